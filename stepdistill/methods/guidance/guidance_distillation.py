"""What methods of guidance distillation share: states of the guided teacher, a regression of its guided prediction on them.

    target = pred(x_t, t, null) + w (pred(x_t, t, c) - pred(x_t, t, null))        w drawn for each sample, told to the student
    L      = mean (pred_student(x_t, t, c; w) - target)^2                         in the teacher's own prediction type

States lie on walks of the guided teacher, where a sampler will be, and not on noised images (Jensen & Sadat 2025): collected
beforehand, or walked on the fly in a few steps whose times are drawn anew for each sample, each of which gives a target.

What guidance adds grows with w - 1, and so the mean of squares is one of large w: `relative` weighs each state by what the
prompt alone misses there (ours, not the paper's).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stepdistill.config.reading import Settings
from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.prediction import to_x0
from stepdistill.diffusion.timesteps import NoiseLevels, trailing_timesteps
from stepdistill.diffusion.transitions import Transition, TransitionKind
from stepdistill.errors import UserError
from stepdistill.families.conditioning import Conditioning
from stepdistill.families.recipe import Recipe
from stepdistill.methods.base import Batch, Method, Needs, Progress, RoleKind, Rollout, Terms
from stepdistill.methods.student_recipe import few_step_recipe
from stepdistill.roles.sampler import GuidedState, guided_state, guided_trajectory, relative_error
from stepdistill.roles.triple import GENERATOR, Triple


class GuidanceDistillationConfig(Settings):
    guidance: float = Field(gt=1, description="w of the recipe, of grids and of the proof")
    guidance_range: tuple[float, float] | None = Field(
        (1.0, 12.0), description="w is drawn evenly from here, for each sample; null for `guidance` always"
    )
    steps: int = Field(50, ge=1, description="network calls of the recipe's deterministic sampler")
    source: Literal["rollout", "trajectories", "images"] = Field(
        "rollout",
        description="where states come from: walks of the teacher on the fly, data.trajectories, or data.images with noise, where "
        "a sampler will not be",
    )
    relative: float | None = Field(
        None,
        gt=0,
        description="error of each state over what the prompt alone leaves there, plus this: 1e-3 lets small w count as large ones do; "
        "null is the plain mean of squares, as published",
    )
    walk_steps: int = Field(10, ge=1, description="teacher steps of a walk on the fly, of two network calls each")

    @model_validator(mode="after")
    def _ordered(self) -> GuidanceDistillationConfig:
        low, high = self.drawn
        if not 0 <= low <= self.guidance <= high:
            raise ValueError(f"guidance {self.guidance:g} is not within guidance_range [{low:g}, {high:g}]")
        return self

    @property
    def drawn(self) -> tuple[float, float]:
        """What w is drawn from."""
        return self.guidance_range or (self.guidance, self.guidance)


ConfigT = TypeVar("ConfigT", bound=GuidanceDistillationConfig)


@dataclass(frozen=True, kw_only=True)
class GuidedRollout(Rollout):
    """S states of B walks: x_t (S, B, ...) and t (S, B); x0 is the guided one at the last of them, (B, ...).

    Attributes:
        target: the guided prediction, (S, B, ...).
        plain: error of the prediction without guidance, (S, B).
        told: conditioning of the walks, which says w.
    """

    target: Tensor
    plain: Tensor
    told: Conditioning


class GuidanceDistillation(Method[ConfigT]):
    name: str
    """In recipes."""

    @classmethod
    def roles(cls, config: ConfigT) -> Mapping[str, RoleKind]:
        return {GENERATOR: "generator"}

    @classmethod
    def network_guidance_range(cls, config: ConfigT) -> tuple[float, float] | None:
        return config.drawn

    @classmethod
    def needs(cls, config: ConfigT) -> Needs:
        return Needs(images=config.source == "images", trajectories=config.source == "trajectories")

    def updates(self, progress: Progress) -> Sequence[str]:
        return (GENERATOR,)

    @torch.no_grad()
    def rollout(self, batch: Batch, triple: Triple, progress: Progress, draws: Draws) -> GuidedRollout:
        states, told = self._states(batch, triple, draws.for_role("rollout"))
        if self.network_guidance_range(self.config) is None:
            told = replace(told, guidance=None)
        last, schedule = states[-1], self.schedule
        return GuidedRollout(
            batch=batch,
            x_t=torch.stack([state.x_t for state in states]),
            t=torch.stack([state.t for state in states]),
            x0=to_x0(last.target, last.x_t, *schedule.levels(last.t, last.x_t), schedule.prediction),
            target=torch.stack([state.target for state in states]),
            plain=torch.stack([state.plain for state in states]),
            told=told,
        )

    def loss(self, role: str, rollout: Rollout, triple: Triple, progress: Progress, draws: Draws) -> Terms:
        return Terms.sum(self.pieces(role, rollout, triple, progress, draws))

    def pieces(self, role: str, rollout: Rollout, triple: Triple, progress: Progress, draws: Draws) -> Iterator[Terms]:
        """State after state: the memory of one, however long the walk."""
        assert isinstance(rollout, GuidedRollout)
        for x_t, t, target, plain in zip(rollout.x_t, rollout.t, rollout.target, rollout.plain, strict=True):
            found = triple.generator.raw(x_t, t, rollout.told)
            error = relative_error(found, target)
            floor = self.config.relative
            loss = ((found - target).square() if floor is None else error / (plain + floor)).mean()
            logged = {"error": error.detach().mean(), "error_unguided": plain.mean()}
            yield Terms(loss, logged) * (1 / len(rollout.t))

    def recipe(self) -> Recipe:
        """The base's sampler on its trailing ladder, its guidance off."""
        timesteps = trailing_timesteps(self.schedule, self.config.steps)
        transition = Transition(TransitionKind.DETERMINISTIC)
        plain = few_step_recipe(self.problem, self.name, timesteps, transition, self.config.guidance)
        return replace(plain, told_guidance=self.config.guidance)

    def _states(self, batch: Batch, triple: Triple, draws: Draws) -> tuple[list[GuidedState], Conditioning]:
        """States, one or more, and the conditioning that their student is given."""
        if batch.cond.guidance is not None or triple.real_score.guide is not None:
            raise UserError(
                "the teacher is told its guidance, in one call, and guidance distillation makes one call of two: choose a teacher "
                "that is guided by two calls"
            )
        if self.config.source == "trajectories":
            if batch.states is None or batch.states_cond is None:
                raise ValueError("a batch without trajectories reached a loss on them")
            return [batch.states], batch.states_cond
        low, high = self.config.drawn
        w = low + (high - low) * draws.uniform("w")
        if self.config.source == "images":
            if batch.images is None or batch.image_cond is None:
                raise ValueError("a batch without images reached a loss on them")
            t = NoiseLevels().times(self.schedule, draws.uniform("t"))
            x_t = self.schedule.add_noise(batch.images, draws.normal("eps", batch.images.shape[1:]), t)
            cond, null = batch.image_cond, batch.null.with_size_of(batch.image_cond)
            return [guided_state(triple.real_score, x_t, t, cond, null, w)], cond.told(w)
        noise = draws.normal("noise", self.latent_shape(batch))
        walk = guided_trajectory(triple.real_score, batch.cond, batch.null, noise, self._times(draws), w)
        return list(walk), batch.cond.told(w)

    def _times(self, draws: Draws) -> list[Tensor]:
        """Falling times of each walk, each (B,): the noisiest, then one in each of `walk_steps` even intervals."""
        lot, count = draws.uniform("times"), self.config.walk_steps
        fractions = [torch.ones_like(lot), *(1 - (index + lot) / count for index in range(count))]
        # a flow model is not defined at its clean end
        return [self.schedule.time_at_fraction(p.clamp_min(1e-3) if self.schedule.is_flow else p) for p in fractions]
