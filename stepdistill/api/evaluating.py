"""`stepdistill evaluate` and `compare` as functions: models, LoRAs, runs and folders of images, by a named protocol.

report = stepdistill.evaluate("builtin:teacher", "out", protocol="fashion", lora="lora", teacher_steps=50, teacher_guidance=2)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray

from stepdistill.api.training import dtype_of, export, natural_format
from stepdistill.assets import resolve
from stepdistill.config.schema import load_config
from stepdistill.errors import UserError
from stepdistill.evaluation.generation import Sampler, format_arguments
from stepdistill.evaluation.image_scores import ImageScorers
from stepdistill.evaluation.images import Quantize
from stepdistill.evaluation.metrics.lpips import Lpips
from stepdistill.evaluation.networks.features import load_extractor, weights_hash
from stepdistill.evaluation.networks.resize import ResizeMode
from stepdistill.evaluation.protocols import PromptConfig, Protocol, expand_metric_names, load_protocol, prompt_set
from stepdistill.evaluation.report import Report
from stepdistill.evaluation.report import compare as compare_reports
from stepdistill.evaluation.runner import evaluate_folders, evaluate_samplers
from stepdistill.evaluation.text import ClipScorer, load_reward
from stepdistill.exporting.export import check_output_folder
from stepdistill.files.outputs import check_file_is_writable, check_folder_is_writable
from stepdistill.inference.artifact import (
    SCHEDULERS,
    Artifact,
    draw,
    load_artifact,
    load_base,
    supports_negative_prompt,
)
from stepdistill.training.session import place_of


def evaluate(
    model: str,
    output: str | Path,
    *,
    protocol: str = "prompts",
    lora: str | Path | None = None,
    steps: Sequence[int] = (),
    guidance: float | None = None,
    scheduler: str | None = None,
    teacher_steps: int | None = None,
    teacher_guidance: float | None = None,
    prompts: str | None = None,
    reference: str | Path | None = None,
    num_images: int | None = None,
    seeds_per_prompt: int = 1,
    features: str | None = None,
    resize: ResizeMode | None = None,
    metrics: Sequence[str] = (),
    clip: str | None = None,
    clip_conventions: Sequence[str] = ("gigagan",),
    rewards: Sequence[str] = (),
    lpips: str | None = None,
    size: tuple[int, int] | None = None,
    keep_images: bool = True,
    recursive: bool = False,
    allow_lossy: bool = False,
    batch_size: int = 8,
    dtype: str = "float32",
    device: str | None = None,
    download: bool = False,
) -> Report:
    """Measure a model, a LoRA or a run at several step counts, on the same prompts and seeds, by a named protocol.

    Args:
        model: as for `sample`, or the folder of a run, whose student is measured.
        protocol: a shipped name (`stepdistill list protocols`), or a YAML file.
        steps: step counts to draw at; the recipe's own, or 50, by default.
        teacher_steps, teacher_guidance: draw the base without the LoRA too, with DDIM at this scale w.
        features, resize, metrics: instead of the protocol's, which makes it another protocol.
        lpips: backbone (alex, vgg, squeeze) of the pairwise LPIPS of one prompt's images.
        recursive, allow_lossy: of the reference's folder.
        keep_images: write the images, which a stopped evaluation goes on from; False keeps them in memory only.
        download: allow fetching weights that are not on this machine.

    Raises:
        UserError: missing prompts, reference or weights, or an output folder that holds something else.
    """
    check_folder_is_writable(Path(output))
    if teacher_guidance is not None and teacher_steps is None:
        raise UserError("--teacher-guidance is the scale of a teacher that is not drawn: give --teacher-steps too")
    if scheduler is not None and scheduler not in SCHEDULERS:
        raise UserError(f"the scheduler {scheduler!r} is not known: use one of {', '.join(SCHEDULERS)}")
    plan = _changed(load_protocol(protocol), features, resize, metrics)
    wanted = prompt_set(plan, prompts, num_images, seeds_per_prompt)
    place = place_of(device)
    extractor = load_extractor(plan.features, resize=plan.resize, device=place, download=download)
    scores = ImageScorers(
        ClipScorer(clip, place, download=download) if clip is not None else None,
        [name.strip() for name in clip_conventions],
        [load_reward(spec, place, download=download) for spec in rewards],
        Lpips(lpips, place, download=download) if lpips is not None else None,
    )
    with TemporaryDirectory() as scratch:
        base, adapter, stats = _student_of(model, lora, Path(scratch) / "student", place)
        artifact = load_artifact(resolve(base), adapter, dtype_of(dtype), place)
        recipe = artifact.recipe
        chosen = Settings(plan.quantize, batch_size, size, dtype)
        own_w = guidance if guidance is not None else (recipe.w if recipe else 7.5)
        own_steps = list(steps) or [recipe.num_inference_steps if recipe else 50]
        label = "student" if recipe is not None else "model"
        student = Candidate(artifact, _network_hash(artifact))
        samplers = [_sampler(f"{label}-{n}", student, n, own_w, scheduler, chosen) for n in own_steps]
        if teacher_steps is not None:
            teacher = student
            if recipe is not None:
                origin = Artifact(load_base(resolve(recipe.base), recipe, dtype_of(dtype), place), None)
                teacher = Candidate(origin, _network_hash(origin))
            w = teacher_guidance if teacher_guidance is not None else (recipe.baked_guidance if recipe else own_w)
            samplers.insert(0, _sampler("teacher", teacher, teacher_steps, w, "ddim", chosen))
        return evaluate_samplers(
            samplers, protocol, plan, wanted, extractor, reference, Path(output), metrics=plan.metrics, beside=scores,
            keep_images=keep_images, recursive=recursive, allow_lossy=allow_lossy, stats=stats,
        )  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What all samplers of one evaluation share."""

    quantize: Quantize
    batch_size: int
    size: tuple[int, int] | None
    dtype: str


