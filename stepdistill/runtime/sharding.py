"""FSDP2: every process holds a share of every network, and of its gradients and moments.

`fully_shard` keeps module names, adapters and forward hooks as they are, so that roles, checkpoints and truncated features
work on a sharded network as on a plain one. Its parameters are DTensors; these functions are the only ones that know.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed import all_reduce
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(network: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh) -> None:
    """Split a network over the processes of a one-dimensional mesh; `blocks` are gathered one at a time when they run.

    Raises:
        RuntimeError: a parameter was left whole, so that every process would train a copy of its own.
    """
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    left = [name for name, parameter in network.named_parameters() if not isinstance(parameter, DTensor)]
    if left:
        raise RuntimeError(f"{len(left)} parameters were not sharded, such as {left[0]!r}")


def reshard(network: nn.Module) -> None:
    """Free what forwards have gathered and kept, so that parameters are shards again."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or its shards put together; in that case every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(pattern: Tensor, values: Tensor) -> Tensor:
    """Whole `values`, equal on all processes, on the device of `pattern` and sharded as it is."""
    values = values.to(pattern.device)
    if not isinstance(pattern, DTensor):
        return values
    return distribute_tensor(values, pattern.device_mesh, pattern.placements)


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm over all tensors, float64 scalar, the same on every process; one reduction where some are sharded."""
    squares = {True: torch.zeros((), dtype=torch.float64), False: torch.zeros((), dtype=torch.float64)}
    group = None
    for tensor in tensors:
        sharded = isinstance(tensor, DTensor)
        if isinstance(tensor, DTensor):
            group, tensor = tensor.device_mesh.get_group(), tensor.to_local()
        square = torch.linalg.vector_norm(tensor).double().square()
        squares[sharded] = squares[sharded].to(square.device) + square
    if group is not None:
        all_reduce(squares[True], group=group)
    return (squares[True] + squares[False].to(squares[True].device)).sqrt()
