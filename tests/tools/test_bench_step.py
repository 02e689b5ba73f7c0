"""The step bench on a small U-Net: both sides make the same iteration and train; what is measured and left out is said."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

TOOLS = Path(__file__).parents[2] / "tools"
pytestmark = [pytest.mark.ci, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")]
SHAPE = {
    "model": "tiny", "resolution": 64, "rank": 4, "targets": "attention", "steps": 2, "ratio": 2, "turns": 1,
    "threads": 1, "checkpointing": False,
}  # fmt: skip


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    return import_module("bench_step")


def test_both_sides_make_the_same_iteration_and_train(bench: ModuleType) -> None:
    """Before the first update LoRAs on one base and three networks are one model, so that their losses are equal."""
    mine, theirs = (
        bench.Case(method=method, layout=layout, **SHAPE)
        for method, layout in (("dmd2", "lora/lora"), (bench.PLAIN, "full/full"))
    )
    report = bench.race(mine, theirs)
    shared, whole = report["first_losses"]
    assert shared.keys() == whole.keys() == {"generator", "fake_score"}
    assert all(shared[role] == pytest.approx(whole[role], rel=1e-4) for role in shared)
    assert report["trained"] == [{"generator": True, "fake_score": True}] * 2
    assert len(report["shared"]) == len(report["three_networks"]) == 1
    turn = report["three_networks"][0]["wall"] / report["shared"][0]["wall"]
    assert report["ratio"] == pytest.approx(turn, abs=1e-3)
    assert report["ratio_range"] == [report["ratio"]] * 2


@pytest.mark.parametrize("due", [True, False])
def test_the_plain_iteration_follows_the_ratio(bench: ModuleType, due: bool) -> None:
    contestant = bench.plain(bench.Case(method=bench.PLAIN, layout="full/full", **SHAPE))
    torch.set_num_threads(1)
    losses = contestant.run(0 if due else 1)
    assert losses.keys() == ({"generator", "fake_score"} if due else {"fake_score"})
    assert contestant.trained() == {"generator": due, "fake_score": True}


def test_the_report(tmp_path: Path) -> None:
    """One row is measured in a process of its own, two pass the limit and say so."""
    file = tmp_path / "report.json"
    command = [sys.executable, str(TOOLS / "bench_step.py"), "--model", "tiny", "--resolution", "64", "--ratio", "1"]
    command += ["--turns", "2", "--methods", "dmd2", "--layouts", "lora/lora", "full/full", "--limit", "0.5"]
    subprocess.run([*command, "--json", str(file)], check=True, capture_output=True, text=True, timeout=1800)
    report = json.loads(file.read_text())
    assert (report["model"], report["resolution"], report["ratio"]) == ("tiny", 64, 1)
    assert report["torch_version"] == torch.__version__
    measured, *beyond = report["rows"]
    assert (measured["method"], measured["layout"]) == ("dmd2", "lora/lora")
    assert len(measured["seconds"]) == len(measured["cpu_seconds"]) == 2
    assert measured["peak_gb"] > measured["baseline_gb"] > 0.1
    assert measured["trained"] == {"generator": True, "fake_score": True}
    assert measured["left_out"] is None
    assert [row["layout"] for row in beyond] == ["full/full", "full/full"]
    assert all("more than the 0.5 GB of --limit" in row["left_out"] and not row["seconds"] for row in beyond)
    assert "race" not in report
