"""Denoiser: all that a method sees of a model. Network + schedule + family -> x0, eps, velocity, in float32 at the edge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from stepdistill.diffusion.prediction import Prediction, convert_prediction, guide, to_eps, to_x0
from stepdistill.diffusion.schedule import NoiseSchedule, Time, float64, full
from stepdistill.diffusion.trigflow import TrigFlow
from stepdistill.families.base import Family
from stepdistill.families.conditioning import Conditioning
from stepdistill.roles.guidance_conditioning import GuidanceConditioner
from stepdistill.runtime.gradient_checkpointing import StopForward
from stepdistill.runtime.kernels import math_sdpa


@dataclass(frozen=True)
class Estimate:
    """What a network says at x_t, each (B, ...) in float32 or better."""

    x0: Tensor
    eps: Tensor
    raw: Tensor
    """In the network's own prediction type."""


class Denoiser:
    """One role's view of a network.

    Args:
        network: the module that is called (always the root, so that wrappers such as FSDP see every forward).
        family: knows how to call it.
        schedule: the checkpoint's noise schedule.
        enter: context under which the network plays this role (selects adapters).
        autocast: dtype for the network's forward alone; conversions never run inside it.
        guide: tells the network the guidance scale of the conditioning (`cond.guidance`), which has no input for it.
    """

    def __init__(
        self,
        network: nn.Module,
        family: Family,
        schedule: NoiseSchedule,
        role_context: Callable[[], AbstractContextManager[None]] = nullcontext,
        autocast: torch.dtype | None = None,
        guide: GuidanceConditioner | None = None,
    ) -> None:
        self.network = network
        self.family = family
        self.schedule = schedule
        self.role_context = role_context
        self.autocast = autocast
        self.guide = guide

    def estimate(self, x_t: Tensor, t: Time, cond: Conditioning) -> Estimate:
        """Shapes: x_t (B, ...), t () or (B,) native times, cond of B rows."""
        raw, x = self.raw(x_t, t, cond), full(x_t)
        alpha, sigma = self.schedule.levels(t, x)
        prediction = self.schedule.prediction
        return Estimate(to_x0(raw, x, alpha, sigma, prediction), to_eps(raw, x, alpha, sigma, prediction), raw)

    def raw(self, x_t: Tensor, t: Time, cond: Conditioning) -> Tensor:
        """`estimate(...).raw` alone, without the conversions."""
        return full(self._forward(x_t, t, cond))

    def x0(self, x_t: Tensor, t: Time, cond: Conditioning) -> Tensor:
        """The network's estimate of the clean sample."""
        return self.estimate(x_t, t, cond).x0

    def epsilon(self, x_t: Tensor, t: Time, cond: Conditioning) -> Tensor:
        """The network's estimate of the noise."""
        return self.estimate(x_t, t, cond).eps

    def velocity(self, x_t: Tensor, t: Time, cond: Conditioning) -> Tensor:
        """v = alpha eps - sigma x0 for VP, u = eps - x0 for flow matching."""
        estimate = self.estimate(x_t, t, cond)
        alpha, sigma = self.schedule.levels(t, estimate.x0)
        native = self.schedule.prediction
        target = Prediction.FLOW if self.schedule.is_flow else Prediction.V
        return convert_prediction(estimate.raw, full(x_t), alpha, sigma, native, target)

    def trigflow(self, trigflow: TrigFlow, x: Tensor, angle: Time, cond: Conditioning) -> Tensor:
        """F of the TrigFlow network that this one is through the bridge, at X_T (B, ...) and angles () or (B,)."""
        x_t, t = trigflow.native(x, angle)
        return trigflow.velocity(self._forward(x_t, t, cond), x_t, angle)

    def jvp(
        self, function: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """(value, derivative along the tangents) of a function of this denoiser's answers, in one forward without graph.

        A tangent has its primal's shape and dtype. Attention runs in its plain form meanwhile, the only one with a
        forward mode; the network is called through its root all the same, so that a sharded one gathers its parameters.
        """
        with torch.no_grad(), math_sdpa(), forward_ad.dual_level():
            duals = [forward_ad.make_dual(p.detach(), t.detach()) for p, t in zip(primals, tangents, strict=True)]
            value, tangent = forward_ad.unpack_dual(function(*duals))
            # (a function that does not depend on what is varied has no tangent at all)
            return value, torch.zeros_like(value) if tangent is None else tangent

    def guided(self, x_t: Tensor, t: Time, cond: Conditioning, null: Conditioning, w: Tensor | float) -> Tensor:
        """x0 under classifier-free guidance; one batched call of 2B rows, a plain call where w = 1.

        A network that is told its guidance (it has a guide, or `cond.guidance` is set) is told w, in one call, and `null` is
        not looked at.

        w: float or (B,); w = 1 is off.
        """
        if self.guide is not None or cond.guidance is not None:
            return self.x0(x_t, t, cond.told(w))
        if not isinstance(w, Tensor) and w == 1:
            return self.x0(x_t, t, cond)
        uncond, conditional = self.uncond_and_cond_x0(x_t, t, cond, null)
        if isinstance(w, Tensor):
            w = w.to(uncond).reshape(-1, *(1,) * (uncond.ndim - 1))
        return guide(uncond, conditional, w)

    def guidance_delta(
        self, x_t: Tensor, t: Time, cond: Conditioning, null: Conditioning, w: float
    ) -> tuple[Tensor, Tensor]:
        """(x0, what guidance w adds to it). Of a network that is told its guidance: the difference of what it is told."""
        if self.guide is None and cond.guidance is None:
            uncond, conditional = self.uncond_and_cond_x0(x_t, t, cond, null)
            return conditional, (w - 1) * (conditional - uncond)
        plain = self.x0(x_t, t, replace(cond, guidance=None) if self.guide is not None else cond.told(1.0))
        return plain, self.x0(x_t, t, cond.told(w)) - plain

    def uncond_and_cond_x0(self, x_t: Tensor, t: Time, cond: Conditioning, null: Conditioning) -> tuple[Tensor, Tensor]:
        """(unconditional x0, conditional x0) from one batched call of 2B rows."""
        uncond, conditional = self.uncond_and_cond_estimates(x_t, t, cond, null)
        return uncond.x0, conditional.x0

    def uncond_and_cond_estimates(
        self, x_t: Tensor, t: Time, cond: Conditioning, null: Conditioning
    ) -> tuple[Estimate, Estimate]:
        """(unconditional, conditional) estimate from one batched call of 2B rows."""
        times = float64(t).expand(len(x_t))
        asked = self.estimate(torch.cat([x_t, x_t]), torch.cat([times, times]), Conditioning.cat([null, cond]))
        halves = zip(*(tensor.chunk(2) for tensor in (asked.x0, asked.eps, asked.raw)), strict=True)
        uncond, conditional = (Estimate(*half) for half in halves)
        return uncond, conditional

    def features(self, x_t: Tensor, t: Time, cond: Conditioning) -> Tensor:
        """Features (B, C, h, w) of the family's feature module; the rest is not run.

        The forward is left from inside the wrapped root by an exception, since calling a part directly breaks wrappers.
        """

        def leave(_module: nn.Module, _args: tuple[object, ...], output: object) -> None:
            raise StopForward(output)

        handle = self.family.feature_module(self.network).register_forward_hook(leave)
        try:
            self._forward(x_t, t, cond)
        except StopForward as reached:
            return self.family.feature_map(self.network, reached.output, x_t)
        finally:
            handle.remove()
        raise RuntimeError(f"the feature module of family {self.family.name!r} was never called")

    def _forward(self, x_t: Tensor, t: Time, cond: Conditioning) -> Tensor:
        parameter = next(self.network.parameters())
        times = float64(t).to(x_t.device).expand(len(x_t))
        dtype = self.autocast or parameter.dtype
        # a half-precision base runs under autocast as well, which keeps norms in float32 on CUDA: a full fake score must
        # equal the base at the start, or the gap of two precisions biases every distribution-matching gradient
        mixed = self.autocast in (torch.bfloat16, torch.float16)
        device = x_t.device.type
        told: AbstractContextManager[None] = nullcontext()
        if self.guide is not None:
            told, cond = self.guide.told(cond.guidance), replace(cond, guidance=None)
        with self.role_context(), told, torch.autocast(device, dtype=self.autocast) if mixed else nullcontext():
            return self.family.call(self.network, x_t.to(dtype), times, cond.to(x_t.device, dtype))
