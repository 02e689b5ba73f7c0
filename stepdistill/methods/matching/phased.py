"""Phased DMD (CVPR 2026, arXiv 2510.27684): one expert for each stretch of noise levels, trained one after another.

Under gradient truncation the first call of a few-step student is trained as a one-step student, which costs diversity. Here
the expert of phase k carries the walk from t_{k-1} to t_k, whatever its exit, and scores are compared where it arrives:
at noisier versions x_t of x_s, s = t_k, with t anywhere in (s, 1) and not in the phase's own stretch alone (reverse nested
intervals: structure is decided at high noise). Finished experts are frozen; generator and fake score start again from the
teacher. Moves are deterministic, and the last phase, s clean, is DMD2.

Only x_s is at hand to train the fake score, so its targets are those of the kernel from s to t (`interval_targets`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.prediction import from_x0_eps
from stepdistill.diffusion.schedule import NoiseSchedule, Time, broadcast, full
from stepdistill.diffusion.transitions import Transition, TransitionKind
from stepdistill.errors import UserError
from stepdistill.families.recipe import Recipe
from stepdistill.methods import parts
from stepdistill.methods.base import STUDENT, Batch, Decode, Needs, Problem, Progress, Rollout, Stage, Terms
from stepdistill.methods.matching.few_step import FewStepStudent, StudentTimestepsConfig
from stepdistill.methods.student_recipe import few_step_recipe
from stepdistill.roles.sampler import make_expert_predictor, sample_trajectory
from stepdistill.roles.triple import FAKE_SCORE, GENERATOR, REAL_SCORE, Triple

MAX_WEIGHT = 10.0
"""Bound of 1 / sigma_{t|s}^2 in the fake score's loss, the paper's."""


class PhasedConfig(StudentTimestepsConfig):
    phases: Annotated[int, Field(ge=1)] | list[float] = Field(
        2,
        description="number of phases, of steps as equal as can be, or the ladder's times at which later phases begin",
    )
    phase_iterations: Annotated[int, Field(ge=1)] | list[Annotated[int, Field(ge=1)]] | None = Field(
        None,
        description="length of the phases before the last, one number for all or one for each; the last fills the run",
    )
    dm_weight: Literal["code", "exact_kl"] = Field(
        "code",
        description="code: DMD's normaliser in x0, as released; exact_kl: unit-weight KL at x_s, as in the paper",
    )
    dm_levels: parts.NoiseLevelConfig = parts.NoiseLevelConfig()
    fake_levels: parts.NoiseLevelConfig = parts.NoiseLevelConfig(low=0.0, high=1.0)
    margin: float = Field(
        0.02, gt=0, lt=1, description="least distance of t from a noisy s, on the fraction axis before the shift"
    )


@dataclass(frozen=True)
class Phase:
    """Steps `first` to `last` (exclusive) of the ladder, which end at the native time s."""

    first: int
    last: int
    s: float


class Phased(FewStepStudent[PhasedConfig]):
    Config = PhasedConfig

    def __init__(self, config: PhasedConfig, problem: Problem) -> None:
        super().__init__(config, problem)
        self.transition = Transition(TransitionKind.DETERMINISTIC)
        firsts = self._phase_starts()
        ends = [self.timesteps[first] for first in firsts[1:]] + [self.transition.final_time(self.schedule)]
        self.phases = [Phase(a, b, s) for a, b, s in zip(firsts, [*firsts[1:], len(self.timesteps)], ends, strict=True)]
        self.phase_lengths = self._phase_lengths()
        for phase in self.phases:
            for levels in (config.dm_levels, config.fake_levels):
                self._levels(levels, phase)
            if config.exit_odds is not None and not any(config.exit_odds[phase.first : phase.last]):
                raise UserError(
                    f"method.exit_odds is {config.exit_odds}, which trains no step of ladder entries {phase.first + 1} to "
                    f"{phase.last}: give every phase a step with odds above 0"
                )

    def _phase_starts(self) -> list[int]:
        """The first step of every phase."""
        chosen, steps = self.config.phases, len(self.timesteps)
        if isinstance(chosen, int):
            if chosen > steps:
                raise UserError(f"method.phases is {chosen} and the ladder has {steps} steps: ask for {steps} at most")
            return [k * steps // chosen for k in range(chosen)]
        if any(t not in self.timesteps[1:] for t in chosen) or sorted(set(chosen), reverse=True) != chosen:
            raise UserError(
                f"method.phases is {chosen}, and phases begin at falling entries of the ladder {list(self.timesteps)} below its "
                "first: choose among them, or give a number of phases"
            )
        return [0, *(self.timesteps.index(t) for t in chosen)]

    def _phase_lengths(self) -> list[int]:
        """Iterations of every phase but the last."""
        given, count = self.config.phase_iterations, len(self.phases) - 1
        phase_lengths = [given] * count if isinstance(given, int) else list(given or [])
        if len(phase_lengths) != count:
            raise UserError(
                f"method.phase_iterations is {given} and {count} phases come before the last: give one number, or {count}"
            )
        return phase_lengths

    @classmethod
    def needs(cls, config: PhasedConfig) -> Needs:
        return Needs()

    def stages(self) -> Sequence[Stage]:
        """Phases; the student of one becomes an expert as the next begins, and both roles go back to the teacher."""
        later = [
            Stage(f"phase_{k + 1}", length, ((STUDENT, expert_name(k)),), (GENERATOR, FAKE_SCORE))
            for k, length in enumerate([*self.phase_lengths, None])
            if k > 0
        ]
        return (Stage("phase_1", self.phase_lengths[0] if self.phase_lengths else None), *later)

    def prepare(self, triple: Triple, decode: Decode | None = None) -> None:
        for k in range(1, len(self.phases)):
            triple.add_copy(expert_name(k), GENERATOR)

    def experts(self, role: str, stage: int) -> tuple[str, ...]:
        """The finished experts, the role in training, and the teacher where later phases will be."""
        finished = tuple(expert_name(k + 1) for k in range(stage))
        return (*finished, role, *[REAL_SCORE] * (len(self.phases) - stage - 1))

    def rollout(self, batch: Batch, triple: Triple, progress: Progress, draws: Draws) -> Rollout:
        """The finished experts' walk without graph, then the phase's own steps down to the exit."""
        phase, shape = self.phases[progress.stage], self.latent_shape(batch)
        x = draws.for_role("rollout").normal("noise", shape)
        if phase.first:
            roles = self.recipe().expert_of_step(self.experts(GENERATOR, progress.stage))
            predict = make_expert_predictor(triple, self.timesteps, roles, batch.cond)
            with torch.no_grad():
                steps = sample_trajectory(
                    predict, self.schedule, x, self.timesteps, self.transition, lambda _: torch.zeros_like(x)
                )
                x = next(islice(steps, phase.first - 1, None)).x_s
        end_step_weights = self.config.exit_odds
        x_t, t, x0 = parts.roll_out(
            triple.generator,
            batch,
            self.timesteps[phase.first : phase.last],
            self.transition,
            shape,
            draws,
            graph=GENERATOR in self.updates(progress),
            exits=self.config.exits,
            end_step_weights=None if end_step_weights is None else end_step_weights[phase.first : phase.last],
            start=x,
        )
        return Rollout(batch, x_t, t, x0)

    def loss(self, role: str, rollout: Rollout, triple: Triple, progress: Progress, draws: Draws) -> Terms:
        phase = self.phases[progress.stage]
        x_s = self.transition(self.schedule, rollout.x_t, rollout.x0, rollout.t, phase.s).mean
        if role == FAKE_SCORE:
            return self._fake_score_loss(x_s, phase, rollout, triple, draws)
        return self._generator_loss(x_s, phase, rollout, triple, draws)

    def _generator_loss(self, x_s: Tensor, phase: Phase, rollout: Rollout, triple: Triple, draws: Draws) -> Terms:
        """KL of the distributions at s; its direction is alpha_{t|s} (s_F - s_T) at x_s.

        x_s = a x0 + b x_t, so that a direction in x0 is one in x_s up to a scalar, which a normaliser takes away.
        """
        direction, logged = parts.distribution_matching_direction(
            rollout.x0,
            rollout.batch.cond,
            rollout.batch.null,
            triple,
            draws,
            levels=self._levels(self.config.dm_levels, phase),
            guidance=self.config.guidance,
            weight=self.config.dm_weight,
            anchor=(x_s, phase.s),
        )
        logged |= parts.sample_statistics(rollout)
        if self.config.dm_weight == "code":
            return Terms(parts.surrogate_loss(rollout.x0, direction), logged)
        alpha_s, _ = self.schedule.levels(phase.s, x_s)
        return Terms(parts.surrogate_loss(x_s, direction / alpha_s), logged)

    def _fake_score_loss(self, x_s: Tensor, phase: Phase, rollout: Rollout, triple: Triple, draws: Draws) -> Terms:
        """L_F = min(1, 10 sigma_{t|s}^2) ||pred(x_t) - target||^2 in the network's own prediction type."""
        t = self._levels(self.config.fake_levels, phase).levels().times(self.schedule, draws.uniform("fake.t"))
        eps = draws.normal("fake.eps", x_s.shape[1:])
        x_t, x0, noise = interval_targets(self.schedule, x_s, eps, phase.s, t)
        alpha, sigma = self.schedule.levels(t, x_t)
        target = from_x0_eps(x0, noise, alpha, sigma, self.schedule.prediction)
        error = (triple.fake_score.raw(x_t, t, rollout.batch.cond) - target).square()
        if phase.s != self.schedule.clean_time:  # from a clean sample targets are bounded as they are
            _, spread = self.schedule.kernel(phase.s, t)
            error = error * broadcast((MAX_WEIGHT * spread.square()).clamp(max=1), error)
        loss = error.mean()
        return Terms(loss, {"denoising": loss.detach()})

    def _levels(self, levels: parts.NoiseLevelConfig, phase: Phase) -> parts.NoiseLevelConfig:
        """Levels of a phase, (s, 1) within `levels`."""
        if phase.s == self.schedule.clean_time:
            return levels
        if levels.shape != "uniform":
            raise UserError(
                f"the noise levels of a phase are drawn with shape {levels.shape!r}, which piles up where the phase ends: set "
                "method.dm_levels.shape and method.fake_levels.shape to uniform"
            )
        low = max(levels.low, float(self.schedule.fraction_at(phase.s)) + self.config.margin)
        if low >= levels.high:
            raise UserError(
                f"the phase that ends at time {phase.s:g} leaves no noise level between {low:g} and {levels.high:g}: lower "
                "method.margin, or let phases end at less noise"
            )
        return levels.model_copy(update={"low": low})

    def recipe(self) -> Recipe:
        recipe = few_step_recipe(self.problem, "phased", self.timesteps, self.transition, self.config.guidance)
        calls = tuple(phase.last - phase.first for phase in self.phases)
        return replace(recipe, experts=calls) if len(calls) > 1 else recipe


