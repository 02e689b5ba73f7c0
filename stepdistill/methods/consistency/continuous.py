"""What continuous-time consistency methods share: the tangent, its warm-up and normalisation, adaptive weighting, a recipe.

In TrigFlow (`diffusion/trigflow.py`) the consistency function is f(x_T, T) = cos(T) x_T - sin(T) sigma_d F(x_T, T). Letting the
step of a discrete consistency loss go to zero leaves the regression of F onto F- + g, without graph, where (Lu & Song
2024, arXiv 2410.11081, algorithm 1)

    g = cos(T) df/dT = -cos^2(T) (sigma_d F- - dx/dT) - r cos(T) sin(T) (x_T + sigma_d dF-/dT)

with dx/dT = sigma_d F_teacher, guided. F- is the student itself, no EMA. r grows from 0, where only the teacher's velocity
is matched, to 1. A method over this class says where the states x_T and their velocities come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.config.reading import Settings
from stepdistill.diffusion.schedule import broadcast
from stepdistill.diffusion.transitions import Transition, TransitionKind
from stepdistill.diffusion.trigflow import TrigFlow
from stepdistill.errors import UserError
from stepdistill.families.conditioning import Conditioning
from stepdistill.families.recipe import Recipe
from stepdistill.methods.base import Decode, Method, Needs, Problem, Progress, RoleKind, Terms
from stepdistill.methods.student_recipe import few_step_recipe, timesteps_of
from stepdistill.roles.denoiser import Denoiser
from stepdistill.roles.heads import AdaptiveWeight
from stepdistill.roles.triple import GENERATOR, Triple

WEIGHT = "weight"
DEFAULT_ANGLES: Mapping[int, tuple[float, ...]] = {1: (), 2: (1.3,), 4: (1.3, 1.1, 0.6)}
"""Number of steps -> the angles after the noisiest one, as SANA-Sprint is sampled."""
PredictVelocity = Callable[[Tensor, Tensor], Tensor]
"""(X_T, T) -> F."""


class TangentConfig(Settings):
    """How g is formed. Updates are the generator's."""

    kind: Literal["jvp", "semi_discrete", "finite_difference"] = Field(
        "jvp",
        description="jvp: the derivative itself, in forward mode; semi_discrete: a step of delta along the teacher's velocity, "
        "one call more and any kernel of attention; finite_difference: central, two calls more",
    )
    delta: float = Field(
        0.01, gt=0, lt=0.5, description="step in radians, where there is one; 0.02 or more in bfloat16"
    )
    warmup: int = Field(10_000, ge=0, description="updates over which r grows from 0 to 1")
    calm_from: int | None = Field(None, ge=0, description="update from which r falls again; null is never")
    calm_over: int = Field(2_000, gt=0, description="updates that its fall takes")
    calm_to: float = Field(0.75, ge=0, le=1, description="where it ends")
    bound: Literal["normalise", "clip"] = Field(
        "normalise", description="g / (|g| + floor) with the norm of each sample, or elements cut to [-1, 1]"
    )
    floor: float = Field(0.1, gt=0, description="c of the normalisation")

    def tangent_weight(self, done: int) -> float:
        """r after so many updates."""
        rising = min(1.0, done / self.warmup) if self.warmup else 1.0
        if self.calm_from is None:
            return rising
        fallen = min(1.0, max(0, done - self.calm_from) / self.calm_over)
        return min(rising, 1 - (1 - self.calm_to) * fallen)


class ContinuousConfig(Settings):
    steps: int = Field(1, ge=1, description="network calls of the student")
    angles: list[float] | None = Field(
        None, description="ladder by hand, angles from the noisiest down; the first is moved to the network's noisiest"
    )
    guidance: float = Field(ge=1, description="teacher guidance scale w that the student absorbs; 1 is off")
    sigma_data: float = Field(0.5, gt=0, description="sigma_d of TrigFlow")
    mean: float = Field(0.0, description="P_mean: angles are drawn as arctan(exp(tau) / sigma_d), tau ~ N(mean, std^2)")
    std: float = Field(1.6, gt=0, description="P_std")
    tangent: TangentConfig = TangentConfig()
    adaptive: bool = Field(True, description="learn a weight for every angle, so that each adds the same to the loss")


