"""Tensors that live in main memory between their uses: pinned where the device is CUDA, so that they move quickly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def to_pinned_memory(tensor: Tensor) -> Tensor:
    """A copy of a tensor in main memory, pinned where it comes from CUDA; the tensor itself where it is there already."""
    if tensor.device.type == "cpu":
        return tensor
    parked = torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda")
    return parked.copy_(tensor)


class OffloadedParameters:
    """Untrained parameters that are on their device only within `at_hand`.

    Args:
        parameters: moved to main memory here; all on one device.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._device = self._parameters[0].device
        self._users = 0
        for parameter in self._parameters:
            parameter.data = to_pinned_memory(parameter.data)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """The parameters are on the device inside, where they must not be written to; may be nested."""
        parked = [parameter.data for parameter in self._parameters]
        if self._users == 0:
            for parameter in self._parameters:
                parameter.data = parameter.data.to(self._device, non_blocking=True)
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            # nothing to copy back: what is in main memory is what was lent out
            for parameter, tensor in zip(self._parameters, parked, strict=True):
                parameter.data = tensor
