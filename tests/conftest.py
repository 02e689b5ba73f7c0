"""Fixtures that every test may use: tiny checkpoints, each written once a session."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizerFast, CLIPVisionConfig

from stepdistill.assets import FOLDER
from stepdistill.config.registry import load_family

# one thread: the networks are tiny, and a second one waits in a busy loop for its turn on a machine that is shared
torch.set_num_threads(1)

CLIP_LENGTH = 77


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


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


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP of 77 positions with the embedded teacher's tokenizer."""
    folder = tmp_path_factory.mktemp("clip-tiny")
    tokenizer = CLIPTokenizerFast.from_pretrained(FOLDER / "teacher" / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    torch.manual_seed(0)
    CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
