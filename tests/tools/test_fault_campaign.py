"""Real `stepdistill train` processes, killed and damaged: no run is lost, and nothing is done twice that was saved."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "fault_campaign.py"
pytestmark = [pytest.mark.ci, pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")]


def campaign(folder: Path, *arguments: str, kills: int, timeout: float) -> dict[str, Any]:
    file = folder / "faults.json"
    command = [sys.executable, str(TOOL), "--kills", str(kills), "--json", str(file), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(file.read_text()))


def test_a_kill_and_a_truncated_file(tmp_path: Path) -> None:
    report = campaign(tmp_path, "--only", "kills", "broken-files", kills=1, timeout=1800)
    assert [(fault["fault"], fault["verdict"]) for fault in report["faults"]] == [
        ("kills", "passed"),
        ("broken-files", "passed"),
    ]
    assert (report["injected"], report["runs_lost"], report["steps_lost"], report["not_run"]) == (2, 0, 0, [])


@pytest.mark.slow
def test_twenty_kills_and_every_other_fault(tmp_path: Path) -> None:
    report = campaign(tmp_path, kills=20, timeout=7200)
    assert (report["runs_lost"], report["steps_lost"]) == (0, 0)
    assert {fault["fault"]: fault["injected"] for fault in report["faults"]}["kills"] == 20
    assert set(report["not_run"]) <= {"full-disk"}
