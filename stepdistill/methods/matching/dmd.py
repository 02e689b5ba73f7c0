"""DMD: One-step Diffusion with Distribution Matching Distillation (Yin et al., CVPR 2024, arXiv 2311.18828).

A one-step generator follows the difference of two scores (section 3.2), and a regression on deterministic teacher pairs
(noise, image) pins the coarse map and keeps the modes (section 3.3). Generator and fake score alternate 1:1, which is
stable because of the regression; without it use DMD2. With `matching: 0` only the regression is left: the warm start
that DMD2's one-step SDXL needs (its issue 34: about 10k pairs, lr 1e-5, 2-3k iterations).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor

from stepdistill.config.reading import Settings
from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.timesteps import student_timesteps
from stepdistill.diffusion.transitions import Transition, TransitionKind
from stepdistill.errors import UserError
from stepdistill.families.recipe import Recipe
from stepdistill.methods import parts
from stepdistill.methods.base import Batch, Method, Needs, Problem, Progress, RoleKind, Rollout, Terms
from stepdistill.methods.student_recipe import few_step_recipe, timesteps_of
from stepdistill.roles.triple import FAKE_SCORE, GENERATOR, Triple


class DMDConfig(Settings):
    guidance: float = Field(ge=1, description="teacher guidance scale w; the pairs must have been made with the same")
    regression: float = Field(
        0.25, ge=0, description="weight of the regression on pairs (lambda_reg); 0 needs no pairs"
    )
    matching: float = Field(
        1.0, ge=0, description="weight of distribution matching; 0 trains the generator on pairs alone"
    )
    timestep: float | None = Field(None, description="native time the student is told; 399 for one-step SDXL")
    distance: Literal["l2", "huber"] = Field("l2", description="of the regression, in latent space")
    huber_c: float = Field(1e-3, gt=0)
    dm_weight: parts.DmWeight = "paper"
    dm_levels: parts.NoiseLevelConfig = parts.NoiseLevelConfig()
    fake_levels: parts.NoiseLevelConfig = parts.NoiseLevelConfig(low=0.0, high=1.0)


class DMD(Method[DMDConfig]):
    Config = DMDConfig

    def __init__(self, config: DMDConfig, problem: Problem) -> None:
        super().__init__(config, problem)
        told = config.timestep
        self.timesteps = student_timesteps(self.schedule, 1) if told is None else timesteps_of(self.schedule, [told])
        if config.matching == 0 and config.regression == 0:
            raise UserError("method.matching and method.regression are both 0, which leaves no loss: set one of them")
        self.transition = Transition(TransitionKind.RENOISE)

    @classmethod
    def needs(cls, config: DMDConfig) -> Needs:
        return Needs(pairs=config.regression > 0)

    @classmethod
    def roles(cls, config: DMDConfig) -> Mapping[str, RoleKind]:
        return super().roles(config) if config.matching > 0 else {GENERATOR: "generator"}

    def updates(self, progress: Progress) -> Sequence[str]:
        return (GENERATOR, FAKE_SCORE) if self.config.matching > 0 else (GENERATOR,)

    def rollout(self, batch: Batch, triple: Triple, progress: Progress, draws: Draws) -> Rollout:
        x_t, t, x0 = parts.roll_out(
            triple.generator, batch, self.timesteps, self.transition, self.latent_shape(batch), draws, graph=True
        )
        pair_x0 = None
        if self.config.regression > 0:
            if batch.pair_noise is None or batch.pair_cond is None:
                raise ValueError("a batch without pairs reached DMD's regression")
            pair_x0 = triple.generator.x0(batch.pair_noise, self.timesteps[0], batch.pair_cond)
        return Rollout(batch, x_t, t, x0, pair_x0)

    def loss(self, role: str, rollout: Rollout, triple: Triple, progress: Progress, draws: Draws) -> Terms:
        x, cond = rollout.x0, rollout.batch.cond
        if role == FAKE_SCORE:
            t = self.config.fake_levels.levels().times(self.schedule, draws.uniform("fake.t"))
            denoising = parts.fake_score_loss(triple.fake_score, x, t, draws.normal("fake.eps", x.shape[1:]), cond)
            return Terms(denoising, {"denoising": denoising.detach()})
        total = x.new_zeros(())
        logged = parts.sample_statistics(rollout)
        if self.config.matching > 0:
            matching, of_matching = self._distribution_matching(rollout, triple, draws)
            total = self.config.matching * matching
            logged |= of_matching
        if rollout.pair_x0 is not None and rollout.batch.pair_latents is not None:
            error = rollout.pair_x0 - rollout.batch.pair_latents
            regression = parts.distance(error, self.config.distance, self.config.huber_c).mean()
            total = total + self.config.regression * regression
            logged["regression"] = regression.detach()
        return Terms(total, logged)

    def _distribution_matching(
        self, rollout: Rollout, triple: Triple, draws: Draws
    ) -> tuple[Tensor, dict[str, Tensor]]:
        direction, logged = parts.distribution_matching_direction(
            rollout.x0,
            rollout.batch.cond,
            rollout.batch.null,
            triple,
            draws,
            levels=self.config.dm_levels,
            guidance=self.config.guidance,
            weight=self.config.dm_weight,
        )
        return parts.surrogate_loss(rollout.x0, direction), logged

    def recipe(self) -> Recipe:
        return few_step_recipe(self.problem, "dmd", self.timesteps, self.transition, self.config.guidance)
