"""The report as one HTML file that loads nothing else; its pictures link to the full images beside it."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from PIL import Image

from stepdistill.evaluation.images import ImageArray
from stepdistill.evaluation.reports.report import Report, column_title, columns, report_lines, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """body { font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 60em; color: #222 }
table { border-collapse: collapse } td, th { padding: .25em .7em; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left } img { max-width: 100%; image-rendering: pixelated }
.wide { overflow-x: auto } .pictures td { vertical-align: bottom; text-align: left; font-size: 12px }
details { margin-top: 2em } code { word-break: break-all }"""
THUMBNAIL_SIZE = 256
PLOTTED_SIGNALS = ("loss", "score_gap", "latent_std")


@dataclass(frozen=True)
class ReportImage:
    """An image on the page.

    Attributes:
        row: name of the row that it belongs to.
        caption: its prompt, or its file name.
        image: uint8 (H, W, 3).
        link: relative path of the full image; None if it was not written.
    """

    row: str
    caption: str
    image: ImageArray
    link: str | None = None


def html_page(report: Report, pictures: Sequence[ReportImage], stats: Path | None = None) -> str:
    """Makes the page: table, pictures, curves over steps if there are several step counts, training curves, protocol record.

    Args:
        report: what to show.
        pictures: a few of each row, at the same prompts; rows are shown above one another.
        stats: `stats.jsonl` of the training run, if there is one.
    """
    parts = [f"<h1>{html.escape(report.record.protocol)}</h1>", _table(table(report.rows))]
    parts += [f"<p>{html.escape(line)}</p>" for line in report_lines(report)]
    if pictures:
        parts += ["<h2>Images at the same prompts and seeds</h2>", _grid(pictures)]
    if len({row.steps for row in report.rows if not row.name.startswith("teacher")}) > 1 and columns(report.rows):
        parts += ["<h2>Metrics over steps and network calls</h2>", _curves(report)]
    if stats is not None and stats.is_file():
        parts += ["<h2>Training</h2>", _training(stats)]
    lines = [
        f"<tr><td>{key}</td><td><code>{html.escape(str(value))}</code></td></tr>"
        for key, value in asdict(report.record).items()
    ]
    record = "".join(lines)
    parts.append(f"<details open><summary>Protocol record</summary><table>{record}</table></details>")
    body = "\n".join(parts)
    title = html.escape(report.record.protocol)
    return f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{title}</title><style>{STYLE}</style><body>{body}</body></html>\n"


def _table(lines: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in lines[0])
    rows = ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in lines[1:]]
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _curves(report: Report) -> str:
    from matplotlib.figure import Figure

    names = columns(report.rows)
    figure = Figure(figsize=(9, 2.8 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), 2, squeeze=False)
    teachers = [row for row in report.rows if row.name.startswith("teacher")]
    others = [row for row in report.rows if row not in teachers]
    for line, name in enumerate(names):
        for column, axis_name in enumerate(("steps", "network_calls")):
            axis = axes[line][column]
            values = [(row, row.steps if axis_name == "steps" else row.network_calls) for row in others]
            points = sorted((x, row.metrics[name]) for row, x in values if x is not None and name in row.metrics)
            axis.plot([x for x, _ in points], [y for _, y in points], "o-")
            for teacher in teachers:
                if name in teacher.metrics:
                    axis.axhline(teacher.metrics[name], color="grey", linestyle=":")
            axis.set_xscale("log")
            axis.set_xlabel(axis_name.replace("_", " "))
            axis.set_ylabel(column_title(name))
    return _image(figure)


def _training(stats: Path) -> str:
    from matplotlib.figure import Figure

    lines = [line for text in stats.read_text().splitlines() if (line := _parsed(text))]
    names = [n for n in dict.fromkeys(k for line in lines for k in line) if n.rpartition("/")[2] in PLOTTED_SIGNALS]
    if not names:
        return "<p>stats.jsonl holds no curves.</p>"
    figure = Figure(figsize=(9, 2.4 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), 1, squeeze=False)
    for axis, name in zip(axes[:, 0], names, strict=True):
        points = [(line["iteration"], y) for line in lines if (y := line.get(name)) is not None and "iteration" in line]
        axis.plot([x for x, _ in points], [y for _, y in points])
        axis.set_ylabel(name)
    axes[-1][0].set_xlabel("iteration")
    return _image(figure)


def _parsed(text: str) -> dict[str, float | None]:
    """Parses a log record of `stats.jsonl`; a running training may have written only half of the last one."""
    try:
        return dict(json.loads(text))
    except ValueError:
        return {}


def _image(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return _embed(buffer.getvalue())


def _grid(pictures: Sequence[ReportImage]) -> str:
    """Makes a table with one row of pictures per row of the report; the captions are above the first of each column."""
    rows: dict[str, list[ReportImage]] = {}
    for picture in pictures:
        rows.setdefault(picture.row, []).append(picture)
    lines, above = [], None
    for name, shown in rows.items():
        captions = [picture.caption for picture in shown]
        if captions != above:
            lines.append("<tr><td></td>" + "".join(f"<td>{html.escape(text)}</td>" for text in captions) + "</tr>")
            above = captions
        cells = "".join(f"<td>{_thumbnail(picture)}</td>" for picture in shown)
        lines.append(f"<tr><td>{html.escape(name)}</td>{cells}</tr>")
    return f"<div class='wide'><table class='pictures'>{''.join(lines)}</table></div>"


def _thumbnail(picture: ReportImage) -> str:
    small = Image.fromarray(picture.image)
    small.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG")
    shown = _embed(buffer.getvalue(), THUMBNAIL_SIZE)
    return shown if picture.link is None else f"<a href='{html.escape(quote(picture.link))}'>{shown}</a>"


def _embed(png: bytes, width: int | None = None) -> str:
    size = f" width='{width}'" if width else ""
    return f"<img{size} alt='' src='data:image/png;base64,{base64.b64encode(png).decode()}'>"
