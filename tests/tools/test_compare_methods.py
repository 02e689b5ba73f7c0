"""The comparison tool: one cell made again against the kept one, budgets, what is missing, tables."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from stepdistill.config.schema import RunConfig
from stepdistill.errors import UserError
from stepdistill.training.run import Outcome

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))
import compare_methods as compare  # noqa: E402
import comparetables  # noqa: E402

pytestmark = pytest.mark.ci

COMPARISON = compare.read_comparison(TOOLS / "comparison.yaml")


def test_a_kept_cell_is_what_its_config_gives_again(tmp_path: Path) -> None:
    """Trained, exported and measured anew: the same calls and iterations, and the judge's figures but for rounding."""
    kept = comparetables.Cell.read(compare.RESULTS / "check-seed0.json")
    again = compare.run_cell("check", COMPARISON.entries["check"], COMPARISON, 0, tmp_path)
    assert again.config_sha256 == kept.config_sha256, "the config of the cell 'check' changed: run it again"
    assert (again.calls, again.iterations, again.images) == (kept.calls, kept.iterations, kept.images)
    for new, old in zip(again.rows, kept.rows, strict=True):
        assert asdict(new) == pytest.approx(asdict(old), rel=0.02)
    assert not any(tmp_path.iterdir())


def test_a_cell_that_was_stopped_is_no_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that a signal ends goes on to its end in good order, and was measured as if it were whole."""
    whole = compare.train

    def stopped(config: RunConfig, *others: Any) -> Outcome:
        """As after SIGTERM in the first iteration."""
        short = config.training.model_copy(update={"max_steps": 1})
        return whole(config.model_copy(update={"training": short}), *others)

    monkeypatch.setattr(compare, "train", stopped)
    entry = COMPARISON.entries["check"].model_copy(update={"calls": 10**9})
    with pytest.raises(UserError, match="was stopped at iteration 1: run it again"):
        compare.run_cell("check", entry, COMPARISON, 0, tmp_path)


def test_the_budget_counts_every_call_and_ends_the_run() -> None:
    """3 iterations of 64 samples: 1 exit call and some on the way, guided teacher 2, fake score 1 in each loss."""
    kept = comparetables.Cell.read(compare.RESULTS / "check-seed0.json")
    budget = COMPARISON.entries["check"].calls
    assert budget is not None
    assert kept.calls["real_score"] == kept.iterations * 64 * 2
    assert kept.calls["fake_score"] == kept.iterations * 64 * 2
    assert kept.iterations * 64 <= kept.calls["generator"] <= kept.iterations * 64 * 4
    spent = sum(kept.calls.values())
    assert budget <= spent < budget * kept.iterations / (kept.iterations - 1) + 64


def test_every_kept_cell_is_of_todays_config() -> None:
    for name, cells in comparetables.read_cells(compare.RESULTS).items():
        entry = COMPARISON.entries[name]
        for cell in cells:
            calls, images = entry.calls or COMPARISON.calls, entry.images or COMPARISON.images
            config = compare.config_of(entry, cell.seed)
            assert cell.config_sha256 == compare.hash_of(config, calls, images), (name, cell.seed)


def test_all_entries_and_tables_fit() -> None:
    for name, entry in COMPARISON.entries.items():
        assert compare.config_of(entry, 0).training.seed == 0, name
    assert {name for names in COMPARISON.tables.values() for name in names} <= set(COMPARISON.entries)


def test_only_missing_and_changed_cells_run(tmp_path: Path) -> None:
    wanted = compare.Wanted(tmp_path, None, None)
    everything = list(compare.missing(COMPARISON, wanted))
    assert ("check", 0) in everything
    assert ("check", 1) not in everything
    assert everything.index(("dmd2", 0)) < everything.index(("decoupled", 0)) < everything.index(("dmd2", 1))
    kept = comparetables.Cell.read(compare.RESULTS / "check-seed0.json")
    (tmp_path / "check-seed0.json").write_text(json.dumps(asdict(kept)))
    assert ("check", 0) not in compare.missing(COMPARISON, wanted)
    (tmp_path / "check-seed0.json").write_text(json.dumps(asdict(replace(kept, config_sha256="of another config"))))
    assert list(compare.missing(COMPARISON, compare.Wanted(tmp_path, ["check"], None))) == [("check", 0)]
    with pytest.raises(UserError, match="no entry 'dmd3'"):
        list(compare.missing(COMPARISON, compare.Wanted(tmp_path, ["dmd3"], None)))


def test_table_and_picture(tmp_path: Path) -> None:
    kept = comparetables.Cell.read(compare.RESULTS / "check-seed0.json")
    rows = [replace(row, frechet=1.0, diversity=0.1, prompt_accuracy=0.9) for row in kept.rows]
    one = replace(kept, entry="one", rows=rows)
    two = replace(one, seed=1, rows=[replace(row, frechet=3.0) for row in rows])
    short = replace(one, entry="short", rows=rows[:1])
    cells = {"one": [one, two], "short": [short]}
    lines = comparetables.table(cells, ["one", "short", "absent"], 0.2).splitlines()
    assert len(lines) == 4
    # standard error of 1 and 3: sqrt(2) / sqrt(2)
    assert lines[2].startswith("| one | 2 | 2.000 ±1.000 | 2.000 ±1.000 | 2.000 ±1.000 | 0.900 ±0.000 | 0.500 ±0.000 |")
    assert lines[3].startswith("| short | 1 | 1.000 | - | - | 0.900 | 0.500 |")
    comparetables.picture(cells, ["one", "short"], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_the_results_page_shows_the_tables() -> None:
    """Of the kept cells, as the tool prints them."""
    text = (TOOLS.parent / "docs/results.md").read_text()
    cells = comparetables.read_cells(compare.RESULTS)
    for entries in COMPARISON.tables.values():
        assert comparetables.table(cells, entries, compare.teacher_diversity(COMPARISON, entries)) in text


def test_what_the_kept_cells_say_of_consistency() -> None:
    """As docs/results.md has it: LCM in 4 steps within twice the teacher's distance, the segmented chain with its score below LCM in one
    step, TBCM without images within 10 % of sCM, in less memory and time an update."""
    cells = comparetables.read_cells(compare.RESULTS)
    mean = lambda name, steps: fmean(row.frechet for cell in cells[name] if (row := cell.at(steps)))  # noqa: E731
    for before, row in (("", compare.TEACHER_ROW), ("flow-", compare.FLOW_TEACHER_ROW)):
        assert mean(f"{before}lcm", 4) <= 2 * json.loads(row.read_text())["1.5"]["frechet"]
        assert mean(f"{before}tscd", 1) < mean(f"{before}lcm", 1)
        assert mean(f"{before}tbcm", 1) <= 1.1 * mean(f"{before}scm", 1)
    cost = json.loads((TOOLS / "results/bench_consistency.json").read_text())["tbcm / scm, semi_discrete"]
    assert max(cost["processor"], cost["memory"]) < 1
