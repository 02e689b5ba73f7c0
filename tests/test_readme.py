"""Tests that README.md and docs/ contain the numbers that the command beside them wrote, and that their links lead to files."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import generate_docs  # noqa: E402


def test_the_teachers_numbers_are_the_shipped_statistics() -> None:
    shipped = json.loads((ROOT / "stepdistill/assets/teacher_statistics.json").read_text())
    page = (ROOT / "docs/embedded-teacher.md").read_text()
    seen, drawn = shipped["precision_recall_of_photographs"], shipped["accuracy"]
    halves = [shipped["frechet_of_real_halves"][str(shipped["images"])], *shipped["accuracy_on_photographs"].values()]
    rows = {
        "through the autoencoder": [shipped["frechet_of_reconstructions"]],
        "photographs against photographs": [*halves, seen["precision"], seen["recall"]],
        "teacher": [shipped["frechet"], *drawn.values(), shipped["precision"], shipped["recall"]],
    }
    for name, values in rows.items():
        line = next(line for line in page.splitlines() if line.startswith(f"| {name} |"))
        written = [float(cell) for cell in line.split("|")[2:-1] if cell.strip()]
        assert all(abs(cell - value) <= 0.00051 for cell, value in zip(written, values, strict=True)), (name, values)
    assert shipped["command"] in page
    assert all(shipped["floors"].values())


def test_the_quickstarts_numbers_are_those_of_its_report() -> None:
    """`notebooks/quickstart/report.json` is what `stepdistill quickstart` wrote; its teacher is the shipped row."""
    report = json.loads((ROOT / "notebooks/quickstart/report.json").read_text())
    readme = (ROOT / "README.md").read_text()
    for row in report["rows"]:
        numbers = [row["frechet"], row["prompt_accuracy"], row["diversity"], row["saturation"]]
        cells = " | ".join([str(row["network_calls"]), *(f"{value:.3f}" for value in numbers)])
        assert f"| {cells} |" in readme, row["name"]
    assert f"{report['seconds_total']:.0f} s in all" in readme
    teacher, base, _, student = report["rows"]
    assert teacher == json.loads((ROOT / "stepdistill/assets/teacher_row.json").read_text())["1.5"]
    assert student["frechet"] <= min(1.3 * teacher["frechet"], 0.85 * base["frechet"])
    assert student["prompt_accuracy"] >= teacher["prompt_accuracy"] - 0.02
    assert student["diversity"] >= 0.9 * teacher["diversity"]
    assert report["seconds_total"] < 600


def test_the_curves_numbers_are_those_of_its_report() -> None:
    """The distance does not rise up to 8 steps and then stays within two standard errors."""
    report = json.loads((ROOT / "notebooks/quickstart/curve.json").read_text())
    page = (ROOT / "docs/evaluation.md").read_text()
    rows = [(row["steps"], row["metrics"]["fid"], row["metrics"]["fid_error"]) for row in report["rows"]]
    for steps, distance, error in rows:
        assert f"| {steps} | {2 * steps} | {distance:.3f} ± {error:.3f} |" in page
    early = [distance for steps, distance, _ in rows if steps <= 8]
    assert early == sorted(early, reverse=True)
    _, last, last_error = rows[-1]
    for steps, distance, error in rows:
        if steps >= 8:
            assert abs(distance - last) <= 2 * (error**2 + last_error**2) ** 0.5


def test_what_tuning_makes_of_a_student_is_what_was_measured() -> None:
    """`tools/measure_pso.py` and `tools/measure_styles.py` wrote the files."""
    page = (ROOT / "docs/preference-tuning.md").read_text()
    for name in ("measure_pso", "measure_style", "measure_subject"):
        found = json.loads((ROOT / f"tools/results/{name}.json").read_text())
        untouched, *tuned = found["rows"]
        for row in tuned:
            distances = f"{row['frechet']:.3f} ({untouched['frechet']:.3f})"
            assert f"| {row['win_rate']:.3f} | {distances} | {row['sharpness']:.3f} |" in page, (name, row["name"])


def test_the_guidance_adapters_numbers_are_those_that_were_measured() -> None:
    """`tools/measure_agd.py` wrote the file: half the calls, 0.6x of the time, and a fifth of the error over all w."""
    page = (ROOT / "docs/guidance-adapters.md").read_text()
    found = json.loads((ROOT / "tools/results/measure_agd.json").read_text())
    for line in found["lines"]:
        guided, adapter = line["guided"]["frechet"], line["adapter"]["frechet"]
        alone, adapted = line["error_unguided"], line["error"]
        ratios = f"{line['frechet_ratio']:.2f}x | {line['time_ratio']:.2f}x"
        assert f"| {line['w']:g} | {guided:.3f} | {adapter:.3f} | {ratios} | {alone:.4f} | {adapted:.4f} |" in page
        assert line["frechet_ratio"] <= 1.05
        assert line["time_ratio"] <= 0.6
    assert f"| all | | | | | {found['error_unguided']:.4f} | {found['error']:.4f} |" in page
    assert found["error_unguided"] >= 5 * found["error"]


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_readme_is_short_and_links_every_page() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 200
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in readme, page.name


def test_the_readmes_results_are_those_of_the_results_page() -> None:
    """The README has five rows of the tables that `tools/compare_methods.py` wrote."""
    readme, results = (ROOT / "README.md").read_text(), (ROOT / "docs/results.md").read_text()
    rows = {
        "`dmd2`": "dmd2",
        "`decoupled`": "decoupled",
        "`lcm`": "lcm",
        "`tscd`": "tscd",
        "`dmd2`, one-step config": "dmd2-1step",
    }
    for name, label in rows.items():
        line = next(line for line in results.splitlines() if line.startswith(f"| {label} |"))
        _, _, seeds, one, _, four, *_ = [cell.strip().split(" ")[0] for cell in line.split("|")]
        assert seeds == "3"
        assert f"| {name} | {one} | {four} |" in readme


def test_the_config_reference_is_current() -> None:
    """`python tools/generate_docs.py` wrote the page from today's schema."""
    assert generate_docs.PAGE.read_text(encoding="utf-8") == generate_docs.configs_page()
