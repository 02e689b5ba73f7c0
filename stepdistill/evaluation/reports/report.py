"""A report of an evaluation: its protocol record, its rows, and its table. Rows of two protocols are never put together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from stepdistill.errors import UserError

LOWER_IS_BETTER = ("fid", "fd_infinity", "kid", "cmmd")
METRICS_WITHOUT_COLUMN = {"kid_std"}
"""Standard deviations, which are written to report.json but not to the tables."""
METRIC_UNITS = {"kid": "x 1000", "kid_std": "x 1000"}
"""Metrics that are multiplied by a factor, as publications do; the tables' headers and report.json say so."""


@dataclass(frozen=True)
class ProtocolRecord:
    """Everything about a measurement except the model.

    Two numbers are comparable if and only if their records are equal, apart from the reference's name (its hash counts) and the
    program's version. Fields about features and reference are empty if no metric needs them.

    Attributes:
        scorers: networks of CLIP scores, rewards and LPIPS.
    """

    protocol: str
    prompts_sha256: str
    images: int
    seeds: str
    reference: str
    reference_sha256: str
    reference_count: int
    chain: str
    quantize: str
    features: str
    features_weights: str
    features_preprocessing: str
    scorers: str
    version: str


@dataclass(frozen=True)
class ReportRow:
    """One model at one setting.

    Attributes:
        steps: sampling steps; None, like the next two, for images from a folder.
        network_calls: per image; a step with guidance costs two.
        guidance: guidance scale w.
        seconds_per_image: wall time of drawing; None if the images existed already.
        metrics: by name; `fid@N` if N is not the protocol's number of images.
    """

    name: str
    steps: int | None
    network_calls: int | None
    guidance: float | None
    sampler: str
    num_images: int
    seconds_per_image: float | None
    metrics: dict[str, float]


@dataclass(frozen=True)
class ReportSource:
    """Where a report comes from.

    Attributes:
        command: a command line that repeats the evaluation.
        date: UTC, ISO 8601.
        model: as given on the command line; "" for a folder of images.
        lora: as given on the command line; "" if there is none.
    """

    command: str
    date: str
    model: str = ""
    lora: str = ""


