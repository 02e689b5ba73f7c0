"""A student as a full pipeline folder: its weights merged into a copy of the network, its scheduler inside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepdistill.errors import UserError
from stepdistill.exporting.lora import lora_tensors
from stepdistill.families.base import Checkpoint
from stepdistill.families.common.guidance_embedding import GuidanceEmbedding
from stepdistill.families.recipe import Recipe
from stepdistill.roles.triple import Triple


def write_pipeline(
    checkpoint: Checkpoint, triple: Triple, experts: Sequence[str], recipe: Recipe, folder: Path, dtype: torch.dtype
) -> None:
    """Save the base's pipeline with the student's network and the recipe's scheduler; every other component is kept.

    Experts after the first go to folders of their own beside it: `unet_2`, `unet_3`.
    """
    if checkpoint.pipeline is None:
        raise UserError("an analytic mixture has no pipeline to export: use a diffusers checkpoint")
    component = triple.family.network_component
    network = merged_network(triple, experts[0]).to(dtype)
    config = dict(checkpoint.info.scheduler_config)
    parts = {
        **checkpoint.pipeline.components,
        component: network,
        "scheduler": recipe.scheduler(config),
    }
    extra = {
        key: value for key, value in checkpoint.pipeline.config.items() if key not in parts and not key.startswith("_")
    }
    type(checkpoint.pipeline)(**parts, **_accepted(checkpoint, extra)).save_pretrained(folder)
    for index, role in enumerate(experts[1:], 2):
        other: Any = merged_network(triple, role).to(dtype)
        other.save_pretrained(folder / f"{component}_{index}")


@torch.no_grad()
def merged_network(triple: Triple, role: str) -> nn.Module:
    """A copy of the role's network without adapters: W + (alpha / rank) B A in float32 for a LoRA role.

    An embedding of w that the role has beside it is inside the copy.
    """
    network = triple.copied(triple.networks[role]) if role in triple.networks else _merged_lora(triple, role)
    guide = triple.guidance_conditioners.get(role)
    if isinstance(guide, GuidanceEmbedding):
        return triple.family.with_guidance_embedding(network, guide.cond_proj.weight.detach())
    return network


def _merged_lora(triple: Triple, role: str) -> nn.Module:
    network = triple.copy_base()
    lora_tensors(triple, role, torch.float32)  # refuses a full role and non-finite values
    for module, lora in triple.bank.factors(role).items():
        delta = (lora.up.float().flatten(1) @ lora.down.float().flatten(1)) * lora.scale
        weight = network.get_submodule(module).get_parameter("weight")
        weight.copy_(weight.float() + delta.reshape(weight.shape).to(weight.device))
    return network


def _accepted(checkpoint: Checkpoint, extra: dict[str, object]) -> dict[str, object]:
    """The pipeline's own settings (`force_zeros_for_empty_prompt`, `requires_safety_checker`) among its config entries."""
    known = ("force_zeros_for_empty_prompt", "requires_safety_checker", "add_watermarker")
    return {key: value for key, value in extra.items() if key in known and value is not None}
