"""The README's numbers are those that the command beside them wrote."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_teachers_numbers_are_the_shipped_statistics() -> None:
    shipped = json.loads((ROOT / "stepdistill/assets/teacher_statistics.json").read_text())
    readme = (ROOT / "README.md").read_text()
    seen, drawn = shipped["precision_recall_of_photographs"], shipped["accuracy"]
    halves = [shipped["frechet_of_real_halves"][str(shipped["images"])], *shipped["accuracy_on_photographs"].values()]
    row = json.loads((ROOT / "stepdistill/assets/teacher_row.json").read_text())["3"]
    rows = {
        "through the autoencoder": [shipped["frechet_of_reconstructions"]],
        "photographs against photographs": [*halves, seen["precision"], seen["recall"]],
        "teacher": [shipped["frechet"], *drawn.values(), shipped["precision"], shipped["recall"]],
    }
    for name, values in rows.items():
        line = next(line for line in readme.splitlines() if line.startswith(f"| {name} |"))
        written = [float(cell) for cell in line.split("|")[2:-1] if cell.strip()]
        assert all(abs(cell - value) <= 0.00051 for cell, value in zip(written, values, strict=True)), (name, values)
    quickstart = f"| teacher | {row['network_calls']} | {row['frechet']:.3f} | {row['prompt_accuracy']:.3f} | {row['diversity']:.3f} |"
    assert quickstart in readme
    assert shipped["command"] in readme
    assert all(shipped["floors"].values())
