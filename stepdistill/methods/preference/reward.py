"""Climbing a differentiable reward through a few-step sampler: ReFL and DRaFT-K.

late    ReFL (ImageReward, Xu et al., NeurIPS 2023, arXiv 2304.05977): walk without graph to a late step drawn by lot, and
        reward the image that the student estimates there: max(0, margin - r)
last    DRaFT-K (Clark et al., ICLR 2024, arXiv 2309.17400): the graph of the last K steps is kept, and the finished image is
        rewarded; of a student of four steps, all can be (AlignProp, arXiv 2310.03739)

Nothing in a reward says when to stop. `stay` holds the student to what it said before at the states it visits (DRaFT+), a
reward that is not optimised (`held_out`) is logged, and diversity and saturation are held against the student's start: see
`training.alarms`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.diffusion.draws import Draws
from stepdistill.errors import UserError
from stepdistill.methods import parts
from stepdistill.methods.base import Batch, Decode, Needs, Problem, Progress, Rollout, Terms
from stepdistill.methods.preference.losses import reward_loss
from stepdistill.methods.preference.tuning import Tuning, TuningConfig
from stepdistill.roles.sampler import sample_trajectory
from stepdistill.roles.triple import Triple


class RewardConfig(TuningConfig):
    reward: str = Field(
        description="'imagereward:FOLDER', 'critic:brightness', any MODULE:FUNCTION, or a sum, '0.5*A + B'; differentiable"
    )
    held_out: str | None = Field(None, description="a further reward, logged and never optimised")
    form: Literal["late", "last"] = Field("last", description="ReFL, or DRaFT-K")
    last: int = Field(1, ge=1, description="last: steps whose graph is kept, K")
    late: int | None = Field(None, ge=1, description="late: last steps to draw one from; half of them by default")
    margin: float | None = Field(None, description="max(0, margin - r) in place of -r; ReFL's is 2 for ImageReward")
    weight: float = Field(1.0, gt=0, description="of the reward; ReFL's is 1e-3 beside a loss that keeps the model")
    stay: float = Field(
        0.0, ge=0, description="weight of the mean squared change of eps (flow: velocity) since the start"
    )


@dataclass(frozen=True)
class RewardedRollout(Rollout):
    """x0 is what is rewarded, x_t and t where the student was asked last.

    Attributes:
        states, answers: of the steps with graph, (K, B, C, h, w).
        times: (K, B).
    """

    states: Tensor | None = None
    predictions: Tensor | None = None
    times: Tensor | None = None


class RewardTuning(Tuning[RewardConfig]):
    """L = w mean(-r(x0)) + stay mean (eps_theta - eps_ref)^2."""

    Config = RewardConfig
    name = "reward"

    def __init__(self, config: RewardConfig, problem: Problem) -> None:
        super().__init__(config, problem)
        steps = len(self.timesteps)
        self.late = config.late if config.late is not None else max(1, steps // 2)
        for key, count in (("last", config.last), ("late", self.late)):
            if count > steps:
                raise UserError(f"method.{key} is {count} and the student has {steps} steps: give no more than those")

    @classmethod
    def needs(cls, config: RewardConfig) -> Needs:
        return Needs(reward=config.reward, held_out=config.held_out)

    def prepare(self, triple: Triple, decode: Decode | None = None) -> None:
        super().prepare(triple, decode)
        if decode is None:
            raise UserError("the checkpoint has no autoencoder, and rewards look at images: choose another checkpoint")

    def rollout(self, batch: Batch, triple: Triple, progress: Progress, draws: Draws) -> Rollout:
        shape = self.latent_shape(batch)
        if self.config.form == "late":
            end_step_weights = [float(index >= len(self.timesteps) - self.late) for index in range(len(self.timesteps))]
            x_t, t, x0 = parts.roll_out(
                triple.generator,
                batch,
                self.timesteps,
                self.transition,
                shape,
                draws,
                graph=True,
                end_step_weights=end_step_weights,
            )
            return RewardedRollout(batch, x_t, t, x0, None, x_t[None], x0[None], t[None])
        draws, first = draws.for_role("rollout"), self.timesteps[-self.config.last]

        def predict(x_t: Tensor, t: float) -> Tensor:
            with torch.set_grad_enabled(t <= first):
                return triple.generator.x0(x_t, t, batch.cond)

        steps = list(
            sample_trajectory(
                predict,
                self.schedule,
                draws.normal("noise", shape),
                self.timesteps,
                self.transition,
                lambda index: draws.normal(f"fresh{index}", shape),
            )
        )
        kept, end = steps[-self.config.last :], steps[-1]
        times = torch.tensor([step.t for step in kept], dtype=torch.float64, device=end.x_t.device)
        states, predictions = torch.stack([step.x_t for step in kept]), torch.stack([step.x0 for step in kept])
        times = times[:, None].expand(-1, len(batch))
        return RewardedRollout(batch, end.x_t, times[-1], end.x_s, None, states, predictions, times)

    def loss(self, role: str, rollout: Rollout, triple: Triple, progress: Progress, draws: Draws) -> Terms:
        prompts, config = rollout.batch.prompts, self.config
        climbed, logged = reward_loss(rollout.x0, prompts, triple, self.decode, config.margin)
        terms = Terms(config.weight * climbed, {**logged, **parts.sample_statistics(rollout)})
        if config.stay == 0:
            return terms
        return terms.plus("stay", self._change_from_reference(rollout, triple), config.stay)

    def _change_from_reference(self, rollout: Rollout, triple: Triple) -> Tensor:
        """Mean over the graph's steps of the squared change of what the student says where it is now."""
        if (
            not isinstance(rollout, RewardedRollout)
            or rollout.states is None
            or rollout.predictions is None
            or rollout.times is None
        ):
            raise TypeError("reward was given another method's rollout")
        changes = []
        for x_t, t, x0 in zip(rollout.states.detach(), rollout.times, rollout.predictions, strict=True):
            with torch.no_grad():
                before = self.reference(triple).x0(x_t, t, rollout.batch.cond)
            changes.append(self.error(x0, before, t).mean())
        return torch.stack(changes).mean()
