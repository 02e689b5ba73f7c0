"""The one few-step sampler: backward simulation in training, sample grids, collected data and exports all walk it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.diffusion.prediction import guide, to_x0
from stepdistill.diffusion.schedule import NoiseSchedule, broadcast, full
from stepdistill.diffusion.timesteps import trailing_timesteps
from stepdistill.diffusion.transitions import Gaussian, Transition, TransitionKind
from stepdistill.families.conditioning import Conditioning
from stepdistill.families.recipe import Recipe
from stepdistill.roles.denoiser import Denoiser
from stepdistill.roles.triple import Triple

PredictX0 = Callable[[Tensor, float], Tensor]
"""(x_t, t) -> x0."""
StepNoise = Callable[[int], Tensor]
"""Index of a step -> fresh standard normal noise of x's shape; called only where a transition needs it."""


@dataclass(frozen=True)
class TrajectoryStep:
    """One transition of a walk: x_s was drawn from `gaussian`, which came from (x_t, x0)."""

    t: float
    s: float
    x_t: Tensor
    x0: Tensor
    gaussian: Gaussian
    x_s: Tensor


def sample_trajectory(
    predict: PredictX0,
    schedule: NoiseSchedule,
    noise: Tensor,
    ladder: Sequence[float],
    transition: Transition,
    step_noise: StepNoise,
) -> Iterator[TrajectoryStep]:
    """Walk from pure noise down the ladder to the clean end, yielding every step.

    noise: initial x at ladder[0], (B, ...), standard normal. A VP schedule has some signal left at its last timestep
    (alpha = 0.068 for SD), and networks are fed pure noise there all the same: at inference there is nothing else.
    """
    x = noise
    for index, t in enumerate(ladder):
        s = ladder[index + 1] if index + 1 < len(ladder) else transition.final_time(schedule)
        step = sample_step(predict, schedule, x, t, s, transition, lambda index=index: step_noise(index))  # type: ignore[misc]
        yield step
        x = step.x_s


def sample_step(
    predict: PredictX0,
    schedule: NoiseSchedule,
    x_t: Tensor,
    t: float,
    s: float,
    transition: Transition,
    step_noise: Callable[[], Tensor],
) -> TrajectoryStep:
    """One network call and one transition, t -> s."""
    x0 = predict(x_t, t)
    gaussian = transition(schedule, x_t, x0, t, s)
    # diffusers' samplers draw no noise where none is used; drawing in their order keeps seeds interchangeable
    x_s = gaussian.mean if gaussian.is_deterministic else gaussian.sample(step_noise())
    return TrajectoryStep(t, s, x_t, x0, gaussian, x_s)


@torch.no_grad()
def sample(
    predict: PredictX0,
    schedule: NoiseSchedule,
    noise: Tensor,
    ladder: Sequence[float],
    transition: Transition,
    step_noise: StepNoise,
) -> Tensor:
    """The clean sample at the end of `walk`, (B, ...)."""
    x = noise
    for step in sample_trajectory(predict, schedule, noise, ladder, transition, step_noise):
        x = step.x_s
    return x


@dataclass(frozen=True)
class GuidedState:
    """B states of guided walks, and what the teacher says there.

    Attributes:
        x_t: what the network saw, (B, ...).
        t: native times, (B,), float64.
        target: the guided prediction in the network's own type, (B, ...).
        plain: error of the prediction without guidance, (B,), as `relative_error` has it.
    """

    x_t: Tensor
    t: Tensor
    target: Tensor
    plain: Tensor


@torch.no_grad()
def guided_state(
    teacher: Denoiser, x_t: Tensor, t: Tensor, cond: Conditioning, null: Conditioning, w: Tensor
) -> GuidedState:
    """What the teacher, guided by w (B,), says at x_t (B, ...) and t (B,)."""
    uncond, conditional = teacher.uncond_and_cond_estimates(x_t, t, cond, null)
    target = guide(uncond.raw, conditional.raw, broadcast(w, x_t))
    return GuidedState(x_t, t, target, relative_error(conditional.raw, target))


@torch.no_grad()
def guided_trajectory(
    teacher: Denoiser, cond: Conditioning, null: Conditioning, noise: Tensor, times: Sequence[Tensor], w: Tensor
) -> Iterator[GuidedState]:
    """The guided, deterministic solver from noise to sample, state by state.

    times: of the states, falling, each (B,); noise: x at the first, (B, ...); w: guidance scale of each walk, (B,).
    """
    x, schedule = noise, teacher.schedule
    clean = torch.full_like(times[0], schedule.clean_time)
    for t, s in zip(times, [*times[1:], clean], strict=True):
        state = guided_state(teacher, x, t, cond, null, w)
        yield state
        x0 = to_x0(state.target, full(x), *schedule.levels(t, x), schedule.prediction)
        x = Transition(TransitionKind.DETERMINISTIC)(schedule, x, x0, t, s).mean


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """||found - wanted||^2 / ||wanted||^2 of each sample, (B,)."""
    own = wanted.flatten(1).square().sum(1).clamp_min(1e-12)
    return (found - wanted).flatten(1).square().sum(1) / own


def make_expert_predictor(
    triple: Triple, ladder: Sequence[float], roles: Sequence[str], cond: Conditioning, told: float | None = None
) -> PredictX0:
    """x0 along a ladder by the role whose turn it is, one role for each step.

    told: guidance scale for the roles that are told one.
    """
    role_at = dict(zip(ladder, roles, strict=True))

    def predict(x: Tensor, t: float) -> Tensor:
        denoiser = triple.denoiser(role_at[t])
        return denoiser.x0(x, t, cond if told is None or denoiser.guide is None else cond.told(told))

    return predict


def student_sample(
    triple: Triple, experts: Sequence[str], recipe: Recipe, cond: Conditioning, noise: Tensor, step_noise: StepNoise
) -> Tensor:
    """Where a student takes `noise` by its recipe, (B, C, h, w); `experts` are its roles, one for each of the recipe's."""
    ladder = recipe.native_timesteps(triple.schedule)
    with ExitStack() as stack:
        for role in dict.fromkeys(experts):
            stack.enter_context(triple.on_device(role))
        predict = make_expert_predictor(triple, ladder, recipe.expert_of_step(experts), cond, recipe.told_guidance)
        return sample(predict, triple.schedule, noise, ladder, recipe.transition(), step_noise)


def teacher_sample(
    denoiser: Denoiser, cond: Conditioning, null: Conditioning, noise: Tensor, steps: int, guidance: float
) -> Tensor:
    """Where the guided, deterministic solver (DDIM or Euler, trailing ladder) takes `noise`, (B, C, h, w)."""
    return sample(
        lambda x, t: denoiser.guided(x, t, cond, null, guidance),
        denoiser.schedule,
        noise,
        trailing_timesteps(denoiser.schedule, steps),
        Transition(TransitionKind.DETERMINISTIC),
        lambda _: torch.zeros_like(noise),
    )
