"""Loading what was exported, and drawing with it, through stock diffusers pipelines."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from safetensors import safe_open

from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.errors import UserError
from stepdistill.families.base import Checkpoint
from stepdistill.families.checkpoints.loading import inspect_checkpoint, load_checkpoint
from stepdistill.families.checkpoints.schedulers import make_scheduler
from stepdistill.families.recipe import Recipe
from stepdistill.inference.experts import Experts, adapter_experts, load_experts
from stepdistill.inference.lora_files import DIFFUSERS_FILE, KOHYA_FILE, expert_files, read_recipe
from stepdistill.inference.pipeline_calls import decode_in_vae_dtype, seeded_scheduler_steps
from stepdistill.roles.guidance_adapter import ADAPTER_FILE as ADAPTER_FILE
from stepdistill.roles.guidance_adapter import GuidanceAdapter, load_guidance_adapter

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
FLOW_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    # on straight paths DDIM is Euler
    "ddim": ("FlowMatchEulerDiscreteScheduler", {}),
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "dpm++2m": (
        "DPMSolverMultistepScheduler",
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "algorithm_type": "dpmsolver++"},
    ),
    "lcm": ("FlowMatchLCMScheduler", {}),
}
"""The same for a flow-matching checkpoint."""


@dataclass(frozen=True)
class Artifact:
    """A stock pipeline, and what came with it.

    Attributes:
        recipe: None for a base.
        experts: the callback that its calls need, where the student is several experts.
        adapter: guidance adapters that are on, at the recipe's w.
    """

    pipeline: DiffusionPipeline
    recipe: Recipe | None
    experts: Experts | None = None
    adapter: GuidanceAdapter | None = None


def load_artifact(model: str, lora: Path | None, dtype: torch.dtype, device: torch.device | str) -> Artifact:
    """A stock pipeline of a base or exported pipeline, with a LoRA where one is given, and the recipe that came with it.

    lora: an exported folder or file, of guidance adapters too.

    Raises:
        UserError: a checkpoint that cannot be loaded, or a LoRA that does not fit it.
    """
    if lora is None:
        checkpoint = load_checkpoint(inspect_checkpoint(model), dtype, device)
        pipeline = _quiet_pipeline(checkpoint, model)
        recipe = Recipe.read(checkpoint.info.folder)
        several = recipe is not None and recipe.experts
        return Artifact(pipeline, recipe, load_experts(pipeline, checkpoint.info.folder) if several else None)
    adapter_file = lora / ADAPTER_FILE if lora.is_dir() else lora
    is_adapter = adapter_file.name == ADAPTER_FILE and adapter_file.is_file()
    file = adapter_file if is_adapter else lora_file(lora)
    recipe = read_recipe(file) or Recipe.read(file.parent)
    pipeline = load_base(model, recipe, dtype, device)
    if is_adapter:
        return Artifact(pipeline, recipe, adapter=_load_adapter(pipeline, file, recipe))
    if recipe is None or not recipe.experts:
        load_lora(pipeline, file)
        return Artifact(pipeline, recipe)
    return Artifact(pipeline, recipe, _load_experts(pipeline, lora, file, recipe.experts))


def load_base(model: str, recipe: Recipe | None, dtype: torch.dtype, device: torch.device | str) -> DiffusionPipeline:
    """Loads the stock pipeline of a base as the run that wrote `recipe` had opened it (family, configs of a single file).

    Raises:
        UserError: a checkpoint that cannot be loaded.
    """
    family = config_dir = None
    if recipe is not None:
        family = recipe.base_family or None
        config_dir = recipe.base_config_dir if Path(model).expanduser().is_file() and recipe.base_config_dir else None
    return _quiet_pipeline(load_checkpoint(inspect_checkpoint(model, family, config_dir), dtype, device), model)


def _quiet_pipeline(checkpoint: Checkpoint, model: str) -> DiffusionPipeline:
    if checkpoint.pipeline is None:
        raise UserError(f"{model!r} is an analytic mixture, which has no images to draw: give a diffusers checkpoint")
    checkpoint.pipeline.set_progress_bar_config(disable=True)
    return checkpoint.pipeline


def _load_adapter(pipeline: DiffusionPipeline, file: Path, recipe: Recipe | None) -> GuidanceAdapter:
    try:
        return load_guidance_adapter(pipeline, file, None if recipe is None else recipe.told_guidance)
    except ValueError as error:
        raise UserError(_one_line(error)) from None


def lora_file(path: Path) -> Path:
    """The LoRA file in an exported folder, the first expert's where there are several, or the file itself. Raises UserError."""
    names = [expert_files(name, count)[0] for name in (DIFFUSERS_FILE, KOHYA_FILE) for count in (1, 2)]
    for candidate in [path] if path.is_file() else [path / name for name in names]:
        if candidate.is_file() and candidate.suffix == ".safetensors":
            return candidate
    raise UserError(f"there is no LoRA at {str(path)!r}: give an exported folder, or a .safetensors file")


