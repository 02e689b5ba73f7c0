"""`stepdistill evaluate --images`: metrics without a network, scores of images and captions, what is not a sample."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import stepdistill
from stepdistill.errors import UserError
from stepdistill.evaluation.images import ImageArray
from stepdistill.evaluation.metrics.frechet import frechet_of_features
from stepdistill.evaluation.networks.features import load_extractor
from stepdistill.rewards import load_reward

CAPTIONS = ["a red bag", "a blue coat", "a white dress"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / f"images/{i}.png")
    return tmp_path / "images"


def pixels(folder: Path) -> torch.Tensor:
    images = np.stack([np.asarray(Image.open(folder / f"{i}.png")) for i in range(3)])
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 255


def test_rewards_and_clip_score_of_a_folder_read_captions_or_a_prompt_file(
    folder: Path, tmp_path: Path, clip: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(CAPTIONS) + "\n")
    scored = {"rewards": f"pickscore:{clip},critic:colour", "clip": str(clip), "device": "cpu"}
    listed = stepdistill.evaluate_images(folder, None, tmp_path / "listed", prompts=str(prompts), **scored)
    for i, caption in enumerate(CAPTIONS):
        (folder / f"{i}.txt").write_text(caption)
    beside = stepdistill.evaluate_images(folder, None, tmp_path / "beside", **scored)
    assert beside.rows[0].metrics == listed.rows[0].metrics
    for name in (f"pickscore:{clip}", "critic:colour"):
        expected = float(load_reward(name)(pixels(folder), CAPTIONS).double().mean())
        label = name.replace(str(clip), clip.name)
        assert beside.rows[0].metrics[label] == pytest.approx(expected, abs=1e-6)
    assert f"clip[{clip.name},gigagan]" in beside.rows[0].metrics
    assert beside.record.seeds == ""  # nothing was drawn
    (folder / "2.txt").unlink()
    with pytest.raises(UserError, match=r"1 of 3 images .* have no caption \(first: '2.png'\)"):
        stepdistill.evaluate_images(folder, None, tmp_path / "other", **scored)
    prompts.write_text("one\ntwo\n")
    with pytest.raises(UserError, match=r"holds 2 prompts and .* 3 images"):
        stepdistill.evaluate_images(folder, None, tmp_path / "other", prompts=str(prompts), **scored)
    assert not (tmp_path / "other").exists()


def test_metrics_without_a_network_need_no_weights_and_no_reference(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    report = stepdistill.evaluate_images(
        folder, None, tmp_path / "out", metrics=["saturation", "brightness"], device="cpu"
    )
    luma = (pixels(folder) * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1).mean()
    assert set(report.rows[0].metrics) == {"saturation", "brightness"}
    assert report.rows[0].metrics["brightness"] == pytest.approx(float(luma), abs=0.05)
    with pytest.raises(UserError, match="give --reference"):
        stepdistill.evaluate_images(folder, None, tmp_path / "other", metrics=["kid"])
    with pytest.raises(UserError, match="give --download"):
        stepdistill.evaluate_images(folder, folder, tmp_path / "other", metrics=["fid"])


def test_a_folders_row_says_nothing_about_sampling(folder: Path, tmp_path: Path) -> None:
    stepdistill.evaluate_images(folder, None, tmp_path / "out", metrics=["brightness"], device="cpu")
    (row,) = json.loads((tmp_path / "out/report.json").read_text())["rows"]
    assert (row["steps"], row["network_calls"], row["guidance"]) == (None, None, None)
    assert "|  | brightness |" in (tmp_path / "out/report.md").read_text()


def test_the_overview_of_sample_is_not_measured(folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (96, 32)).save(folder / "grid.png")
    report = stepdistill.evaluate_images(folder, None, tmp_path / "out", metrics=["brightness"], device="cpu")
    assert report.rows[0].num_images == 3


def test_lossy_files_are_an_error_that_names_the_option(folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(folder / "photo.jpg")
    with pytest.raises(UserError, match="or --allow-lossy"):
        stepdistill.evaluate_images(folder, None, tmp_path / "out", metrics=["brightness"])


def pictures(count: int, seed: int = 0, tint: int = 0) -> Iterator[ImageArray]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        base = rng.integers(0, 200, (1, 1, 3)) + np.array([tint, 0, 0])
        yield (base + rng.integers(0, 50, (16, 16, 3))).clip(0, 255).astype(np.uint8)


def write(folder: Path, images: Iterator[ImageArray]) -> Path:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:04d}.png")
    return folder


def test_two_folders_of_mixed_sizes_are_measured(tmp_path: Path) -> None:
    """pytorch-fid 1: unequal sizes in one folder."""
    a, b = write(tmp_path / "a", pictures(40)), write(tmp_path / "b", pictures(50, 1, 40))
    Image.fromarray(np.zeros((24, 31, 3), np.uint8)).save(a / "odd.png")
    report = stepdistill.evaluate_images(
        a, b, tmp_path / "out", features="random", metrics=["fid", "kid", "prdc"], device="cpu"
    )
    found = report.rows[0].metrics
    assert set(found) == {"fid", "kid", "kid_std", "precision", "recall", "density", "coverage"}
    images = [*pictures(40), np.zeros((24, 31, 3), np.uint8)]
    network = load_extractor("random")
    expected = frechet_of_features(network(images), network(list(pictures(50, 1, 40))))
    assert found["fid"] == pytest.approx(expected, rel=1e-6)
    saved = tmp_path / "reference.npz"
    told = {"features": "random", "metrics": ["fid", "kid"], "device": "cpu"}
    stepdistill.evaluate_images(b, a, tmp_path / "saving", save_statistics=saved, **told)
    again = stepdistill.evaluate_images(a, saved, tmp_path / "reading", **told).rows[0].metrics
    assert again["fid"] == pytest.approx(expected, rel=1e-6)
    for name in ("report.json", "report.md", "report.html"):
        assert (tmp_path / "out" / name).stat().st_size > 300
    with pytest.raises(UserError, match="did you mean 'precision'"):
        stepdistill.evaluate_images(a, b, tmp_path / "other", features="random", metrics=["precison"])
    with pytest.raises(UserError, match=r"have no caption .*give --prompts FILE"):
        stepdistill.evaluate_images(a, b, tmp_path / "other", features="random", metrics=["diversity"])
