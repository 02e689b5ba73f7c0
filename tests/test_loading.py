"""Sources of checkpoints: folders, variants, one file in the original format, the hub's cache; and what is refused before loading."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from original_format import sd1, sd2, sdxl
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor

from stepdistill.diffusion.prediction import Prediction
from stepdistill.errors import Refusal
from stepdistill.models.conditioning import ImageSize
from stepdistill.models.families import single_file
from stepdistill.models.families import tiny as tiny_parts
from stepdistill.models.families.base import Checkpoint
from stepdistill.models.families.clip import clip_merges, make_tokenizer, vocabulary
from stepdistill.models.families.unet import UNetFamily
from stepdistill.models.families.weights import wanted_shapes
from stepdistill.models.files import Header, read_header
from stepdistill.models.loading import inspect_checkpoint, load_checkpoint
from stepdistill.registry import load_family

Tiny = Callable[..., Path]


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a weight fails the test."""

    def forbidden(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("weights were read")

    for owner in (StableDiffusionPipeline, StableDiffusionXLPipeline, AutoencoderKL):
        monkeypatch.setattr(owner, "from_pretrained", forbidden)
        monkeypatch.setattr(owner, "from_single_file", forbidden)
    monkeypatch.setattr(torch, "load", forbidden)
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", forbidden)


def refusal(call: Callable[[], object], *parts: str) -> None:
    """Refused in one sentence that holds the given parts and, after a colon, what to change."""
    with pytest.raises(Refusal) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text, text
    assert not re.search(r"[.!?] +[A-Z]", text), text
    assert re.search(r": \w", text), text
    for part in parts:
        assert part in text, text


def load(source: str | Path, **options: Any) -> Checkpoint:
    return load_checkpoint(inspect_checkpoint(source, **options), torch.float32, "cpu")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def copied(tiny: Tiny, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a tiny checkpoint that the test may break."""

    def copy(family: str, variant: str = "default") -> Path:
        return Path(shutil.copytree(tiny(family, variant), tmp_path / "model"))

    return copy


def same(one: Checkpoint, other: Checkpoint) -> bool:
    """Equal weights of every component, equal ids, and outputs equal but for the memory layout that kernels see."""
    family, components = load_family(one.info.family), [_components(checkpoint) for checkpoint in (one, other)]
    for name, module in components[0].items():
        if isinstance(module, torch.nn.Module):
            ours, theirs = module.state_dict(), components[1][name].state_dict()
            if ours.keys() != theirs.keys() or not all(torch.equal(ours[key], theirs[key]) for key in ours):
                return False
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    outputs = []
    for checkpoint in (one, other):
        cond = family.encode(checkpoint, ["a red cat"], [ImageSize.plain(16, 16)])
        out = family.call(checkpoint.network, x, torch.tensor([499.0]), cond)
        outputs.append((cond.text, out, family.decode(checkpoint, out)))
    return all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*outputs, strict=True))


def _components(checkpoint: Checkpoint) -> dict[str, Any]:
    assert checkpoint.pipeline is not None
    return dict(checkpoint.pipeline.components)


# ---------------------------------------------------------------- folders


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


# ---------------------------------------------------------------- one file


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


def full_size_header(name: str) -> Header:
    """The header of a whole checkpoint in the original format, from the packaged configs."""
    folder = single_file.CONFIGS / name
    family: UNetFamily = load_family(single_file.FAMILY_OF[name])
    parts = [
        {key: torch.empty(shape, device="meta") for key, shape in wanted_shapes(folder, component, model_class).items()}
        for component, model_class in family._classes().items()
    ]
    write = {"sd15": sd1, "sdxl": sdxl}.get(name, sd2)
    return Header({key: tuple(value.shape) for key, value in write(*parts, layers=2).items()}, {})


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
    assert single_file.architecture(path, header) == name
    family: UNetFamily = load_family(single_file.FAMILY_OF[name])
    single_file.check_file(path, header, single_file.CONFIGS / name, family._classes())
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
    header = Header(shapes, {"modelspec.prediction_type": told} if told else {})
    assert single_file.architecture(Path("m.safetensors"), header) == name
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
            ({"model.diffusion_model.joint_blocks.0.x": (2,)}, ("no known architecture", "folder")),
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