def _load_experts(pipeline: DiffusionPipeline, lora: Path, first: Path, calls: Sequence[int]) -> Experts:
    """The LoRAs of all experts. Raises UserError where one is missing, or is all that was named."""
    if lora.is_file():
        raise UserError(
            f"{str(lora)!r} is one of {len(calls)} experts, which draw together: give the folder that holds them all"
        )
    names = [f"expert_{k}" for k in range(1, len(calls) + 1)]
    for name in names:
        file = first.with_name(first.name.replace(names[0], name))
        if not file.is_file():
            raise UserError(f"the student has {len(calls)} experts and {str(file)!r} is missing: export the run again")
        load_lora(pipeline, file, name)
    return adapter_experts(pipeline, names, calls)


def load_lora(pipeline: DiffusionPipeline, file: Path, name: str = "stepdistill") -> None:
    """Load a LoRA and prove that every tensor of the file found its place.

    Raises:
        UserError: it does not fit; the first orphan or missing key is named.
    """
    with safe_open(file, "pt") as opened:
        keys = list(opened.keys())
        total = 0
        for key in keys:
            tensor = opened.get_tensor(key)
            if not bool(torch.isfinite(tensor).all()):
                raise UserError(
                    f"the tensor {key!r} of the LoRA {str(file)!r} holds a NaN or an infinite value: export the run again from an "
                    "earlier checkpoint, or download the file again"
                )
            total += 0 if key.endswith(".alpha") else tensor.numel()
    try:
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    except (ValueError, RuntimeError, KeyError, IndexError) as error:
        raise UserError(
            f"the LoRA {str(file)!r} does not fit this model ({_one_line(error)}): use the base it was trained on"
        ) from None
    loaded = {
        f"{component}.{key}": value
        for component, module in pipeline.components.items()
        if isinstance(module, torch.nn.Module)
        for key, value in module.named_parameters()
        if f".{name}." in key
    }
    # diffusers fills a module that got half of its pair with random numbers: counts alone do not show it
    orphans = _unmatched_keys(keys, loaded, name) if keys[0].partition(".")[0] in pipeline.components else []
    if orphans or sum(value.numel() for value in loaded.values()) != total:
        pipeline.unload_lora_weights()
        raise UserError(
            f"only {len(loaded)} of the LoRA's {sum(not key.endswith('.alpha') for key in keys)} matrices found a module "
            f"(the first that did not: {orphans[0] if orphans else keys[0]!r}): use the base it was trained on, or export it again"
        )


