"""A LoRA file of anybody's as the tensors of a role: diffusers' layout, or kohya's where it has diffusers' module names."""

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
from stepdistill.roles.triple import Triple

MATRIX_NAMES = {"lora_A": ("lora_A", "lora_down", "lora.down"), "lora_B": ("lora_B", "lora_up", "lora.up")}
"""A role's matrix -> what files call it."""


def load_lora_file(triple: Triple, role: str, path: Path) -> None:
    """Load a file into a LoRA role of the same rank and targets; where its alpha is another, its B is scaled instead.

    Raises:
        UserError: the role is a full network, or the file is not such a LoRA.
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
    names = {f"lora_{component}_{module.replace('.', '_')}": module for module in factors}
    metadata = json.loads(header.metadata.get(LORA_ADAPTER_METADATA_KEY, "{}"))
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if key.endswith(".alpha"):
            continue
        module, matrix = _split_key(key)
        own = names.get(module, module.removeprefix("base_model.model.").removeprefix(f"{component}."))
        if matrix == "lora_B":
            # the file's alpha / rank; the role's own follows from its settings
            rank = value.shape[1]
            alpha = (
                tensors[f"{module}.alpha"] if f"{module}.alpha" in tensors else _alpha(metadata, component, own, rank)
            )
            if own in factors:
                value = value.float() * (float(alpha) / rank / factors[own].scale)
        found[f"{own}.{matrix}.weight"] = value
    triple.load_state(role, found)


def _split_key(key: str) -> tuple[str, str]:
    """Module and matrix of a key; a key of no LoRA is its own module, which fits no role."""
    stem = key.removesuffix(".weight")
    for matrix, words in MATRIX_NAMES.items():
        for word in words:
            if stem.endswith(f".{word}"):
                return stem.removesuffix(f".{word}"), matrix
    return stem, ""


def _alpha(metadata: Mapping[str, object], component: str, module: str, rank: int) -> float:
    """The alpha of a module by diffusers' metadata; its rank where there is none, as diffusers takes it."""
    patterns = metadata.get(f"{component}.alpha_pattern")
    own = dict(patterns) if isinstance(patterns, dict) else {}
    alpha = own.get(get_pattern_key(list(own), module), metadata.get(f"{component}.lora_alpha", rank))
    return float(alpha)  # type: ignore[arg-type]
