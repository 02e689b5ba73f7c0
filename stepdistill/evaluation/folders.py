"""Measures a folder of images without a model: against a reference, by its prompts, or both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import PartialState

from stepdistill.data.images.folder import ImageFolder
from stepdistill.data.prompts import read_prompts
from stepdistill.errors import UserError
from stepdistill.evaluation.generation import GeneratedImages
from stepdistill.evaluation.image_scores import ImageScorers, ImageScores, score_images
from stepdistill.evaluation.images import list_images, read_images
from stepdistill.evaluation.measure import (
    METRICS_NEEDING_FEATURES,
    METRICS_WITHOUT_NETWORK,
    check_metrics,
    compute_metrics,
    feature_provenance,
    measure_files,
    read_reference,
)
from stepdistill.evaluation.networks.features import FeatureExtractor
from stepdistill.evaluation.protocols import Metric, PromptSet, Protocol, text_hash
from stepdistill.evaluation.reports.html_report import ReportImage
from stepdistill.evaluation.reports.report import Report, ReportRow, ReportSource
from stepdistill.evaluation.reports.writing import make_record, write_report
from stepdistill.files.disk_errors import disk_errors_as_user_errors

NUM_REPORT_IMAGES = 8
NEED_PROMPTS: frozenset[Metric] = frozenset({"prompt_accuracy", "diversity"})


@dataclass(frozen=True)
class ImageSource:
    """Which images are measured.

    Attributes:
        images: folder, or statistics (.npz).
        reference: folder or statistics to compare with; None if no metric needs it.
        prompts: file with one prompt per image, in the order of the file names; None takes captions beside the images.
        recursive: search sub-folders too.
        allow_lossy: take JPEG and WebP.
    """

    images: Path
    reference: Path | None = None
    prompts: str | None = None
    recursive: bool = False
    allow_lossy: bool = False

    @property
    def is_statistics(self) -> bool:
        """Whether `images` is a statistics file, which holds no images."""
        return self.images.suffix in (".npz", ".npy")

    def files(self) -> list[Path]:
        """Lists the image files, in the order of their names."""
        return list_images(self.images, recursive=self.recursive, allow_lossy=self.allow_lossy)


def evaluate_folder(
    source: ImageSource,
    protocol: Protocol,
    extractor: FeatureExtractor | None,
    output: Path,
    *,
    scorers: ImageScorers | None = None,
    save_statistics: Path | None = None,
    origin: ReportSource | None = None,
) -> Report:
    """Measures a folder of images, or a statistics file, and writes the report.

    Args:
        source: the images, their reference and prompts.
        protocol: metrics, crop and size.
        extractor: the feature network; None if no metric needs one.
        output: folder of the report.
        scorers: CLIP score, rewards and LPIPS, which need prompts.
        save_statistics: also write the statistics of the images to this .npz.
        origin: command and date, for the report.

    Raises:
        UserError: no images or prompts, statistics of another network, or a metric that needs more than they hold.
    """
    scorers = scorers or ImageScorers()
    metrics = protocol.metrics
    with_prompts = scorers.need_prompts or bool(NEED_PROMPTS & set(metrics))
    if with_prompts and source.is_statistics:
        raise UserError(
            f"scores of images and prompts were asked for and {str(source.images)!r} holds statistics: give the folder of images"
        )
    prompts = _prompts_of(source) if with_prompts else PromptSet((), (), "")
    keep = bool(METRICS_NEEDING_FEATURES & set(metrics))
    chain = protocol.chain.chain()
    options = {"recursive": source.recursive, "lossy": source.allow_lossy}
    truth = None
    if extractor is not None and source.reference is not None:
        truth = read_reference(source.reference, extractor, keep_features=keep, chain=chain, **options)
    if not source.is_statistics:
        check_metrics(metrics, truth, len(source.files()))
        own = measure_files(source.files(), extractor, keep_features=keep, chain=chain)
    elif extractor is not None:
        own = read_reference(source.images, extractor, keep_features=keep, chain=chain, **options)
    else:
        raise UserError(
            f"{', '.join(metrics)} need images and {str(source.images)!r} holds statistics: give the folder"
        )
    values = compute_metrics(own, truth, metrics, np.random.default_rng(0), prompts.prompts)
    scored = ImageScores()
    if with_prompts:
        files = GeneratedImages(len(prompts), tuple(source.files()), (), None)
        scored = score_images(files, prompts, metrics, scorers, chain)
    found = {**values.metrics, **scored.means}
    described = scorers.record() + (", lossy files allowed" if source.allow_lossy else "")
    name = str(source.reference) if source.reference is not None else ""
    record = make_record("folders", protocol, prompts, own.count, extractor, truth, name, described)
    row = ReportRow(source.images.resolve().name, None, None, None, "images from a folder", own.count, None, found)
    notes = (*(f"{metric} could not be computed" for metric in metrics if metric not in found), *scored.notes)
    report = Report(record, (row,), values.noise_floor, notes=notes, source=origin)
    if save_statistics is not None and own.statistics is not None and PartialState().is_main_process:
        kept = {} if own.features is None else {"features": own.features}
        provenance = {} if extractor is None else feature_provenance(extractor, chain)
        with disk_errors_as_user_errors(save_statistics):
            own.statistics.save(save_statistics, provenance, **kept)
    write_report(report, output, _report_images(source, row.name, prompts), None)
    return report


def check_needs(metrics: tuple[Metric, ...], reference: Path | None) -> None:
    """Checks that the metrics have the reference that they need. Raises UserError."""
    needing = [metric for metric in metrics if metric not in METRICS_WITHOUT_NETWORK]
    if needing and reference is None:
        raise UserError(
            f"no reference was given, which these metrics need: {', '.join(needing)}; give --reference, or choose --metrics without one "
            f"({', '.join(sorted(METRICS_WITHOUT_NETWORK))})"
        )


def _prompts_of(source: ImageSource) -> PromptSet:
    files = source.files()
    if source.prompts is not None:
        texts = list(read_prompts(source.prompts).texts)
        if len(texts) != len(files):
            raise UserError(
                f"{source.prompts!r} holds {len(texts)} prompts and {str(source.images)!r} {len(files)} images: give one prompt per "
                "image, in the order of the file names"
            )
    else:
        folder = ImageFolder(source.images, (8, 8))
        captions = dict(zip(folder.names, folder.captions, strict=True))
        texts = [captions.get(file.relative_to(source.images).as_posix(), "") for file in files]
        if bare := [file.name for file, text in zip(files, texts, strict=True) if not text]:
            raise UserError(
                f"{len(bare)} of {len(files)} images in {str(source.images)!r} have no caption (first: {bare[0]!r}), and prompts are "
                "needed: give --prompts FILE with one line per image, or write a .txt file beside each"
            )
    return PromptSet(tuple(texts), (), text_hash(texts))


def _report_images(source: ImageSource, row: str, prompts: PromptSet) -> list[ReportImage]:
    if source.is_statistics:
        return []
    files = source.files()
    chosen = range(0, len(files), max(1, len(files) // NUM_REPORT_IMAGES))[:NUM_REPORT_IMAGES]
    images = read_images([files[i] for i in chosen])
    return [
        ReportImage(row, prompts.prompts[i] if prompts.prompts else files[i].name, image)
        for i, image in zip(chosen, images, strict=True)
    ]
