"""What a network predicts, and conversions among epsilon, v, x0, flow velocity and TrigFlow; guidance.

Every prediction type is linear: out = a x0 + b eps. With x_t = alpha x0 + sigma eps that is a 2x2 system, solved once
for all of them (determinant alpha b - sigma a).
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from stepdistill.errors import UserError


class Prediction(str, Enum):
    """Prediction types under the names of diffusers' scheduler configs."""

    EPSILON = "epsilon"
    V = "v_prediction"
    SAMPLE = "sample"
    FLOW = "flow_prediction"
    TRIGFLOW = "trigflow"

    @classmethod
    def parse(cls, name: str) -> Prediction:
        """Raises UserError for a name that no scheduler config uses."""
        try:
            return cls(name)
        except ValueError:
            known = ", ".join(repr(p.value) for p in cls)
            raise UserError(f"the scheduler config has prediction_type {name!r}: use one of {known}") from None

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) of out = a x0 + b eps.

        v = alpha eps - sigma x0 (Salimans & Ho 2022); flow velocity u = eps - x0 (Lipman et al. 2023);
        TrigFlow F = (alpha eps - sigma x0) / sqrt(alpha^2 + sigma^2) (Lu & Song 2024; SANA-Sprint).
        """
        zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
        if self is Prediction.EPSILON:
            return zero, one
        if self is Prediction.SAMPLE:
            return one, zero
        if self is Prediction.V:
            return -sigma, alpha
        if self is Prediction.FLOW:
            return -one, one
        norm = (alpha.square() + sigma.square()).sqrt()
        return -sigma / norm, alpha / norm


def to_x0(out: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, prediction: Prediction) -> Tensor:
    """x0 = (b x_t - sigma out) / (alpha b - sigma a); alpha and sigma broadcast over x_t."""
    a, b = prediction.coefficients(alpha, sigma)
    return (b * x_t - sigma * out) / (alpha * b - sigma * a)


def to_eps(out: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, prediction: Prediction) -> Tensor:
    """eps = (alpha out - a x_t) / (alpha b - sigma a)."""
    a, b = prediction.coefficients(alpha, sigma)
    return (alpha * out - a * x_t) / (alpha * b - sigma * a)


def from_x0_eps(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor, prediction: Prediction) -> Tensor:
    """out = a x0 + b eps: the regression target of a network of this prediction type."""
    a, b = prediction.coefficients(alpha, sigma)
    return a * x0 + b * eps


def convert_prediction(
    out: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, source: Prediction, target: Prediction
) -> Tensor:
    """Re-express a prediction made at x_t in another type."""
    x0 = to_x0(out, x_t, alpha, sigma, source)
    eps = to_eps(out, x_t, alpha, sigma, source)
    return from_x0_eps(x0, eps, alpha, sigma, target)


def guide(uncond: Tensor, cond: Tensor, w: Tensor | float) -> Tensor:
    """Classifier-free guidance uncond + w (cond - uncond) (Ho & Salimans 2022 with w' = w - 1); w = 1 is off.

    Affine in the prediction, hence the same in x0, eps, v and velocity at one (x_t, t).
    """
    return uncond + w * (cond - uncond)
