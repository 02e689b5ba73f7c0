"""An optimizer's state in main memory between steps."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from stepdistill.runtime.parking import to_pinned_memory

State: TypeAlias = MutableMapping[Tensor, dict[str, Any]]


class OffloadedState:
    """Lends an optimizer's state to its device for a step: `fetch`, step, `release`.

    What the optimizer keeps in main memory anyway (step counts, say) stays there. The buffers in main memory are made
    once, at the first release, and used again.

    Args:
        state: parameter -> name -> value, the optimizer's own; its tensors are replaced in place.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._cpu_copies: dict[tuple[Tensor, str], tuple[torch.device, Tensor]] = {}

    def fetch(self) -> None:
        """Every tensor back to where it was released from."""
        for (parameter, name), (device, parked) in self._cpu_copies.items():
            self._state[parameter][name] = parked.to(device, non_blocking=True)

    def release(self) -> None:
        """Every tensor to main memory."""
        for parameter, name, value in list(self._on_device()):
            if (parameter, name) in self._cpu_copies:
                self._cpu_copies[parameter, name][1].copy_(value)
            else:
                self._cpu_copies[parameter, name] = value.device, to_pinned_memory(value)
            self._state[parameter][name] = self._cpu_copies[parameter, name][1]

    def _on_device(self) -> Iterator[tuple[Tensor, str, Tensor]]:
        for parameter, values in self._state.items():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.device.type != "cpu":
                    yield parameter, name, value
