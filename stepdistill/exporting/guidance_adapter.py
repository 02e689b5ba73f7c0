"""Guidance adapters as files: their weights, and the two modules that attach them to a stock pipeline's network."""

from __future__ import annotations

import inspect
from pathlib import Path

import torch
from safetensors.torch import save_file

from stepdistill.errors import UserError
from stepdistill.families.recipe import Recipe
from stepdistill.inference.lora_files import RECIPE_KEY
from stepdistill.roles import guidance_adapter, guidance_modules
from stepdistill.roles.guidance_adapter import GuidanceAdapter, settings_metadata
from stepdistill.roles.triple import Triple


def guidance_adapter_of(triple: Triple, role: str) -> GuidanceAdapter:
    """The adapters of a role. Raises UserError where it is held otherwise."""
    guide, mode = triple.guidance_conditioners.get(role), triple.layouts[role].mode
    if mode != "adapter" or not isinstance(guide, GuidanceAdapter):
        form = "diffusers-lora" if mode == "lora" else "pipeline"
        raise UserError(f"the {role} is no guidance adapter (its mode is {mode!r}): export it with --format {form}")
    return guide


def write_guidance_adapter(triple: Triple, role: str, recipe: Recipe, folder: Path, dtype: torch.dtype) -> None:
    """Write guidance_adapter.safetensors, with hyperparameters and recipe in its metadata, and the modules that load it.

    Raises:
        UserError: the role is no guidance adapter, or has non-finite values.
    """
    adapter = guidance_adapter_of(triple, role)
    trained = {key for key, _ in adapter.named_parameters()}
    tensors = {
        # frequencies stay as they are: rounded ones are those of another adapter
        key: value.detach().to("cpu", dtype if key in trained else torch.float32).contiguous()
        for key, value in adapter.state_dict().items()
    }
    bad = [key for key, value in tensors.items() if not bool(value.isfinite().all())]
    if bad:
        raise UserError(
            f"{len(bad)} tensors of the {role} are not finite in {dtype} (first: {bad[0]!r}): export an earlier checkpoint"
        )
    save_file(
        tensors,
        folder / guidance_adapter.ADAPTER_FILE,
        {**settings_metadata(adapter.settings), RECIPE_KEY: recipe.to_json()},
    )
    for module in (guidance_modules, guidance_adapter):
        # beside one another in the export, they are no parts of this package
        source = inspect.getsource(module).replace(
            f"from {guidance_modules.__name__} import", "from guidance_modules import"
        )
        (folder / f"{module.__name__.rpartition('.')[2]}.py").write_text(source)
