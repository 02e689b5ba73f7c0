"""`stepdistill evaluate` and `compare` as functions: models, LoRAs, runs and folders of images, by a named protocol.

report = stepdistill.evaluate("builtin:teacher", "out", protocol="fashion", lora="lora", teacher_steps=50, teacher_guidance=2)

The keywords are the fields of `ModelOptions` and `FolderOptions` in `api/evaluation_options.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stepdistill.api.evaluation_options import FolderOptions, MeasuringOptions, ModelOptions, command_of, parse_options
from stepdistill.api.run_evaluation import as_run_evaluation, local_base
from stepdistill.api.training import default_export_format, export, parse_dtype
from stepdistill.config.schema import load_config
from stepdistill.errors import UserError
from stepdistill.evaluation.folders import ImageSource, check_needs, evaluate_folder
from stepdistill.evaluation.generation import Sampler, format_arguments
from stepdistill.evaluation.image_scores import ImageScorers
from stepdistill.evaluation.metrics.lpips import Lpips
from stepdistill.evaluation.networks.features import FeatureExtractor, load_extractor, weights_hash
from stepdistill.evaluation.protocols import (
    PromptConfig,
    Protocol,
    expand_metric_names,
    load_protocol,
    prompt_set,
)
from stepdistill.evaluation.reports.comparison import compare_reports
from stepdistill.evaluation.reports.report import Report, ReportSource
from stepdistill.evaluation.runner import Evaluation, evaluate_samplers, needs_network
from stepdistill.evaluation.scorers import ClipScorer, RewardScorer
from stepdistill.exporting.export import check_output_folder
from stepdistill.files.locks import locked_folder
from stepdistill.files.outputs import check_file_is_writable, check_folder_is_writable
from stepdistill.inference.artifact import (
    SCHEDULERS,
    Artifact,
    draw,
    load_artifact,
    load_base,
    supports_negative_prompt,
)
from stepdistill.training.session import process_device


def evaluate(model: str, output: str | Path, **options: Any) -> Report:
    """Measures a model, a LoRA or a run at several step counts, at the same prompts and seeds, by a named protocol.

    Args:
        model: as for `sample`, or the folder of a run, whose student is measured.
        output: folder of images and report; an evaluation that was stopped continues from it.
        options: the fields of `ModelOptions`, as in `steps=[1, 2, 4], teacher_steps=50`; also `size=(height, width)`.

    Raises:
        UserError: an unknown option, missing prompts, reference or weights, an output folder that holds something else.
    """
    return measure_model(model, output, parse_options(ModelOptions, options))


def evaluate_images(images: str | Path, reference: str | Path | None, output: str | Path, **options: Any) -> Report:
    """Measures a folder of images without a model: against a reference, by CLIP scores and rewards, or both.

    Args:
        images: folder, or statistics (.npz).
        reference: folder or statistics to compare with; None if the metrics need none.
        output: folder of the report; must be new or empty.
        options: the fields of `FolderOptions`, as in `metrics=["fid", "kid"], rewards=["pickscore"]`.

    Raises:
        UserError: an unknown option, no images, missing prompts or weights, an output folder that is not empty.
    """
    return measure_folder(images, output, parse_options(FolderOptions, {"reference": reference, **options}))


def measure_model(model: str, output: str | Path, options: ModelOptions) -> Report:
    """Does the work of `evaluate`, with checked options."""
    origin = _report_source(options, [model, "--output", str(output)], model, options.lora or "")
    if options.scheduler is not None and options.scheduler not in SCHEDULERS:
        raise UserError(f"the scheduler {options.scheduler!r} is not known: use one of {', '.join(SCHEDULERS)}")
    check_folder_is_writable(Path(output))
    options = as_run_evaluation(model, options)
    protocol = _changed(load_protocol(options.protocol or "prompts"), options)
    prompts = prompt_set(protocol, options.prompts, options.num_images, options.seeds_per_prompt)
    device = process_device(options.device)
    evaluation = Evaluation(
        options.protocol or "prompts", protocol, prompts, _extractor(protocol, device, options.download),
        Path(options.reference) if options.reference is not None else None, _scorers(options, device),
        keep_images=options.keep_images, recursive=options.recursive, allow_lossy=options.allow_lossy,
    )  # fmt: skip
    with _locked(Path(output)), TemporaryDirectory() as scratch:
        base, adapter, stats = _student_of(model, options.lora, Path(scratch) / "student", device)
        samplers = _samplers(base, adapter, options, protocol, device)
        return evaluate_samplers(samplers, evaluation, Path(output), stats=stats, source=origin)


def measure_folder(images: str | Path, output: str | Path, options: FolderOptions) -> Report:
    """Does the work of `evaluate_images`, with checked options."""
    origin = _report_source(options, ["--images", str(images), "--output", str(output)], "", "")
    check_output_folder(Path(output))
    if options.save_statistics is not None:
        check_file_is_writable(Path(options.save_statistics))
    reference = Path(options.reference) if options.reference is not None else None
    scored = bool(options.clip or options.rewards or options.lpips)
    default = ("fid",) if reference is not None or not scored else ()
    protocol = Protocol(
        description="a folder of images",
        prompts=PromptConfig(),
        features=options.features or "inception",
        resize=options.resize or "clean",
        metrics=tuple(expand_metric_names(default if options.metrics is None else options.metrics)),
    )
    check_needs(protocol.metrics, reference)
    device = process_device(options.device)
    wants_network = needs_network(protocol.metrics) or options.save_statistics is not None
    extractor = load_extractor(
        protocol.features, resize=protocol.resize, device=device, download=options.download
    ) if wants_network else None  # fmt: skip
    source = ImageSource(Path(images), reference, options.prompts, options.recursive, options.allow_lossy)
    saved = Path(options.save_statistics) if options.save_statistics is not None else None
    scorers = _scorers(options, device)
    with _locked(Path(output)):
        return evaluate_folder(
            source, protocol, extractor, Path(output), scorers=scorers, save_statistics=saved, origin=origin
        )


def compare(first: str | Path, second: str | Path, output: str | Path | None = None) -> str:
    """Puts two reports into one table.

    Args:
        first: report.json of an evaluation, or its folder.
        second: the other one.
        output: folder for comparison.md and comparison.html, with the images of both evaluations; None writes nothing.

    Raises:
        UserError: the protocols differ, or a file is no report.
    """
    return compare_reports(Path(first), Path(second), Path(output) if output is not None else None)


def _locked(output: Path) -> AbstractContextManager[None]:
    """Locks the output folder; all processes of one evaluation share the lock of the first."""
    return locked_folder(output, "evaluation") if os.environ.get("RANK", "0") == "0" else nullcontext()


def _report_source(options: MeasuringOptions, leading: list[str], model: str, lora: str) -> ReportSource:
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return ReportSource(command_of(options, *leading), date, model, lora)


def _extractor(protocol: Protocol, device: torch.device, download: bool) -> FeatureExtractor | None:
    if not needs_network(protocol.metrics):
        return None
    return load_extractor(protocol.features, resize=protocol.resize, device=device, download=download)


def _scorers(options: MeasuringOptions, device: torch.device) -> ImageScorers:
    download = options.download
    return ImageScorers(
        ClipScorer(options.clip, device, download=download) if options.clip is not None else None,
        options.clip_conventions,
        [RewardScorer(name, device, download=download) for name in options.rewards],
        Lpips(options.lpips, device, download=download) if options.lpips is not None else None,
    )


def _samplers(
    base: str, adapter: Path | None, options: ModelOptions, protocol: Protocol, device: torch.device
) -> list[Sampler]:
    """Loads the networks and makes one sampler per row, the teacher's first."""
    artifact = load_artifact(local_base(base, download=options.download), adapter, parse_dtype(options.dtype), device)
    recipe = artifact.recipe
    own_w = options.guidance if options.guidance is not None else (recipe.w if recipe else 7.5)
    own_steps = list(options.steps) or [recipe.num_inference_steps if recipe else 50]
    label = "student" if recipe is not None else "model"
    student = Candidate(artifact, _network_hash(artifact))
    samplers = [_sampler(f"{label}-{n}", student, n, own_w, options.scheduler, options, protocol) for n in own_steps]
    if options.teacher_steps is not None:
        teacher = student
        if recipe is not None:
            source = local_base(recipe.base, download=options.download)
            origin = Artifact(load_base(source, recipe, parse_dtype(options.dtype), device), None)
            teacher = Candidate(origin, _network_hash(origin))
        w = options.teacher_guidance
        if w is None:
            w = recipe.baked_guidance if recipe else own_w
        samplers.insert(0, _sampler("teacher", teacher, options.teacher_steps, w, "ddim", options, protocol))
    return samplers


