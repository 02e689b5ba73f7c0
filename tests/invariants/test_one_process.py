"""What holds for every method on one process: a broken run equals a whole one, and micro-batches change nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from methods import CASES, Bench, difference, equal, saved

from stepdistill.registry import method_names
from stepdistill.training.run import train


@pytest.fixture
def bench(tiny: Callable[..., Path], tmp_path: Path) -> Bench:
    return Bench(tiny, tmp_path)


def test_no_method_is_missing() -> None:
    assert {case.method for case in CASES.values()} == set(method_names())


@pytest.mark.parametrize("name", CASES)
def test_resume_is_bit_identical(bench: Bench, tmp_path: Path, name: str) -> None:
    """Broken off one before, at, and one after the end of a period of updates, and in mid-epoch each time."""
    case, last = CASES[name], 2 * CASES[name].period + 2
    train(bench.config(case, last), tmp_path / "whole")
    for cut in {max(1, case.period - 1), case.period, case.period + 1}:
        folder = tmp_path / f"broken{cut}"
        train(bench.config(case, cut), folder)
        train(bench.config(case, last), folder, resume="latest")
        assert equal(saved(tmp_path / "whole"), saved(folder))
        assert (tmp_path / "whole/stats.jsonl").read_text() == (folder / "stats.jsonl").read_text()


@pytest.mark.parametrize("name", CASES)
def test_accumulation_changes_nothing(bench: Bench, tmp_path: Path, name: str) -> None:
    """4 x 1 = 2 x 2 = 1 x 4, over more than a period."""
    case, last = CASES[name], CASES[name].period + 2
    train(bench.config(case, last, batch_size=4), tmp_path / "4x1")
    for batch, accumulation in ((2, 2), (1, 4)):
        folder = tmp_path / f"{batch}x{accumulation}"
        train(bench.config(case, last, batch_size=batch, accumulation=accumulation), folder)
        assert difference(saved(tmp_path / "4x1"), saved(folder)) < 1e-10
