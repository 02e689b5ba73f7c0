"""Tensors without content that pass for the CPU's: a network of any size runs, forward and backward, in no memory.

torch's own `FakeTensor` does the same and more, five times slower. What a ghost meets becomes one; what is made of real
tensors alone stays real. So weights and all that follows from them cost nothing, while seeds, ladders and noise levels keep
the values that decide which branch a method takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Ghost(Tensor):
    """A tensor on the meta device, `inner`, that says it lies on the CPU, so that autocast and autograd treat it as usual."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Ghost:
        made: Ghost = Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device="cpu"
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def ghost(like: Tensor) -> Ghost:
    """A ghost of a tensor's shape and dtype, with storage of its own."""
    return Ghost(torch.empty(like.shape, dtype=like.dtype, device="meta"))


def hollow(module: nn.Module) -> None:
    """Replace a module's parameters and buffers on the meta device, in place, by ghosts."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            part.register_parameter(name, nn.Parameter(ghost(parameter), parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_meta:
                part.register_buffer(name, ghost(buffer))


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation of torch: on shapes alone where a ghost is among its arguments, else as it is."""
    found: dict[int, Ghost] = {}
    _find(args, found)
    if kwargs:
        _find(tuple(kwargs.values()), found)
    if not found:
        return func(*args, **kwargs)
    given = {name: _bare(value) for name, value in kwargs.items()} if kwargs else kwargs
    if given.get("device") is not None:
        given["device"] = torch.device("meta")
    return _dressed(func(*[_bare(argument) for argument in args], **given), found)


def _find(values: Any, found: dict[int, Ghost]) -> None:
    for value in values:
        if type(value) is Ghost:
            found[id(value.inner)] = value
        elif type(value) in (list, tuple):
            _find(value, found)


def _bare(value: Any) -> Any:
    if type(value) is Ghost:
        return value.inner
    if isinstance(value, Tensor):
        return value.to("meta")
    if type(value) in (list, tuple):
        return type(value)(_bare(item) for item in value)
    return value


def _dressed(value: Any, found: dict[int, Ghost]) -> Any:
    if isinstance(value, Tensor):
        # an operation in place returns the argument that it changed
        known = found.get(id(value))
        return Ghost(value) if known is None else known
    if type(value) in (list, tuple):
        return type(value)(_dressed(item, found) for item in value)
    return value
