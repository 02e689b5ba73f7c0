"""Fixtures that every test may use: tiny checkpoints, each written once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

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
