"""Loads a public LoRA file into a role; `lora_layouts` has the layouts that are understood."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.families.checkpoints.files import read_header
from stepdistill.roles.lora_layouts import B, kohya_modules, layers_per_block, own_module, split_key
from stepdistill.roles.triple import Triple


def load_lora_file(triple: Triple, role: str, path: Path) -> None:
    """Loads a file into a LoRA role of the same rank and targets; B is scaled where the file's alpha differs from the role's.

    Raises:
        UserError: the role is a full network, or the file is not a LoRA of these modules and this rank.
    """
    lora = triple.layouts[role].lora
    if lora is None:
        raise UserError(
            f"init names the LoRA file {str(path)!r} and roles.{role}.mode is 'full': set it to lora, or give a model.path that has "
            "the file fused into it"
        )
    header = read_header(path)
    tensors, component = load_file(path), triple.family.network_component
    factors = triple.bank.factors(role)
    names = kohya_modules(component, factors, layers_per_block(triple.bank.network))
    metadata = json.loads(header.metadata.get(LORA_ADAPTER_METADATA_KEY, "{}"))
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if key.endswith(".alpha"):
            continue
        module, matrix = split_key(key)
        own = names.get(module, own_module(component, module))
        if matrix == B:
            # the file's scale is alpha / rank; the role's own scale follows from its settings
            rank = value.shape[1]
            alpha = (
                tensors[f"{module}.alpha"] if f"{module}.alpha" in tensors else _alpha(metadata, component, own, rank)
            )
            if own in factors:
                value = value.float() * (float(alpha) / rank / factors[own].scale)
        found[f"{own}.{matrix}.weight"] = value
    triple.load_state(role, found)


def _alpha(metadata: Mapping[str, object], component: str, module: str, rank: int) -> float:
    """Returns a module's alpha by diffusers' metadata, or its rank if there are none, which is what diffusers assumes."""
    patterns = metadata.get(f"{component}.alpha_pattern")
    own = dict(patterns) if isinstance(patterns, dict) else {}
    alpha = own.get(get_pattern_key(list(own), module), metadata.get(f"{component}.lora_alpha", rank))
    return float(alpha)
