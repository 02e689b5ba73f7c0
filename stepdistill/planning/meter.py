"""Bytes that live and operations that are done, counted as code runs."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from stepdistill.planning.fake_tensors import FakeCpuTensor, ShapeCache, run_operation

HALF_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Flops:
    """Operations of matrix products, convolutions and attention, a multiply-add being two.

    Attributes:
        half: on bfloat16 or float16 operands.
        full: on float32 or float64 operands.
    """

    half: float = 0.0
    full: float = 0.0

    @property
    def total(self) -> float:
        return self.half + self.full

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.half + other.half, self.full + other.full)

    def __sub__(self, other: Flops) -> Flops:
        return self + other * -1

    def __mul__(self, factor: float) -> Flops:
        return Flops(self.half * factor, self.full * factor)


class Meter(TorchDispatchMode):
    """Counts the bytes of all storages that live at once, of ghosts and of real tensors, and the operations done.

    Attributes:
        live: bytes of the storages alive now, of those made or held since the meter began.
        peak: the most they were since `restart`.
        flops: done since the beginning.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peak = 0
        self.flops = Flops()
        self._shapes = ShapeCache()
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def register(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that are alive already."""
        for tensor in tensors:
            self._register(tensor)

    def reset_peak(self) -> None:
        """Forget the peak: from here on it is what lives now."""
        self.peak = self.live_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = run_operation(func, args, kwargs or {}, self._shapes)
        if isinstance(out, Tensor):
            self._register(out)
        elif isinstance(out, list | tuple):
            self.register(tensor for tensor in out if isinstance(tensor, Tensor))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            done = float(count(*args, **(kwargs or {}), out_val=out))
            self.flops += Flops(half=done) if args[0].dtype in HALF_DTYPES else Flops(full=done)
        return out

    def _register(self, tensor: Tensor) -> None:
        storage = (tensor.meta if type(tensor) is FakeCpuTensor else tensor).untyped_storage()
        key = id(storage)
        if key in self._storages:
            return
        size = storage.nbytes()

        def release(_: object) -> None:
            del self._storages[key]
            self.live_bytes -= size

        self._storages[key] = weakref.ref(storage, release)
        self.live_bytes += size
        self.peak = max(self.peak, self.live_bytes)


def upcast_norm_inputs(module: nn.Module) -> None:
    """Give normalisations float32 inputs under autocast, as CUDA does; the CPU, where ghosts are said to lie, does not.

    By hooks, which checkpointed segments meet again as they are recomputed.
    """

    def widened(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not torch.is_autocast_enabled("cpu"):
            return args
        return tuple(a.float() if isinstance(a, Tensor) and a.dtype in HALF_DTYPES else a for a in args)

    for part in module.modules():
        if isinstance(part, nn.LayerNorm | nn.GroupNorm):
            part.register_forward_pre_hook(widened)
