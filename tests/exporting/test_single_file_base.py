"""A student whose base is one file: how the base was opened is known to export, sample and the exported code."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from original_format import sd1
from safetensors.torch import load_file, save_file
from support.proofs import BLOCKED, reproduced

import stepdistill
from stepdistill.config.reading import parse
from stepdistill.config.schema import RunConfig
from stepdistill.families.recipe import Recipe
from stepdistill.training.run import train


@pytest.fixture(scope="module")
def export(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported LoRA on a single file with the configs of `config_dir`."""
    root, base = tmp_path_factory.mktemp("single"), tiny("sd")
    parts = [load_file(base / part) for part in (
        "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors",
    )]  # fmt: skip
    tensors = sd1(*parts, 1)
    save_file({key: value.contiguous() for key, value in tensors.items()}, root / "one.safetensors")
    data = {
        "model": {"path": str(root / "one.safetensors"), "config_dir": str(base)},
        "method": {"name": "dmd2", "guidance": 2.0, "steps": 2, "ratio": 1},
        "roles": {"generator": {"rank": 4, "alpha": 2}, "fake_score": {"rank": 4}},
        "optimizers": {"generator": {"lr": 1e-2}},
        "data": {"prompts": "builtin:general"},
        "training": {"max_steps": 2, "batch_size": 2, "grid_prompts": 1, "device": "cpu"},
    }
    train(parse(RunConfig, data, "test"), root / "run")
    return stepdistill.export(root / "run", "diffusers-lora", root / "lora")


def test_the_recipe_records_how_the_base_was_opened(export: Path, tiny: Callable[..., Path]) -> None:
    recipe = Recipe.read(export)
    assert recipe is not None
    assert recipe.base_config_dir == str(tiny("sd").resolve())


def test_sample_opens_the_base_as_training_did(export: Path, tmp_path: Path) -> None:
    base = export.parent / "one.safetensors"
    (picture,) = stepdistill.sample(str(base), tmp_path / "pictures", lora=export, prompt="a red cat")
    assert picture.is_file()


def test_reproduce_loads_the_single_file(export: Path) -> None:
    assert reproduced(export)


def test_the_code_of_the_card_runs_as_pasted(export: Path) -> None:
    code = (export / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code += "\nassert image.size == (16, 16), image.size\n"
    script = export.parent / "pasted.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED.format(str(script))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-800:]
