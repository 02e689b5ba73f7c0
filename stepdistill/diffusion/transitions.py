"""The steps of few-step samplers as Gaussians: one place, shared by training, sampling and preference tuning.

Every transition from t to a cleaner s keeps some of the noise that the network saw and replaces the rest:
x_s = alpha_s x0 + c eps + sqrt(sigma_s^2 - c^2) n, with 0 <= c <= sigma_s. They differ in c alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from stepdistill.diffusion.schedule import NoiseSchedule, Time, broadcast, float64, full
from stepdistill.errors import UserError


@dataclass(frozen=True)
class Gaussian:
    """N(mean, std^2 I); std broadcasts over mean, 0 where the transition is deterministic."""

    mean: Tensor
    std: Tensor

    @property
    def is_deterministic(self) -> bool:
        return bool((self.std == 0).all())

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std noise, for standard normal `noise` of mean's shape."""
        return self.mean + self.std * noise.to(self.mean)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density summed over all dimensions but the first, shape (B,).

        Raises:
            UserError: the transition is deterministic and has no density.
        """
        if bool((self.std == 0).any()):
            raise UserError(
                "a deterministic transition has no log_prob: use 'renoise', or 'ancestral' or 'tcd' above 0"
            )
        z = (x - self.mean) / self.std
        constant = torch.log(self.std) + 0.5 * math.log(2 * math.pi)
        return -(0.5 * z.square() + constant).flatten(1).sum(1)


class TransitionKind(str, Enum):
    DETERMINISTIC = "deterministic"
    RENOISE = "renoise"
    ANCESTRAL = "ancestral"
    TCD = "tcd"


@dataclass(frozen=True)
class Transition:
    """How a sampler moves from (x_t, x0) to x_s.

    deterministic: DDIM eta = 0, Euler (VP: Song et al. 2021; flow: x_s = x_t + (s - t) u; TrigFlow rotation).
    renoise: x0 plus fresh noise (consistency models, LCM, DMD2).
    ancestral: DDIM with eta = `strength`; eta = 1 is the posterior, equal to k-diffusion's ancestral Euler.
    tcd: jump to (1 - gamma) of s, then re-noise to s, gamma = `strength` (Zheng et al. 2024).
    """

    kind: TransitionKind = TransitionKind.RENOISE
    strength: float = 1.0

    def kept_noise(self, schedule: NoiseSchedule, t: Time, s: Time) -> Tensor:
        """c(t, s): how much of the predicted eps survives, float64."""
        sigma_s, alpha_s = schedule.sigma(s), schedule.alpha(s)
        if self.kind is TransitionKind.DETERMINISTIC:
            return sigma_s
        if self.kind is TransitionKind.RENOISE:
            return torch.zeros_like(sigma_s)
        if self.kind is TransitionKind.ANCESTRAL:
            ratio = sigma_s * schedule.alpha(t) / (alpha_s * schedule.sigma(t))
            fresh = self.strength * sigma_s * (1 - ratio.square()).clamp_min(0).sqrt()
            return (sigma_s.square() - fresh.square()).clamp_min(0).sqrt()
        s = float64(s)
        middle = s * (1 - self.strength)
        if not schedule.is_flow:
            # timesteps are integers to a VP network: TCDScheduler floors the product, which it forms in float32;
            # a step to the clean end (-1) stays there
            middle = torch.where(s < 0, s, (s.float() * (1 - self.strength)).floor().double())
        return alpha_s / schedule.alpha(middle) * schedule.sigma(middle)

    def final_time(self, schedule: NoiseSchedule) -> float:
        """Where the last step lands: the clean end, but timestep 0 for `tcd` on VP, as TCDScheduler has it."""
        return 0.0 if self.kind is TransitionKind.TCD else schedule.clean_time

    def __call__(self, schedule: NoiseSchedule, x_t: Tensor, x0: Tensor, t: Time, s: Time) -> Gaussian:
        """The distribution of x_s. Shapes: x_t, x0 (B, ...); t, s () or (B,), native times with s cleaner than t."""
        alpha_t, sigma_t = schedule.levels(t, x_t)
        kept = self.kept_noise(schedule, t, s)
        std = broadcast((schedule.sigma(s).square() - kept.square()).clamp_min(0).sqrt(), x_t)
        x0 = full(x0)
        eps = (full(x_t) - alpha_t * x0) / sigma_t
        return Gaussian(broadcast(schedule.alpha(s), x_t) * x0 + broadcast(kept, x_t) * eps, std)
