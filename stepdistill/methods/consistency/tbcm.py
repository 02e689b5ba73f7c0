"""TBCM: the Trajectory-Backward Consistency Model (arXiv 2511.20410): continuous-time consistency without an image.

States and velocities are those of the guided teacher's own walk from noise to sample, which computes both anyway. So the
student learns on states that it will meet, and no autoencoder, image or further teacher call is needed. The angles of a
walk are drawn anew each time, one in each interval of a reference route.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.diffusion.draws import Draws
from stepdistill.methods.base import Batch, Progress, Rollout, Terms
from stepdistill.methods.consistency.continuous import Continuous, ContinuousConfig, TangentConfig, TrigFlowStates
from stepdistill.roles.triple import Triple


class TBCMConfig(ContinuousConfig):
    route: Literal["random_interval", "fixed", "logit_normal"] = Field(
        "random_interval",
        description="angles of a walk: one drawn evenly in each interval of the reference route; the route itself; or drawn "
        "as `mean` and `std` say, in order",
    )
    route_steps: int = Field(16, ge=2, description="teacher steps of a walk, of two network calls each")
    route_shift: float = Field(2.5, gt=0, description="applied twice: the larger, the more of the route is noisy")
    tangent: TangentConfig = TangentConfig(warmup=4000, calm_from=15_000)


@dataclass(frozen=True, kw_only=True)
class TeacherTrajectory(Rollout):
    """S states of B walks: x_t = X_T (S, B, ...) and t (S, B); x0 is the teacher's sample at the end, (B, ...).

    Attributes:
        angle: T, (S, B), float64.
        velocity: the guided teacher's F, (S, B, ...).
    """

    angle: Tensor
    velocity: Tensor


class TBCM(Continuous[TBCMConfig]):
    Config = TBCMConfig
    name = "tbcm"

    @torch.no_grad()
    def rollout(self, batch: Batch, triple: Triple, progress: Progress, draws: Draws) -> TeacherTrajectory:
        draws = draws.for_role("rollout")
        angles = self._draw_angles(draws)
        x = self.config.sigma_data * draws.normal("noise", self.latent_shape(batch))
        states, velocities = [], []
        for angle, to in zip(angles, [*angles[1:], torch.zeros_like(angles[0])], strict=True):
            velocity = self.teacher(triple, x, angle, batch.cond, batch.null)
            states.append(x)
            velocities.append(velocity)
            x = self.trigflow.step(x, velocity, angle, to)
        # where cos(T) is 0, so is g: there is nothing to learn from the first state
        first = 1 if self.schedule.zero_terminal_snr else 0
        kept = angles[first:]
        return TeacherTrajectory(
            batch=batch,
            x_t=torch.stack(states[first:]),
            t=self.schedule.time_at_angle(kept),
            x0=x / self.config.sigma_data,
            angle=kept,
            velocity=torch.stack(velocities[first:]),
        )

    def loss(self, role: str, rollout: Rollout, triple: Triple, progress: Progress, draws: Draws) -> Terms:
        return Terms.sum(self.pieces(role, rollout, triple, progress, draws))

    def pieces(self, role: str, rollout: Rollout, triple: Triple, progress: Progress, draws: Draws) -> Iterator[Terms]:
        """State after state: the memory of one, however long the walk."""
        if not isinstance(rollout, TeacherTrajectory):
            raise TypeError(f"a rollout of {self.name} was expected, not a {type(rollout).__name__}")
        for x, angle, velocity in zip(rollout.x_t, rollout.angle, rollout.velocity, strict=True):
            state = TrigFlowStates(x, angle, velocity, rollout.batch.cond)
            yield self.consistency_loss(state, triple, progress) * (1 / len(rollout.x_t))

    def _draw_angles(self, draws: Draws) -> Tensor:
        """Angles of each walk, falling from the noisiest, (route_steps, B)."""
        low, high = self.angle_range
        # a route that ends short of pi/2 is the whole one, squeezed
        route = reference_angles(self.config.route_steps, self.config.route_shift) * (
            self.trigflow.max_angle / (math.pi / 2)
        )
        lots = torch.stack([draws.uniform(f"angle{i}") for i in range(1, len(route))])
        route = route.to(lots.device)[:, None]
        if self.config.route == "fixed":
            drawn = route[1:].expand_as(lots)
        elif self.config.route == "random_interval":
            drawn = route[1:] + (route[:-1] - route[1:]) * lots
        else:
            drawn = self.angles(lots).sort(0, descending=True).values
        return torch.cat([torch.full_like(lots[:1], self.trigflow.max_angle), drawn.clamp(low, high)])


def reference_angles(steps: int, shift: float) -> Tensor:
    """Angles of the released route, falling from pi/2, float64 (steps,).

    Flow times that are even after one shift s t / (1 + (s - 1) t), from the noisiest of a thousand to the cleanest, and are
    shifted once more.
    """

    def shifted(t: Tensor) -> Tensor:
        return shift * t / (1 + (shift - 1) * t)

    cleanest = float(shifted(torch.tensor(1e-3, dtype=torch.float64)))
    t = shifted(torch.linspace(1.0, cleanest, steps, dtype=torch.float64))
    return torch.atan2(t, 1 - t)