ContinuousConfigT = TypeVar("ContinuousConfigT", bound=ContinuousConfig)


@dataclass(frozen=True)
class TrigFlowStates:
    """Points that the consistency function is made consistent at, B of them, without graph.

    Attributes:
        x: X_T, (B, ...).
        angle: T, (B,), float64.
        velocity: the guided teacher's F there: dX/dT = sigma_d F.
        cond: what both networks were told.
    """

    x: Tensor
    angle: Tensor
    velocity: Tensor
    cond: Conditioning


class Continuous(Method[ContinuousConfigT]):
    """Base of sCM and TBCM."""

    name: str
    """In recipes."""

    def __init__(self, config: ContinuousConfigT, problem: Problem) -> None:
        super().__init__(config, problem)
        self.trigflow = TrigFlow(self.schedule, config.sigma_data)
        self.timesteps = self._make_timesteps()

    @classmethod
    def roles(cls, config: ContinuousConfigT) -> Mapping[str, RoleKind]:
        return {GENERATOR: "generator"}

    @classmethod
    def needs(cls, config: ContinuousConfigT) -> Needs:
        return Needs(jvp=config.tangent.kind == "jvp")

    def prepare(self, triple: Triple, decode: Decode | None = None) -> None:
        if self.config.adaptive:
            triple.attach_head(GENERATOR, WEIGHT, AdaptiveWeight())

    def updates(self, progress: Progress) -> Sequence[str]:
        return (GENERATOR,)

    # ---------------------------------------------------------------- states

    @property
    def angle_range(self) -> tuple[float, float]:
        """Angles that states may have: those the network knows, short of pi/2, where g vanishes; room for a step below."""
        step = 0.0 if self.config.tangent.kind == "jvp" else self.config.tangent.delta
        return self.trigflow.min_angle + step, min(self.trigflow.max_angle, math.pi / 2 - 1e-4)

    def angles(self, uniform: Tensor) -> Tensor:
        """T = arctan(exp(tau) / sigma_d), tau ~ N(mean, std^2), for uniform numbers in [0, 1); float64."""
        normal = torch.special.ndtri(uniform.double().clamp(1e-12, 1 - 1e-12))
        tau = self.config.mean + self.config.std * normal
        return torch.atan(tau.exp() / self.config.sigma_data).clamp(*self.angle_range)

    def teacher(self, triple: Triple, x: Tensor, angle: Tensor, cond: Conditioning, null: Conditioning) -> Tensor:
        """The guided teacher's F at X_T, without graph."""
        with torch.no_grad():
            x_t, t = self.trigflow.native(x, angle)
            x0 = triple.real_score.guided(x_t, t, cond, null, self.config.guidance)
            return self.trigflow.velocity_from_x0(x0, x, angle)

    # ---------------------------------------------------------------- the loss

    def consistency_loss(self, state: TrigFlowStates, triple: Triple, progress: Progress) -> Terms:
        """mean over samples of exp(w(T)) |F - F- - g / (|g| + c)|^2 - w(T); sCM's 1/D is part of w here."""
        tangent_weight = self.config.tangent.tangent_weight(progress.updates.get(GENERATOR, 0))
        velocity, g = self.tangent(triple.generator, state, tangent_weight)
        error = (velocity - velocity.detach() - self._bounded(g)).square().flatten(1).sum(1)
        loss = error
        if self.config.adaptive:
            weight = triple.head(GENERATOR, WEIGHT)(state.angle).to(error)
            loss = weight.exp() * error - weight
        # the error says little, since F = F-: what falls as the student grows consistent is the tangent before its bound
        logged = {
            "consistency": error.detach().mean(),
            "tangent": g.flatten(1).square().mean(1).sqrt().mean(),
            "tangent_share": g.new_tensor(tangent_weight),
        }
        return Terms(loss.mean(), logged)

    def tangent(self, student: Denoiser, state: TrigFlowStates, tangent_weight: float) -> tuple[Tensor, Tensor]:
        """(F with graph, g without) at the states, r being `share`."""
        config, x, angle, sigma_d = self.config.tangent, state.x, state.angle, self.config.sigma_data
        cos, sin = broadcast(angle.cos(), x), broadcast(angle.sin(), x)

        def answer(x: Tensor, angle: Tensor) -> Tensor:
            return student.trigflow(self.trigflow, x, angle, state.cond)

        # what needs no graph comes first, so that the graph does not lie in memory meanwhile
        if config.kind == "semi_discrete":
            before = angle - config.delta
            with torch.no_grad():
                earlier = answer(self.trigflow.step(x, state.velocity, angle, before), before)
        else:
            change = self._scaled_jvp(student, answer, state, cos * sin)
        velocity = answer(x, angle)
        own = velocity.detach()
        gap = sigma_d * (own - state.velocity)
        if config.kind == "semi_discrete":
            # [f(x_T, T) - f(x_T', T')] / sin(delta) at r = 1, T' = T - delta (sCM, appendix D)
            cos_before, sin_before = broadcast(before.cos(), x), broadcast(before.sin(), x)
            turned = (math.cos(config.delta) * own - earlier) / math.sin(config.delta)
            return velocity, cos * (-cos_before * gap - tangent_weight * sin_before * (x + sigma_d * turned))
        return velocity, -(cos**2) * gap - tangent_weight * (cos * sin * x + sigma_d * change)

    def _scaled_jvp(self, student: Denoiser, answer: PredictVelocity, state: TrigFlowStates, factor: Tensor) -> Tensor:
        """cos(T) sin(T) dF/dT along the teacher's velocity: the factor is in the tangents, so that nothing large is formed."""
        config, x, angle = self.config.tangent, state.x, state.angle
        slope = self.config.sigma_data * state.velocity
        if config.kind == "jvp":
            return student.jvp(answer, (x, angle), (factor * slope, angle.cos() * angle.sin()))[1]
        up = (self.trigflow.max_angle - angle).clamp(max=config.delta)
        down = torch.full_like(angle, config.delta)
        with torch.no_grad():
            later = answer(x + broadcast(up, x) * slope, angle + up)
            earlier = answer(x - broadcast(down, x) * slope, angle - down)
        return factor * (later - earlier) / broadcast(up + down, x)

    def _bounded(self, g: Tensor) -> Tensor:
        if self.config.tangent.bound == "clip":
            return g.clamp(-1, 1)
        norm = g.flatten(1).norm(dim=1)
        return g / (broadcast(norm, g) + self.config.tangent.floor)

    # ---------------------------------------------------------------- sampling

    def _make_timesteps(self) -> tuple[float, ...]:
        after = self.config.angles[1:] if self.config.angles is not None else DEFAULT_ANGLES.get(self.config.steps)
        if self.config.angles is None and self.schedule.fraction_is_angle and self.config.steps > 2:
            # the pipelines of such networks walk evenly, but in two steps
            after = torch.linspace(self.trigflow.max_angle, 0, self.config.steps + 1, dtype=torch.float64)[
                1:-1
            ].tolist()
        if after is None:
            raise UserError(
                f"method.steps is {self.config.steps} and published ladders have {', '.join(map(str, DEFAULT_ANGLES))} steps: "
                "write method.angles out"
            )
        if self.config.angles is not None and len(self.config.angles) != self.config.steps:
            raise UserError(
                f"method.angles has {len(self.config.angles)} angles and method.steps is {self.config.steps}: make them agree"
            )
        # (a plan makes methods where new tensors have no content)
        times = self.schedule.time_at_angle(torch.tensor(after, dtype=torch.float64, device="cpu")).tolist()
        below = times if self.schedule.is_flow else [float(round(t)) for t in times]
        return timesteps_of(self.schedule, [self.schedule.terminal_time, *below])

    def recipe(self) -> Recipe:
        """One call maps a state to x0, which is noised again to the next angle: what LCM schedulers walk, in native times."""
        renoise = Transition(TransitionKind.RENOISE)
        return few_step_recipe(self.problem, self.name, self.timesteps, renoise, self.config.guidance)
