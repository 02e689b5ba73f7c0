"""The tool that measures PSO: pairs that differ as they should, rows of what was trained, and what the rows are held against."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stepdistill.config.schema import load_config
from stepdistill.training.run import run_config, train

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import measure_pso as tool  # noqa: E402

pytestmark = pytest.mark.ci


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


def held(found: dict[str, Any]) -> None:
    """PSO wins and stays sharp where fitting the same images does not."""
    untouched, pso, plain = found["rows"]
    assert [row["name"] for row in found["rows"]] == ["untouched", "pso", "plain"]
    assert pso["win_rate"] >= 0.8
    assert pso["frechet"] < untouched["frechet"]
    assert pso["sharpness"] == pytest.approx(1, abs=0.05)
    assert plain["sharpness"] < min(pso["sharpness"], 0.97)


@pytest.mark.parametrize("name", ["measure_pso", "measure_style", "measure_subject"])
def test_what_the_readme_says_was_measured(name: str) -> None:
    held(json.loads((ROOT / f"tools/results/{name}.json").read_text()))


@pytest.mark.slow
def test_it_is_so(tmp_path: Path) -> None:
    """Trains the student and both tunings: 15 minutes."""
    held(tool.measure(tool.parser().parse_args(["--student", str(tmp_path / "student"), "--work", str(tmp_path)])))


def read(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])[:, None]
