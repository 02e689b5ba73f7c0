"""Evaluation during training: raw weights and EMA by one protocol, and the best checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import stepdistill
from stepdistill.errors import UserError
from stepdistill.training.run_folder import checkpoints


@pytest.mark.ci
def test_evaluation_during_training_keeps_the_best_checkpoint(tmp_path: Path) -> None:
    """Raw and averaged weights by one protocol; pruning spares the best; a resumed run knows it; nothing else changes."""
    short = [
        "training.max_steps=4", "training.batch_size=2", "training.grid_prompts=1", "training.threads=1", "training.keep=1",
        "training.log_every=1", "training.save_every=1", "method.ratio=1",
    ]  # fmt: skip
    watched = ["evaluation={every: 2, protocol: fashion, images: 12, metrics: [fid, saturation]}"]
    quickstart = Path(__file__).parents[2] / "configs/quickstart.yaml"
    stepdistill.distill(stepdistill.load_config(quickstart, short), tmp_path / "plain")
    stepdistill.distill(stepdistill.load_config(quickstart, short + watched), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/evaluation.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [2, 4]
    names = {
        "evaluation/generator/fid@12",
        "evaluation/generator_ema/fid@12",
        "evaluation/generator/saturation@12",
        "evaluation/generator_ema/saturation@12",
    }
    assert set(lines[0]) == {"iteration"} | names
    best = json.loads((tmp_path / "run/checkpoints/best/best.json").read_text())
    assert best["value"] == min(line["evaluation/generator_ema/fid@12"] for line in lines)
    kept = checkpoints.read(tmp_path / "run/checkpoints/best")
    assert kept.metadata.counters.iteration == best["iteration"]
    newest = [checkpoints.read(tmp_path / name / "checkpoints/step-00000004") for name in ("plain", "run")]
    for name, tensor in newest[0].tensors["generator"].items():
        assert torch.equal(tensor, newest[1].tensors["generator"][name])
    stepdistill.export(tmp_path / "run", "diffusers-lora", tmp_path / "lora", checkpoint="best", device="cpu")
    with pytest.raises(UserError, match="no best checkpoint"):
        stepdistill.export(tmp_path / "plain", "diffusers-lora", tmp_path / "other", checkpoint="best")
    worse = ["evaluation={every: 2, protocol: fashion, metrics: [kid], best: fid}"]
    with pytest.raises(UserError, match=r"evaluation.best is 'fid'"):
        stepdistill.distill(stepdistill.load_config(quickstart, short + worse), tmp_path / "wrong")