def _changed(protocol: Protocol, options: ModelOptions) -> Protocol:
    """Returns the protocol with the user's features, resizing and metrics."""
    changes: dict[str, object] = {
        "features": options.features or protocol.features,
        "resize": options.resize or protocol.resize,
        "metrics": protocol.metrics if options.metrics is None else tuple(expand_metric_names(options.metrics)),
    }
    return protocol.model_copy(update=changes)


@dataclass(frozen=True)
class Candidate:
    """A loaded model, and the hash of its networks including adapters."""

    artifact: Artifact
    weights: str


def _network_hash(artifact: Artifact) -> str:
    pipeline = artifact.pipeline
    others = artifact.experts.networks if artifact.experts is not None else ()
    adapters = () if artifact.adapter is None else (artifact.adapter,)
    networks = (pipeline.unet if "unet" in pipeline.components else pipeline.transformer, *others, *adapters)
    return "+".join(weights_hash(network)[:16] for network in networks)


def _sampler(
    name: str,
    candidate: Candidate,
    steps: int,
    w: float,
    scheduler: str | None,
    options: ModelOptions,
    protocol: Protocol,
) -> Sampler:
    """Makes the sampler of a pipeline; its description distinguishes it from every other setting and network."""
    artifact, recipe = candidate.artifact, candidate.artifact.recipe

    def drawn(texts: Sequence[str], seeds: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        return draw(
            artifact.pipeline, texts, seeds, recipe=recipe, experts=artifact.experts, adapter=artifact.adapter,
            steps=steps, guidance=w, size=options.size, scheduler=scheduler, batch_size=options.batch_size,
            quantize=protocol.quantize,
        )  # fmt: skip

    solver = scheduler or (recipe.scheduler_class if recipe is not None else "ddim")
    described = format_arguments(
        {
            "network": candidate.weights, "solver": solver, "steps": steps, "w": f"{w:g}", "dtype": options.dtype,
            "size": options.size,
        }
    )  # fmt: skip
    calls = 2 if w > 1 and supports_negative_prompt(artifact.pipeline) and artifact.adapter is None else 1
    return Sampler(name, steps, steps * calls, w, described, drawn, _image_size(artifact, options))


def _image_size(artifact: Artifact, options: ModelOptions) -> tuple[int, int] | None:
    """Returns (height, width) of the images before they are drawn: asked for, trained, or the pipeline's default."""
    recipe, pipeline = artifact.recipe, artifact.pipeline
    if options.size is not None:
        return options.size
    if recipe is not None and all(recipe.resolution):
        return recipe.resolution[0], recipe.resolution[1]
    if "unet" not in pipeline.components:
        return None
    side = pipeline.unet.config.sample_size
    return (side * pipeline.vae_scale_factor,) * 2 if isinstance(side, int) else None


def _student_of(
    model: str, lora: str | Path | None, scratch: Path, place: torch.device
) -> tuple[str, Path | None, Path | None]:
    """Returns (base, LoRA folder, stats.jsonl) of what is measured; the student of a run is exported, with its proof, first."""
    run = Path(model)
    if not (run / "config.yaml").is_file():
        return model, Path(lora) if lora is not None else None, None
    if lora is not None:
        raise UserError(f"{model!r} is a run, which has its own student: leave --lora out")
    config = load_config(run / "config.yaml")
    form = default_export_format(config)
    export(run, form, scratch, device=str(place))
    stats = run / "stats.jsonl"
    return (str(scratch), None, stats) if form == "pipeline" else (config.model.path, scratch, stats)
