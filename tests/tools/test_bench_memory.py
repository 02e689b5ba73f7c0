"""The memory bench on a small U-Net: what it lists adds up, and what it computes for three copies is what it measures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "bench_memory.py"
pytestmark = [pytest.mark.ci, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")]


def bench(output: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(TOOL), "--model", "tiny", "--resolution", "128", "--json", str(output), *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=1800)
    return json.loads(output.read_text())


def test_shared_and_three_copies(tmp_path: Path) -> None:
    shared = bench(tmp_path / "shared.json")
    copies = bench(tmp_path / "copies.json", "--layout", "three-copies")
    halves = bench(tmp_path / "halves.json", "--layout", "three-copies", "--copies", "bfloat16")
    known = ("--layout", "three-copies", "--shared", str(tmp_path / "shared.json"), "--limit", "0")
    computed = bench(tmp_path / "computed.json", *known)

    assert (shared["computed"], copies["computed"], computed["computed"]) == (False, False, True)
    for report in (shared, copies, halves, computed):
        assert sum(report["parts"].values()) == pytest.approx(report["peak_gb"], abs=1e-3)
    assert shared["peak_gb"] == max(shared["phases"].values())
    for part in ("roles", "optimizers"):  # exact: they are the sizes of the same tensors
        assert computed["parts"][part] == pytest.approx(copies["parts"][part], abs=2e-4)
        assert halves["parts"][part] == pytest.approx(copies["parts"][part] / 2, rel=0.02)
    beyond = {name: report["peak_gb"] - report["parts"]["baseline"] for name, report in
              (("shared", shared), ("copies", copies), ("computed", computed))}  # fmt: skip
    assert beyond["computed"] == pytest.approx(beyond["copies"], rel=0.15)
    assert beyond["shared"] < 0.6 * beyond["copies"]
