"""Ships things: a role as a LoRA or a pipeline, with a card, and the proof that stock diffusers reproduces it."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from stepdistill.assets import resolve
from stepdistill.errors import Refusal
from stepdistill.exporting.artefact import load_artefact
from stepdistill.exporting.card import write_card
from stepdistill.exporting.lora import DIFFUSERS_FILE, KOHYA_FILE, write_diffusers_lora, write_kohya_lora
from stepdistill.exporting.pipeline import write_pipeline
from stepdistill.exporting.proof import (
    HALF_TOLERANCE,
    TOLERANCE,
    Proof,
    QuantizedStudent,
    make_proof,
    reproduction_script,
    verify,
)
from stepdistill.models.families.base import Checkpoint
from stepdistill.models.recipe import Recipe
from stepdistill.models.triple import Triple

logger = logging.getLogger(__name__)
ExportFormat = Literal["diffusers-lora", "kohya-lora", "pipeline"]
FILES: dict[ExportFormat, str] = {
    "diffusers-lora": DIFFUSERS_FILE,
    "kohya-lora": KOHYA_FILE,
    "pipeline": "model_index.json",
}


def check_output(folder: Path) -> None:
    """Refuse a folder that holds anything."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Refusal(f"the output folder {str(folder)!r} is not empty: choose another --output")


def export_role(
    checkpoint: Checkpoint,
    triple: Triple,
    role: str,
    recipe: Recipe,
    format: ExportFormat,
    folder: Path,
    *,
    prompts: Sequence[str],
    seeds: Sequence[int],
    half: bool = False,
    quantized: QuantizedStudent | None = None,
) -> Path:
    """Prove, write aside, verify with a fresh stock pipeline, rename. Nothing is left where anything fails.

    quantized: what the student drew while its base was quantised; the card says how far that is from what is exported.

    Raises:
        Refusal: a non-empty folder, a layout that the format cannot hold, non-finite tensors, or a failed proof.
    """
    check_output(folder)
    lora = triple.layouts[role].lora
    if lora is not None:
        recipe = replace(recipe, rank=lora.rank, alpha=lora.alpha)
    base = resolve(recipe.base)
    dtype = torch.float16 if half else torch.float32
    proof = make_proof(checkpoint, triple, role, recipe, prompts, seeds)
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        if format == "pipeline":
            write_pipeline(checkpoint, triple, role, recipe, aside, dtype)
        else:
            write = write_diffusers_lora if format == "diffusers-lora" else write_kohya_lora
            write(triple, role, recipe, aside, dtype)
        (aside / "recipe.json").write_text(recipe.to_json() + "\n")
        proof.write(aside, recipe)
        exported = str(aside) if format == "pipeline" else base
        pipeline, _ = load_artefact(exported, None if format == "pipeline" else aside, torch.float32, "cpu")
        tolerance = HALF_TOLERANCE if half else TOLERANCE
        verify(pipeline, proof, recipe, tolerance)
        script = reproduction_script(base, format, FILES[format], tolerance, triple.family.left_out(checkpoint.info))
        (aside / "reproduce.py").write_text(script)
        write_card(
            checkpoint.info,
            triple.family,
            recipe,
            format,
            FILES[format],
            folder,
            aside / "README.md",
            notes=[_distance(quantized, proof)] if quantized is not None else [],
        )
        if folder.exists():
            folder.rmdir()
        os.replace(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return folder


def _distance(quantized: QuantizedStudent, proof: Proof) -> str:
    """A sentence for card and log."""
    text = (
        f"It was trained on {quantized.base}; on the unquantised base, which these files are for and were proved on, the final "
        f"latents of the proof differ from those by {quantized.difference(proof):.2%} (relative rms)."
    )
    logger.info("%s", text)
    return text
