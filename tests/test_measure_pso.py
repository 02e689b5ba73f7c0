"""The tool that measures PSO: pairs that differ as they should, rows of what was trained, and what the rows are held against."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from stepdistill.config import load_config
from stepdistill.training.run import run_config, train

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import measure_pso as tool  # noqa: E402


def test_ranked_takes_most_and_least() -> None:
    images = np.arange(2 * 3, dtype=np.uint8).reshape(2, 3, 1, 1, 1)
    most, least = tool.ranked(images, np.array([[0.1, 0.9, 0.5], [3.0, 2.0, 1.0]]))
    assert most.flatten().tolist() == [1, 3]
    assert least.flatten().tolist() == [0, 5]


def test_a_small_measurement(tmp_path: Path) -> None:
    """A student of one iteration: what is not trained ties with itself, and winners are brighter than losers."""
    quick = ["training.max_steps=1", "training.batch_size=2", "training.grid_every=0", "training.grid_prompts=1"]
    train(load_config(ROOT / "configs/fashion_dmd2.yaml", quick), tmp_path / "student")
    asked = ["--student", str(tmp_path / "student"), "--work", str(tmp_path), "--pairs", "4", "--candidates", "2"]
    arguments = tool.parser().parse_args(
        [*asked, "--images", "12", "--iterations", "1", "--batch", "2", "--lr", "1e-3"]
    )
    found = tool.measure(arguments)
    untouched, pso, plain = found["rows"]
    assert [row["name"] for row in found["rows"]] == ["untouched", "pso", "plain"]
    assert (untouched["win_rate"], untouched["sharpness"]) == (0.5, 1.0)
    assert pso["attribute"] != untouched["attribute"]
    assert plain["attribute"] != pso["attribute"]
    luma = [
        tool.attribute_of("critic:brightness", read(tmp_path / side), [""] * 4)[:, 0] for side in ("winners", "losers")
    ]
    assert len(luma[0]) == len(luma[1]) == 4
    assert (luma[0] > luma[1]).all()
    assert run_config(tmp_path / "plain").method["kappa"] == 0


def read(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])[:, None]
