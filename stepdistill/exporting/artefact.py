"""Loading what was exported, and drawing with it, through stock diffusers pipelines."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from safetensors import safe_open

from stepdistill.errors import Refusal
from stepdistill.exporting.lora import DIFFUSERS_FILE, KOHYA_FILE, recipe_of
from stepdistill.models.loading import inspect_checkpoint, load_checkpoint
from stepdistill.models.recipe import Recipe

logger = logging.getLogger(__name__)

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"timestep_spacing": "trailing"}),
    "euler": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing", "algorithm_type": "dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {"timestep_spacing": "trailing"}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}
"""Short names for `--scheduler`: (class, changes to the checkpoint's config)."""


def load_artefact(
    model: str, lora: Path | None, dtype: torch.dtype, device: torch.device | str
) -> tuple[DiffusionPipeline, Recipe | None]:
    """A stock pipeline of a base or exported pipeline, with a LoRA where one is given, and the recipe that came with it.

    Raises:
        Refusal: a checkpoint that cannot be loaded, or a LoRA that does not fit it.
    """
    checkpoint = load_checkpoint(inspect_checkpoint(model), dtype, device)
    if checkpoint.pipeline is None:
        raise Refusal(f"{model!r} is an analytic mixture, which has no images to draw: give a diffusers checkpoint")
    pipeline = checkpoint.pipeline
    pipeline.set_progress_bar_config(disable=True)
    if lora is None:
        return pipeline, Recipe.read(checkpoint.info.folder)
    file = lora_file(lora)
    load_lora(pipeline, file)
    return pipeline, recipe_of(file) or Recipe.read(file.parent)


def lora_file(path: Path) -> Path:
    """The LoRA file in an exported folder, or the file itself. Raises Refusal."""
    candidates = [path] if path.is_file() else [path / DIFFUSERS_FILE, path / KOHYA_FILE]
    for candidate in candidates:
        if candidate.is_file() and candidate.suffix == ".safetensors":
            return candidate
    raise Refusal(f"there is no LoRA at {str(path)!r}: give an exported folder, or a .safetensors file")


def load_lora(pipeline: DiffusionPipeline, file: Path, name: str = "stepdistill") -> None:
    """Load a LoRA and prove that every tensor of the file found its place.

    Raises:
        Refusal: it does not fit; the first orphan or missing key is named.
    """
    with safe_open(file, "pt") as opened:
        keys = list(opened.keys())
        total = sum(opened.get_tensor(key).numel() for key in keys if not key.endswith(".alpha"))
    try:
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    except (ValueError, RuntimeError, KeyError, IndexError) as error:
        raise Refusal(
            f"the LoRA {str(file)!r} does not fit this model ({_first(error)}): use the base it was trained on"
        ) from None
    network = pipeline.unet if "unet" in pipeline.components else pipeline.transformer
    loaded = {key: value for key, value in network.named_parameters() if f".{name}." in key}
    # diffusers fills a module that got half of its pair with random numbers: counts alone do not show it
    orphans = _orphans(keys, loaded, name) if keys[0].partition(".")[0] in pipeline.components else []
    if orphans or sum(value.numel() for value in loaded.values()) != total:
        pipeline.unload_lora_weights()
        raise Refusal(
            f"only {len(loaded)} of the LoRA's matrices found a module ({len(orphans)} orphans, first: "
            f"{orphans[0] if orphans else keys[0]!r}): use the base it was trained on, or export it again"
        )


def draw(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    recipe: Recipe | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    negative_prompt: str | None = None,
    size: tuple[int, int] | None = None,
    scheduler: str | None = None,
    batch_size: int = 8,
    quantize: Literal["round", "floor"] = "round",
) -> Iterator[NDArray[np.uint8]]:
    """Images (B, H, W, 3), uint8, batch by batch; image i depends on seeds[i] alone, not on the batch size.

    quantize: to 8 bits; floor is what DMD2's and GigaGAN's scripts do.
    The recipe applies unless `steps`, `guidance` or `scheduler` overrides it, which warns. guidance is w; 1 is off.

    Raises:
        Refusal: unknown scheduler name, or a size or number of steps that the pipeline does not take.
    """
    own = pipeline.scheduler
    arguments = _arguments(pipeline, recipe, steps, guidance, scheduler)
    if size is not None:
        arguments |= {"height": size[0], "width": size[1]}
    if negative_prompt is not None and arguments["guidance_scale"] <= 1:
        logger.warning("the negative prompt has no effect: guidance is off (w = %g)", arguments["guidance_scale"])
    try:
        for start in range(0, len(prompts), batch_size):
            rows = slice(start, start + batch_size)
            count = len(prompts[rows])
            batch = dict(arguments)
            if negative_prompt is not None:
                batch["negative_prompt"] = [negative_prompt] * count
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[rows]]
            try:
                images = pipeline(list(prompts[rows]), generator=generators, output_type="np", **batch).images
            except ValueError as error:
                first = " ".join(str(error).split())[:200]
                raise Refusal(f"the pipeline refuses to draw ({first}): change steps, size or scheduler") from None
            yield (np.floor(images * 255) if quantize == "floor" else (images * 255).round()).astype(np.uint8)
    finally:
        pipeline.scheduler = own  # the next scheduler must start from the checkpoint's config, not from this one's


def _arguments(
    pipeline: DiffusionPipeline, recipe: Recipe | None, steps: int | None, guidance: float | None, scheduler: str | None
) -> dict[str, Any]:
    if scheduler is not None and scheduler not in SCHEDULERS:
        raise Refusal(f"the scheduler {scheduler!r} is not known: use one of {', '.join(SCHEDULERS)}")
    overridden = [
        name
        for name, value, own in (
            ("steps", steps, recipe.num_inference_steps if recipe else None),
            ("guidance", guidance, recipe.guidance_scale if recipe else None),
            ("scheduler", scheduler, None),
        )
        if recipe is not None and value is not None and value != own
    ]
    if overridden:
        logger.warning("overriding the recipe's %s: the model was trained for its own recipe", ", ".join(overridden))
    if recipe is not None and not {"steps", "scheduler"} & set(overridden):
        arguments = recipe.apply(pipeline)
    elif recipe is not None and scheduler is None:
        # another number of steps by the same kind of sampler; its ladder starts at the noisiest time, like the recipe's
        spaced = {"timestep_spacing": "trailing"} if "timestep_spacing" in recipe.scheduler_config else {}
        changed = replace(recipe, scheduler_config={**recipe.scheduler_config, **spaced})
        pipeline.scheduler = changed.scheduler(dict(pipeline.scheduler.config))
        arguments = {"num_inference_steps": steps, "guidance_scale": recipe.guidance_scale, **recipe.extra()}
    else:
        name, changes = SCHEDULERS[scheduler or "ddim"]
        pipeline.scheduler = vars(diffusers)[name].from_config({**pipeline.scheduler.config, **changes})
        default = recipe.num_inference_steps if recipe is not None else 50
        arguments = {
            "num_inference_steps": steps or default,
            "guidance_scale": recipe.guidance_scale if recipe else 7.5,
        }
    if guidance is not None:
        arguments["guidance_scale"] = guidance
    return arguments


def _orphans(keys: Sequence[str], loaded: dict[str, torch.nn.Parameter], name: str) -> list[str]:
    """Keys `COMPONENT.MODULE.lora_A.weight` of a file whose module has no adapter."""
    known = {key.replace(f".{name}.", ".") for key in loaded}
    return [key for key in keys if key.partition(".")[2] not in known]


def _first(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
