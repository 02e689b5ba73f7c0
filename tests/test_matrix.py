"""Every registered method on one tiny family, every family and variant with one method: step, resume, export, reload.

A method or family joins by being registered.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open

import stepdistill
from stepdistill.config import RunConfig, parse
from stepdistill.registry import family_names, load_family, load_method, method_names
from stepdistill.training import checkpoint as checkpoints
from stepdistill.training.collect import CollectConfig, collect
from stepdistill.training.run import train

OPTIONS: dict[str, dict[str, Any]] = {
    "dmd": {"guidance": 2.0},
    "dmd2": {"guidance": 2.0, "ratio": 2, "steps": 2, "gan": {"weight": 1e-2}},
}
LAYOUTS = {"lora": ("lora", "lora"), "full": ("full", "full"), "mixed": ("lora", "full")}
FAMILIES = [
    (name, variant) for name in family_names() for variant in load_family(name).tiny_variants if name != "analytic"
]


def test_no_method_is_missing() -> None:
    assert set(OPTIONS) == set(method_names())


@pytest.fixture
def config(tiny: Callable[..., Path], tmp_path: Path) -> Callable[..., RunConfig]:
    def make(method: str, family: str, variant: str, layout: str, steps: int) -> RunConfig:
        model = tiny(family, variant)
        method_class = load_method(method)
        options = method_class.Config.model_validate(OPTIONS[method])
        data = {"prompts": "builtin:general"}
        needs = method_class.needs(options)
        if needs.images:
            images = tmp_path / "images"
            images.mkdir(exist_ok=True)
            for index, colour in enumerate(("red", "green", "blue")):
                Image.new("RGB", (80, 96), colour).save(images / f"{index}.png")
                (images / f"{index}.txt").write_text(f"a {colour} square")
            data["images"] = str(images)
        if needs.pairs and not (tmp_path / "pairs").exists():
            pairs = {
                "model": {"path": str(model)},
                "prompts": "builtin:general",
                "count": 4,
                "guidance": 2.0,
                "steps": 2,
            }
            collect("pairs", CollectConfig.model_validate({**pairs, "device": "cpu"}), tmp_path / "pairs")
        if needs.pairs:
            data["pairs"] = str(tmp_path / "pairs")
        role = [{"mode": mode, "rank": 4, "alpha": 2} for mode in LAYOUTS[layout]]
        return parse(
            RunConfig,
            {
                "model": {"path": str(model)},
                "method": {"name": method, **OPTIONS[method]},
                "roles": {"generator": role[0], "fake_score": role[1]},
                "optimizers": {"generator": {"lr": 1e-3}, "fake_score": {"lr": 1e-3}},
                "data": data,
                "training": {
                    "max_steps": steps, "batch_size": 2, "ema": 0.5, "gradient_checkpointing": True, "grid_prompts": 1,
                    "device": "cpu",
                },
            },
            "test",
        )  # fmt: skip

    return make


def tensors(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    path = checkpoints.latest(folder / "checkpoints")
    assert path is not None
    return checkpoints.read(path).tensors


def folder_hash(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def through(
    config: Callable[..., RunConfig], tmp_path: Path, method: str, family: str, variant: str, layout: str
) -> None:
    make = lambda steps: config(method, family, variant, layout, steps)  # noqa: E731
    base = folder_hash(Path(make(1).model.path))
    train(make(3), tmp_path / "whole")
    train(make(2), tmp_path / "broken")
    train(make(3), tmp_path / "broken", resume="latest")
    whole, broken = tensors(tmp_path / "whole"), tensors(tmp_path / "broken")
    assert all(torch.equal(whole[f][k], broken[f][k]) for f in whole for k in whole[f])
    assert all(bool(torch.isfinite(t).all()) for f in whole for t in whole[f].values())
    form = "pipeline" if layout == "full" else "diffusers-lora"
    exported = stepdistill.export(tmp_path / "whole", form, tmp_path / "export")
    with safe_open(exported / "proof.safetensors", "pt") as proof:
        assert len(list(proof.keys())) > 0
    assert (tmp_path / "whole/grids/step-00000003.png").is_file()
    assert folder_hash(Path(make(1).model.path)) == base


@pytest.mark.parametrize("method", method_names())
def test_every_method_on_sd(config: Callable[..., RunConfig], tmp_path: Path, method: str) -> None:
    through(config, tmp_path, method, "sd", "default", "lora")


# sd-default is in test_every_method_on_sd already
@pytest.mark.parametrize(("family", "variant"), [pair for pair in FAMILIES if pair != ("sd", "default")])
def test_every_family_with_dmd2(config: Callable[..., RunConfig], tmp_path: Path, family: str, variant: str) -> None:
    through(config, tmp_path, "dmd2", family, variant, "mixed" if variant == "v" else "lora")


@pytest.mark.slow
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize(("family", "variant"), FAMILIES)
@pytest.mark.parametrize("method", method_names())
def test_the_whole_matrix(
    config: Callable[..., RunConfig], tmp_path: Path, method: str, family: str, variant: str, layout: str
) -> None:
    through(config, tmp_path, method, family, variant, layout)
