"""Fixtures that every test may use: tiny checkpoints, each written once a session."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

from stepdistill.registry import load_family

# one thread: the networks are tiny, and a second one waits in a busy loop for its turn on a machine that is shared
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny(family, variant="default")` -> folder of a tiny random checkpoint. Read it, never write to it."""
    root = tmp_path_factory.mktemp("tiny")

    def write(family: str, variant: str = "default") -> Path:
        folder = root / f"{family}-{variant}"
        if not folder.exists():
            load_family(family).write_tiny(folder, variant)
        return folder

    return write


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a weight fails the test."""

    def forbidden(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("weights were read")

    for owner in (StableDiffusionPipeline, StableDiffusionXLPipeline, StableDiffusion3Pipeline, AutoencoderKL):
        monkeypatch.setattr(owner, "from_pretrained", forbidden)
        monkeypatch.setattr(owner, "from_single_file", forbidden)
    monkeypatch.setattr(torch, "load", forbidden)
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", forbidden)


@pytest.fixture
def copied(tiny: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a tiny checkpoint that the test may break."""

    def copy(family: str, variant: str = "default") -> Path:
        return Path(shutil.copytree(tiny(family, variant), tmp_path / "model"))

    return copy
