"""Presets lie beneath what a config writes out, say what they are for, and train on a tiny checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel
from torch import nn

from stepdistill.config.presets import PRESETS, preset_names, with_preset
from stepdistill.config.registry import load_family
from stepdistill.config.schema import RoleConfig, RunConfig, load_config
from stepdistill.errors import UserError
from stepdistill.families.checkpoints.single_file import CONFIGS
from stepdistill.roles.lora import AdapterBank, LoraSettings
from stepdistill.training.run import open_run, train
from stepdistill.training.run_folder import checkpoints
from stepdistill.training.setup import prepare

NAMES = ("8gb", "12gb", "24gb", "80gb")


@pytest.fixture
def written(tmp_path: Path, tiny: Callable[..., Path]) -> Callable[..., Path]:
    """A minimal config file, with changes."""

    def write(**changes: Any) -> Path:
        data: dict[str, Any] = {
            "model": {"path": str(tiny("sd"))},
            "method": {"name": "dmd2", "guidance": 2.0, "ratio": 1, "steps": 2},
            "data": {"prompts": "builtin:general"},
            "training": {"max_steps": 1, "device": "cpu", "ema": 0.5, "grid_prompts": 1},
            "cache": {"folder": str(tmp_path / "cache")},
            **changes,
        }
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(data))
        return file

    return write


def test_the_files_are_the_names_of_the_config() -> None:
    annotation = RunConfig.model_fields["preset"].annotation
    assert preset_names() == NAMES == get_args(get_args(annotation)[0])


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_is_valid_and_says_what_for(name: str, written: Callable[..., Path]) -> None:
    config = load_config(written(), [f"preset={name}"])
    assert config.model.quantization == {"8gb": "int4", "12gb": "int8"}.get(name, "none")
    assert config.model.dtype == "bfloat16"
    assert config.training.gradient_checkpointing
    prepare(config.model_copy(update={"model": config.model.model_copy(update={"quantization": "none"})}))
    header = [line for line in (PRESETS / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    assert "SDXL at 1024 px or SD 1.5 at 512 px" in header[0]
    assert f"stepdistill plan CONFIG --set preset={name}" in " ".join(header)


@pytest.mark.parametrize(("name", "bytes_a_weight"), [("8gb", 0.5 + 1 / 64), ("12gb", 1.0)])
def test_the_headers_sums(name: str, bytes_a_weight: float) -> None:
    """What the headers say of SDXL: its network (a scale takes a byte), and two roles with 8-bit moments."""
    with torch.device("meta"):
        network = UNet2DConditionModel.from_config(json.loads((CONFIGS / "sdxl/unet/config.json").read_text()))
    linear = sum(m.weight.numel() for m in network.modules() if isinstance(m, nn.Linear))
    total = sum(p.numel() for p in network.parameters())
    text = (PRESETS / f"{name}.yaml").read_text()
    role = RoleConfig.model_validate(yaml.safe_load(text)["roles"]["generator"])
    bank = AdapterBank(network)
    with torch.device("meta"):
        bank.add("role", LoraSettings(role.rank, 1.0, load_family("sdxl").lora_targets(str(role.targets))), seed=0)
    trained = sum(p.numel() for _, p in bank.parameters("role"))
    assert (
        f"in {(linear * bytes_a_weight + (total - linear) * 2) / 1e9:.1f} GB instead of {total * 2 / 1e9:.1f}" in text
    )
    assert f"{2 * trained * (4 + 2) / 1e9:.1f} GB for both roles on SDXL" in text


def test_written_keys_win_and_the_rest_is_the_preset_s(written: Callable[..., Path]) -> None:
    file = written(
        preset="8gb",
        roles={"generator": {"rank": 3}, "fake_score": {"targets": ["to_q"]}},
        optimizers={"generator": {"lr": 2e-4}},
        cache=None,
    )
    config = load_config(file, ["model.quantization=none"])
    assert (config.roles.generator.rank, config.roles.generator.targets) == (3, "attention")
    assert (config.roles.fake_score.rank, config.roles.fake_score.targets) == (16, ["to_q"])
    assert (config.optimizers.generator.lr, config.optimizers.generator.kind) == (2e-4, "adamw8bit")
    assert (config.optimizers.fake_score.lr, config.optimizers.fake_score.kind) == (1e-5, "adamw8bit")
    assert (config.model.quantization, config.model.dtype, config.cache) == ("none", "bfloat16", None)
    assert config.training.offload == ["optimizer", "ema"]


def test_without_a_preset_nothing_changes() -> None:
    assert with_preset({"model": {"path": "a"}}) == {"model": {"path": "a"}}


def test_an_unknown_preset_is_refused(written: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="'preset' = \"9gb\""):
        load_config(written(preset="9gb"))
    with pytest.raises(UserError, match="'preset'"):
        load_config(written(preset="../protocols/fashion"))


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_config_reads_as_itself(name: str, written: Callable[..., Path], tmp_path: Path) -> None:
    first = load_config(written(preset=name, cache=None))
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(first.model_dump(mode="json")))
    assert load_config(again) == first


def test_a_full_role_names_the_key_and_its_preset(written: Callable[..., Path], no_weights: None) -> None:
    config = load_config(written(preset="12gb", roles={"generator": {"mode": "full"}}))
    with pytest.raises(
        UserError, match=r"model\.quantization is 'int8' \(by preset '12gb'.*set model\.quantization to none"
    ):
        prepare(config)


def test_a_preset_trains_and_its_run_opens(written: Callable[..., Path], tmp_path: Path) -> None:
    """8gb sets more than the others: int4, 8-bit moments, state and EMA in main memory, checkpointing, bfloat16."""
    pytest.importorskip("torchao")
    pytest.importorskip("bitsandbytes")
    config = load_config(written(), ["preset=8gb"])
    train(config, tmp_path / "run")
    session, iteration = open_run(tmp_path / "run")
    assert (iteration, session.setup.config) == (1, config.model_copy(update={"output": str(tmp_path / "run")}))
    state = checkpoints.read(tmp_path / "run/checkpoints/step-00000001").tensors["optimizer.generator"]
    assert {key.rpartition("|")[2] for key in state} == {"step", "state1", "state2"}  # too small for 8 bit, all of them
