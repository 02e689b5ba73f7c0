"""Evaluates samplers: draws the missing images, measures them, writes the report.

It runs on any number of processes and continues where an earlier call stopped.

OUTPUT/images/<row>/00000.png ...   named by global index; existing files are kept
       evaluation.json              the protocol record, which a continued evaluation must match
       report.json  report.md  report.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from accelerate import PartialState

from stepdistill.assets import FOLDER
from stepdistill.data.fashion import parse_caption
from stepdistill.errors import UserError
from stepdistill.evaluation.generation import GeneratedImages, Sampler, claim_output_folder, generate_missing_images
from stepdistill.evaluation.image_scores import ImageScorers, ImageScores, score_images
from stepdistill.evaluation.measure import (
    METRICS_NEEDING_FEATURES,
    METRICS_WITHOUT_NETWORK,
    ImageSetFeatures,
    check_metrics,
    compute_metrics,
    measure_images,
    merge,
    read_reference,
)
from stepdistill.evaluation.metrics.win_rate import win_rate
from stepdistill.evaluation.networks.features import FeatureExtractor
from stepdistill.evaluation.protocols import Metric, PromptSet, Protocol, metric_label, text_hash
from stepdistill.evaluation.reports.html_report import ReportImage
from stepdistill.evaluation.reports.report import Report, ReportRow, ReportSource
from stepdistill.evaluation.reports.writing import make_record, write_report
from stepdistill.evaluation.scorers import ScoreArray
from stepdistill.files.disk_errors import disk_errors_as_user_errors

NUM_REPORT_IMAGES = 8
JUDGE_SIZE = (32, 32)


@dataclass(frozen=True)
class Evaluation:
    """What is measured, and how; everything except the samplers.

    Attributes:
        name: the protocol's name, or its YAML file.
        protocol: the protocol with the user's changes.
        prompts: prompts and seeds.
        extractor: the feature network; None if no metric needs one.
        reference: folder or statistics; None takes the protocol's own reference, or the teacher's images.
        scorers: CLIP scores, rewards and LPIPS.
        keep_images: write the images as PNG, from which a stopped evaluation continues; otherwise they stay in memory.
        recursive: search sub-folders of the reference.
        allow_lossy: take JPEG and WebP files of the reference.
    """

    name: str
    protocol: Protocol
    prompts: PromptSet
    extractor: FeatureExtractor | None
    reference: Path | None = None
    scorers: ImageScorers = field(default_factory=ImageScorers)
    keep_images: bool = True
    recursive: bool = False
    allow_lossy: bool = False

    @property
    def keep_features(self) -> bool:
        """Whether a metric needs every feature vector."""
        return bool(METRICS_NEEDING_FEATURES & set(self.protocol.metrics))

    @property
    def needs_reference(self) -> bool:
        """Whether a metric compares the images with others."""
        return needs_network(self.protocol.metrics)


def needs_network(metrics: Sequence[Metric]) -> bool:
    """Returns whether any of the metrics needs a feature network and a reference."""
    return not set(metrics) <= METRICS_WITHOUT_NETWORK


def evaluate_samplers(
    samplers: Sequence[Sampler],
    evaluation: Evaluation,
    output: Path,
    *,
    stats: Path | None = None,
    source: ReportSource | None = None,
) -> Report:
    """Measures all samplers at the same prompts and seeds, and writes the report.

    Args:
        samplers: one row each.
        evaluation: what is measured.
        output: folder of images and report.
        stats: `stats.jsonl` of the training run, for the page.
        source: model, command and date, for the report.

    Raises:
        UserError: no reference, a folder that holds another evaluation, fewer than two images, or a full disk.
    """
    protocol, prompts, extractor = evaluation.protocol, evaluation.prompts, evaluation.extractor
    metrics, chain = protocol.metrics, protocol.chain.chain()
    marker = {
        "protocol": evaluation.name,
        "prompts": prompts.sha256,
        "images": len(prompts),
        "quantize": protocol.quantize,
    }
    _check_reference(evaluation, samplers)
    _check_set(prompts, metrics, extractor)
    _check_sizes(evaluation, samplers)
    fixed = _read_fixed_reference(evaluation)
    check_metrics(metrics, fixed, len(prompts))
    drawn: dict[str, GeneratedImages] = {}
    measured: dict[str, ImageSetFeatures] = {}
    with disk_errors_as_user_errors(output):
        claim_output_folder(output, marker, [(s.name, s.description) for s in samplers])
        for sampler in samplers:
            folder = output / "images" / sampler.name if evaluation.keep_images else None
            images = generate_missing_images(sampler, prompts, folder)
            pixels = map(chain, images.iter_local_images())
            own = measure_images(pixels, extractor, keep_features=evaluation.keep_features)
            drawn[sampler.name], measured[sampler.name] = images, merge(own, len(prompts))
    truth = fixed
    if truth is None and evaluation.needs_reference:
        truth = _teacher_reference(samplers, prompts, measured)
    scored = {s.name: score_images(drawn[s.name], prompts, metrics, evaluation.scorers, chain) for s in samplers}
    rows, notes, floor = _rows(samplers, evaluation, measured, truth, drawn, scored)
    where = str(evaluation.reference or protocol.reference.kind)
    record = make_record(
        evaluation.name, protocol, prompts, len(prompts), extractor, truth, where, evaluation.scorers.record()
    )
    wins = _win_rates({name: found.values for name, found in scored.items()}, prompts)
    report = Report(record, tuple(rows), floor, wins, tuple(notes), source)
    write_report(report, output, _report_images(drawn, prompts, evaluation.keep_images), stats)
    return report


# ---------------------------------------------------------------- parts


def _rows(
    samplers: Sequence[Sampler],
    evaluation: Evaluation,
    measured: Mapping[str, ImageSetFeatures],
    truth: ImageSetFeatures | None,
    drawn: Mapping[str, GeneratedImages],
    scored: Mapping[str, ImageScores],
) -> tuple[list[ReportRow], list[str], float | None]:
    """Computes the rows, the notes about what could not be computed, and the noise floor of the Fréchet distance."""
    prompts, protocol = evaluation.prompts, evaluation.protocol
    rows: list[ReportRow] = []
    notes: list[str] = []
    floor: float | None = None
    for sampler in samplers:
        own = measured[sampler.name]
        asked = [metric for metric in protocol.metrics if not _is_self_comparison(metric, own, truth)]
        values = compute_metrics(own, truth, asked, np.random.default_rng(0), prompts.prompts)
        floor = floor if values.noise_floor is None else values.noise_floor
        found = {**values.metrics, **scored[sampler.name].means}
        notes += [f"{sampler.name}: {metric} could not be computed" for metric in asked if metric not in found]
        notes += [f"{sampler.name}: {note}" for note in scored[sampler.name].notes]
        labelled = {metric_label(key, len(prompts), protocol.prompts.count): value for key, value in found.items()}
        rows.append(
            ReportRow(
                sampler.name, sampler.steps, sampler.network_calls, sampler.guidance, sampler.description, len(prompts),
                drawn[sampler.name].seconds_per_image, labelled,
            )
        )  # fmt: skip
    return rows, notes, floor


def _check_reference(evaluation: Evaluation, samplers: Sequence[Sampler]) -> None:
    """Checks before anything is drawn that there will be a reference. Raises UserError."""
    protocol = evaluation.protocol
    if not evaluation.needs_reference or evaluation.reference is not None or protocol.reference.kind == "builtin":
        return
    if protocol.reference.kind == "images":
        raise UserError(f"the protocol needs a reference: give --reference with {protocol.reference.hint}")
    if not any(sampler.name == "teacher" for sampler in samplers):
        raise UserError(
            "the reference is the teacher and no teacher is drawn: give --teacher-steps N, or --reference DIR"
        )


def _check_set(prompts: PromptSet, metrics: Sequence[Metric], extractor: FeatureExtractor | None) -> None:
    """Checks what depends on the prompts and the network only. Raises UserError."""
    processes = PartialState().num_processes
    if len(prompts) < processes:
        raise UserError(f"{len(prompts)} images are fewer than the {processes} processes: start fewer processes")
    if "cmmd" in metrics and extractor is not None and "L2-normalised" not in extractor.record.preprocessing:
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


def _check_sizes(evaluation: Evaluation, samplers: Sequence[Sampler]) -> None:
    """Checks before anything is drawn that the networks can read the images. Raises UserError."""
    for sampler in samplers:
        if sampler.size is None:
            continue
        height, width = evaluation.protocol.chain.chain()(np.zeros((*sampler.size, 3), np.uint8)).shape[:2]
        if evaluation.extractor is not None:
            evaluation.extractor.check_size(height, width)
        if "prompt_accuracy" in evaluation.protocol.metrics and (height, width) != JUDGE_SIZE:
            raise UserError(
                f"prompt_accuracy reads {JUDGE_SIZE[1]} x {JUDGE_SIZE[0]} images and {sampler.name} draws {width} x {height}: leave it out"
            )


def _read_fixed_reference(evaluation: Evaluation) -> ImageSetFeatures | None:
    """Reads the reference before anything is drawn; None if there is none, or if it is the teacher's images."""
    protocol, extractor = evaluation.protocol, evaluation.extractor
    if extractor is None or (evaluation.reference is None and protocol.reference.kind == "teacher"):
        return None
    place = evaluation.reference if evaluation.reference is not None else FOLDER / str(protocol.reference.builtin)
    reference = read_reference(
        place, extractor, keep_features=evaluation.keep_features, chain=protocol.chain.chain(),
        recursive=evaluation.recursive, lossy=evaluation.allow_lossy or protocol.reference.lossy,
    )  # fmt: skip
    wanted = protocol.reference.count
    if wanted is not None and 0 < reference.count != wanted:
        raise UserError(
            f"the reference {str(place)!r} has {reference.count} images and the protocol wants {wanted}: give {protocol.reference.hint}"
        )
    return reference


def _teacher_reference(
    samplers: Sequence[Sampler], prompts: PromptSet, measured: dict[str, ImageSetFeatures]
) -> ImageSetFeatures:
    teacher = next(sampler for sampler in samplers if sampler.name == "teacher")
    return replace(measured["teacher"], content_hash=text_hash([teacher.description, prompts.sha256]))


def _is_self_comparison(metric: Metric, own: ImageSetFeatures, truth: ImageSetFeatures | None) -> bool:
    """Returns whether the metric would compare the teacher with itself."""
    alone = ("diversity", "saturation", "brightness", "sharpness")
    return truth is not None and own.statistics is truth.statistics and metric not in alone


def _report_images(drawn: Mapping[str, GeneratedImages], prompts: PromptSet, kept: bool) -> list[ReportImage]:
    """Chooses a few images of each row for the page, at the same prompts. This is a collective."""
    chosen = range(0, len(prompts), max(1, len(prompts) // NUM_REPORT_IMAGES))[:NUM_REPORT_IMAGES]
    return [
        ReportImage(name, prompts.prompts[i], image, f"images/{name}/{i:05d}.png" if kept else None)
        for name, images in drawn.items()
        for i, image in zip(chosen, images.images_at(chosen), strict=True)
    ]


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
