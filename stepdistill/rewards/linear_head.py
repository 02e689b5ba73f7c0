"""The head that LAION's aesthetic predictor and ImageReward share: linear layers, nothing between them but dropout."""

from __future__ import annotations

from torch import nn

LAYER_INDICES, LAYER_WIDTHS = (0, 2, 4, 6, 7), (1024, 128, 64, 16, 1)
"""Of the linear layers in the published stacks, and what they put out."""


def linear_stack(width: int) -> nn.ModuleDict:
    """The layers by their published places, for inputs of a width, untrained."""
    inputs = (width, *LAYER_WIDTHS[:-1])
    return nn.ModuleDict({str(k): nn.Linear(i, o) for k, i, o in zip(LAYER_INDICES, inputs, LAYER_WIDTHS, strict=True)})
