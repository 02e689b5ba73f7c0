"""Writes a report: its protocol record, report.json, report.md and report.html."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from accelerate import PartialState

from stepdistill.evaluation.fashion import FIRST_SEED
from stepdistill.evaluation.measure import ImageSetFeatures
from stepdistill.evaluation.networks.features import FeatureExtractor
from stepdistill.evaluation.protocols import PromptSet, Protocol
from stepdistill.evaluation.reports.html_report import ReportImage, html_page
from stepdistill.evaluation.reports.report import ProtocolRecord, Report, markdown
from stepdistill.files.atomic import write_atomically
from stepdistill.files.disk_errors import disk_errors_as_user_errors

logger = logging.getLogger(__name__)
REPORT_FILES = ("report.json", "report.md", "report.html")


def make_record(
    name: str,
    protocol: Protocol,
    prompts: PromptSet,
    images: int,
    extractor: FeatureExtractor | None,
    reference: ImageSetFeatures | None,
    source: str,
    scorers: str,
) -> ProtocolRecord:
    """Makes the record of a measurement: everything about it except the model.

    Args:
        name: the protocol's name, or its YAML file.
        protocol: the protocol with the user's changes.
        prompts: prompts and, if images were drawn, their seeds; empty if no metric needs prompts.
        images: number of images.
        extractor: the feature network; None if no metric needs one.
        reference: what the images are compared with; None if no metric needs it.
        source: where the reference came from.
        scorers: the scorers' networks.
    """
    return ProtocolRecord(
        protocol=Path(name).stem if name.endswith((".yaml", ".yml")) else name,
        prompts_sha256=prompts.sha256,
        images=images,
        seeds=f"{FIRST_SEED} + global index" if prompts.seeds else "",
        reference=Path(source).name if reference is not None else "",
        reference_sha256=reference.content_hash if reference is not None else "",
        reference_count=reference.count if reference is not None else 0,
        chain=protocol.chain.text(),
        quantize=protocol.quantize,
        features=extractor.record.name if extractor is not None else "",
        features_weights=extractor.record.weights if extractor is not None else "",
        features_preprocessing=extractor.record.preprocessing if extractor is not None else "",
        scorers=scorers,
        version=version("stepdistill"),
    )


def write_report(report: Report, output: Path, pictures: Sequence[ReportImage], stats: Path | None) -> None:
    """Writes the three files of a report; on a full disk, none of them is left.

    report.json comes first, because a page that cannot be drawn must not lose hours of numbers.

    Args:
        report: what to write.
        output: the folder.
        pictures: images for the page.
        stats: `stats.jsonl` of the training run, for the page's curves.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    state = PartialState()
    if state.is_main_process:
        made = not output.exists()
        try:
            with disk_errors_as_user_errors(output):
                output.mkdir(parents=True, exist_ok=True)
                write_atomically(output / "report.json", (report.to_json() + "\n").encode())
                write_atomically(output / "report.md", markdown(report).encode())
                try:
                    write_atomically(output / "report.html", html_page(report, pictures, stats).encode())
                except ImportError as error:
                    logger.warning("report.html was not written (%s): pip install 'stepdistill[evaluation]'", error)
        except BaseException:
            for name in REPORT_FILES:
                (output / name).unlink(missing_ok=True)
            if made and output.is_dir() and not any(output.iterdir()):
                output.rmdir()
            raise
    state.wait_for_everyone()
