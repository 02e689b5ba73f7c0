"""Ships things: a role as a LoRA, guidance adapters or a pipeline, with a card, and the proof that stock diffusers reproduces it."""

from __future__ import annotations

import inspect
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from stepdistill.assets import resolve
from stepdistill.errors import UserError
from stepdistill.exporting.base_loading import BASE_CONFIGS, base_location, write_base_configs
from stepdistill.exporting.guidance_adapter import guidance_adapter_of, write_guidance_adapter
from stepdistill.exporting.lora import write_diffusers_lora, write_kohya_lora
from stepdistill.exporting.model_card import write_model_card
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
from stepdistill.families.base import Checkpoint
from stepdistill.families.recipe import Recipe
from stepdistill.files.outputs import check_folder_is_writable
from stepdistill.inference import experts as loader
from stepdistill.inference.artifact import load_artifact
from stepdistill.inference.lora_files import DIFFUSERS_FILE, KOHYA_FILE, expert_files
from stepdistill.roles.guidance_adapter import ADAPTER_FILE as ADAPTER_FILE
from stepdistill.roles.guidance_adapter import GuidanceAdapter
from stepdistill.roles.triple import REAL_SCORE, Triple

logger = logging.getLogger(__name__)
ExportFormat = Literal["diffusers-lora", "kohya-lora", "guidance-adapter", "pipeline"]
EXPORT_FILES: dict[ExportFormat, str] = {
    "diffusers-lora": DIFFUSERS_FILE,
    "kohya-lora": KOHYA_FILE,
    "guidance-adapter": ADAPTER_FILE,
    "pipeline": "model_index.json",
}


def check_output_folder(folder: Path) -> None:
    """Refuse a folder that holds anything, or cannot be made."""
    check_folder_is_writable(folder)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"the output folder {str(folder)!r} is not empty: choose another --output")


def export_student(
    checkpoint: Checkpoint,
    triple: Triple,
    experts: Sequence[str],
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

    experts: the student's roles, one for each of the recipe's experts; where there are several, one file (or network folder)
        each, and `experts.py`, with which plain diffusers takes them by turns.
    quantized: what the student drew while its base was quantised; the card says how far that is from what is exported.

    Raises:
        UserError: a non-empty folder, an expert that is not trained yet, a layout that the format cannot hold, non-finite tensors,
            or a failed proof.
    """
    check_output_folder(folder)
    if REAL_SCORE in experts:
        raise UserError(
            f"only {len(experts) - experts.count(REAL_SCORE)} of the student's {len(experts)} experts have been in training: resume "
            "the run until its last phase"
        )
    several = len(experts) > 1
    check_format(triple, experts[0], format)
    lora = triple.layouts[experts[0]].lora
    if lora is not None:
        recipe = replace(recipe, rank=lora.rank, alpha=lora.alpha)
    base = resolve(recipe.base)
    dtype = torch.float16 if half else torch.float32
    proof = make_proof(checkpoint, triple, experts, recipe, prompts, seeds)
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        if format == "pipeline":
            write_pipeline(checkpoint, triple, experts, recipe, aside, dtype)
        elif format == "guidance-adapter":
            write_guidance_adapter(triple, experts[0], recipe, aside, dtype)
        else:
            write = write_diffusers_lora if format == "diffusers-lora" else write_kohya_lora
            for role, file in zip(experts, expert_files(EXPORT_FILES[format], len(experts)), strict=True):
                write(triple, role, recipe, aside / file, dtype)
        if several:
            (aside / "experts.py").write_text(inspect.getsource(loader))
        (aside / "recipe.json").write_text(recipe.to_json() + "\n")
        if format != "pipeline":
            write_base_configs(checkpoint, aside / BASE_CONFIGS)
        proof.write(aside, recipe)
        exported = str(aside) if format == "pipeline" else base
        artifact = load_artifact(exported, None if format == "pipeline" else aside, torch.float32, "cpu")
        tolerance = HALF_TOLERANCE if half else TOLERANCE
        verify(artifact.pipeline, proof, recipe, tolerance, experts=artifact.experts)
        script = reproduction_script(
            checkpoint,
            base_location(base),
            format,
            EXPORT_FILES[format],
            tolerance,
            family=triple.family,
            experts=several,
        )
        (aside / "reproduce.py").write_text(script)
        write_model_card(
            checkpoint.info,
            triple.family,
            recipe,
            format,
            EXPORT_FILES[format],
            folder,
            aside / "README.md",
            notes=[_quantization_note(quantized, proof)] if quantized is not None else [],
        )
        if folder.exists():
            folder.rmdir()
        os.replace(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return folder


def check_format(triple: Triple, role: str, format: ExportFormat) -> None:
    """Refuse a format that cannot hold all of a role, before anything is drawn."""
    guide = triple.guidance_conditioners.get(role)
    if format == "guidance-adapter":
        guidance_adapter_of(triple, role)
    elif isinstance(guide, GuidanceAdapter):
        raise UserError(f"the {role} is guidance adapters beside its base: export it with --format guidance-adapter")
    elif guide is not None and format != "pipeline":
        raise UserError(
            f"the {role} is told its guidance scale by an embedding, which no LoRA file can hold: export it with --format pipeline"
        )


def _quantization_note(quantized: QuantizedStudent, proof: Proof) -> str:
    """A sentence for card and log."""
    text = (
        f"It was trained on {quantized.base}; on the unquantised base, which these files are for and were proved on, the final "
        f"latents of the proof differ from those by {quantized.difference(proof):.2%} (relative rms)."
    )
    logger.info("%s", text)
    return text
