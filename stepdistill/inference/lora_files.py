"""Names and metadata of exported LoRA files: what an export writes and what loading looks for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open

from stepdistill.families.recipe import Recipe

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "lora_kohya.safetensors"
RECIPE_KEY = "stepdistill_recipe"


def expert_files(file: str, experts: int) -> list[str]:
    """Names of the files of a student: `file` itself for one expert, NAME_expert_1.safetensors and so on for several."""
    stem, dot, suffix = file.rpartition(".")
    return [file] if experts <= 1 else [f"{stem}_expert_{k}{dot}{suffix}" for k in range(1, experts + 1)]


def read_recipe(path: Path) -> Recipe | None:
    """The recipe inside a LoRA file, None where it has none."""
    with safe_open(path, "pt") as file:
        metadata: Mapping[str, str] = file.metadata() or {}
    return Recipe.from_json(metadata[RECIPE_KEY]) if RECIPE_KEY in metadata else None
