"""Gradient checkpointing that a forward pass may leave early, as one that is run for its features alone does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint


class StopForward(Exception):
    """Carries a module's output out of a forward pass that is not wanted beyond it."""

    def __init__(self, output: object) -> None:
        self.output = output


def checkpointed(function: Callable[..., Any], *args: Tensor) -> Any:
    """`function(*args)`, computed again in backward instead of kept: diffusers' `gradient_checkpointing_func`.

    Raises:
        Reached: as the function did. torch's own checkpoint must not see it: its hooks on saved tensors would stay behind.
    """
    # not the exception itself, whose traceback would hold this frame and the output with it
    left: list[bool] = []

    def run(*inputs: Tensor) -> Any:
        try:
            return function(*inputs)
        except StopForward as found:
            left.append(True)
            return found.output

    output = checkpoint(run, *args, use_reentrant=False)
    if left:
        raise StopForward(output)
    return output
