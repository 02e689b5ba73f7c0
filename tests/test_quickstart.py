"""The quickstart on a short budget: every file it promises, and a report that holds together."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import stepdistill
from stepdistill.errors import UserError
from stepdistill.evaluation.fashion import SEEDS_PER_PROMPT, FashionScorer, evaluation_set


def test_a_short_quickstart_writes_what_it_promises(tmp_path: Path) -> None:
    short = ["training.max_steps=4", "training.batch_size=4", "training.grid_prompts=2", "training.threads=1"]
    report = stepdistill.quickstart(tmp_path / "out", overrides=short, images=12)
    folder = tmp_path / "out"
    record = json.loads((folder / "report.json").read_text())
    assert [row["name"] for row in record["rows"]] == ["teacher", "base", "base_same_recipe", "student"]
    assert [row["network_calls"] for row in record["rows"]] == [100, 8, 4, 4]
    assert all(row["num_images"] == 12 for row in record["rows"])
    assert record["noise_floor"] > 0
    for name in ("grid.png", "lora/pytorch_lora_weights.safetensors", "lora/recipe.json", "lora/proof.safetensors"):
        assert (folder / name).is_file()
    assert len(list((folder / "images/student").glob("*.png"))) == 12
    assert "load_lora_weights" in report.text()


def test_the_scorer_reads_what_the_prompts_say() -> None:
    prompts, seeds = evaluation_set(24)
    shared = prompts[: 2 * SEEDS_PER_PROMPT]
    assert [len(set(shared[:SEEDS_PER_PROMPT])), len(set(shared))] == [1, 2]
    assert len(set(prompts)) == 2 + 16  # a third of the images in groups, the others with a prompt of their own
    assert len(set(seeds)) == len(prompts) == 24
    grey = np.full((24, 32, 32, 3), 127, np.uint8)
    scores = FashionScorer().score(grey, prompts)
    assert abs(scores.diversity) < 1e-12  # one picture twenty-four times
    assert scores.saturation == 0
    assert scores.frechet > 1


@pytest.mark.parametrize("images", [0, 100])
def test_a_number_of_images_without_whole_groups_is_refused_before_training(images: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="multiple of 12"):
        stepdistill.quickstart(tmp_path / "out", images=images)
    assert not (tmp_path / "out").exists()
