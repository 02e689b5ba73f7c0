"""Compares two reports: one table, and a page with the images of both evaluations."""

from __future__ import annotations

import os
from pathlib import Path

from stepdistill.evaluation.images import read_image
from stepdistill.evaluation.reports.html_report import ReportImage, html_page
from stepdistill.evaluation.reports.report import Report, compared, markdown
from stepdistill.files.atomic import write_atomically
from stepdistill.files.disk_errors import disk_errors_as_user_errors
from stepdistill.files.outputs import check_folder_is_writable

NUM_IMAGES = 8


def compare_reports(first: Path, second: Path, output: Path | None) -> str:
    """Puts two reports into one table and, if `output` is given, writes comparison.md and comparison.html there.

    Args:
        first: report.json, or its folder.
        second: the other one.
        output: folder to write; None writes nothing.

    Raises:
        UserError: no report, protocols that differ, or a folder that cannot be written.
    """
    folders = [path if path.is_dir() else path.parent for path in (first, second)]
    names = [folder.name for folder in folders]
    if names[0] == names[1] or not all(names):
        names = [str(first), str(second)]
    reports = [Report.read(first), Report.read(second)]
    both = compared(reports[0], reports[1], (names[0], names[1]))
    text = markdown(both)
    if output is None:
        return text
    check_folder_is_writable(output)
    pictures = [
        picture
        for name, folder, report in zip(names, folders, reports, strict=True)
        for row in report.rows
        for picture in _report_images(f"{name}: {row.name}", folder / "images" / row.name, output, row.num_images)
    ]
    with disk_errors_as_user_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / "comparison.md", text.encode())
        write_atomically(output / "comparison.html", html_page(both, pictures).encode())
    return text


def _report_images(row: str, folder: Path, output: Path, count: int) -> list[ReportImage]:
    """Returns a few images of a row, at the same indices for every row; none if the images were not kept."""
    chosen = range(0, count, max(1, count // NUM_IMAGES))[:NUM_IMAGES]
    files = [folder / f"{i:05d}.png" for i in chosen]
    return [
        ReportImage(row, f"image {i}", read_image(file), os.path.relpath(file, output))
        for i, file in zip(chosen, files, strict=True)
        if file.is_file()
    ]
