"""What methods share that tune a student which has few steps already: its ladder, a frozen reference, its recipe.

The student is what `init` names, or the checkpoint itself where that was distilled. The reference is the same, frozen: a copy
of what `init` brought, else the untouched base, which costs nothing beside a LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar

from pydantic import Field
from torch import Tensor

from stepdistill.config.reading import Settings
from stepdistill.diffusion.prediction import Prediction
from stepdistill.diffusion.timesteps import student_timesteps
from stepdistill.diffusion.transitions import Transition, TransitionKind
from stepdistill.families.recipe import Recipe
from stepdistill.methods.base import Decode, Method, Problem, Progress, RoleKind
from stepdistill.methods.preference.losses import REFERENCE
from stepdistill.methods.student_recipe import few_step_recipe, timesteps_of
from stepdistill.roles.denoiser import Denoiser
from stepdistill.roles.triple import GENERATOR, REAL_SCORE, Triple


class TuningConfig(Settings):
    steps: int = Field(4, ge=1, description="network calls of the student")
    timesteps: list[float] | None = Field(None, description="its ladder by hand, native times, noisiest first")
    transition: Literal["renoise", "deterministic", "tcd", "ancestral"] = Field(
        "renoise", description="of the student's sampler; ancestral is SDXL-Turbo's"
    )
    gamma: float = Field(0.3, ge=0, le=1, description="of the tcd transition, TCDScheduler's eta")
    guidance: float = Field(1.0, ge=1, description="scale w that the student has absorbed, for its recipe; 1 is off")


TuningConfigT = TypeVar("TuningConfigT", bound=TuningConfig)


class Tuning(Method[TuningConfigT]):
    """One trained role, beside the frozen student that it starts from."""

    name: str
    """In recipes."""

    def __init__(self, config: TuningConfigT, problem: Problem) -> None:
        super().__init__(config, problem)
        if config.timesteps is not None:
            self.timesteps = timesteps_of(self.schedule, config.timesteps)
        else:
            self.timesteps = student_timesteps(self.schedule, config.steps)
        kind = TransitionKind(config.transition)
        self.transition = Transition(kind, config.gamma if kind is TransitionKind.TCD else 1.0)
        self.decode: Decode | None = None

    @classmethod
    def roles(cls, config: TuningConfigT) -> Mapping[str, RoleKind]:
        return {GENERATOR: "generator"}

    def prepare(self, triple: Triple, decode: Decode | None = None) -> None:
        self.decode = decode
        if self.problem.initialised:
            triple.add_copy(REFERENCE, GENERATOR)

    @property
    def beside(self) -> str:
        return REFERENCE if self.problem.initialised else REAL_SCORE

    def reference(self, triple: Triple) -> Denoiser:
        """The student before it was tuned."""
        return triple.denoiser(self.beside)

    def error(self, found: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """Each sample's mean squared error of eps, (B,), of estimates of x0 at times (B,); of the velocity for networks that
        predict one, since eps says nothing of x0 at zero SNR."""
        alpha, sigma = self.schedule.levels(t, x0)
        velocity = self.schedule.is_flow or self.schedule.prediction is Prediction.V
        scale = 1 / sigma if velocity else alpha / sigma
        return (scale * (found - x0)).square().flatten(1).mean(1)

    def updates(self, progress: Progress) -> Sequence[str]:
        return (GENERATOR,)

    def recipe(self) -> Recipe:
        return few_step_recipe(self.problem, self.name, self.timesteps, self.transition, self.config.guidance)
