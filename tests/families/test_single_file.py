"""Checkpoints of one file in the original format, with the packaged configs and tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from original_format import sd1, sd2, sdxl
from safetensors.torch import load_file, save_file
from support.tiny_checkpoints import load, refusal, same

from stepdistill.config.registry import load_family
from stepdistill.diffusion.prediction import Prediction
from stepdistill.families.checkpoints import single_file
from stepdistill.families.checkpoints.files import SafetensorsHeader, read_header
from stepdistill.families.checkpoints.loading import inspect_checkpoint
from stepdistill.families.checkpoints.weights import expected_shapes
from stepdistill.families.common import tiny as tiny_parts
from stepdistill.families.common.clip import clip_merges, make_tokenizer, vocabulary
from stepdistill.families.common.unet import UNetFamily

Tiny = Callable[..., Path]


@pytest.fixture
def one_file(tiny: Tiny, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """(a tiny checkpoint as one file in the original format, its diffusers folder)."""

    def write(family: str, extra: Mapping[str, torch.Tensor] | None = None, drop: str = "") -> tuple[Path, Path]:
        folder = tiny(family)
        parts = [load_file(path) for path in _weight_files(folder, family)]
        weights = (sd1 if family == "sd" else sdxl)(*parts, layers=1) | dict(extra or {})
        path = tmp_path / f"{family}.safetensors"
        save_file({key: value.contiguous() for key, value in weights.items() if not drop or drop not in key}, path)
        return path, folder

    return write


def _weight_files(folder: Path, family: str) -> list[Path]:
    names = ["unet", "vae", "text_encoder"] + (["text_encoder_2"] if family == "sdxl" else [])
    return [next((folder / name).glob("*.safetensors")) for name in names]


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_one_file_is_the_folder_it_was_made_from(one_file: Callable[..., tuple[Path, Path]], family: str) -> None:
    path, folder = one_file(family, extra={"model_ema.decay": torch.ones(())})
    ours = load(path, config_dir=folder)
    assert ours.info.single_file == path
    assert ours.info.licence is None
    assert same(ours, load(folder))


def test_marker_tensors_tell_the_prediction_type(one_file: Callable[..., tuple[Path, Path]]) -> None:
    path, folder = one_file("sdxl", extra={"v_pred": torch.empty(0), "ztsnr": torch.empty(0)})
    info = inspect_checkpoint(path, config_dir=folder)
    assert info.schedule.prediction is Prediction.V
    assert info.schedule.zero_terminal_snr
    scheduler = load(path, config_dir=folder).pipeline.scheduler.config  # type: ignore[union-attr]
    assert scheduler.prediction_type == "v_prediction"
    assert scheduler.rescale_betas_zero_snr


def full_size_header(name: str) -> SafetensorsHeader:
    """The header of a whole checkpoint in the original format, from the packaged configs."""
    folder = single_file.CONFIGS / name
    family: UNetFamily = load_family(single_file.FAMILY_OF[name])
    parts = [
        {
            key: torch.empty(shape, device="meta")
            for key, shape in expected_shapes(folder, component, model_class).items()
        }
        for component, model_class in family._component_classes(folder).items()
    ]
    write = {"sd15": sd1, "sdxl": sdxl}.get(name, sd2)
    return SafetensorsHeader({key: tuple(value.shape) for key, value in write(*parts, layers=2).items()}, {})


@pytest.mark.parametrize(
    ("name", "stock", "tensors"),
    [
        ("sd15", "v1", 686 + 248 + 197),
        ("sd21", "v2", 686 + 248 + 23 * 12 + 5),
        ("sdxl", "xl_base", 1680 + 248 + 197 + 390),
    ],
)
def test_packaged_configs_fit_files_of_full_size(name: str, stock: str, tensors: int) -> None:
    header = full_size_header(name)
    assert len(header.shapes) == tensors
    assert infer_diffusers_model_type({key: torch.empty(s, device="meta") for key, s in header.shapes.items()}) == stock
    path = Path("model.safetensors")
    assert single_file.detect_architecture(path, header) == name
    family: UNetFamily = load_family(single_file.FAMILY_OF[name])
    single_file.check_single_file(
        path, header, single_file.CONFIGS / name, family._component_classes(single_file.CONFIGS / name)
    )
    info = family.inspect(name, single_file.CONFIGS / name, None)
    size, prediction = {"sd15": (512, "epsilon"), "sd21": (768, "v_prediction"), "sdxl": (1024, "epsilon")}[name]
    assert info.default_size == (size, size)
    assert info.schedule.prediction.value == prediction
    assert float(info.schedule.alpha(999)) == pytest.approx(0.0683, abs=1e-4)


@pytest.mark.parametrize(("told", "name"), [("epsilon", "sd21base"), ("v", "sd21"), (None, "sd21")])
def test_the_second_generation_says_what_it_predicts_or_a_warning_does(
    told: str | None, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    shapes = {"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3), "cond_stage_model.model.logit_scale": ()}
    header = SafetensorsHeader(shapes, {"modelspec.prediction_type": told} if told else {})
    assert single_file.detect_architecture(Path("m.safetensors"), header) == name
    assert ("v_prediction is assumed" in caplog.text) == (told is None)


@pytest.mark.usefixtures("no_weights")
class TestRefusedFiles:
    def test_another_architecture_than_the_packaged_one(self, one_file: Callable[..., tuple[Path, Path]]) -> None:
        path, _ = one_file("sd")
        refusal(lambda: load(path), "the unet in", "missing", "of another shape", "config_dir")

    def test_missing_and_stray_tensors(self, one_file: Callable[..., tuple[Path, Path]]) -> None:
        stray = {"model.diffusion_model.control.0.weight": torch.zeros(2)}
        path, folder = one_file("sd", extra=stray, drop="out.2.bias")
        refusal(
            lambda: load(path, config_dir=folder),
            "1 missing (conv_out.bias)",
            "1 unexpected (model.diffusion_model.control.0.weight)",
        )

    def test_a_missing_component(self, one_file: Callable[..., tuple[Path, Path]]) -> None:
        path, folder = one_file("sd", drop="first_stage_model.")
        refusal(lambda: load(path, config_dir=folder), "no tensors 'first_stage_model.*' for the vae", "all components")
        path, folder = one_file("sd", drop="cond_stage_model.")
        refusal(lambda: inspect_checkpoint(path, config_dir=folder), "no text encoder", "whole checkpoint")

    def test_configs_of_another_family(self, one_file: Callable[..., tuple[Path, Path]], tiny: Tiny) -> None:
        path, _ = one_file("sdxl")
        refusal(lambda: inspect_checkpoint(path, config_dir=tiny("sd")), "family 'sd'", "the tensors of 'sdxl'")
        refusal(lambda: inspect_checkpoint(path, family="sd"), "family 'sdxl', not 'sd'", "change or remove")
        refusal(lambda: inspect_checkpoint(path, config_dir="no/where"), "config_dir 'no/where' is no folder")

    @pytest.mark.parametrize(
        ("keys", "parts"),
        [
            ({"lora_unet_down.alpha": ()}, ("is a LoRA", "base")),
            ({"down_blocks.0.resnets.0.conv1.weight": (2, 2)}, ("one component in diffusers keys", "folder")),
            ({"model.diffusion_model.joint_blocks.0.x": (2,)}, ("an SD3 model", "folder")),
            ({"model.diffusion_model.other_blocks.0.x": (2,)}, ("no known architecture", "folder")),
            ({"model.diffusion_model.input_blocks.0.0.weight": (8, 9, 3, 3)}, ("inpainting", "9 channels")),
            (
                {
                    "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
                    "conditioner.embedders.0.model.x": (2,),
                },
                ("refiner", "base"),
            ),
        ],
    )
    def test_files_that_are_no_text_to_image_checkpoint(
        self, keys: Mapping[str, tuple[int, ...]], parts: tuple[str, ...], tmp_path: Path
    ) -> None:
        path = tmp_path / "model.safetensors"
        save_file({key: torch.zeros(shape) for key, shape in keys.items()}, path)
        refusal(lambda: inspect_checkpoint(path), str(path), *parts)

    def test_other_files(self, tmp_path: Path) -> None:
        (tmp_path / "model.onnx").write_bytes(b"x")
        refusal(lambda: inspect_checkpoint(tmp_path / "model.onnx"), "type '.onnx'", ".safetensors")
        (tmp_path / "model.safetensors").write_bytes(b"x")
        refusal(lambda: inspect_checkpoint(tmp_path / "model.safetensors"), "not a readable safetensors file")


def test_headers_are_read_without_tensors(tiny: Tiny) -> None:
    path = tiny("sd") / "unet" / "diffusion_pytorch_model.safetensors"
    assert read_header(path).shapes == {key: tuple(value.shape) for key, value in load_file(path).items()}


# ---------------------------------------------------------------- the tokenizer


def test_the_packaged_vocabulary_is_the_published_one() -> None:
    merges = clip_merges()
    text = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)
    # merges.txt and vocab.json of openai/clip-vit-large-patch14, as every SD folder has them
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a"
    )
    listed = json.dumps(dict(sorted(vocabulary(merges).items())), indent=2, ensure_ascii=False) + "\n"
    assert (
        hashlib.sha256(listed.encode()).hexdigest()
        == "e089ad92ba36837a0d31433e555c8f45fe601ab5c221d4f607ded32d9f7a4349"
    )


def test_the_packaged_tokenizer_gives_clip_s_ids() -> None:
    ids = make_tokenizer(clip_merges())("a photo of a cat").input_ids
    assert ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    padded = make_tokenizer(clip_merges(), pad="!")("cat", padding="max_length").input_ids
    assert padded[:4] == [49406, 2368, 49407, 0]
    assert len(padded) == 77


@pytest.mark.parametrize("kept", ["tokenizer.json", "vocab.json"])
def test_either_layout_of_tokenizer_files_gives_the_same_ids(copied: Callable[..., Path], kept: str) -> None:
    folder = copied("sdxl")
    for name in {"tokenizer.json", "vocab.json", "merges.txt"} - {kept, "merges.txt" if kept == "vocab.json" else ""}:
        (folder / "tokenizer_2" / name).unlink()
    prompt, built = "a photo, unseen!", tiny_parts.tokenizer(pad="!")
    read = DiffusionPipeline.from_pretrained(folder).tokenizer_2
    assert read(prompt, padding="max_length").input_ids == built(prompt, padding="max_length").input_ids
