"""A LoRA role as a file: diffusers' layout with its metadata, or kohya's with its alphas. Keys, alphas and ranks whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.families.recipe import Recipe
from stepdistill.inference.lora_files import RECIPE_KEY
from stepdistill.roles.lora import LoraSettings
from stepdistill.roles.lora_layouts import kohya_name, kohya_names
from stepdistill.roles.triple import Triple


def lora_tensors(triple: Triple, role: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """`module.lora_A.weight` and `module.lora_B.weight` of a LoRA role, on the CPU.

    Raises:
        UserError: the role is a full network, or has non-finite values.
    """
    lora_settings_of(triple, role)
    tensors = {key: value.detach().to("cpu", dtype).contiguous() for key, value in triple.bank.parameters(role)}
    return {key: finite(value, f"{role}.{key}") for key, value in tensors.items()}


def finite(tensor: Tensor, name: str) -> Tensor:
    """Returns the tensor.

    Raises:
        UserError: it holds a NaN or an infinite value.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise UserError(f"the tensor {name!r} is not finite in {tensor.dtype}: export an earlier checkpoint")
    return tensor


def lora_settings_of(triple: Triple, role: str) -> LoraSettings:
    """The role's LoRA settings. Raises UserError where it is no LoRA."""
    layout = triple.layouts[role]
    if layout.lora is None:
        raise UserError(f"the {role} is a full network, which no LoRA file can hold: export it with --format pipeline")
    return layout.lora


def module_alpha(module: str, lora: LoraSettings) -> float:
    """The alpha of one module, exceptions applied as peft applies them."""
    return float(lora.alpha_pattern.get(get_pattern_key(list(lora.alpha_pattern), module), lora.alpha))


def write_diffusers_lora(triple: Triple, role: str, recipe: Recipe, path: Path, dtype: torch.dtype) -> None:
    """Writes diffusers' layout to a file; the adapter's configuration travels in its metadata.

    The scale alpha / rank is multiplied into B, and the metadata say alpha = rank for every module. diffusers reads alpha from
    these metadata only since version 0.35; ComfyUI, older versions and `load_lora_weights(state_dict)` know the tensors alone
    and take alpha to be the rank, so any other alpha would make the LoRA too strong or too weak there.
    """
    component, lora = triple.family.network_component, lora_settings_of(triple, role)
    scales = {module: factors.scale for module, factors in triple.bank.factors(role).items()}
    tensors: dict[str, Tensor] = {}
    for key, value in lora_tensors(triple, role, torch.float32).items():
        module, _, matrix = key.removesuffix(".weight").rpartition(".")
        scaled = value * scales[module] if matrix == "lora_B" else value
        tensors[f"{component}.{key}"] = finite(scaled.to(dtype), f"{role}.{key}")
    folded = replace(
        lora, alpha=float(lora.rank), alpha_pattern={key: float(r) for key, r in lora.rank_pattern.items()}
    )
    config = folded.peft().to_dict()
    kept = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "lora_bias", "use_dora", "use_rslora")
    adapter = {f"{component}.{key}": _plain(config[key]) for key in kept if key in config}
    metadata = {
        "format": "pt",
        LORA_ADAPTER_METADATA_KEY: json.dumps(adapter, sort_keys=True),
        RECIPE_KEY: recipe.to_json(),
    }
    save_file(tensors, path, metadata)


def write_kohya_lora(triple: Triple, role: str, recipe: Recipe, path: Path, dtype: torch.dtype) -> None:
    """Writes kohya's layout: `lora_unet_MODULE.lora_down.weight`, `.lora_up.weight` and `.alpha`, for ComfyUI and A1111.

    SDXL's blocks are named as kohya's own scripts name them (`input_blocks_4_1`), because A1111 drops the module
    `up_blocks_0_upsamplers_0_conv` under diffusers' name.
    """
    if not triple.family.has_kohya_layout:
        raise UserError(
            f"kohya's layout has no names that diffusers knows for the network of {triple.family.name!r}: export it with --format "
            "diffusers-lora"
        )
    lora = lora_settings_of(triple, role)
    names = kohya_names(triple.bank.network, triple.bank.factors(role), sgm=triple.family.uses_sgm_names)
    tensors: dict[str, Tensor] = {}
    for key, value in lora_tensors(triple, role, dtype).items():
        module, _, matrix = key.removesuffix(".weight").rpartition(".")
        name = kohya_name(triple.family.network_component, names[module])
        if matrix == "lora_A":
            tensors[f"{name}.lora_down.weight"] = value
        else:
            # loaders disagree about modules with an alpha of their own: one alpha everywhere, exceptions folded into B
            tensors[f"{name}.lora_up.weight"] = value * (module_alpha(module, lora) / lora.alpha)
        tensors[f"{name}.alpha"] = torch.tensor(lora.alpha)
    metadata = {
        **triple.family.kohya_metadata,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(lora.rank),
        "ss_network_alpha": str(lora.alpha),
    }
    save_file(tensors, path, {"format": "pt", **metadata, RECIPE_KEY: recipe.to_json()})


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value
