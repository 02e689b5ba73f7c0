"""TrigFlow (Lu & Song 2024, arXiv 2410.11081): the spherical form of a diffusion, and a network of any schedule read as one.

X_T = cos(T) sigma_d x0 + sin(T) sigma_d eps with the angle T in [0, pi/2], and dX/dT = sigma_d F. At the angle
T = atan2(sigma, alpha) any x_t = alpha x0 + sigma eps is such a state times sqrt(alpha^2 + sigma^2) / sigma_d, so that a
network of another schedule becomes a TrigFlow network by converting input, time and output (SANA-Sprint, arXiv
2503.09641, section 3.1, for flow matching; for VP the factor is 1 / sigma_d and F is the v-prediction). Nothing is lost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.diffusion.prediction import Prediction, convert_prediction
from stepdistill.diffusion.schedule import NoiseSchedule, Time, broadcast, float64, full


@dataclass(frozen=True)
class TrigFlow:
    """The bridge between a schedule and TrigFlow. All functions of x and T can be differentiated in both.

    Attributes:
        schedule: of the network.
        sigma_data: sigma_d, the factor between latents and TrigFlow's data; SNR does not depend on it.
    """

    schedule: NoiseSchedule
    sigma_data: float = 0.5

    @property
    def max_angle(self) -> float:
        """Angle of the noisiest time the network knows: pi/2 for flow matching, 1.5025 for SD."""
        return float(self.schedule.angle(self.schedule.terminal_time))

    @property
    def min_angle(self) -> float:
        """Angle of the cleanest time the network knows: 0.001 for flow matching, 0.0292 for SD."""
        return float(self.schedule.angle(1e-3 if self.schedule.is_flow else 0.0))

    def state(self, x0: Tensor, eps: Tensor, angle: Time) -> Tensor:
        """X_T = sigma_d (cos(T) x0 + sin(T) eps) of a clean sample and noise in the network's own scale."""
        cos, sin = _cos_sin(angle, x0)
        return self.sigma_data * (cos * full(x0) + sin * full(eps))

    def native(self, x: Tensor, angle: Time) -> tuple[Tensor, Tensor]:
        """(x_t, t) that the network is called on for X_T; t in native units, float64.

        Angles lie within [0, max_angle].
        """
        scale = self._scale(angle) / self.sigma_data
        return broadcast(scale, x) * full(x), self.schedule.time_at_angle(angle)

    def from_native(self, x_t: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        """Inverse of `native`: (X_T, T), the angle in float64."""
        angle = self.schedule.angle(t)
        return broadcast(self.sigma_data / self._scale(angle), x_t) * full(x_t), angle

    def velocity(self, raw: Tensor, x_t: Tensor, angle: Time) -> Tensor:
        """F of what the network said at (x_t, t), in its own prediction type."""
        scale = self._scale(angle)
        alpha, sigma = (
            broadcast(scale * level, x_t) for level in (torch.cos(float64(angle)), torch.sin(float64(angle)))
        )
        return convert_prediction(full(raw), full(x_t), alpha, sigma, self.schedule.prediction, Prediction.TRIGFLOW)

    def velocity_from_x0(self, x0: Tensor, x: Tensor, angle: Time) -> Tensor:
        """F of an estimate of the clean sample: (cos(T) X_T / sigma_d - x0) / sin(T)."""
        cos, sin = _cos_sin(angle, x)
        return (cos * full(x) / self.sigma_data - full(x0)) / sin

    def x0(self, x: Tensor, velocity: Tensor, angle: Time) -> Tensor:
        """The consistency function in the network's own scale: f(X_T, T) / sigma_d = cos(T) X_T / sigma_d - sin(T) F."""
        cos, sin = _cos_sin(angle, x)
        return cos * full(x) / self.sigma_data - sin * velocity

    def step(self, x: Tensor, velocity: Tensor, angle: Time, to: Time) -> Tensor:
        """DDIM along F from T to R: cos(T - R) X_T - sin(T - R) sigma_d F."""
        cos, sin = _cos_sin(float64(angle) - float64(to), x)
        return cos * full(x) - sin * self.sigma_data * velocity

    def _scale(self, angle: Time) -> Tensor:
        """sqrt(alpha^2 + sigma^2) at an angle: 1 for VP; 1 / (sin + cos) for flow matching, where alpha + sigma = 1."""
        angle = float64(angle)
        if self.schedule.is_flow:
            return 1 / (torch.sin(angle) + torch.cos(angle))
        return torch.ones_like(angle)


def _cos_sin(angle: Time, like: Tensor) -> tuple[Tensor, Tensor]:
    angle = float64(angle)
    return broadcast(torch.cos(angle), like), broadcast(torch.sin(angle), like)
