"""Runs of DMD2 with its GAN term on tiny checkpoints, for tests of image sources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from stepdistill.config import RunConfig, parse
from stepdistill.training import checkpoint as checkpoints
from stepdistill.training.run import train


def run_config(model: Path, steps: int, batch: int = 2, accumulation: int = 1, **section: Any) -> RunConfig:
    """DMD2 with its GAN term on a tiny checkpoint."""
    role = {"mode": "lora", "rank": 4, "alpha": 2}
    return parse(
        RunConfig,
        {
            "model": {"path": str(model)},
            "method": {"name": "dmd2", "guidance": 2.0, "ratio": 2, "steps": 2, "gan": {"weight": 1e-2}},
            "roles": {"generator": role, "fake_score": role},
            "optimizers": {"generator": {"lr": 1e-3}, "fake_score": {"lr": 1e-3}},
            "data": {"prompts": "builtin:general", **section},
            "training": {
                "max_steps": steps, "batch_size": batch, "accumulation": accumulation, "grid_prompts": 1, "device": "cpu",
            },
        },
        "test",
    )  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's newest checkpoint, by file and name."""
    path = checkpoints.latest(folder / "checkpoints")
    assert path is not None
    return {
        f"{file}/{key}": value for file, group in checkpoints.read(path).tensors.items() for key, value in group.items()
    }


def resumes_exactly(model: Path, folder: Path, **section: Any) -> bool:
    """Whether four iterations and two and two end in the same bits."""
    train(run_config(model, 4, **section), folder / "whole")
    train(run_config(model, 2, **section), folder / "broken")
    train(run_config(model, 4, **section), folder / "broken", resume="latest")
    whole, broken = weights(folder / "whole"), weights(folder / "broken")
    return whole.keys() == broken.keys() and all(torch.equal(whole[key], broken[key]) for key in whole)
