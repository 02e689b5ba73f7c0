"""Evaluating samplers: draw what is missing, measure, report. Runs on any number of processes and goes on where it stopped.

OUTPUT/images/<row>/00000.png ...   by global index; what is there already is kept
       evaluation.json              the record of the protocol, which a continued run must match
       report.json  report.md  report.html
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from accelerate import PartialState

from stepdistill.assets import FOLDER
from stepdistill.errors import Refusal
from stepdistill.evaluation.drawing import Drawn, Sampler, claim, draw_missing
from stepdistill.evaluation.fashion import attribute_accuracy
from stepdistill.evaluation.features import FeatureExtractor
from stepdistill.evaluation.judge import Judge
from stepdistill.evaluation.measure import KEEP_FEATURES, Measured, compute, measure_images, merge, read_reference
from stepdistill.evaluation.page import html_page
from stepdistill.evaluation.perceptual import Lpips
from stepdistill.evaluation.protocols import Metric, PromptSet, Protocol, qualified, text_hash
from stepdistill.evaluation.report import Record, Report, ReportRow, write_report
from stepdistill.evaluation.text import ClipScorer, Reward, Unavailable, Values, clip_score, win_rate

logger = logging.getLogger(__name__)
SHOWN = 8


@dataclass(frozen=True)
class PictureScores:
    """What is measured on pictures and prompts beside the features: CLIP scores by convention, rewards, LPIPS."""

    clip: ClipScorer | None = None
    conventions: Sequence[str] = ()
    rewards: Sequence[Reward | Unavailable] = ()
    lpips: Lpips | None = None


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
    beside: PictureScores | None = None,
    keep_images: bool = True,
    stats: Path | None = None,
) -> Report:
    """Rows for all samplers at equal prompts and seeds.

    Args:
        keep_images: write them as PNG, which a stopped evaluation goes on from; else they stay in memory.
        reference: folder or statistics; None takes the protocol's own, or the teacher's images.
        stats: `stats.jsonl` of the training run, for the page.

    Raises:
        Refusal: no reference, a folder that holds another evaluation, or fewer images than two.
    """
    beside = beside or PictureScores()
    keep = bool(KEEP_FEATURES & set(metrics))
    _check_reference(protocol, reference, samplers)
    fixed = (
        None
        if reference is None and protocol.reference.kind == "teacher"
        else _read(protocol, reference, extractor, keep)
    )
    marker = {"protocol": name, "prompts": prompts.sha256, "images": len(prompts), "quantize": protocol.quantize}
    claim(output, marker, [(s.name, s.description) for s in samplers])
    drawn: dict[str, Drawn] = {}
    measured: dict[str, Measured] = {}
    for sampler in samplers:
        images = draw_missing(sampler, prompts, output / "images" / sampler.name if keep_images else None)
        own = measure_images(map(protocol.chain.chain(), images.share()), extractor, keep=keep)
        drawn[sampler.name], measured[sampler.name] = images, merge(own, len(prompts))
    truth = fixed or _teacher(samplers, prompts, measured)
    scores: dict[str, dict[str, Values]] = {}
    rows = []
    floor: float | None = None
    for sampler in samplers:
        own = measured[sampler.name]
        values = compute(
            own, truth, [m for m in metrics if not _trivial(m, own, truth)], np.random.default_rng(0), prompts.prompts
        )
        floor = floor if values.noise_floor is None else values.noise_floor
        found = {qualified(key, len(prompts), protocol.prompts.count): value for key, value in values.metrics.items()}
        more, scores[sampler.name] = _on_pictures(drawn[sampler.name], prompts, metrics, beside)
        rows.append(
            ReportRow(
                sampler.name, sampler.steps, sampler.network_calls, sampler.guidance, sampler.description, len(prompts),
                drawn[sampler.name].seconds_per_image, {**found, **more},
            )
        )  # fmt: skip
    record = make_record(name, protocol, prompts, extractor, truth, str(reference or protocol.reference.kind))
    notes = tuple(f"{r.name}: not available ({r.reason})" for r in beside.rewards if isinstance(r, Unavailable))
    report = Report(record, tuple(rows), floor, _wins(scores, prompts), notes)
    pictures = {name: images.all()[:: max(1, images.total // SHOWN)][:SHOWN] for name, images in drawn.items()}
    state = PartialState()
    if state.is_main_process:
        write_report(report, output, html_page(report, pictures, stats))
    state.wait_for_everyone()
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
        Refusal: a folder without images, statistics of another network, a metric that needs more than they hold.
    """
    metrics = protocol.metrics
    keep = bool(KEEP_FEATURES & set(metrics))
    chain = protocol.chain.chain()
    if odd := {"prompt_accuracy", "diversity"} & set(metrics):
        raise Refusal(f"{', '.join(sorted(odd))} need prompts, which a folder does not tell: leave them out")
    sets = [
        read_reference(source, extractor, keep=keep, chain=chain, recursive=recursive, lossy=allow_lossy)
        for source in (images, reference)
    ]
    own, truth = sets
    record = make_record("folders", protocol, None, extractor, truth, str(reference))
    values = compute(own, truth, metrics, np.random.default_rng(0))
    row = ReportRow(Path(images).name, 0, 0, 1.0, "images from a folder", own.count, None, values.metrics)
    report = Report(record, (row,), values.noise_floor)
    if PartialState().is_main_process:
        if save_statistics is not None:
            made_with = {"weights": extractor.record.weights, "preprocessing": extractor.record.preprocessing}
            save_statistics.parent.mkdir(parents=True, exist_ok=True)
            kept = {} if own.features is None else {"features": own.features}
            own.statistics.save(save_statistics, made_with, **kept)
        write_report(report, output, html_page(report, {}))
    return report


