"""A report: its protocol record, its rows, and the three forms it is written in. Rows of two protocols never meet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from stepdistill.errors import UserError

LOWER_IS_BETTER = ("fid", "fd_infinity", "kid", "cmmd")
METRICS_WITHOUT_COLUMN = {"kid_std"}
"""Spreads: shown in JSON, not as columns."""


@dataclass(frozen=True)
class ProtocolRecord:
    """Everything about a measurement except the model. Two numbers are comparable if and only if these are equal, apart from
    the reference's name (its hash counts) and the program's version."""

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
    beside: str
    version: str


@dataclass(frozen=True)
class ReportRow:
    """One model at one setting.

    Attributes:
        network_calls: per image; guided steps cost two.
        seconds_per_image: wall time of drawing, None where the images were there already.
        metrics: by name; `fid@N` where N is not the protocol's count.
    """

    name: str
    steps: int
    network_calls: int
    guidance: float
    sampler: str
    num_images: int
    seconds_per_image: float | None
    metrics: dict[str, float]


@dataclass(frozen=True)
class Report:
    """What `report.json` holds.

    Attributes:
        noise_floor: Fréchet distance of two sets of these sizes from one distribution, on average.
        wins: name of a score -> row -> (rate against the teacher, low, high).
        notes: what was not available, and why.
    """

    record: ProtocolRecord
    rows: tuple[ReportRow, ...]
    noise_floor: float | None = None
    wins: dict[str, dict[str, tuple[float, float, float]]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def row(self, name: str) -> ReportRow:
        """The row of that name."""
        return next(row for row in self.rows if row.name == name)

    def to_json(self) -> str:
        content = asdict(self)
        content["protocol"] = content.pop("record")
        if len(self.rows) == 1:
            content["metrics"] = self.rows[0].metrics
        return json.dumps(content, indent=2)

    @classmethod
    def from_json(cls, text: str, where: str) -> Report:
        """Raises UserError where the text is no report."""
        try:
            content = json.loads(text)
            wins = {
                score: {row: (float(a), float(b), float(c)) for row, (a, b, c) in rates.items()}
                for score, rates in content["wins"].items()
            }
            rows = tuple(ReportRow(**row) for row in content["rows"])
            return cls(
                ProtocolRecord(**content["protocol"]), rows, content["noise_floor"], wins, tuple(content["notes"])
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{where!r} is not a report of 'stepdistill evaluate' ({error}): give its report.json"
            ) from None

    @classmethod
    def read(cls, path: str | Path) -> Report:
        """The report of a file, or of the folder that holds it. Raises UserError."""
        file = Path(path)
        file = file / "report.json" if file.is_dir() else file
        if not file.is_file():
            raise UserError(f"there is no report {str(file)!r}: give the output folder of 'stepdistill evaluate'")
        return cls.from_json(file.read_text(encoding="utf-8", errors="replace"), str(file))


def columns(rows: Sequence[ReportRow]) -> list[str]:
    """Metric names of all rows, in order of first appearance."""
    names = [name for row in rows for name in row.metrics]
    return [name for name in dict.fromkeys(names) if name.partition("@")[0] not in METRICS_WITHOUT_COLUMN]


def table(rows: Sequence[ReportRow], labels: Sequence[str] | None = None) -> list[list[str]]:
    """Header and lines of text cells; a distance that rounding left below zero shows as 0."""
    names = columns(rows)
    head = ["", "steps", "calls", "w", *names, "s/image"]
    lines = [head]
    for row, label in zip(rows, labels or [row.name for row in rows], strict=True):
        cells = [_cell(name, row.metrics.get(name)) for name in names]
        seconds = "" if row.seconds_per_image is None else f"{row.seconds_per_image:.3g}"
        lines.append([label, str(row.steps), str(row.network_calls), f"{row.guidance:g}", *cells, seconds])
    return lines


def markdown(report: Report, labels: Sequence[str] | None = None) -> str:
    """The table, the wins, the protocol record."""
    lines = [f"# {report.record.protocol}", "", _markdown_table(table(report.rows, labels)), ""]
    if report.noise_floor is not None:
        lines += [f"Noise floor of the Fréchet distance at these counts: {report.noise_floor:.4g}.", ""]
    lines += [f"* {line}" for line in win_rate_sentences(report)]
    lines += [f"* {note}" for note in report.notes]
    lines += ["", "| protocol | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in asdict(report.record).items()]
    return "\n".join(lines) + "\n"


def compare(first: Report, second: Report, names: tuple[str, str]) -> str:
    """Both reports' rows in one table.

    Raises:
        UserError: the protocols differ; what differs is named.
    """
    a, b = asdict(first.record), asdict(second.record)
    odd = [key for key in a if a[key] != b[key] and key not in ("version", "reference")]
    if odd:
        shown = ", ".join(f"{key}: {str(a[key])[:40]!r} and {str(b[key])[:40]!r}" for key in odd)
        raise UserError(
            f"the two reports cannot be compared, their protocols differ ({shown}): measure both by one protocol"
        )
    rows = (*first.rows, *second.rows)
    labels = [f"{names[0]}: {row.name}" for row in first.rows] + [f"{names[1]}: {row.name}" for row in second.rows]
    wins = [
        f"{name}: {line}"
        for name, report in zip(names, (first, second), strict=True)
        for line in win_rate_sentences(report)
    ]
    return markdown(Report(first.record, rows, first.noise_floor, notes=(*wins, *first.notes, *second.notes)), labels)


def win_rate_sentences(report: Report) -> list[str]:
    """The win rates as sentences."""
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


def _markdown_table(lines: list[list[str]]) -> str:
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]])
