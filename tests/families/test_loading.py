"""Checkpoints from folders and the hub's cache; and what is refused before a weight is read."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from support.tiny_checkpoints import edit, load, refusal, same
from transformers import CLIPConfig, CLIPImageProcessor

from stepdistill.families.checkpoints.loading import inspect_checkpoint

Tiny = Callable[..., Path]


def test_half_precision_variants_are_the_fallback(tiny: Tiny, copied: Callable[..., Path]) -> None:
    folder = copied("sd")
    for path in folder.rglob("*.safetensors"):
        half = {key: value.half() for key, value in load_file(path).items()}
        save_file(half, path.with_suffix(".fp16.safetensors"), {"format": "pt"})
    assert same(load(folder), load(tiny("sd")))
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    mixed = load(folder)
    assert not same(mixed, load(tiny("sd")))
    assert next(mixed.network.parameters()).dtype == torch.float32


def test_old_names_of_the_autoencoder_s_attention_load(tiny: Tiny, copied: Callable[..., Path]) -> None:
    folder = copied("sd")
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(path)
    renamed = {re.sub(r"(to_[qkv]|to_out\.0)", lambda m: old[m[1]], key): value for key, value in weights.items()}
    assert renamed.keys() != weights.keys()
    save_file(renamed, path, {"format": "pt"})
    assert same(load(folder), load(tiny("sd")))


def test_safety_checker_and_feature_extractor_stay(tiny: Tiny, tmp_path: Path) -> None:
    stock = StableDiffusionPipeline.from_pretrained(tiny("sd"))
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**small, "image_size": 16, "patch_size": 8}
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=small, vision_config=vision, projection_dim=16))
    parts = {**stock.components, "safety_checker": checker, "feature_extractor": CLIPImageProcessor()}
    StableDiffusionPipeline(**parts).save_pretrained(tmp_path / "checked")
    pipeline: Any = load(tmp_path / "checked").pipeline
    assert isinstance(pipeline.safety_checker, StableDiffusionSafetyChecker)
    pipeline.save_pretrained(tmp_path / "again")
    before, after = (json.loads((tmp_path / name / "model_index.json").read_text()) for name in ("checked", "again"))
    assert before.keys() <= after.keys()
    assert all(after[key] == before[key] for key in before if not key.startswith("_name"))


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: openrail++\ntags: [a]\n---\n# Model", "openrail++"),
        ("---\nlicense: other\nlicense_name: faipl-1.0\n---\n", "faipl-1.0"),
        ("# Model\n---\nlicense: mit\n---\n", None),
        ("---\n: [\n---\n", None),
        (None, None),
    ],
)
def test_the_licence_is_the_card_s(copied: Callable[..., Path], card: str | None, licence: str | None) -> None:
    folder = copied("sd")
    if card is not None:
        (folder / "README.md").write_text(card)
    assert inspect_checkpoint(folder).licence == licence


@pytest.mark.usefixtures("no_weights")
class TestRefusedFolders:
    def test_nothing_there(self) -> None:
        refusal(lambda: inspect_checkpoint("./no/such/folder"), "no file or folder './no/such/folder'", "hub id")

    def test_no_pipeline(self, copied: Callable[..., Path], tmp_path: Path) -> None:
        folder = copied("sd")
        refusal(
            lambda: inspect_checkpoint(folder / "unet"), "no model_index.json", "'diffusion_pytorch_model.safetensors'"
        )
        (tmp_path / "empty").mkdir()
        refusal(lambda: inspect_checkpoint(tmp_path / "empty"), "is not a diffusers pipeline", "give the folder")

    def test_an_unknown_pipeline(self, copied: Callable[..., Path]) -> None:
        folder = copied("sdxl")
        edit(folder / "model_index.json", _class_name="StableDiffusionXLInpaintPipeline")
        refusal(
            lambda: inspect_checkpoint(folder),
            "'StableDiffusionXLInpaintPipeline'",
            "did you mean 'StableDiffusionXLPipeline'",
        )
        assert inspect_checkpoint(folder, family="sdxl").family == "sdxl"

    def test_an_unknown_family(self, tiny: Tiny) -> None:
        refusal(lambda: inspect_checkpoint(tiny("sd"), family="sdd"), "no family named 'sdd'", "'sd'")

    def test_configs_for_a_folder(self, tiny: Tiny) -> None:
        refusal(lambda: inspect_checkpoint(tiny("sd"), config_dir=tiny("sd")), "config_dir", "remove it")

    def test_pickles_are_not_opened(self, copied: Callable[..., Path], tmp_path: Path) -> None:
        class Malicious:
            def __reduce__(self) -> tuple[Any, ...]:
                return (Path.touch, (tmp_path / "ran",))

        folder = copied("sd")
        (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Malicious()))
        refusal(lambda: inspect_checkpoint(folder), "diffusion_pytorch_model.bin' is a pickle", "convert it")
        for name in ("model.ckpt", "model.pt", "model.pth", "model.bin"):
            (tmp_path / name).write_bytes(pickle.dumps(Malicious()))
            refusal(lambda: inspect_checkpoint(tmp_path / name), f"{name}' is a pickle", "convert it")  # noqa: B023
        assert not (tmp_path / "ran").exists()

    def test_epsilon_with_zero_terminal_snr(self, copied: Callable[..., Path]) -> None:
        folder = copied("sd", "zsnr")
        edit(folder / "scheduler" / "scheduler_config.json", prediction_type="epsilon")
        refusal(lambda: inspect_checkpoint(folder), "scheduler_config.json", "zero terminal SNR", "'v_prediction'")

    def test_a_flow_scheduler(self, copied: Callable[..., Path]) -> None:
        folder = copied("sd")
        edit(folder / "scheduler" / "scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler")
        refusal(lambda: inspect_checkpoint(folder), "scheduler_config.json", "flow matching", "restore")

    def test_a_missing_or_broken_config(self, copied: Callable[..., Path]) -> None:
        folder = copied("sd")
        (folder / "vae" / "config.json").write_text("{")
        refusal(lambda: inspect_checkpoint(folder), "vae/config.json' is not readable JSON")
        (folder / "vae" / "config.json").unlink()
        refusal(lambda: inspect_checkpoint(folder), "vae/config.json' is missing")

    def test_an_inpainting_network(self, copied: Callable[..., Path]) -> None:
        folder = copied("sd")
        edit(folder / "unet" / "config.json", in_channels=9)
        refusal(lambda: inspect_checkpoint(folder), "reads 9 channels and writes 4", "text-to-image")

    def test_absent_weights(self, copied: Callable[..., Path]) -> None:
        folder = copied("sd")
        (folder / "text_encoder" / "model.safetensors").unlink()
        refusal(lambda: load(folder), "text_encoder", "there are none", "download")

    def test_weights_that_do_not_fit(self, copied: Callable[..., Path]) -> None:
        folder = copied("sd")
        path = folder / "unet" / "diffusion_pytorch_model.safetensors"
        weights = load_file(path)
        weights["stray.weight"] = weights.pop("conv_out.bias")
        weights["conv_in.bias"] = torch.zeros(3)
        save_file(weights, path)
        refusal(
            lambda: load(folder),
            "1 missing (conv_out.bias)",
            "1 unexpected (stray.weight)",
            "conv_in.bias (3,) instead of (32,)",
        )

    def test_a_truncated_file(self, copied: Callable[..., Path]) -> None:
        path = copied("sd") / "unet" / "diffusion_pytorch_model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
        refusal(lambda: load(path.parent.parent), "not a readable safetensors file", "download")


# ---------------------------------------------------------------- the hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, offline."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_cached_hub_id_loads_offline(hub: Path, tiny: Tiny) -> None:
    commit = "0" * 40
    repository = hub / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(tiny("sd"), repository / "snapshots" / commit)
    assert same(load("someone/tiny"), load(tiny("sd")))


@pytest.mark.usefixtures("hub", "no_weights")
def test_a_hub_id_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal(lambda: inspect_checkpoint("someone/absent"), "'someone/absent' is no folder here", "give the folder")
