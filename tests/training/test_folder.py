"""Lines of logs on a disk that refuses them."""

from __future__ import annotations

import json
import logging
import os
import resource
from pathlib import Path

import pytest

from stepdistill.training.run_folder.logs import JsonLinesFile


def iterations(path: Path) -> list[int]:
    return [json.loads(line)["iteration"] for line in path.read_text().splitlines()]


def test_refused_lines_wait(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder stands where the file should be, and then no longer does."""
    path = tmp_path / "stats.jsonl"
    file = JsonLinesFile(path)
    path.mkdir()
    with caplog.at_level(logging.WARNING):
        file.append(1, {"loss": 1.0})
        file.append(2, {"loss": 2.0})
    assert caplog.text.count("could not be written") == 2
    path.rmdir()
    file.append(3, {"loss": 3.0})
    assert iterations(path) == [1, 2, 3]


def test_no_line_stays_by_half(tmp_path: Path) -> None:
    """A limit of the file's size cuts the second line short, as a full disk does."""
    path = tmp_path / "stats.jsonl"
    file = JsonLinesFile(path)
    file.append(1, {"loss": 1.0})
    whole = path.stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole + 10, before[1]))
    try:
        file.append(2, {"loss": 2.0})
        assert path.stat().st_size == whole
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    file.append(3, {"loss": 3.0})
    assert iterations(path) == [1, 2, 3]


def test_a_deleted_folder_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "run" / "stats.jsonl"
    file = JsonLinesFile(path)
    file.append(1, {})
    os.unlink(path)
    path.parent.rmdir()
    file.append(2, {})
    assert iterations(path) == [2]


def test_lines_are_json_also_where_a_loss_is_no_number(tmp_path: Path) -> None:
    JsonLinesFile(tmp_path / "stats.jsonl").append(3, {"loss": float("nan"), "norm": float("inf"), "lr": 0.5})
    line = (tmp_path / "stats.jsonl").read_text()
    assert line == '{"iteration": 3, "loss": null, "norm": null, "lr": 0.5}\n'
