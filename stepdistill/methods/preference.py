"""What preference losses share: a frozen reference, log-likelihood ratios of a sampler's steps, and their pairwise loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

REFERENCE = "reference"
"""The generator as it was before preferences, frozen."""


def log_ratio(x: Tensor, mean: Tensor, reference: Tensor, std: Tensor) -> Tensor:
    """log p(x) / p_ref(x), (B,), for p = N(mean, std^2 I), p_ref = N(reference, std^2 I).

    It is linear in x, so that its expectation over x is its value at x's mean.
    """
    # ||x - reference||^2 - ||x - mean||^2 = 2 (x - (mean + reference) / 2) . (mean - reference)
    middle = (mean + reference) / 2
    return ((x - middle) * (mean - reference) / std.square()).flatten(1).sum(1)


def within(log_ratios: Tensor, trust: float) -> Tensor:
    """Log ratios whose ratio is clamped to 1 -+ `trust`, where no gradient is left; 0 is off."""
    if trust == 0:
        return log_ratios
    bounds = torch.tensor([1 - trust, 1 + trust], dtype=torch.float64).log().tolist()
    return log_ratios.clamp(*bounds)


def pairwise_loss(argument: Tensor) -> Tensor:
    """-log sigmoid of each pair's argument, (B,): log 2 at 0 (Bradley and Terry)."""
    return -F.logsigmoid(argument)


def chosen_of(candidates: Sequence[Tensor], index: Tensor) -> Tensor:
    """Row b of the candidate that index[b] names."""
    stacked = torch.stack(list(candidates), 1)
    place = index.reshape(-1, 1, *(1,) * (stacked.ndim - 2)).expand(-1, 1, *stacked.shape[2:])
    return stacked.gather(1, place)[:, 0]
