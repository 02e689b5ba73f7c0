"""Every shipped config loads and dry-runs on the tiny checkpoint of its family; every header says what it must."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

import stepdistill
from stepdistill.assets import FOLDER
from stepdistill.config.collection import CollectionKind
from stepdistill.config.reading import read_settings
from stepdistill.errors import UserError
from stepdistill.training.collect import CollectConfig, collect

CONFIGS = Path(__file__).parents[2] / "configs"
COLLECTIONS: dict[str, CollectionKind] = {
    **{path.name: "pairs" for path in sorted(CONFIGS.glob("*_pairs.yaml"))},
    **{path.name: "trajectories" for path in sorted(CONFIGS.glob("*_trajectories.yaml"))},
}
TRAINING = sorted(path.name for path in CONFIGS.glob("*.yaml") if path.name not in COLLECTIONS)


def tiny_of(name: str, tiny: Callable[..., Path]) -> Path:
    family = next(family for family in ("sdxl", "sd3", "sd", "sana") if name.startswith(family))
    return tiny(family, "v" if name.startswith("sd21v") else "default")


def model_of(name: str, raw: dict[str, Any], tiny: Callable[..., Path]) -> Path | str:
    """The config's own where it comes with the package."""
    return raw["model"]["path"] if raw["model"]["path"].startswith("builtin:") else tiny_of(name, tiny)


def pairs_for(model: Path | str, prompts: str, guidance: float, folder: Path) -> Path:
    config = {"model": {"path": str(model)}, "prompts": prompts, "count": 2, "guidance": guidance, "steps": 2}
    collect("pairs", CollectConfig.model_validate({**config, "device": "cpu"}), folder)
    return folder


def trajectories_for(model: Path | str, raw: dict[str, Any], folder: Path) -> Path:
    wanted = {"model": {"path": str(model)}, "prompts": raw["data"]["prompts"], "count": 1, "steps": 2, "device": "cpu"}
    ranged = {"guidance_range": raw["method"]["guidance_range"]}
    collect("trajectories", CollectConfig.model_validate({**wanted, **ranged}), folder)
    return folder


@pytest.mark.parametrize("name", TRAINING)
def test_training_configs_dry_run(name: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    raw = yaml.safe_load((CONFIGS / name).read_text())
    model = model_of(name, raw, tiny)
    overrides = [f"model.path={model}"]
    if raw["data"].get("pairs"):
        pairs = pairs_for(model, raw["data"]["prompts"], raw["method"]["guidance"], tmp_path / "pairs")
        overrides.append(f"data.pairs={pairs}")
    if raw["data"].get("trajectories"):
        overrides.append(f"data.trajectories={trajectories_for(model, raw, tmp_path / 'trajectories')}")
    if raw["data"].get("images"):
        (tmp_path / "images").mkdir()
        Image.new("RGB", (96, 96), "red").save(tmp_path / "images/a.png")
        overrides.append(f"data.images={tmp_path / 'images'}")
    if raw["data"]["prompts"].startswith("runs/"):  # written by the command that its header names
        (tmp_path / "prompts.txt").write_text("a photo of a bag\n")
        overrides.append(f"data.prompts={tmp_path / 'prompts.txt'}")
    if raw["data"].get("losers"):  # a column of a data set that is not here: the images lose against themselves
        overrides.append(f"data.losers={tmp_path / 'images'}")
    if raw.get("init"):  # the run that it starts from is another config's
        with pytest.raises(UserError, match="init names"):
            stepdistill.dry_run(stepdistill.load_config(CONFIGS / name, overrides), tmp_path / "run")
        overrides.append("init=null")
    lines = stepdistill.dry_run(stepdistill.load_config(CONFIGS / name, overrides), tmp_path / "run")
    assert any(line.startswith("student") for line in lines)


@pytest.mark.parametrize("name", COLLECTIONS)
def test_collections_run(name: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    raw = yaml.safe_load((CONFIGS / name).read_text())
    changes = [f"model.path={model_of(name, raw, tiny)}", "count=2", "steps=2", "device=cpu", "model.dtype=float32"]
    changes += ["keep=1"] if COLLECTIONS[name] == "trajectories" else []
    assert collect(COLLECTIONS[name], read_settings(CollectConfig, CONFIGS / name, changes), tmp_path) == 2


@pytest.mark.parametrize("name", [*TRAINING, *COLLECTIONS])
def test_headers(name: str) -> None:
    text = (CONFIGS / name).read_text()
    said = " ".join(line for line in text.splitlines() if line.startswith("#"))
    # the embedded teacher's prompts come with it
    wanted = ["command", "hardware", "numbers"] + ([] if "path: builtin:" in text else ["prompts"])
    assert [word for word in wanted if f"# {word}" not in said] == []


def test_the_packaged_quickstart_is_the_shown_one() -> None:
    assert (FOLDER / "quickstart.yaml").read_text() == (CONFIGS / "quickstart.yaml").read_text()