@dataclass(frozen=True)
class Candidate:
    """What was loaded, and the hash of its networks, adapters included."""

    artifact: Artifact
    weights: str


def _network_hash(artifact: Artifact) -> str:
    pipeline = artifact.pipeline
    others = artifact.experts.networks if artifact.experts is not None else ()
    beside = () if artifact.adapter is None else (artifact.adapter,)
    networks = (pipeline.unet if "unet" in pipeline.components else pipeline.transformer, *others, *beside)
    return "+".join(weights_hash(network)[:16] for network in networks)


def _sampler(
    name: str,
    candidate: Candidate,
    steps: int,
    w: float,
    scheduler: str | None,
    shared: Settings,
) -> Sampler:
    """A pipeline at one setting; its description tells every other setting and every other network from it."""
    artifact, recipe = candidate.artifact, candidate.artifact.recipe

    def drawn(texts: Sequence[str], seeds: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        return draw(
            artifact.pipeline, texts, seeds, recipe=recipe, experts=artifact.experts, adapter=artifact.adapter,
            steps=steps, guidance=w, size=shared.size, scheduler=scheduler, batch_size=shared.batch_size, quantize=shared.quantize,
        )  # fmt: skip

    solver = scheduler or (recipe.scheduler_class if recipe is not None else "ddim")
    told = format_arguments(
        {"network": candidate.weights, "solver": solver, "steps": steps, "w": f"{w:g}", "dtype": shared.dtype, "size": shared.size}
    )  # fmt: skip
    calls = 2 if w > 1 and supports_negative_prompt(artifact.pipeline) and artifact.adapter is None else 1
    return Sampler(name, steps, steps * calls, w, told, drawn)


def evaluate_images(
    images: str | Path,
    reference: str | Path,
    output: str | Path,
    *,
    features: str = "inception",
    resize: ResizeMode = "clean",
    metrics: Sequence[str] = ("fid",),
    recursive: bool = False,
    allow_lossy: bool = False,
    save_statistics: str | Path | None = None,
    device: str | None = None,
    download: bool = False,
) -> Report:
    """Measure two image folders, or statistics files, against each other; no model.

    Args:
        save_statistics: write what was measured of `images` to this .npz, a reference for later, here or in clean-fid.

    Raises:
        UserError: no images, wrong weights, an output folder that holds something.
    """
    check_output_folder(Path(output))
    if save_statistics is not None:
        check_file_is_writable(Path(save_statistics))
    plan = Protocol(
        description="two sets of images",
        prompts=PromptConfig(),
        features=features,
        resize=resize,
        metrics=tuple(expand_metric_names(metrics)),
    )
    extractor = load_extractor(features, resize=resize, device=place_of(device), download=download)
    return evaluate_folders(
        images, reference, plan, extractor, Path(output), recursive=recursive, allow_lossy=allow_lossy,
        save_statistics=Path(save_statistics) if save_statistics is not None else None,
    )  # fmt: skip


def compare(first: str | Path, second: str | Path) -> str:
    """Two reports in one table. Raises UserError where their protocols differ."""
    names = [path.name if path.is_dir() else path.parent.name for path in (Path(first), Path(second))]
    if names[0] == names[1] or not all(names):
        names = [str(first), str(second)]
    return compare_reports(Report.read(first), Report.read(second), (names[0], names[1]))


def _changed(plan: Protocol, features: str | None, resize: ResizeMode | None, metrics: Sequence[str]) -> Protocol:
    changes: dict[str, object] = {
        "features": features or plan.features,
        "resize": resize or plan.resize,
        "metrics": tuple(expand_metric_names(metrics)) or plan.metrics,
    }
    return plan.model_copy(update=changes)


def _student_of(
    model: str, lora: str | Path | None, scratch: Path, place: torch.device
) -> tuple[str, Path | None, Path | None]:
    """(base, LoRA folder, stats.jsonl) of what is to be measured; a run's student is exported, proof and all, first."""
    run = Path(model)
    if not (run / "config.yaml").is_file():
        return model, Path(lora) if lora is not None else None, None
    if lora is not None:
        raise UserError(f"{model!r} is a run, which has its own student: leave --lora out")
    config = load_config(run / "config.yaml")
    form = natural_format(config)
    export(run, form, scratch, device=str(place))
    stats = run / "stats.jsonl"
    return (str(scratch), None, stats) if form == "pipeline" else (config.model.path, scratch, stats)
