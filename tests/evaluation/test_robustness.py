"""Evaluations on a full or read-only disk, with images that are not numbers, or too large for the network."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch
from PIL import Image

import stepdistill
from stepdistill.errors import UserError
from stepdistill.evaluation.images import as_uint8
from stepdistill.evaluation.reports.report import Report
from stepdistill.inference import artifact

ARGUMENTS: dict[str, object] = {
    "protocol": "fashion", "steps": [1], "guidance": 1.5, "scheduler": "ddim", "num_images": 12, "device": "cpu", "batch_size": 12,
    "metrics": ["fid", "saturation"],
}  # fmt: skip


def fill_disk(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Makes every write after that many files fail, as on a full disk."""
    written, fsync = [0], os.fsync

    def full(file: int | IO[bytes]) -> None:
        written[0] += 1
        if written[0] > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "fsync", full)


@pytest.mark.parametrize("after", [0, 2, 9, 26, 28])
def test_evaluate_on_a_full_disk_is_one_sentence_and_the_same_call_works_later(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up while the record, the first images, the last images or the report are written."""
    with monkeypatch.context() as full:
        fill_disk(full, after)
        with pytest.raises(UserError, match=r"could not be written .No space left on device.: make room"):
            stepdistill.evaluate("builtin:teacher", tmp_path / "out", **ARGUMENTS)
    assert not list((tmp_path).rglob("*.tmp"))
    assert not (tmp_path / "out/report.json").exists()
    report = stepdistill.evaluate("builtin:teacher", tmp_path / "out", **ARGUMENTS)
    assert Report.read(tmp_path / "out") == report


@pytest.mark.parametrize("after", [0, 1, 2, 4])
def test_a_folder_on_a_full_disk_leaves_nothing_and_the_same_call_works_later(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").mkdir()
    for i in range(4):
        Image.new("RGB", (32, 32), (40 * i, 0, 90)).save(tmp_path / f"images/{i}.png")
    call = lambda: stepdistill.evaluate_images(  # noqa: E731
        tmp_path / "images", tmp_path / "images", tmp_path / "out", features="random", device="cpu",
        save_statistics=tmp_path / "statistics.npz",
    )  # fmt: skip
    with monkeypatch.context() as full:
        fill_disk(full, after)
        with pytest.raises(UserError, match="could not be written"):
            call()
    assert not list(tmp_path.glob("**/*.tmp"))
    assert not (tmp_path / "out").exists()
    call()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.json", "report.md", "report.html"}
    assert (tmp_path / "statistics.npz").is_file()


def test_a_model_that_draws_nan_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = artifact.load_artifact

    def overflowed(*arguments: object) -> artifact.Artifact:
        loaded = load(*arguments)  # type: ignore[arg-type]
        with torch.no_grad():
            loaded.pipeline.unet.conv_out.weight.mul_(torch.nan)
        return loaded

    monkeypatch.setattr("stepdistill.api.evaluating.load_artifact", overflowed)
    with pytest.raises(UserError, match="draws NaN or infinity"):
        stepdistill.evaluate("builtin:teacher", tmp_path / "out", **ARGUMENTS)
    assert not list((tmp_path / "out").rglob("*.png"))
    assert not (tmp_path / "out/report.json").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_pixels_are_an_error(value: float) -> None:
    images = np.full((1, 3, 8, 8), 0.5, np.float32)
    images[0, 1, 2, 3] = value
    with pytest.raises(UserError, match="NaN or infinity"):
        as_uint8(images, (0, 1))


def test_a_size_that_the_network_cannot_read_is_an_error_before_anything_is_drawn(tmp_path: Path) -> None:
    for metrics, sentence in (
        (["fid"], "the judge reads 32 x 32"),
        (["prompt_accuracy"], "prompt_accuracy reads 32 x 32"),
    ):
        with pytest.raises(UserError, match=sentence):
            stepdistill.evaluate(
                "builtin:teacher", tmp_path / "out", **(ARGUMENTS | {"size": (64, 48), "metrics": metrics})
            )
        assert not (tmp_path / "out").exists()
