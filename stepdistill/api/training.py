"""The public functions, for notebooks and scripts; the command line calls the same ones.

outcome = stepdistill.distill(stepdistill.load_config("configs/quickstart.yaml"), output="runs/first")
stepdistill.export(outcome.folder, "diffusers-lora", "lora")
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState

from stepdistill.api.arguments import check_sample_arguments
from stepdistill.assets import resolve
from stepdistill.config.collection import CollectConfig
from stepdistill.config.registry import load_method
from stepdistill.config.schema import RunConfig
from stepdistill.data.prompts import read_prompts
from stepdistill.errors import UserError
from stepdistill.evaluation.during_training import EvaluationSetup, StudentEvaluation
from stepdistill.exporting.export import ExportFormat, check_output_folder, export_student
from stepdistill.exporting.model_card import push_to_hub as push
from stepdistill.exporting.proof import QuantizedStudent, final_latents
from stepdistill.families.base import Checkpoint
from stepdistill.families.checkpoints.loading import inspect_checkpoint, load_checkpoint
from stepdistill.files.locks import locked_folder
from stepdistill.inference.artifact import draw, load_artifact
from stepdistill.rewards import load_reward
from stepdistill.roles.triple import RoleMode
from stepdistill.training.collect import collect
from stepdistill.training.description import describe_run
from stepdistill.training.distributed import check_launcher, is_sharding_requested
from stepdistill.training.initialization import find_initial_checkpoint
from stepdistill.training.inputs.caching import CacheSummary, fill_caches
from stepdistill.training.monitoring.grids import images_to_tensor, make_image_grid, save_images
from stepdistill.training.option_checks import check_training_options, float32_precision
from stepdistill.training.run import Outcome, find_resume_checkpoint, open_run, run_config, train
from stepdistill.training.session import DTYPES, Session, resolve_device
from stepdistill.training.setup import prepare

__all__ = [
    "CollectConfig",
    "cache",
    "collect",
    "destroy_process_group",
    "distill",
    "dry_run",
    "export",
    "load_teacher",
    "sample",
]  # fmt: skip

logger = logging.getLogger(__name__)
PROOF_IMAGES = 2
MAX_GRID_IMAGES = 256
"""Images that a grid shows at most."""


def distill(config: RunConfig, output: str | Path | None = None, resume: str | None = None) -> Outcome:
    """Train a student, measured as it trains where the config says so. See `stepdistill.training.run.train`."""
    if config.evaluation is None:
        return train(config, output, resume)
    section = config.evaluation
    return train(config, output, resume, lambda session, folder: StudentEvaluation(session, folder, section))


def cache(config: RunConfig) -> CacheSummary:
    """Fill the caches of a training config, so that its training finds them warm. See `training.caching.fill`."""
    return fill_caches(prepare(config))


def destroy_process_group() -> None:
    """End the group of processes that a distributed `distill` or `collect` joined; nothing where there is one process."""
    PartialState().destroy_process_group()


def dry_run(config: RunConfig, output: str | Path | None = None, resume: str | None = None) -> list[str]:
    """Check a config as training with the same arguments would, without loading a weight; lines that describe the run.

    Raises:
        UserError: whatever training would refuse before it loads a weight.
    """
    check_launcher(config.training)
    find_resume_checkpoint(config, Path(output or config.output), resume)
    setup = prepare(config)
    if config.init is not None:
        find_initial_checkpoint(Path(config.init))
    with torch.device("meta"):  # outlines: their names and options are what a dry run can check
        for reward in (setup.needs.reward, setup.needs.held_out):
            if reward is not None:
                load_reward(reward)
    if config.evaluation is not None:
        EvaluationSetup.of(config.evaluation)
    adapter = config.model.guidance_adapter
    if adapter is not None and not Path(adapter).exists():
        raise UserError(
            f"model.guidance_adapter is {adapter!r}, and there is no such file: give an exported adapter or its folder"
        )
    device = resolve_device(config.training.device)
    check_training_options(config, setup.roles, setup.needs, device, sharded=is_sharding_requested(config.training))
    return describe_run(setup)


def load_teacher(model: str, dtype: str = "float32", device: str | None = None) -> Checkpoint:
    """Load a checkpoint: diffusers folder, hub id, single `.safetensors` file, or `builtin:teacher`. Raises UserError."""
    return load_checkpoint(inspect_checkpoint(resolve(model)), parse_dtype(dtype), resolve_device(device))


def export(
    run: str | Path,
    format: ExportFormat,
    output: str | Path,
    *,
    half: bool = False,
    push_to_hub: str | None = None,
    device: str | None = None,
    checkpoint: Literal["latest", "best"] = "latest",
) -> Path:
    """Write a run's student and prove that stock diffusers reproduces it; nothing is left where the proof fails.

    Args:
        format: diffusers-lora, kohya-lora, guidance-adapter or pipeline.
        half: store float16.
        push_to_hub: hub repository to upload the folder to.
        checkpoint: the newest, or the one that evaluation during training liked best.

    Raises:
        UserError: not a run, a non-empty output folder, non-finite weights, or a failed proof.
    """
    check_output_folder(Path(output))
    # a half-precision base is widened, and a GPU's convolutions have all 24 bits: the proof is exact, and the LoRA's float32
    # weights are the same on any
    with locked_folder(Path(output), "export"), float32_precision(tf32=False):
        quantized = _quantized_student(run, device, checkpoint)
        session, iteration = open_run(run, device, full_precision=True, checkpoint=checkpoint)
        logger.info("exporting the %s of iteration %d", session.student.replace("_", " "), iteration)
        folder = export_student(
            session.checkpoint,
            session.triple,
            session.experts,
            session.recipe,
            format,
            Path(output),
            prompts=_proof_prompts(session),
            seeds=list(range(PROOF_IMAGES)),
            half=half,
            quantized=quantized,
        )
    if push_to_hub is not None:
        push(folder, push_to_hub)
    return folder


def default_export_format(config: RunConfig) -> ExportFormat:
    """What holds all of the student that a run of this config trains, in the smallest files that stock diffusers loads."""
    forms: dict[RoleMode, ExportFormat] = {"lora": "diffusers-lora", "full": "pipeline", "adapter": "guidance-adapter"}
    form = forms[config.roles.generator.mode]
    method = load_method(config.method_name)
    receives_guidance = method.network_guidance_range(method.Config.model_validate(config.method_options)) is not None
    # an embedding is no part of a LoRA
    return "pipeline" if receives_guidance and form == "diffusers-lora" else form


def sample(
    model: str,
    output: str | Path,
    *,
    lora: str | Path | None = None,
    prompt: str | None = None,
    prompts: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    negative_prompt: str | None = None,
    width: int | None = None,
    height: int | None = None,
    num_images: int = 1,
    seed: int = 0,
    batch_size: int = 8,
    dtype: str = "float32",
    device: str | None = None,
    scheduler: str | None = None,
) -> list[Path]:
    """Draw images into a folder, as PNG and as a grid; image i has seed `seed + i` whatever the batch size.

    The recipe that came with the LoRA or pipeline applies by default; overriding it warns.

    Raises:
        UserError: no prompt or two sources of them, a folder that is not empty, a LoRA that does not fit.
    """
    folder = Path(output)
    check_output_folder(folder)
    check_sample_arguments(prompt, prompts, width, height)
    listed = [prompt] if prompt is not None else list(read_prompts(str(prompts)).texts)
    texts = [text for text in listed for _ in range(num_images)]
    artifact = load_artifact(
        resolve(model), Path(lora) if lora is not None else None, parse_dtype(dtype), resolve_device(device)
    )
    size = (height, width) if height is not None and width is not None else None
    images = draw(
        artifact.pipeline, texts, [seed + i for i in range(len(texts))], recipe=artifact.recipe, experts=artifact.experts,
        adapter=artifact.adapter, steps=steps, guidance=guidance, negative_prompt=negative_prompt, size=size,
        scheduler=scheduler, batch_size=batch_size,
    )  # fmt: skip
    paths: list[Path] = []
    shown: list[torch.Tensor] = []
    for batch in images:
        shown.append(images_to_tensor(batch[: max(0, MAX_GRID_IMAGES - len(paths))]))
        paths += save_images(batch, folder, len(paths))
    drawn = torch.cat(shown)
    columns = num_images if num_images > 1 else min(8, len(drawn))
    make_image_grid(list(drawn.split(columns))).save(folder / "grid.png")
    (folder / "prompts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return paths


def _proof_prompts(session: Session) -> list[str]:
    prompts = session.setup.prompts
    return [prompts[i % len(prompts)] for i in range(PROOF_IMAGES)]


def _quantized_student(
    run: str | Path, device: str | None, checkpoint: Literal["latest", "best"]
) -> QuantizedStudent | None:
    """What the student draws on its quantised base, for the proof's prompts and seeds; None where the base is not."""
    model = run_config(run).model
    if model.quantization == "none":
        return None
    session, _ = open_run(run, device, checkpoint=checkpoint)
    recipe, seeds = session.recipe, list(range(PROOF_IMAGES))
    latents = final_latents(session.checkpoint, session.triple, session.experts, recipe, _proof_prompts(session), seeds)
    return QuantizedStudent(f"a base in {model.quantization} ({model.dtype} elsewhere)", latents.cpu())


def parse_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise UserError(f"the dtype {name!r} is not known: use one of {', '.join(DTYPES)}")
    return DTYPES[name]