@dataclass(frozen=True)
class Report:
    """The content of `report.json`.

    Attributes:
        noise_floor: Fréchet distance of two sets of these sizes from one distribution, on average.
        wins: name of a score -> row -> (win rate against the teacher, lower bound, upper bound).
        notes: what could not be measured, and why.
        source: model, command and date; None in reports of earlier versions.
    """

    record: ProtocolRecord
    rows: tuple[ReportRow, ...]
    noise_floor: float | None = None
    wins: dict[str, dict[str, tuple[float, float, float]]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    source: ReportSource | None = None

    def row(self, name: str) -> ReportRow:
        """Returns the row of that name."""
        return next(row for row in self.rows if row.name == name)

    def to_json(self) -> str:
        """Returns the content of `report.json`."""
        content = asdict(self)
        content["protocol"] = content.pop("record")
        measured = {name.partition("@")[0] for row in self.rows for name in row.metrics}
        content["units"] = {name: unit for name, unit in METRIC_UNITS.items() if name in measured}
        if len(self.rows) == 1:
            content["metrics"] = self.rows[0].metrics
        return json.dumps(content, indent=2)

    @classmethod
    def from_json(cls, text: str, where: str) -> Report:
        """Reads the content of `report.json`; raises UserError if the text is no report."""
        try:
            content = json.loads(text)
            wins = {
                score: {row: (float(a), float(b), float(c)) for row, (a, b, c) in rates.items()}
                for score, rates in content["wins"].items()
            }
            rows = tuple(ReportRow(**row) for row in content["rows"])
            protocol = dict(content["protocol"])
            if "beside" in protocol:  # the name of this field in earlier versions
                protocol["scorers"] = protocol.pop("beside")
            source = content.get("source")
            return cls(
                ProtocolRecord(**protocol),
                rows,
                content["noise_floor"],
                wins,
                tuple(content["notes"]),
                ReportSource(**source) if source is not None else None,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{where!r} is not a report of 'stepdistill evaluate' ({error}): give its report.json"
            ) from None

    @classmethod
    def read(cls, path: str | Path) -> Report:
        """Reads the report of a file, or of the folder that holds it; raises UserError if there is none."""
        file = Path(path)
        file = file / "report.json" if file.is_dir() else file
        if not file.is_file():
            raise UserError(f"there is no report {str(file)!r}: give the output folder of 'stepdistill evaluate'")
        return cls.from_json(file.read_text(encoding="utf-8", errors="replace"), str(file))


def columns(rows: Sequence[ReportRow]) -> list[str]:
    """Returns the metric names of all rows, in order of first appearance."""
    names = [name for row in rows for name in row.metrics]
    return [name for name in dict.fromkeys(names) if name.partition("@")[0] not in METRICS_WITHOUT_COLUMN]


def table(rows: Sequence[ReportRow]) -> list[list[str]]:
    """Returns the header and the rows as text cells. A distance that rounding made negative is shown as 0.

    Columns that are empty in every row, such as the steps of images from a folder, are left out.
    """
    names = columns(rows)
    cells = [["", "steps", "calls", "w", *(column_title(name) for name in names), "s/image"]]
    for row in rows:
        sampling = [_number(value, "g") for value in (row.steps, row.network_calls, row.guidance)]
        measured = [_cell(name, row.metrics.get(name)) for name in names]
        cells.append([row.name, *sampling, *measured, _number(row.seconds_per_image, ".3g")])
    filled = [k == 0 or any(line[k] for line in cells[1:]) for k in range(len(cells[0]))]
    return [[cell for cell, keep in zip(line, filled, strict=True) if keep] for line in cells]


def column_title(metric: str) -> str:
    """Returns the metric's name, with the factor that its values are multiplied by."""
    unit = METRIC_UNITS.get(metric.partition("@")[0])
    return metric if unit is None else f"{metric} {unit}"


def report_lines(report: Report) -> list[str]:
    """Returns the sentences that belong under the table: noise floor, win rates, notes, command."""
    lines = []
    if report.noise_floor is not None:
        lines.append(f"Noise floor of the Fréchet distance at these numbers of images: {report.noise_floor:.4g}.")
    lines += [*win_rate_sentences(report), *report.notes]
    if report.source is not None:
        lines.append(f"Made on {report.source.date} by: {report.source.command}")
    return lines


def markdown(report: Report) -> str:
    """Formats the table, the win rates, the notes and the protocol record."""
    lines = [f"# {report.record.protocol}", "", _markdown_table(table(report.rows)), ""]
    lines += [f"* {line}" for line in report_lines(report)]
    lines += ["", "| protocol | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in asdict(report.record).items()]
    return "\n".join(lines) + "\n"


def compared(first: Report, second: Report, names: tuple[str, str]) -> Report:
    """Puts both reports' rows into one report; rows are named `NAME: ROW`.

    Raises:
        UserError: the protocols differ; the message names the differences.
    """
    a, b = asdict(first.record), asdict(second.record)
    odd = [key for key in a if a[key] != b[key] and key not in ("version", "reference")]
    if odd:
        shown = ", ".join(f"{key}: {str(a[key])[:40]!r} and {str(b[key])[:40]!r}" for key in odd)
        raise UserError(
            f"the two reports cannot be compared, their protocols differ ({shown}): measure both by one protocol"
        )
    both = tuple(zip(names, (first, second), strict=True))
    rows = tuple(replace(row, name=f"{name}: {row.name}") for name, report in both for row in report.rows)
    notes = [f"{name}: {line}" for name, report in both for line in (*win_rate_sentences(report), *report.notes)]
    return Report(first.record, rows, first.noise_floor, notes=tuple(notes))


def win_rate_sentences(report: Report) -> list[str]:
    """Returns the win rates as sentences."""
    return [
        f"{score}: {row} wins against the teacher on {100 * rate:.1f} % of prompts ({100 * low:.1f} to {100 * high:.1f})"
        for score, rates in report.wins.items()
        for row, (rate, low, high) in rates.items()
    ]


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name.startswith(("fid", "fd_")) and value < 0:
        value = 0.0
    return f"{value:.4g}"


def _number(value: float | None, style: str) -> str:
    return "" if value is None else f"{value:{style}}"


def _markdown_table(lines: list[list[str]]) -> str:
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]])
