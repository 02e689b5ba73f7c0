"""Checkpoints of one `.safetensors` file in the original key format (LDM, SGM), judged by its header alone.

diffusers converts the keys; here its conversion is first run on the header's shapes, on the meta device, so that a file
that would load in part is refused before a weight is read.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import Tensor

from stepdistill.assets import FOLDER
from stepdistill.errors import UserError
from stepdistill.families.checkpoints.files import SafetensorsHeader, Shapes, raise_if_keys_differ, read_json
from stepdistill.families.checkpoints.weights import ModelClass, canonical_keys, expected_shapes

logger = logging.getLogger(__name__)

CONFIGS = FOLDER / "public_configs"
UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP_L, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
SDXL_CLIP_L, SDXL_OPEN_CLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
REFINER = "conditioner.embedders.0.model."
FAMILY_OF = {
    "sd15": "sd", "sd21": "sd", "sd21base": "sd", "sdxl": "sdxl", "sd3": "sd3", "sd35m": "sd3", "sd35l": "sd3",
    "sana": "sana",
}  # fmt: skip
"""Folder of packaged configs -> family."""

# parts of the training program that lie under the VAE's prefix
_VAE_TRAINING_PREFIXES = (VAE + "loss.", VAE + "model_ema.")


def detect_architecture(path: Path, header: SafetensorsHeader) -> str:
    """Name of the packaged config folder: sd15, sd21, sd21base or sdxl. Raises UserError for anything else."""
    shapes = header.shapes
    if any("lora" in key for key in shapes):
        raise UserError(f"{str(path)!r} is a LoRA and no checkpoint: give its base as the model")
    conv_in = shapes.get(UNET + "input_blocks.0.0.weight")
    if conv_in is None:
        known = {
            "down_blocks.0.": "one component in diffusers keys",
            "transformer_blocks.0.": "one component in diffusers keys",
            UNET + "joint_blocks.0.": "an SD3 model, which is read from a folder only",
        }
        kind = next(
            (words for prefix, words in known.items() if _has_prefix(shapes, prefix)), "of no known architecture"
        )
        raise UserError(
            f"{str(path)!r} has no 'model.diffusion_model.input_blocks', as SD 1.x, 2.x and SDXL files have, and is {kind}: "
            "give the folder of the whole pipeline in diffusers format"
        )
    if conv_in[1] in (8, 9):
        raise UserError(
            f"{str(path)!r} is an inpainting or editing model, whose network reads {conv_in[1]} channels: give the "
            "text-to-image model that it was made from"
        )
    if _has_prefix(shapes, SDXL_OPEN_CLIP):
        return "sdxl"
    if _has_prefix(shapes, REFINER):
        raise UserError(f"{str(path)!r} is an SDXL refiner, which draws nothing on its own: give the SDXL base model")
    if _has_prefix(shapes, OPEN_CLIP):
        return _sd2_architecture(path, header)
    if _has_prefix(shapes, CLIP_L):
        return "sd15"
    raise UserError(f"{str(path)!r} has a network but no text encoder: give a file that holds the whole checkpoint")


def scheduler_overrides(header: SafetensorsHeader) -> Mapping[str, Any]:
    """What the file itself says about its noise schedule, in the terms of a scheduler config.

    `v_pred` and `ztsnr` are the marker tensors that SDXL v-prediction fine-tunes carry for the user interfaces.

    Raises:
        UserError: the file is marked as having an EDM schedule.
    """
    edm = sorted(key for key in header.shapes if key.startswith("edm_"))
    if edm:
        raise UserError(
            f"the file holds the marker tensor {edm[0]!r} of an EDM noise schedule (as CosXL and Playground 2.5 have), which is "
            "not supported: give a checkpoint of the discrete SDXL schedule"
        )
    facts: dict[str, Any] = {}
    told = header.metadata.get("modelspec.prediction_type")
    if told in ("v", "v_prediction", "epsilon"):
        facts["prediction_type"] = "epsilon" if told == "epsilon" else "v_prediction"
    if "v_pred" in header.shapes:
        facts["prediction_type"] = "v_prediction"
    if "ztsnr" in header.shapes:
        facts["rescale_betas_zero_snr"] = True
    return facts


def check_single_file(path: Path, header: SafetensorsHeader, folder: Path, classes: Mapping[str, ModelClass]) -> None:
    """Run diffusers' conversion on shapes and compare with what the configs ask for.

    Args:
        folder: the diffusers folder whose configs are used.
        classes: component -> class, of every component with weights.

    Raises:
        UserError: a component is absent, or tensors are missing, unexpected or of another shape.
    """
    source = {key: torch.empty(shape, device="meta") for key, shape in header.shapes.items()}
    for component, model_class in classes.items():
        prefix = _prefix(component, header.shapes)
        if not _has_prefix(header.shapes, prefix):
            raise UserError(
                f"{str(path)!r} has no tensors '{prefix}*' for the {component}: give a file with all components"
            )
        converted = _convert_component(component, prefix, source, folder)
        raise_if_keys_differ(
            f"the {component} in {str(path)!r}",
            canonical_keys(
                {key: tuple(tensor.shape) for key, tensor in converted.items()}
                | _unconverted_tensors(prefix, source, converted)
            ),
            expected_shapes(folder, component, model_class),
            f"this is another architecture than {folder.name!r}, so give a diffusers folder of its configs with config_dir",
        )


def _convert_component(component: str, prefix: str, source: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    part = {
        key: value
        for key, value in source.items()
        if key.startswith(prefix) and not key.startswith(_VAE_TRAINING_PREFIXES)
    }
    if component in ("unet", "vae"):
        convert = convert_ldm_unet_checkpoint if component == "unet" else convert_ldm_vae_checkpoint
        try:
            converted: dict[str, Tensor] = convert(part, config=read_json(folder / component / "config.json"))
        except KeyError as error:
            raise UserError(
                f"the {component} lacks {error}, which the configs of {folder.name!r} ask for: give a diffusers folder of the "
                "file's own architecture with config_dir"
            ) from error
        return converted
    if prefix in (CLIP_L, SDXL_CLIP_L):
        return convert_ldm_clip_checkpoint(part)  # type: ignore[no-any-return]
    # all that the conversion asks of the model, to split q, k and v where the file has no text projection
    hidden_size = int(read_json(folder / component / "config.json")["hidden_size"])
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=hidden_size))
    return convert_open_clip_checkpoint(model, part, prefix=prefix)  # type: ignore[no-any-return]


def _unconverted_tensors(
    prefix: str, source: Mapping[str, Tensor], converted: Mapping[str, Tensor]
) -> dict[str, tuple[int, ...]]:
    """Tensors of the UNet or VAE that the conversion passed by in silence. The text encoders' pass through it by name."""
    if prefix not in (UNET, VAE):
        return {}
    used = {id(tensor) for tensor in converted.values()} | {id(tensor._base) for tensor in converted.values()}
    return {
        key: tuple(tensor.shape)
        for key, tensor in source.items()
        if key.startswith(prefix) and not key.startswith(_VAE_TRAINING_PREFIXES) and id(tensor) not in used
    }


def _sd2_architecture(path: Path, header: SafetensorsHeader) -> str:
    """SD 2.x: the 768 models predict v and the 512 base models epsilon, with the very same tensors."""
    facts = scheduler_overrides(header)
    if "prediction_type" in facts:
        return "sd21" if facts["prediction_type"] == "v_prediction" else "sd21base"
    logger.warning(
        "%s does not say what its network predicts; v_prediction is assumed, as in SD 2.1 of 768 pixels: for a base model "
        "of 512 pixels (epsilon) set config_dir to %s",
        path,
        CONFIGS / "sd21base",
    )
    return "sd21"


def _prefix(component: str, shapes: Shapes) -> str:
    if component in ("unet", "vae"):
        return UNET if component == "unet" else VAE
    if component == "text_encoder_2":
        return SDXL_OPEN_CLIP
    return next((prefix for prefix in (SDXL_CLIP_L, OPEN_CLIP) if _has_prefix(shapes, prefix)), CLIP_L)


def _has_prefix(shapes: Shapes, prefix: str) -> bool:
    return any(key.startswith(prefix) for key in shapes)
