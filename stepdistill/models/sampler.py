"""The one few-step sampler: backward simulation in training, sample grids, collected data and exports all walk it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.diffusion.timesteps import trailing_ladder
from stepdistill.diffusion.transitions import Gaussian, Transition, TransitionKind
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.recipe import Recipe
from stepdistill.models.triple import Triple

Predict = Callable[[Tensor, float], Tensor]
"""(x_t, t) -> x0."""
Noise = Callable[[int], Tensor]
"""Index of a step -> fresh standard normal noise of x's shape; called only where a transition needs it."""


@dataclass(frozen=True)
class Step:
    """One transition of a walk: x_s was drawn from `gaussian`, which came from (x_t, x0)."""

    t: float
    s: float
    x_t: Tensor
    x0: Tensor
    gaussian: Gaussian
    x_s: Tensor


def walk(
    predict: Predict,
    schedule: NoiseSchedule,
    noise: Tensor,
    ladder: Sequence[float],
    transition: Transition,
    fresh: Noise,
) -> Iterator[Step]:
    """Walk from pure noise down the ladder to the clean end, yielding every step.

    noise: initial x at ladder[0], (B, ...), standard normal. A VP schedule has some signal left at its last timestep
    (alpha = 0.068 for SD), and networks are fed pure noise there all the same: at inference there is nothing else.
    """
    x = noise
    for index, t in enumerate(ladder):
        s = ladder[index + 1] if index + 1 < len(ladder) else transition.final_time(schedule)
        step = advance(predict, schedule, x, t, s, transition, lambda index=index: fresh(index))  # type: ignore[misc]
        yield step
        x = step.x_s


def advance(
    predict: Predict,
    schedule: NoiseSchedule,
    x_t: Tensor,
    t: float,
    s: float,
    transition: Transition,
    fresh: Callable[[], Tensor],
) -> Step:
    """One network call and one transition, t -> s."""
    x0 = predict(x_t, t)
    gaussian = transition(schedule, x_t, x0, t, s)
    # diffusers' samplers draw no noise where none is used; drawing in their order keeps seeds interchangeable
    x_s = gaussian.mean if gaussian.deterministic else gaussian.sample(fresh())
    return Step(t, s, x_t, x0, gaussian, x_s)


@torch.no_grad()
def sample(
    predict: Predict,
    schedule: NoiseSchedule,
    noise: Tensor,
    ladder: Sequence[float],
    transition: Transition,
    fresh: Noise,
) -> Tensor:
    """The clean sample at the end of `walk`, (B, ...)."""
    x = noise
    for step in walk(predict, schedule, noise, ladder, transition, fresh):
        x = step.x_s
    return x


def by_turns(triple: Triple, ladder: Sequence[float], roles: Sequence[str], cond: Conditioning) -> Predict:
    """x0 along a ladder by the role whose turn it is, one role for each step."""
    role_at = dict(zip(ladder, roles, strict=True))
    return lambda x, t: triple.denoiser(role_at[t]).x0(x, t, cond)


def student_sample(
    triple: Triple, experts: Sequence[str], recipe: Recipe, cond: Conditioning, noise: Tensor, fresh: Noise
) -> Tensor:
    """Where a student takes `noise` by its recipe, (B, C, h, w); `experts` are its roles, one for each of the recipe's."""
    ladder = recipe.ladder(triple.schedule)
    with ExitStack() as stack:
        for role in dict.fromkeys(experts):
            stack.enter_context(triple.at_hand(role))
        predict = by_turns(triple, ladder, recipe.by_step(experts), cond)
        return sample(predict, triple.schedule, noise, ladder, recipe.transition(), fresh)


def teacher_sample(
    denoiser: Denoiser, cond: Conditioning, null: Conditioning, noise: Tensor, steps: int, guidance: float
) -> Tensor:
    """Where the guided, deterministic solver (DDIM or Euler, trailing ladder) takes `noise`, (B, C, h, w)."""
    return sample(
        lambda x, t: denoiser.guided(x, t, cond, null, guidance),
        denoiser.schedule,
        noise,
        trailing_ladder(denoiser.schedule, steps),
        Transition(TransitionKind.DETERMINISTIC),
        lambda _: torch.zeros_like(noise),
    )
