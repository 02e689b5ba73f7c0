"""What training changed of a role, small enough to keep many times over.

A LoRA is its matrices, as they are. A full network is its difference to the base in bfloat16: half a percent of a change
that is itself small, in half the space of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stepdistill.roles.state_check import check_state_matches
from stepdistill.roles.triple import Triple
from stepdistill.runtime.sharding import global_norm, shard_like


@torch.no_grad()
def role_delta(triple: Triple, role: str) -> dict[str, Tensor]:
    """A role's own parameters without heads, as above; sharded ones stay so."""
    own = triple.network_parameters(role)
    if role not in triple.networks:
        return {key: parameter.detach() for key, parameter in own.items()}
    base = triple.base_state()
    return {key: (parameter - base[key].to(parameter.dtype)).bfloat16() for key, parameter in own.items()}


@torch.no_grad()
def load_role_delta(triple: Triple, role: str, tensors: Mapping[str, Tensor]) -> bool:
    """Set a role to what `changes` said of one of the same layout, and tell whether any of its tensors is another now.

    tensors: whole ones, equal on all processes.

    Raises:
        UserError: missing or unexpected keys, or another shape; nothing is changed then.
    """
    own = triple.network_parameters(role)
    check_state_matches(role, own, tensors)
    base = triple.base_state() if role in triple.networks else {}
    moved = False
    for key, parameter in own.items():
        value = shard_like(parameter, tensors[key].to(parameter.dtype))
        if key in base:
            value = value + base[key].to(parameter.dtype)
        # the norm is the same on every process, whose own shard may be unchanged
        moved = moved or float(global_norm([value - parameter])) != 0
        parameter.copy_(value)
    return moved
