"""The head of LAION's aesthetic predictor and of ImageReward: linear layers with dropout, and no activations, between them."""

from __future__ import annotations

from torch import nn

LAYER_INDICES, LAYER_WIDTHS = (0, 2, 4, 6, 7), (1024, 128, 64, 16, 1)
"""Positions of the linear layers in the published `nn.Sequential`, and their output sizes."""


def linear_stack(width: int) -> nn.ModuleDict:
    """Makes the untrained layers for inputs of a width, keyed by their published positions."""
    inputs = (width, *LAYER_WIDTHS[:-1])
    return nn.ModuleDict({str(k): nn.Linear(i, o) for k, i, o in zip(LAYER_INDICES, inputs, LAYER_WIDTHS, strict=True)})