def make_record(
    name: str,
    protocol: Protocol,
    prompts: PromptSet | None,
    extractor: FeatureExtractor,
    reference: Measured,
    source: str,
) -> Record:
    """The resolved protocol of a measurement."""
    return Record(
        protocol=name,
        prompts_sha256=prompts.sha256 if prompts else "",
        images=len(prompts) if prompts else 0,
        seeds="1000000 + global index" if prompts else "",
        reference=Path(source).name,
        reference_sha256=reference.identity,
        reference_count=reference.count,
        chain=f"crop {protocol.chain.crop}, size {protocol.chain.size or 'as is'}",
        quantize=protocol.quantize,
        features=extractor.record.name,
        features_weights=extractor.record.weights,
        features_preprocessing=extractor.record.preprocessing,
        version=version("stepdistill"),
    )


# ---------------------------------------------------------------- parts


def _check_reference(protocol: Protocol, reference: str | Path | None, samplers: Sequence[Sampler]) -> None:
    """Before anything is drawn."""
    if reference is not None or protocol.reference.kind == "builtin":
        return
    if protocol.reference.kind == "images":
        raise Refusal(f"the protocol needs a reference: give --reference with {protocol.reference.hint}")
    if not any(sampler.name == "teacher" for sampler in samplers):
        raise Refusal(
            "the reference is the teacher and no teacher is drawn: give --teacher-steps N, or --reference DIR"
        )


def _read(protocol: Protocol, source: str | Path | None, extractor: FeatureExtractor, keep: bool) -> Measured:
    """The reference that does not depend on what is drawn; read before anything is, since drawing takes hours."""
    place = source if source is not None else FOLDER / str(protocol.reference.builtin)
    lossy = protocol.reference.lossy
    reference = read_reference(place, extractor, keep=keep, chain=protocol.chain.chain(), lossy=lossy)
    wanted = protocol.reference.count
    if wanted is not None and 0 < reference.count != wanted:
        raise Refusal(
            f"the reference {str(place)!r} has {reference.count} images and the protocol wants {wanted}: give {protocol.reference.hint}"
        )
    return reference


def _teacher(samplers: Sequence[Sampler], prompts: PromptSet, measured: dict[str, Measured]) -> Measured:
    teacher = next(sampler for sampler in samplers if sampler.name == "teacher")
    return replace(measured["teacher"], identity=text_hash([teacher.description, prompts.sha256]))


def _trivial(metric: Metric, own: Measured, truth: Measured) -> bool:
    """The teacher against itself says nothing."""
    return own.statistics is truth.statistics and metric not in ("diversity", "saturation", "brightness", "sharpness")


def _on_pictures(
    drawn: Drawn, prompts: PromptSet, metrics: Sequence[Metric], beside: PictureScores
) -> tuple[dict[str, float], dict[str, Values]]:
    """Scores that read the pictures themselves: (means by name, values an image by name)."""
    rewards = [reward for reward in beside.rewards if not isinstance(reward, Unavailable)]
    if "prompt_accuracy" not in metrics and beside.clip is None and not rewards and beside.lpips is None:
        return {}, {}
    images = drawn.all()
    means: dict[str, float] = {}
    values: dict[str, Values] = {}
    if "prompt_accuracy" in metrics:
        judge = Judge.load(FOLDER / "judge.safetensors")
        means["prompt_accuracy"] = attribute_accuracy(judge, np.stack(images), prompts.prompts)
    if beside.clip is not None:
        for convention in beside.conventions:
            score = clip_score(beside.clip, images, prompts.prompts, convention)
            means[score.name], values[score.name] = score.mean, score.values
    if beside.lpips is not None and (spread := beside.lpips.diversity(images, prompts.prompts)) is not None:
        means[f"diversity[{beside.lpips.name}]"] = spread
    for reward in rewards:
        values[reward.name] = reward.score(images, prompts.prompts)
        means[reward.name] = float(values[reward.name].mean())
    return means, values


def _wins(scores: dict[str, dict[str, Values]], prompts: PromptSet) -> dict[str, dict[str, tuple[float, float, float]]]:
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
