"""Evaluating samplers: draw what is missing, measure, report. Runs on any number of processes and goes on where it stopped.

OUTPUT/images/<row>/00000.png ...   by global index; what is there already is kept
       evaluation.json              the record of the protocol, which a continued run must match
       report.json  report.md  report.html
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from accelerate import PartialState

from stepdistill.assets import FOLDER
from stepdistill.data.fashion import parse_caption
from stepdistill.errors import UserError
from stepdistill.evaluation.fashion import FIRST_SEED
from stepdistill.evaluation.generation import GeneratedImages, Sampler, claim_output_folder, generate_missing_images
from stepdistill.evaluation.html_report import html_page
from stepdistill.evaluation.image_scores import ImageScorers, score_images
from stepdistill.evaluation.images import ImageArray
from stepdistill.evaluation.measure import (
    METRICS_NEEDING_FEATURES,
    ImageSetFeatures,
    check_metrics,
    compute_metrics,
    feature_provenance,
    measure_images,
    merge,
    read_reference,
)
from stepdistill.evaluation.networks.features import FeatureExtractor
from stepdistill.evaluation.protocols import Metric, PromptSet, Protocol, metric_label, text_hash
from stepdistill.evaluation.report import ProtocolRecord, Report, ReportRow, markdown
from stepdistill.evaluation.text import ScoreArray, UnavailableReward, win_rate
from stepdistill.files.atomic import write_atomically

logger = logging.getLogger(__name__)
NUM_REPORT_IMAGES = 8


def evaluate_samplers(
    samplers: Sequence[Sampler],
    name: str,
    protocol: Protocol,
    prompts: PromptSet,
    extractor: FeatureExtractor,
    reference: str | Path | None,
    output: Path,
    *,
    metrics: Sequence[Metric],
    beside: ImageScorers | None = None,
    keep_images: bool = True,
    recursive: bool = False,
    allow_lossy: bool = False,
    stats: Path | None = None,
) -> Report:
    """Rows for all samplers at equal prompts and seeds.

    Args:
        keep_images: write them as PNG, which a stopped evaluation goes on from; else they stay in memory.
        recursive, allow_lossy: of the reference's folder.
        reference: folder or statistics; None takes the protocol's own, or the teacher's images.
        stats: `stats.jsonl` of the training run, for the page.

    Raises:
        UserError: no reference, a folder that holds another evaluation, or fewer images than two.
    """
    beside = beside or ImageScorers()
    keep_features = bool(METRICS_NEEDING_FEATURES & set(metrics))
    chain = protocol.chain.chain()
    marker = {"protocol": name, "prompts": prompts.sha256, "images": len(prompts), "quantize": protocol.quantize}
    _check_reference(protocol, reference, samplers)
    _check_set(prompts, metrics, extractor)
    of_teacher = reference is None and protocol.reference.kind == "teacher"
    fixed = (
        None
        if of_teacher
        else _read_protocol_reference(protocol, reference, extractor, keep_features, recursive, allow_lossy)
    )
    check_metrics(metrics, fixed, len(prompts))
    claim_output_folder(output, marker, [(s.name, s.description) for s in samplers])
    drawn: dict[str, GeneratedImages] = {}
    measured: dict[str, ImageSetFeatures] = {}
    for sampler in samplers:
        images = generate_missing_images(sampler, prompts, output / "images" / sampler.name if keep_images else None)
        own = measure_images(map(chain, images.iter_local_images()), extractor, keep_features=keep_features)
        drawn[sampler.name], measured[sampler.name] = images, merge(own, len(prompts))
    truth = fixed or _teacher_reference(samplers, prompts, measured)
    scored = {s.name: score_images(drawn[s.name], prompts, metrics, beside, chain) for s in samplers}
    rows, notes = (
        [],
        [f"{r.name}: not available ({r.reason})" for r in beside.rewards if isinstance(r, UnavailableReward)],
    )
    floor: float | None = None
    for sampler in samplers:
        own = measured[sampler.name]
        asked = [metric for metric in metrics if not _is_self_comparison(metric, own, truth)]
        values = compute_metrics(own, truth, asked, np.random.default_rng(0), prompts.prompts)
        floor = floor if values.noise_floor is None else values.noise_floor
        found = {**values.metrics, **scored[sampler.name].means}
        notes += [f"{sampler.name}: {m} could not be computed" for m in asked if m not in found]
        notes += [f"{sampler.name}: {note}" for note in scored[sampler.name].notes]
        rows.append(
            ReportRow(
                sampler.name, sampler.steps, sampler.network_calls, sampler.guidance, sampler.description, len(prompts),
                drawn[sampler.name].seconds_per_image,
                {metric_label(key, len(prompts), protocol.prompts.count): value for key, value in found.items()},
            )
        )  # fmt: skip
    source = str(reference or protocol.reference.kind)
    record = make_record(name, protocol, prompts.sha256, len(prompts), extractor, truth, source, beside.record())
    wins = _win_rates({name: found.values for name, found in scored.items()}, prompts)
    report = Report(record, tuple(rows), floor, wins, tuple(notes))
    step = max(1, len(prompts) // NUM_REPORT_IMAGES)
    pictures = {
        name: images.images_at(range(0, len(prompts), step)[:NUM_REPORT_IMAGES]) for name, images in drawn.items()
    }
    _write_reports(report, output, pictures, stats)
    return report


def evaluate_folders(
    images: str | Path,
    reference: str | Path,
    protocol: Protocol,
    extractor: FeatureExtractor,
    output: Path,
    *,
    recursive: bool = False,
    allow_lossy: bool = False,
    save_statistics: Path | None = None,
) -> Report:
    """A report of two sets of images (or of statistics), no model involved.

    Raises:
        UserError: a folder without images, statistics of another network, a metric that needs more than they hold.
    """
    metrics = protocol.metrics
    keep_features = bool(METRICS_NEEDING_FEATURES & set(metrics))
    chain = protocol.chain.chain()
    if odd := {"prompt_accuracy", "diversity"} & set(metrics):
        raise UserError(f"{', '.join(sorted(odd))} need prompts, which a folder does not tell: leave them out")
    sets = [
        read_reference(
            source, extractor, keep_features=keep_features, chain=chain, recursive=recursive, lossy=allow_lossy
        )
        for source in (images, reference)
    ]
    own, truth = sets
    lossy = ", lossy files allowed" if allow_lossy else ""
    record = make_record("folders", protocol, "", own.count, extractor, truth, str(reference), lossy)
    values = compute_metrics(own, truth, metrics, np.random.default_rng(0))
    row = ReportRow(Path(images).name, 0, 0, 1.0, "images from a folder", own.count, None, values.metrics)
    notes = tuple(f"{metric} could not be computed" for metric in metrics if metric not in values.metrics)
    report = Report(record, (row,), values.noise_floor, notes=notes)
    _write_reports(report, output, {}, None)
    if save_statistics is not None and PartialState().is_main_process:
        kept = {} if own.features is None else {"features": own.features}
        own.statistics.save(save_statistics, feature_provenance(extractor, chain), **kept)
    return report


def make_record(
    name: str,
    protocol: Protocol,
    prompts_sha256: str,
    images: int,
    extractor: FeatureExtractor,
    reference: ImageSetFeatures,
    source: str,
    beside: str,
) -> ProtocolRecord:
    """The resolved protocol of a measurement."""
    return ProtocolRecord(
        protocol=Path(name).stem if name.endswith((".yaml", ".yml")) else name,
        prompts_sha256=prompts_sha256,
        images=images,
        seeds=f"{FIRST_SEED} + global index" if prompts_sha256 else "",
        reference=Path(source).name,
        reference_sha256=reference.content_hash,
        reference_count=reference.count,
        chain=protocol.chain.text(),
        quantize=protocol.quantize,
        features=extractor.record.name,
        features_weights=extractor.record.weights,
        features_preprocessing=extractor.record.preprocessing,
        beside=beside,
        version=version("stepdistill"),
    )


# ---------------------------------------------------------------- parts


def _check_reference(protocol: Protocol, reference: str | Path | None, samplers: Sequence[Sampler]) -> None:
    """Before anything is drawn."""
    if reference is not None or protocol.reference.kind == "builtin":
        return
    if protocol.reference.kind == "images":
        raise UserError(f"the protocol needs a reference: give --reference with {protocol.reference.hint}")
    if not any(sampler.name == "teacher" for sampler in samplers):
        raise UserError(
            "the reference is the teacher and no teacher is drawn: give --teacher-steps N, or --reference DIR"
        )


def _check_set(prompts: PromptSet, metrics: Sequence[Metric], extractor: FeatureExtractor) -> None:
    """What the prompts and the network alone rule out."""
    processes = PartialState().num_processes
    if len(prompts) < processes:
        raise UserError(f"{len(prompts)} images are fewer than the {processes} processes: start fewer processes")
    if "cmmd" in metrics and "L2-normalised" not in extractor.record.preprocessing:
        raise UserError(
            f"cmmd is defined on CLIP embeddings and the features are {extractor.record.name!r}: use clip:PATH"
        )
    if "prompt_accuracy" in metrics:
        for prompt in prompts.prompts:
            try:
                parse_caption(prompt)
            except ValueError as error:
                raise UserError(
                    f"prompt_accuracy reads captions of the embedded teacher only ({error}): leave it out"
                ) from None


def _read_protocol_reference(
    protocol: Protocol,
    source: str | Path | None,
    extractor: FeatureExtractor,
    keep_features: bool,
    recursive: bool,
    allow_lossy: bool,
) -> ImageSetFeatures:
    """The reference that does not depend on what is drawn; read before anything is, since drawing takes hours."""
    place = source if source is not None else FOLDER / str(protocol.reference.builtin)
    reference = read_reference(
        place, extractor, keep_features=keep_features, chain=protocol.chain.chain(), recursive=recursive,
        lossy=allow_lossy or protocol.reference.lossy,
    )  # fmt: skip
    wanted = protocol.reference.count
    if wanted is not None and 0 < reference.count != wanted:
        raise UserError(
            f"the reference {str(place)!r} has {reference.count} images and the protocol wants {wanted}: give {protocol.reference.hint}"
        )
    return reference


def _write_reports(
    report: Report, output: Path, pictures: Mapping[str, Sequence[ImageArray]], stats: Path | None
) -> None:
    """report.json and report.md first: a page that cannot be drawn must not lose hours of numbers."""
    state = PartialState()
    if state.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / "report.json", (report.to_json() + "\n").encode())
        write_atomically(output / "report.md", markdown(report).encode())
        try:
            write_atomically(output / "report.html", html_page(report, pictures, stats).encode())
        except ImportError as error:
            logger.warning("report.html was not written (%s): pip install 'stepdistill[evaluation]'", error)
    state.wait_for_everyone()


def _teacher_reference(
    samplers: Sequence[Sampler], prompts: PromptSet, measured: dict[str, ImageSetFeatures]
) -> ImageSetFeatures:
    teacher = next(sampler for sampler in samplers if sampler.name == "teacher")
    return replace(measured["teacher"], content_hash=text_hash([teacher.description, prompts.sha256]))


def _is_self_comparison(metric: Metric, own: ImageSetFeatures, truth: ImageSetFeatures) -> bool:
    """The teacher against itself says nothing."""
    return own.statistics is truth.statistics and metric not in ("diversity", "saturation", "brightness", "sharpness")


def _win_rates(
    scores: dict[str, dict[str, ScoreArray]], prompts: PromptSet
) -> dict[str, dict[str, tuple[float, float, float]]]:
    teacher = scores.get("teacher")
    if teacher is None:
        return {}
    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    for row, own in scores.items():
        for name, values in own.items():
            if row != "teacher":
                won = win_rate(values, teacher[name], prompts.prompts, np.random.default_rng(0))
                found.setdefault(name, {})[row] = (won.rate, won.low, won.high)
    return found