def expert_name(phase: int) -> str:
    """The role that keeps the student of a finished phase, counted from 1."""
    return f"expert_{phase}"


def interval_targets(
    schedule: NoiseSchedule, x_s: Tensor, eps: Tensor, s: Time, t: Time
) -> tuple[Tensor, Tensor, Tensor]:
    """(x_t, x0, noise) for samples x_s of time s: x_t by the kernel, and regression targets whose mean given x_t is right.

    The score at t is E[-eps / sigma_{t|s} | x_t], hence noise = (sigma_t / sigma_{t|s}) eps and, from
    x_t = alpha_t x0 + sigma_t noise, x0 = x_s / alpha_s - alpha_t sigma_s^2 / (alpha_s^2 sigma_{t|s}) eps: the paper's
    target for x0, and by conversion those for flow velocity and every other prediction type.
    """
    alpha_s, sigma_s = schedule.levels(s, x_s)
    alpha, sigma = schedule.levels(t, x_s)
    # whole timesteps may round a small margin away: what is divided by is never 0
    spread = broadcast(schedule.kernel(s, t)[1], x_s).clamp_min(1e-8)
    eps = full(eps)
    x0 = full(x_s) / alpha_s - alpha * sigma_s.square() / (alpha_s.square() * spread) * eps
    return schedule.add_noise(x_s, eps, t, s), x0, sigma / spread * eps
