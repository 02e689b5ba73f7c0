"""Tensors without content that pass for the CPU's: a network of any size runs, forward and backward, in no memory.

torch's own `FakeTensor` does the same and more, five times slower. What a ghost meets becomes one; what is made of real
tensors alone stays real. So weights and all that follows from them cost nothing, while seeds, ladders and noise levels keep
the values that decide which branch a method takes.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

_DATA_DEPENDENT_OPS = frozenset(
    (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.equal.default,
        torch.ops.aten.masked_select.default,
    )
)
"""Operations whose answer depends on content."""


class DataDependentOutputError(Exception):
    """A ghost was asked for its content."""


class FakeCpuTensor(Tensor):
    """A tensor on the meta device, `meta`, that says it lies on the CPU, so that autocast and autograd treat it as usual."""

    meta: Tensor

    @staticmethod
    def __new__(cls, meta: Tensor) -> FakeCpuTensor:
        made: FakeCpuTensor = Tensor._make_wrapper_subclass(
            cls, meta.shape, meta.stride(), meta.storage_offset(), dtype=meta.dtype, device=torch.device("cpu")
        )
        made.meta = meta
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return run_operation(func, args, kwargs or {})


def fake_like(like: Tensor) -> FakeCpuTensor:
    """A ghost of a tensor's shape and dtype, with storage of its own."""
    return FakeCpuTensor(torch.empty(like.shape, dtype=like.dtype, device="meta"))


def replace_meta_tensors(module: nn.Module) -> None:
    """Replace a module's parameters and buffers on the meta device, in place, by ghosts; what was one stays one."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.is_meta:
                if parameter not in made:
                    made[parameter] = nn.Parameter(fake_like(parameter), parameter.requires_grad)
                part.register_parameter(name, made[parameter])
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_meta:
                part.register_buffer(name, fake_like(buffer))


class ShapeCache(dict[Hashable, Any]):
    """Operation and shapes of its arguments -> shapes of its results: a network's layers are many and much alike."""


def run_operation(func: Any, args: Any, kwargs: Any, shape_cache: ShapeCache | None = None) -> Any:
    """An operation of torch: on shapes alone where a ghost is among its arguments, else as it is.

    Raises:
        Unknowable: the operation's result depends on a ghost's content.
    """
    found: dict[int, FakeCpuTensor] = {}
    _collect_fakes(args, found)
    if kwargs:
        _collect_fakes(kwargs.values(), found)
    if not found:
        return func(*args, **kwargs)
    if func in _DATA_DEPENDENT_OPS:
        raise DataDependentOutputError(str(func))
    key = None
    if shape_cache is not None and _returns_new_storage(func):
        key = (func, _shape_key(args), _shape_key(tuple(kwargs.items())))
        if None not in key and key in shape_cache:
            return _rebuild_result(shape_cache[key])
    given = {name: _unwrap(value) for name, value in kwargs.items()} if kwargs else kwargs
    if given.get("device") is not None:
        given["device"] = torch.device("meta")
    out = _wrap(func(*[_unwrap(argument) for argument in args], **given), found)
    if shape_cache is not None and key is not None and None not in key:
        made = _result_layout(out, {id(given.meta.untyped_storage()) for given in found.values()})
        if made is not None:
            shape_cache[key] = made
    return out


@cache
def _returns_new_storage(func: Any) -> bool:
    """Whether an operation neither changes its arguments nor returns parts of them."""
    schema = func._schema
    return not schema.is_mutable and all(returned.alias_info is None for returned in schema.returns)


def _shape_key(values: Sequence[Any]) -> Hashable:
    """What the shapes of results depend on; None where a real tensor is among the values, of which there are few."""
    key: list[Hashable] = []
    for value in values:
        kind = type(value)
        if kind is FakeCpuTensor:
            meta = value.meta
            key.append((meta.shape, meta.stride(), meta.dtype))
        elif kind in (list, tuple):
            part = _shape_key(value)
            if part is None:
                return None
            key.append(part)
        elif isinstance(value, Tensor):
            return None
        else:
            # 1, 1.0 and True are equal, and give results of different dtypes
            key.append((kind, value))
    return tuple(key)


def _result_layout(value: Any, taken: set[int]) -> Any:
    """Enough of an operation's result to make it again; None where it holds anything but tensors with storage of their own."""
    if type(value) is FakeCpuTensor:
        # some operations, such as _unsafe_view, share storage without saying so
        shares = id(value.meta.untyped_storage()) in taken
        return None if shares else (value.meta.shape, value.meta.stride(), value.meta.dtype)
    if type(value) is tuple and value:
        forms = [_result_layout(item, taken) for item in value]
        return None if None in forms else forms
    return None


def _rebuild_result(form: Any) -> Any:
    if type(form) is list:
        return tuple(_rebuild_result(item) for item in form)
    shape, stride, dtype = form
    return FakeCpuTensor(torch.empty_strided(shape, stride, dtype=dtype, device="meta"))


def _collect_fakes(values: Any, found: dict[int, FakeCpuTensor]) -> None:
    for value in values:
        if type(value) is FakeCpuTensor:
            found[id(value.meta)] = value
        elif type(value) in (list, tuple):
            _collect_fakes(value, found)


def _unwrap(value: Any) -> Any:
    if type(value) is FakeCpuTensor:
        return value.meta
    if isinstance(value, Tensor):
        return value.to("meta")
    if type(value) in (list, tuple):
        return type(value)(_unwrap(item) for item in value)
    return value


def _wrap(value: Any, found: dict[int, FakeCpuTensor]) -> Any:
    if isinstance(value, Tensor):
        # an operation in place returns the argument that it changed
        known = found.get(id(value))
        return FakeCpuTensor(value) if known is None else known
    if type(value) in (list, tuple):
        return type(value)(_wrap(item, found) for item in value)
    return value