def draw(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    recipe: Recipe | None = None,
    experts: Experts | None = None,
    adapter: GuidanceAdapter | None = None,
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
    experts: those that came with the recipe.
    adapter: that came with the recipe; `guidance` is what it is told then, and stays so.

    Raises:
        UserError: unknown scheduler name, or a size or number of steps that the pipeline does not take.
    """
    if (experts is None) != (recipe is None or not recipe.experts):
        raise ValueError("a recipe of several experts is drawn with them, and no other is")
    if adapter is not None and guidance is not None:
        adapter.w, guidance = guidance, None
    own = pipeline.scheduler
    arguments = _sampling_arguments(pipeline, recipe, steps, guidance, scheduler)
    trained_size = recipe.resolution if recipe is not None and all(recipe.resolution) else None
    arguments |= _size_arguments(pipeline, size or trained_size)
    if negative_prompt is not None and not supports_negative_prompt(pipeline):
        raise UserError(
            f"a negative prompt was given, and {type(pipeline).__name__} tells its network a guidance scale instead of comparing "
            "two prompts: remove it"
        )
    if experts is not None:
        arguments["callback_on_step_end"] = experts
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
            if experts is not None:
                experts.start()
            try:
                with seeded_scheduler_steps(pipeline, generators), decode_in_vae_dtype(pipeline):
                    images = pipeline(list(prompts[rows]), generator=generators, output_type="np", **batch).images
            except ValueError as error:
                first = " ".join(str(error).split())[:200]
                raise UserError(f"the pipeline refuses to draw ({first}): change steps, size or scheduler") from None
            if not np.isfinite(images).all():
                raise UserError(
                    f"the model draws NaN or infinity (image {start + int(np.argmin(np.isfinite(images).all((1, 2, 3))))}): its weights "
                    "have overflowed, or need another data type than this one; try float32"
                )
            yield (np.floor(images * 255) if quantize == "floor" else (images * 255).round()).astype(np.uint8)
    finally:
        pipeline.scheduler = own  # the next scheduler must start from the checkpoint's config, not from this one's


def supports_negative_prompt(pipeline: DiffusionPipeline) -> bool:
    """Whether its guidance is a second call of the network, with the negative prompt; else the network is told w."""
    return "negative_prompt" in signature(pipeline.__call__).parameters


def _sampling_arguments(
    pipeline: DiffusionPipeline, recipe: Recipe | None, steps: int | None, guidance: float | None, scheduler: str | None
) -> dict[str, Any]:
    if scheduler is not None and scheduler not in SCHEDULERS:
        raise UserError(f"the scheduler {scheduler!r} is not known: use one of {', '.join(SCHEDULERS)}")
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
    elif (schedule := NoiseSchedule.from_config(pipeline.scheduler.config)).fraction_is_angle:
        arguments = _angle_arguments(pipeline, recipe, steps, scheduler)
    elif recipe is not None and scheduler is None:
        # another number of steps by the same kind of sampler; its ladder starts at the noisiest time, like the recipe's
        spaced = {"timestep_spacing": "trailing"} if "timestep_spacing" in recipe.scheduler_config else {}
        changed = replace(recipe, scheduler_config={**recipe.scheduler_config, **spaced})
        pipeline.scheduler = changed.scheduler(dict(pipeline.scheduler.config))
        arguments = {"num_inference_steps": steps, "guidance_scale": recipe.guidance_scale, **recipe.call}
        if recipe.sigmas and steps is not None:
            arguments["sigmas"] = [1 - index / steps for index in range(steps)]
    else:
        known = FLOW_SCHEDULERS if schedule.is_flow else SCHEDULERS
        if scheduler is not None and scheduler not in known:
            raise UserError(f"the scheduler {scheduler!r} does not walk a flow: use one of {', '.join(known)}")
        name, changes = known[scheduler or "ddim"]
        if schedule.is_flow and schedule.dynamic_shift is None:
            # which the checkpoint's own scheduler may have by the other name
            changes = {**changes, "shift": schedule.shift, "flow_shift": schedule.shift}
        pipeline.scheduler = make_scheduler(name, pipeline.scheduler.config, changes)
        default = recipe.num_inference_steps if recipe is not None else 50
        arguments = {
            "num_inference_steps": steps or default,
            "guidance_scale": recipe.guidance_scale if recipe else 7.5,
        }
    if guidance is not None:
        arguments["guidance_scale"] = guidance
    return arguments


def _angle_arguments(
    pipeline: DiffusionPipeline, recipe: Recipe | None, steps: int | None, scheduler: str | None
) -> dict[str, Any]:
    """For a pipeline that walks by the angles of its own scheduler only, evenly, but in two steps as published."""
    if scheduler is not None:
        raise UserError(
            f"the scheduler {scheduler!r} was asked for, and {type(pipeline).__name__} works with its own only: remove it"
        )
    defaults = signature(pipeline.__call__).parameters
    steps = steps or (
        recipe.num_inference_steps if recipe is not None else int(defaults["num_inference_steps"].default)
    )
    return {
        "num_inference_steps": steps,
        "intermediate_timesteps": defaults["intermediate_timesteps"].default if steps == 2 else None,
        "guidance_scale": recipe.guidance_scale if recipe is not None else defaults["guidance_scale"].default,
    }


def _size_arguments(pipeline: DiffusionPipeline, size: tuple[int, int] | None) -> dict[str, Any]:
    """Sana's pipelines draw 1024 x 1024 pixels by default, whatever the checkpoint, and at sizes from a list of their own."""
    if "use_resolution_binning" not in signature(pipeline.__call__).parameters:
        return {} if size is None else {"height": size[0], "width": size[1]}
    side = pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
    height, width = size or (side, side)
    return {"height": height, "width": width, "use_resolution_binning": False}


def _unmatched_keys(keys: Sequence[str], loaded: dict[str, torch.nn.Parameter], name: str) -> list[str]:
    """Keys `COMPONENT.MODULE.lora_A.weight` of a file whose module has no adapter.

    Text encoders are left to the count of values: their module names differ between versions of transformers.
    """
    known = {key.replace(f".{name}.", ".") for key in loaded}
    return [key for key in keys if key not in known and not key.startswith("text_encoder")]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
