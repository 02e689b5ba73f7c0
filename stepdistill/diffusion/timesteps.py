"""How noise levels are drawn for a loss, which grid is trained on, and which ladder of times a few-step sampler walks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.errors import UserError


@dataclass(frozen=True)
class NoiseLevels:
    """A distribution of noise levels, written on the fraction axis before the model's shift.

    uniform: p ~ U(low, high); for VP each integer timestep from low N to high N, both included.
    logit-normal: p = sigmoid(N(mean, std)), clamped to (low, high) (Esser et al. 2024).
    """

    low: float = 0.0
    high: float = 1.0
    shape: Literal["uniform", "logit_normal"] = "uniform"
    mean: float = 0.0
    std: float = 1.0

    def times(self, schedule: NoiseSchedule, uniform: Tensor) -> Tensor:
        """Native times, float64, for uniform numbers in [0, 1) of any shape; VP times are integers.

        DMD2's {20..980} of 1000 is low = 0.02, high = 0.98; its fake score's {0..999} is the default.
        """
        u = uniform.double()
        if self.shape == "uniform" and not schedule.is_flow:
            first, last = (round(p * schedule.train_steps) for p in (self.low, self.high))
            last = min(last, schedule.train_steps - 1)
            return first + (u * (last - first + 1)).floor()
        if self.shape == "logit_normal":
            normal = self.mean + self.std * torch.special.ndtri(u.clamp(1e-12, 1 - 1e-12))
            p = torch.sigmoid(normal).clamp(self.low, self.high)
        else:
            p = self.low + (self.high - self.low) * u
        if schedule.is_flow:
            # a flow model is not defined at sigma = 0 exactly, where eps cannot be recovered from x_t
            p = p.clamp(1e-3, 1.0)
        return schedule.time_at_fraction(p)


def student_timesteps(schedule: NoiseSchedule, steps: int) -> tuple[float, ...]:
    """Times of an N-step student, noisiest first, without the clean end.

    VP: start at N - 1 and go down by floor(N / steps), e.g. 999, 749, 499, 249 (DMD2; diffusers' trailing spacing).
    Flow: fractions 1, 1 - 1/steps, ..., through the model's shift, e.g. 1, .9, .75, .5 at shift 3.
    """
    if steps < 1 or (not schedule.is_flow and steps > schedule.train_steps):
        raise UserError(f"a ladder of {steps} steps was asked for: use a number between 1 and {schedule.train_steps}")
    if schedule.is_flow:
        fractions = 1 - torch.arange(steps, dtype=torch.float64) / steps
        return tuple(schedule.time_at_fraction(fractions).tolist())
    stride = schedule.train_steps // steps
    return tuple(float(schedule.train_steps - 1 - i * stride) for i in range(steps))


def trailing_timesteps(schedule: NoiseSchedule, steps: int) -> tuple[float, ...]:
    """Times of a many-step solver with diffusers' `timestep_spacing="trailing"`: round(N (1 - i / steps)) - 1."""
    if schedule.is_flow:
        return student_timesteps(schedule, steps)
    n = schedule.train_steps
    return tuple(float(round(n - i * n / steps) - 1) for i in range(steps))


# ---------------------------------------------------------------- grids that are trained on


def uniform_grid(schedule: NoiseSchedule, points: int) -> Tensor:
    """(points + 1,) native times, rising, float64.

    VP: 0, then N i / points - 1, e.g. 0, 19, 39, ..., 999 (LCM): the clean end is timestep 0, with sigma = 0.03 for SD.
    Flow: i / points through the model's shift, from 0.

    Raises:
        UserError: more points than the schedule has timesteps to tell apart.
    """
    index = torch.arange(points + 1, dtype=torch.float64)
    if schedule.is_flow:
        return schedule.time_at_fraction(index / points)
    grid = ((index * schedule.train_steps / points).round() - 1).clamp_min(0)
    if bool((grid.diff() <= 0).any()):
        raise UserError(
            f"a grid of {points} points was asked for and the teacher has {schedule.train_steps} timesteps: use fewer points"
        )
    return grid


def segment_edges(points: int, count: int) -> Tensor:
    """Indices of the lower ends of `count` equal parts of a grid of `points` steps, rising from 0: floor(i points / count).

    Raises:
        UserError: more parts than steps.
    """
    if count > points:
        raise UserError(f"a grid of {points} points was to be cut into {count} parts: use more points or fewer parts")
    return torch.arange(count) * points // count


def segment_of(start: Tensor, edge: Tensor) -> Tensor:
    """Number of the part that a leap from index `start` lies in; a start on an edge belongs to the part below it."""
    edge = edge.to(start.device)
    return torch.bucketize(start - 1, edge, right=True) - 1


def evenly_spaced_timesteps(grid: Tensor, steps: int) -> list[float]:
    """`steps` points of a grid, the noisiest first, evenly by index as LCMScheduler and TCDScheduler choose them.

    Raises:
        UserError: more steps than points.
    """
    last = len(grid) - 1
    if steps > last:
        raise UserError(f"{steps} steps were asked for and the grid has {last} points: use fewer steps or more points")
    return [float(grid[last - i * last // steps]) for i in range(steps)]
