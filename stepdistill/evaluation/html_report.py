"""The report as one HTML file without outside parts: table, curves, side-by-side pictures, the run's training curves."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from stepdistill.evaluation.images import ImageArray
from stepdistill.evaluation.report import Report, columns, table, win_rate_sentences

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """body { font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 60em; color: #222 }
table { border-collapse: collapse } td, th { padding: .25em .7em; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left } img { max-width: 100%; image-rendering: pixelated }
details { margin-top: 2em } code { word-break: break-all }"""
THUMBNAIL_SIZE = 128
PLOTTED_SIGNALS = ("loss", "score_gap", "latent_std")


def html_page(report: Report, images: Mapping[str, Sequence[ImageArray]], stats: Path | None = None) -> str:
    """The page.

    Args:
        report: what to show.
        images: a few of each row by name, at the same prompts; rows are shown above one another.
        stats: `stats.jsonl` of the training run, where there is one.
    """
    parts = [f"<h1>{html.escape(report.record.protocol)}</h1>", _table(table(report.rows))]
    if report.noise_floor is not None:
        parts.append(f"<p>Noise floor of the Fréchet distance at these counts: {report.noise_floor:.4g}.</p>")
    parts += [f"<p>{html.escape(line)}</p>" for line in (*win_rate_sentences(report), *report.notes)]
    if len(report.rows) > 1 and columns(report.rows):
        parts += ["<h2>Against steps and network calls</h2>", _curves(report)]
    pictures = _grid({row.name: images[row.name] for row in report.rows if row.name in images})
    if pictures:
        parts += ["<h2>Same prompts, same seeds</h2>", pictures]
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
            points = sorted((vars(row)[axis_name], row.metrics[name]) for row in others if name in row.metrics)
            axis.plot([x for x, _ in points], [y for _, y in points], "o-")
            for teacher in teachers:
                if name in teacher.metrics:
                    axis.axhline(teacher.metrics[name], color="grey", linestyle=":")
            axis.set_xscale("log")
            axis.set_xlabel(axis_name.replace("_", " "))
            axis.set_ylabel(name)
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
    """One line of `stats.jsonl`, null where a value was no number; a run that is still writing may have left half of its last one."""
    try:
        return dict(json.loads(text))
    except ValueError:
        return {}


def _image(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return _embed(buffer.getvalue())


def _grid(images: dict[str, Sequence[ImageArray]]) -> str:
    """Rows of pictures, one row for each sampler, the same columns."""
    rows = []
    for name, pictures in images.items():
        shown = []
        for pixels in pictures:
            picture = Image.fromarray(pixels)
            picture.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
            buffer = io.BytesIO()
            picture.save(buffer, format="PNG")
            shown.append(f"<td>{_embed(buffer.getvalue(), THUMBNAIL_SIZE)}</td>")
        rows.append(f"<tr><td>{html.escape(name)}</td>{''.join(shown)}</tr>")
    return f"<table>{''.join(rows)}</table>" if rows else ""


def _embed(png: bytes, width: int | None = None) -> str:
    size = f" width='{width}'" if width else ""
    return f"<img{size} alt='' src='data:image/png;base64,{base64.b64encode(png).decode()}'>"
