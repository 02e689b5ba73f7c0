"""What tools/compare_methods.py keeps of a cell, and the tables and the picture that are made of cells."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Measured:
    """The student at one number of steps, by the judge."""

    steps: int
    frechet: float
    prompt_accuracy: float
    diversity: float
    saturation: float


@dataclass(frozen=True)
class Cell:
    """One entry, one seed.

    Attributes:
        calls: network calls that training made, by role.
        iterations: of training.
        seconds, processor_seconds: of training, on whatever machine it was.
        rows: what the judge says.
    """

    entry: str
    seed: int
    config_sha256: str
    commit: str
    calls: Mapping[str, int]
    iterations: int
    seconds: float
    processor_seconds: float
    images: int
    rows: Sequence[Measured]

    @classmethod
    def read(cls, path: Path) -> Cell:
        record = json.loads(path.read_text())
        return cls(**{**record, "rows": [Measured(**row) for row in record["rows"]]})

    def at(self, steps: int) -> Measured | None:
        return next((row for row in self.rows if row.steps == steps), None)


@dataclass(frozen=True)
class Spread:
    """Mean and standard error over seeds; None of one seed."""

    mean: float
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(statistics.fmean(values), error)

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.error is None else f" ±{self.error:.3f}")


def read_cells(results: Path) -> dict[str, list[Cell]]:
    """Entry -> its cells, by seed."""
    cells: dict[str, list[Cell]] = {}
    for path in sorted(results.glob("*.json")):
        cell = Cell.read(path)
        cells.setdefault(cell.entry, []).append(cell)
    return cells


def table(cells: Mapping[str, Sequence[Cell]], entries: Sequence[str], teacher_diversity: float) -> str:
    """Markdown: means over seeds with standard errors; diversity as a ratio to the teacher's."""
    lines = [
        "| | seeds | Fréchet, 1 step | 2 steps | 4 steps | accuracy | diversity / teacher | iterations | processor s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in entries:
        found = cells.get(name, [])
        if not found:
            continue
        most = max(row.steps for row in found[0].rows)
        full = [row for cell in found if (row := cell.at(most)) is not None]
        frechet = [
            str(Spread.of(values)) if (values := [row.frechet for cell in found if (row := cell.at(steps))]) else "-"
            for steps in (1, 2, 4)
        ]
        lines.append(
            f"| {name} | {len(found)} | {' | '.join(frechet)} | {Spread.of([row.prompt_accuracy for row in full])} | "
            f"{Spread.of([row.diversity / teacher_diversity for row in full])} | "
            f"{statistics.fmean(cell.iterations for cell in found):.0f} | "
            f"{statistics.fmean(cell.processor_seconds for cell in found):.0f} |"
        )
    return "\n".join(lines)


def picture(cells: Mapping[str, Sequence[Cell]], entries: Sequence[str], path: Path) -> None:
    """Fréchet distance against steps, one line an entry, bars of one standard error."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for name in entries:
        found = cells.get(name, [])
        steps = [row.steps for row in found[0].rows] if found else []
        spreads = [Spread.of([row.frechet for cell in found if (row := cell.at(count))]) for count in steps]
        axes.errorbar(steps, [s.mean for s in spreads], [s.error or 0 for s in spreads], marker="o", label=name)
    axes.set(xlabel="network calls of the student", ylabel="Fréchet distance (judge)", xticks=[1, 2, 4])
    axes.legend()
    figure.savefig(path, dpi=120)
