"""f-distillation (Xu et al. 2025, arXiv 2502.15681): other divergences than the reverse KL, by a weight of the gradient.

The gradient of D_f(p_real || p_fake) is distribution matching's, each sample's multiplied by h(r) = r^2 f''(r), with the
density ratio r = p_real / p_fake read off a discriminator's logit, r = exp(D(x_t)). Its mean is kept at 1 within each tenth
of the noise levels, since a discriminator is not equally calibrated at all of them, and so is that of h.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

DivergenceName = Literal[
    "reverse_kl", "forward_kl", "jensen_shannon", "softened", "squared_hellinger", "jeffreys", "neyman"
]
WEIGHT_FUNCTIONS: Mapping[DivergenceName, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,
    "forward_kl": lambda r: r,
    "jensen_shannon": lambda r: r / (1 + r),
    "softened": lambda r: 1 / (1 + r),
    "squared_hellinger": lambda r: r.sqrt(),
    "jeffreys": lambda r: 1 + r,
    "neyman": lambda r: 1 / r,
}
"""h(r) = r^2 f''(r)."""
BINS = 10
MAX_LOGIT, MIN_RATIO, MAX_RATIO = 10.0, 0.1, 20.0
"""Bounds of |D| and of r."""
EMA_DECAY = 0.9
"""Of the running means, per generator update."""


class DivergenceWeights:
    """Weights of samples by their density ratios, with the running means that keep both near 1."""

    def __init__(self, name: DivergenceName) -> None:
        self.h = WEIGHT_FUNCTIONS[name]
        self.ratio = torch.ones(BINS, dtype=torch.float64)
        self.weight = self.h(torch.ones((), dtype=torch.float64))

    def __call__(self, logits: Tensor, fraction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(each sample's weight (B,), statistics for `update`).

        Args:
            logits: of the discriminator on the noised samples, (B,).
            fraction: of the noise axis at which they are, (B,), in [0, 1].
        """
        bins = (fraction * BINS).long().clamp(0, BINS - 1).to(logits.device)
        r = logits.detach().double().clamp(-MAX_LOGIT, MAX_LOGIT).exp().clamp(MIN_RATIO, MAX_RATIO)
        h = self.h(r / self.ratio.to(r.device)[bins])
        chosen = torch.nn.functional.one_hot(bins, BINS).double()
        statistics = {"h": h.mean()}
        statistics |= {f"count.{k}": chosen[:, k].mean() for k in range(BINS)}
        statistics |= {f"ratio.{k}": (chosen[:, k] * r).mean() for k in range(BINS)}
        return h / self.weight.to(h.device), statistics

    def update(self, statistics: Mapping[str, float]) -> None:
        """Follow the means over the global batch; a bin without samples stays."""
        for k in range(BINS):
            if statistics[f"count.{k}"] > 0:
                self.ratio[k].lerp_(
                    self.ratio.new_tensor(statistics[f"ratio.{k}"] / statistics[f"count.{k}"]), 1 - EMA_DECAY
                )
        self.weight.lerp_(self.weight.new_tensor(statistics["h"]), 1 - EMA_DECAY)

    def state_dict(self) -> dict[str, Tensor]:
        return {"divergence.ratio": self.ratio.clone(), "divergence.weight": self.weight.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.ratio.copy_(state["divergence.ratio"])
        self.weight.copy_(state["divergence.weight"])
