"""What holds for every method on one process: a broken run equals a whole one, and micro-batches change nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.method_cases import CASES, Bench, difference, equal, saved

from stepdistill.config.registry import method_names
from stepdistill.training.run import train

BY_DEFAULT = "dmd2"
"""The case that a plain `pytest` runs; the others are marked `ci`."""
ALL_CASES = [name if name == BY_DEFAULT else pytest.param(name, marks=pytest.mark.ci) for name in CASES]


@pytest.fixture
def bench(tiny: Callable[..., Path], tmp_path: Path) -> Bench:
    return Bench(tiny, tmp_path)


def test_no_method_is_missing() -> None:
    assert {case.method for case in CASES.values()} == set(method_names())


@pytest.mark.parametrize("name", ALL_CASES)
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


@pytest.mark.ci
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_what_is_drawn_resumes_too(bench: Bench, tmp_path: Path, cut: int) -> None:
    """Signals of the grids, and of real latents over the lines before: a cut between two drawings, and at one."""
    make = lambda steps: bench.config(CASES["dmd2-gan"], steps, grid_every=2, batch_size=2)  # noqa: E731
    train(make(4), tmp_path / "whole")
    train(make(cut), tmp_path / "broken")
    train(make(4), tmp_path / "broken", resume="latest")
    whole = (tmp_path / "whole/stats.jsonl").read_text()
    assert whole.count("signals/diversity_ratio") == whole.count("signals/fake_shift") == 2
    assert whole.count("generator/real_std") == 2
    assert whole == (tmp_path / "broken/stats.jsonl").read_text()
    for kind in ("step", "scores"):
        pictures = [(tmp_path / run / f"grids/{kind}-00000004.png").read_bytes() for run in ("whole", "broken")]
        assert pictures[0] == pictures[1]


@pytest.mark.parametrize("name", ALL_CASES)
def test_accumulation_changes_nothing(bench: Bench, tmp_path: Path, name: str) -> None:
    """4 x 1 = 2 x 2 = 1 x 4, over more than a period."""
    case, last = CASES[name], CASES[name].period + 2
    train(bench.config(case, last, batch_size=4), tmp_path / "4x1")
    for batch, accumulation in ((2, 2), (1, 4)):
        folder = tmp_path / f"{batch}x{accumulation}"
        train(bench.config(case, last, batch_size=batch, accumulation=accumulation), folder)
        assert difference(saved(tmp_path / "4x1"), saved(folder)) < 1e-10
