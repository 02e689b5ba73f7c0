"""Runs of DMD2 with its GAN term on tiny checkpoints, for tests of image sources."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from stepdistill.config.reading import parse
from stepdistill.config.schema import RunConfig
from stepdistill.training.run import train
from stepdistill.training.run_folder import checkpoints
from stepdistill.training.trainer import Trainer


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
                "max_steps": steps, "batch_size": batch, "accumulation": accumulation, "save_every": 2, "grid_prompts": 1, "device": "cpu",
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


class Killed(Exception):
    """What stands for a process that is killed."""


def train_until_killed(config: RunConfig, folder: Path, iteration: int) -> None:
    """Train, and die in an iteration, with whatever was read ahead by then."""
    step = Trainer.iteration

    def fatal(self: Trainer, batches: Any) -> Any:
        if self.counters.iteration == iteration:
            raise Killed
        return step(self, batches)

    with patch.object(Trainer, "iteration", fatal), pytest.raises(Killed):
        train(config, folder)


def resumes_exactly(model: Path, folder: Path, **section: Any) -> bool:
    """Whether four iterations, and a run that was killed in its fourth and went on from its second, end in the same bits."""
    config = run_config(model, 4, **section)
    train(config, folder / "whole")
    train_until_killed(config, folder / "broken", 3)
    train(config, folder / "broken", resume="latest")
    whole, broken = weights(folder / "whole"), weights(folder / "broken")
    return whole.keys() == broken.keys() and all(torch.equal(whole[key], broken[key]) for key in whole)
