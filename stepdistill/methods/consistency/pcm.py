"""PCM: Phased Consistency Models (Wang et al., NeurIPS 2024, arXiv 2405.18407).

The trajectory is cut into phases, and every point is mapped to the lower edge of its own phase: one end-time for each time,
so that nothing need be told and sampling is deterministic from edge to edge. The adversarial consistency loss (section 3.3)
compares the student with its target, both noised to one level of the phase, on features of the frozen teacher.

The released scripts train the discriminator in every other iteration; here every iteration updates both. For an untouched
classifier-free guidance at inference set `guidance` to 1 (the paper's normal ODE).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.diffusion.timesteps import segment_edges, segment_of
from stepdistill.errors import UserError
from stepdistill.methods.base import Decode, Problem, Progress, RoleKind
from stepdistill.methods.consistency.discrete import Consistency, ConsistencyConfig, ConsistencyGanConfig
from stepdistill.methods.gan import attach_discriminator
from stepdistill.methods.student_recipe import tcd_transition
from stepdistill.roles.triple import FAKE_SCORE, GENERATOR, Triple


class PCMConfig(ConsistencyConfig):
    phases: int = Field(4, ge=1, description="parts of the trajectory (the paper's M)")
    steps: int = Field(4, ge=1, description="network calls of the student: the phases, or a multiple of them")
    gan: ConsistencyGanConfig = ConsistencyGanConfig()


class PCM(Consistency[PCMConfig]):
    """L = d(f(x_s, s -> r), sg f^(x_e, e -> r)) + w_gan L_adv,   r the lower edge of the phase of s."""

    Config = PCMConfig
    name = "pcm"

    def __init__(self, config: PCMConfig, problem: Problem) -> None:
        self.segment_edges = segment_edges(config.points, config.phases)
        super().__init__(config, problem)
        self.transition = tcd_transition(self.schedule, 0.0)

    def end(self, start: Tensor, uniform: Tensor, progress: Progress) -> Tensor:
        return self.segment_edges.to(start.device)[segment_of(start, self.segment_edges)]

    def level(self, end: Tensor, grid: Tensor, uniform: Tensor, progress: Progress) -> Tensor:
        """a ~ U[r, upper edge of the phase); whole timesteps on VP models."""
        upper = torch.cat([self.segment_edges[1:], self.segment_edges.new_tensor([self.config.points])]).to(end.device)
        low, high = grid[end], grid[upper[segment_of(end + 1, self.segment_edges)]]
        level = low + uniform * (high - low)
        return level if self.schedule.is_flow else level.floor()

    def default_timesteps(self) -> Sequence[float]:
        """The upper edges of the phases, noisiest first."""
        steps, phases = self.config.steps, self.config.phases
        if steps % phases:
            raise UserError(f"method.steps is {steps} and method.phases is {phases}: give a multiple of the phases")
        index = [*segment_edges(self.config.points, steps).tolist()[1:], self.config.points]
        return self.grid(Progress())[index].flip(0).tolist()

    # ---------------------------------------------------------------- the adversary

    @classmethod
    def roles(cls, config: PCMConfig) -> Mapping[str, RoleKind]:
        return {GENERATOR: "generator", FAKE_SCORE: "fake_score"} if config.gan.weight > 0 else super().roles(config)

    def gan_config(self, progress: Progress) -> ConsistencyGanConfig:
        return self.config.gan

    def prepare(self, triple: Triple, decode: Decode | None = None) -> None:
        super().prepare(triple, decode)
        if self.config.gan.weight > 0:
            attach_discriminator(triple, self.problem, self.config.gan.width)
