"""Caches of a run: what is read is what the encoders say, to the bit, and warm runs ask no encoder."""

from __future__ import annotations

import io
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from original_format import sd1, sdxl
from PIL import Image
from safetensors.torch import load_file, save_file
from support.method_cases import equal as same_tensors
from support.method_cases import saved
from support.tiny_checkpoints import refusal

import stepdistill
from stepdistill import cli
from stepdistill.config.reading import parse
from stepdistill.config.registry import family_names, load_family
from stepdistill.config.schema import RunConfig
from stepdistill.diffusion.draws import generator
from stepdistill.families.base import Checkpoint, Family, Posterior
from stepdistill.families.checkpoints.single_file import CONFIGS
from stepdistill.families.common.unet import UNetFamily
from stepdistill.families.conditioning import Conditioning, MicroConditioning
from stepdistill.families.sdxl import SDXL
from stepdistill.training.inputs import caching
from stepdistill.training.inputs.batches import BatchSource
from stepdistill.training.inputs.caching import estimate_cache_bytes, fill_caches, open_caches
from stepdistill.training.inputs.encoding import LiveEncoder
from stepdistill.training.run import open_run, train
from stepdistill.training.session import open_session
from stepdistill.training.setup import prepare

VARIANTS = [(name, variant) for name in family_names() for variant in load_family(name).tiny_variants]
GAN = {"weight": 1e-2}
Configure = Callable[..., RunConfig]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Five images, the second of which cannot be read; odd sizes, so that a mirrored crop is no mirror of the crop."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index, colour in enumerate(("red", "green", "blue", "yellow", "white")):
        picture = Image.new("RGB", (29 + index, 24), colour)
        picture.paste("black", (0, 0, 10, 10))
        picture.save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a {colour} square")
    (folder / "1.png").write_bytes((folder / "0.png").read_bytes()[:60])
    return folder


@pytest.fixture
def config(tiny: Callable[..., Path], tmp_path: Path) -> Configure:
    """A run of two iterations; `cached=False` leaves the cache section out, SECTION__KEY=value changes a key."""
    prompts = tmp_path / "prompts.txt"

    def make(family: str = "sd", variant: str = "default", *, cached: bool = True, **changes: Any) -> RunConfig:
        if not prompts.exists():
            texts = [f"mode {k}" for k in range(4)] if family == "analytic" else ["a red cat", "the dog", "a photo"]
            prompts.write_text("\n".join([*texts, texts[0]]))
        data: dict[str, dict[str, Any]] = {
            "model": {"path": str(tiny(family, variant))},
            "method": {"name": "dmd2", "guidance": 2.0, "ratio": 1, "steps": 2},
            "roles": {role: {"rank": 2, "alpha": 2} for role in ("generator", "fake_score")},
            "optimizers": {role: {"lr": 1e-3} for role in ("generator", "fake_score")},
            "data": {"prompts": str(prompts), "max_bad_share": 0.5},
            "training": {"max_steps": 2, "batch_size": 3, "grid_prompts": 1, "device": "cpu"},
        }
        if cached:
            data["cache"] = {"folder": str(tmp_path / "cache")}
        for key, value in changes.items():
            section, _, name = key.partition("__")
            data.setdefault(section, {})[name] = value
        return parse(RunConfig, data, "test")

    return make


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Rows that the encoders of UNet families were asked for since the last `clear`."""
    count: Counter[str] = Counter()
    for name in ("sd", "sdxl"):
        owner = type(load_family(name))
        original = owner.encode

        def encode(self: Family, checkpoint: Checkpoint, prompts: Any, sizes: Any, original: Any = original) -> Any:
            count["text"] += len(prompts)
            return original(self, checkpoint, prompts, sizes)

        monkeypatch.setattr(owner, "encode", encode)
    posterior = UNetFamily.posterior

    def counted(self: UNetFamily, checkpoint: Checkpoint, pictures: torch.Tensor) -> Posterior:
        count["images"] += len(pictures)
        return posterior(self, checkpoint, pictures)

    monkeypatch.setattr(UNetFamily, "posterior", counted)
    return count


def same(one: Conditioning, other: Conditioning) -> bool:
    pairs = [(vars(one)[name], vars(other)[name]) for name in vars(one)]
    return all(
        (a is None and b is None) or (a is not None and a.dtype == b.dtype and torch.equal(a, b)) for a, b in pairs
    )


def equal(one: Path, other: Path) -> bool:
    return same_tensors(saved(one), saved(other))


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("negative", ["", "the dog"])
@pytest.mark.parametrize(("family", "variant"), VARIANTS)
def test_conditioning_comes_back_to_the_bit(
    config: Configure, family: str, variant: str, dtype: str, negative: str
) -> None:
    if family == "analytic":
        negative = negative and "mode 1"
    setup = prepare(config(family, variant, model__dtype=dtype, model__negative_prompt=negative))
    session = open_session(setup, "cpu", open_caches(setup, "cpu"))
    live = open_session(setup, "cpu")
    texts = list(setup.prompts.texts)
    sizes = [MicroConditioning((40 + i, 30), (i, 2), (16, 16)) for i in range(len(texts))]
    wanted = [setup.family.encode(live.checkpoint, [text], [size]) for text, size in zip(texts, sizes, strict=True)]
    # what an encoder says of padding is not stored, and zero in a run without a cache too
    assert same(session.encoder.text(texts, sizes), Conditioning.cat(wanted).masked())
    assert same(live.encoder.text(texts, sizes), Conditioning.cat(wanted).masked())
    null = [setup.family.null(live.checkpoint, [size], negative) for size in sizes]
    assert same(session.encoder.null(sizes), Conditioning.cat(null).masked())
    assert same(live.encoder.null(sizes), Conditioning.cat(null).masked())


@pytest.mark.parametrize("flip", [False, True])
def test_latents_come_back_to_the_bit(config: Configure, images: Path, flip: bool) -> None:
    setup = prepare(config(method__gan=GAN, data__images=str(images), data__flip=flip))
    cached = open_session(setup, "cpu", open_caches(setup, "cpu")).encoder
    live = open_session(prepare(setup.config), "cpu").encoder
    assert cached.images is not None
    assert live.images is not None
    drawn = set()
    for index in range(5):
        for sample in range(6):
            a, b = (encoder.images.read(index, generator(sample)) for encoder in (cached, live))  # type: ignore[union-attr]
            assert (a.caption, a.crop) == (b.caption, b.crop)
            noise = torch.randn(1, *setup.problem.latent_shape, generator=generator(sample))
            latents = cached.latents([a], noise)
            assert torch.equal(latents, live.latents([b], noise))
            drawn.add((a.mean.sum().item(), index))  # type: ignore[union-attr]
    assert len({mean for mean, index in drawn if index == 0}) == (2 if flip else 1)
    # the unreadable second file is replaced by the third
    assert cached.images.read(1, generator(0)).caption == "a blue square"


@pytest.mark.ci
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_run_with_a_cache_is_the_run_without(
    config: Configure, images: Path, tmp_path: Path, calls: Counter[str], family: str
) -> None:
    changes = {"method__gan": GAN, "data__images": str(images), "data__flip": True}
    train(config(family, cached=False, **changes), tmp_path / "live")
    train(config(family, **changes), tmp_path / "cold")
    assert equal(tmp_path / "live", tmp_path / "cold")
    calls.clear()
    train(config(family, **changes, data__workers=2), tmp_path / "warm")
    assert not calls
    assert equal(tmp_path / "live", tmp_path / "warm")
    grids = [(tmp_path / run / "grids/step-00000002.png").read_bytes() for run in ("live", "warm")]
    assert grids[0] == grids[1]


@pytest.mark.ci
def test_text_alone_and_latents_alone(config: Configure, images: Path, tmp_path: Path, calls: Counter[str]) -> None:
    changes = {"method__gan": GAN, "data__images": str(images)}
    train(config(cached=False, **changes), tmp_path / "live")
    for name in ("text", "latents"):
        half = config(**changes, **{f"cache__{name}": False})
        fill_caches(prepare(half))
        calls.clear()
        train(half, tmp_path / name)
        assert set(calls) == {"text" if name == "text" else "images"}
        assert equal(tmp_path / "live", tmp_path / name)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_one_file_is_cached_as_its_folder_is(
    config: Configure, tiny: Callable[..., Path], tmp_path: Path, images: Path, family: str
) -> None:
    folder = tiny(family)
    components = ["unet", "vae", "text_encoder", *(["text_encoder_2"] if family == "sdxl" else [])]
    parts = [load_file(next((folder / name).glob("*.safetensors"))) for name in components]
    weights = (sd1 if family == "sd" else sdxl)(*parts, layers=1)
    save_file({key: value.contiguous() for key, value in weights.items()}, tmp_path / "one.safetensors")
    changes = {"method__gan": GAN, "data__images": str(images)}
    setup = prepare(
        config(family, **changes, model__path=str(tmp_path / "one.safetensors"), model__config_dir=str(folder))
    )
    cached = open_session(setup, "cpu", open_caches(setup, "cpu"))
    assert cached.checkpoint.pipeline is not None
    assert cached.checkpoint.pipeline.text_encoder is None
    live, sizes = open_session(setup, "cpu"), [MicroConditioning.plain(16, 16)]
    assert same(cached.encoder.text(["a photo"], sizes), live.encoder.text(["a photo"], sizes))
    noise = torch.zeros(1, *setup.problem.latent_shape)
    pictures = [encoder.images.read(2, generator(0)) for encoder in (cached.encoder, live.encoder)]  # type: ignore[union-attr]
    assert torch.equal(cached.encoder.latents(pictures[:1], noise), live.encoder.latents(pictures[1:], noise))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_s_batch_comes_back_to_the_bit(config: Configure, images: Path, dtype: str) -> None:
    setup = prepare(config("sdxl", method__gan=GAN, data__images=str(images), model__dtype=dtype))
    cached, live = open_session(setup, "cuda", open_caches(setup, "cuda")).encoder, open_session(setup, "cuda").encoder
    texts, sizes = list(setup.prompts.texts), [MicroConditioning.plain(16, 16)] * len(setup.prompts)
    assert same(cached.text(texts, sizes), live.text(texts, sizes))
    noise = torch.zeros(3, *setup.problem.latent_shape, device="cuda")
    items = [[encoder.images.read(i, generator(i)) for i in range(3)] for encoder in (cached, live)]  # type: ignore[union-attr]
    assert torch.equal(cached.latents(items[0], noise), live.latents(items[1], noise))


def saved_dataset(folder: Path) -> Path:
    """A data set of one row."""
    picture = io.BytesIO()
    Image.new("RGB", (20, 20)).save(picture, "PNG")
    pytest.importorskip("datasets").Dataset.from_dict({"image": [picture.getvalue()], "text": ["a"]}).save_to_disk(
        folder
    )
    return folder


def packed(images: Path, target: Path) -> str:
    """The images as one tar shard."""
    with tarfile.open(target, "w") as tar:
        for file in sorted(images.iterdir()):
            tar.add(file, file.name)
    return str(target)


@pytest.mark.parametrize("source", ["folder", "tar"])
def test_buckets_and_shards_come_back_to_the_bit(
    config: Configure, images: Path, tmp_path: Path, calls: Counter[str], source: str
) -> None:
    Image.new("RGB", (16, 40), "green").save(images / "tall.png")
    (images / "tall.txt").write_text("a tall thing")
    changes = {
        "method__gan": GAN,
        "data__images": str(images) if source == "folder" else packed(images, tmp_path / "part-0.tar"),
        "data__flip": True,
        "data__buckets": [[16, 16], [32, 16]],
    }
    setup = prepare(config(**changes))
    assert setup.buckets is not None
    assert list(map(len, setup.buckets.members)) == [5, 1]
    caches = open_caches(setup, "cpu")
    # five readable images, twice; three prompts, six captions, the unconditional branch
    assert calls == {"images": 10, "text": 10}
    assert estimate_cache_bytes(setup) == 10 * 77 * 32 * 4 + 2 * 2 * 4 * 4 * (5 * 8 * 8 + 16 * 8)
    numbers = [range(start, start + 3) for start in range(0, 90, 3)]
    calls.clear()
    cached = [batch for _, batch in BatchSource(open_session(setup, "cpu", caches), 0, 1).batches(iter(numbers))]
    assert not calls
    assert {tuple(batch.images.shape) for batch in cached if batch.images is not None} == {(3, 4, 8, 8), (3, 4, 16, 8)}
    live = [batch for _, batch in BatchSource(open_session(setup, "cpu"), 0, 1).batches(iter(numbers))]
    for one, other in zip(cached, live, strict=True):
        assert one.images is not None
        assert other.images is not None
        assert torch.equal(one.images, other.images)
        assert one.image_cond is not None
        assert other.image_cond is not None
        assert same(one.image_cond, other.image_cond)


# ---------------------------------------------------------------- memory


def test_encoders_leave_memory(config: Configure, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = prepare(config("sdxl", method__gan=GAN, data__images=str(images)))
    seen: list[weakref.ref[torch.nn.Module]] = []
    load = caching.load_checkpoint

    def watched(*arguments: Any) -> Checkpoint:
        checkpoint = load(*arguments)
        assert next(checkpoint.network.parameters()).is_meta
        parts = [checkpoint.pipeline.text_encoder, checkpoint.pipeline.text_encoder_2, checkpoint.pipeline.vae]
        seen.extend(weakref.ref(part) for part in parts if part is not None)
        return checkpoint

    monkeypatch.setattr(caching, "load_checkpoint", watched)
    caches = open_caches(setup, "cpu")
    assert len(seen) == 3
    assert all(part() is None for part in seen)
    session = open_session(setup, "cpu", caches)
    pipeline = session.checkpoint.pipeline
    assert pipeline is not None
    assert pipeline.text_encoder is None
    assert pipeline.text_encoder_2 is None
    assert pipeline.vae.encoder is None
    assert setup.family.decode(session.checkpoint, torch.zeros(1, *setup.problem.latent_shape)).shape == (1, 3, 16, 16)
    with pytest.raises(RuntimeError, match="left memory"):
        session.encoder.text(["of no cache"], [MicroConditioning.plain(16, 16)])


def test_an_evaluation_keeps_the_text_encoders(config: Configure, calls: Counter[str]) -> None:
    setup = prepare(config(evaluation__every=1))
    session = open_session(setup, "cpu", open_caches(setup, "cpu"))
    calls.clear()
    prompts, sizes = ["a photo", "of no cache"], [MicroConditioning.plain(16, 16)] * 2
    cond = session.encoder.text(prompts, sizes)
    assert calls["text"] == 1
    assert same(cond, open_session(setup, "cpu").encoder.text(prompts, sizes))


# ---------------------------------------------------------------- what makes a cache stale


def test_only_what_is_new_is_encoded(
    config: Configure, images: Path, tmp_path: Path, calls: Counter[str], caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"method__gan": GAN, "data__images": str(images), "data__flip": True}
    done = fill_caches(prepare(config(**changes)))
    # three prompts, five captions, the unconditional branch (which SD encodes as a prompt); four readable images, twice
    assert calls == {"text": 9, "images": 8}
    assert (done.encoded, done.entries) == (17, 17)
    assert done.size > 8 * 2 * 4 * 4 * 8 * 8
    calls.clear()
    assert fill_caches(prepare(config(**changes))).encoded == 0
    (tmp_path / "prompts.txt").write_text("a new one\nthe dog\n")
    Image.new("RGB", (30, 30), "black").save(images / "3.png")
    with caplog.at_level(logging.INFO):
        fill_caches(prepare(config(**changes)))
    assert calls == {"text": 1, "images": 2}
    assert "1 of 8 texts are not in it yet" in caplog.text
    # an image is found by what it holds, wherever it is
    calls.clear()
    (images / "4.png").rename(images / "renamed.png")
    fill_caches(prepare(config(**changes)))
    assert calls["images"] == 0


def test_another_encoder_is_told(
    config: Configure, copied: Callable[..., Path], caplog: pytest.LogCaptureFixture, calls: Counter[str]
) -> None:
    model = copied("sd")
    fill_caches(prepare(config(model__path=str(model))))
    file = model / "text_encoder/model.safetensors"
    weights = load_file(file)
    save_file({key: value + 1 for key, value in weights.items()}, file, {"format": "pt"})
    calls.clear()
    with caplog.at_level(logging.INFO):
        fill_caches(prepare(config(model__path=str(model))))
        fill_caches(prepare(config(model__path=str(model), model__dtype="bfloat16")))
    assert calls["text"] == 2 * 4
    assert "made anew: text_encoder/model.safetensors changed" in caplog.text
    assert "made anew: dtype is bfloat16 and was float32" in caplog.text
    calls.clear()
    # another network or scheduler changes nothing that is cached, and another path to the same files neither
    (model / "unet/extra.txt").write_text("x")
    moved = Path(shutil.copytree(model, model.parent / "moved"))
    fill_caches(prepare(config(model__path=str(moved))))
    assert not calls


def test_a_broken_shard_is_encoded_again(config: Configure, tmp_path: Path, calls: Counter[str]) -> None:
    fill_caches(prepare(config()))
    shard = next((tmp_path / "cache").glob("text-*/shard-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-3])
    calls.clear()
    train(config(), tmp_path / "run")
    assert calls["text"] == 4


# ---------------------------------------------------------------- refusals, room, processes


def test_refusals(
    config: Configure, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: Counter[str]
) -> None:
    changes = {"method__gan": GAN, "data__images": str(images)}
    refusal(lambda: fill_caches(prepare(config(cached=False))), "no cache section")
    refusal(lambda: prepare(config(**changes, data__crop="random")), "data.crop to center", "cache.latents to false")
    prepare(config(**changes, data__crop="random", cache__latents=False))
    streamed = {"data__images": f"hf:{saved_dataset(tmp_path / 'dataset')}", "data__streaming": True}
    refusal(lambda: prepare(config(**{**changes, **streamed})), "data.streaming to false", "remove the cache section")
    refusal(lambda: fill_caches(prepare(config(**{**changes, "data__max_bad_share": 0.1}))), "unreadable")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))  # type: ignore[attr-defined]
        calls.clear()
        target = tmp_path / "elsewhere/cache"
        refusal(lambda: fill_caches(prepare(config(cache__folder=str(target)))), "cache.folder", "0.00 GB are free")
        assert not calls
        assert not list(target.glob("text-*"))
    finite = UNetFamily.posterior

    def black(self: UNetFamily, checkpoint: Checkpoint, pictures: torch.Tensor) -> Posterior:
        found = finite(self, checkpoint, pictures)
        return Posterior(found.mean * torch.nan, found.std) if pictures.mean() > 0.5 else found

    monkeypatch.setattr(UNetFamily, "posterior", black)
    refusal(lambda: train(config(**changes), tmp_path / "run"), "4.png", "not finite")


def test_a_prompt_without_a_finite_embedding_is_named(config: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    original = type(load_family("sd")).encode

    def broken(
        self: Family, checkpoint: Checkpoint, prompts: list[str], sizes: list[MicroConditioning]
    ) -> Conditioning:
        cond = original(self, checkpoint, prompts, sizes)
        return Conditioning(cond.text * (torch.nan if prompts == ["the dog"] else 1))

    monkeypatch.setattr(type(load_family("sd")), "encode", broken)
    refusal(lambda: fill_caches(prepare(config())), "'the dog'", "float32")


def test_the_estimate_is_the_size(config: Configure, images: Path, tmp_path: Path) -> None:
    info = SDXL().inspect("sdxl", CONFIGS / "sdxl", None)
    assert SDXL().encoding_bytes(info, torch.bfloat16) == 77 * 2048 * 2 + 1280 * 2 == 317_952
    assert estimate_cache_bytes(prepare(config(cached=False))) == 0
    for family in ("sd", "sdxl"):
        folder = tmp_path / family
        changes = {"method__gan": GAN, "data__images": str(images), "data__flip": True, "cache__folder": str(folder)}
        setup = prepare(config(family, **changes, model__dtype="bfloat16"))
        fill_caches(setup)
        shards = [load_file(path) for path in folder.rglob("*.safetensors")]
        held = sum(t.nbytes for shard in shards for name, t in shard.items() if not name.endswith("/crop"))
        # the estimate counts the unreadable image too
        unreadable = 2 * 2 * 4 * 4 * 8 * 8
        assert held == estimate_cache_bytes(setup) - unreadable


@pytest.mark.ci
def test_runs_are_opened_and_exported_with_their_encoders(config: Configure, tmp_path: Path) -> None:
    train(config(), tmp_path / "run")
    session, _ = open_run(tmp_path / "run", "cpu")
    assert isinstance(session.encoder, LiveEncoder)
    assert session.checkpoint.pipeline is not None
    assert session.checkpoint.pipeline.text_encoder is not None
    exported = stepdistill.export(tmp_path / "run", "diffusers-lora", tmp_path / "lora", device="cpu")
    assert (exported / "proof.safetensors").is_file()


def test_the_command_fills_what_training_uses(
    config: Configure, tmp_path: Path, calls: Counter[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config(cached=False).model_dump(mode="json", exclude_none=True)))

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["stepdistill", *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return int(exit_.value.code or 0)

    setting = ["--set", f"cache.folder={tmp_path / 'cache'}"]
    assert run("cache", str(path), *setting) == 0
    assert "4 of 4 entries were encoded" in capsys.readouterr().out
    assert run("cache", str(path), *setting) == 0
    assert "0 of 4 entries were encoded" in capsys.readouterr().out
    calls.clear()
    assert run("train", str(path), *setting, "--output", str(tmp_path / "run")) == 0
    assert not calls
    capsys.readouterr()
    assert run("cache", str(path)) == 2
    assert "error: the config has no cache section: add" in capsys.readouterr().err


@pytest.mark.ci
def test_one_process_fills_and_the_other_reads(config: Configure, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config().model_dump(mode="json", exclude_none=True)))
    script = tmp_path / "both.py"
    script.write_text(
        """
import sys
from pathlib import Path
from accelerate import PartialState
from stepdistill.config.schema import load_config
from stepdistill.training.inputs import caching
from stepdistill.training.setup import prepare
state = PartialState(cpu=True)
asked, load = [], caching.load_checkpoint
caching.load_checkpoint = lambda *arguments: asked.append(1) or load(*arguments)
warm = caching.open_caches(prepare(load_config(sys.argv[1])), "cpu")
Path(sys.argv[2], f"rank{state.process_index}").write_text(f"{state.num_processes} {len(asked)} {len(warm.text)}")
"""
    )
    here = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(
        [*command, str(path), str(tmp_path)], env={**os.environ, "PYTHONPATH": here}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # processes, checkpoints loaded, entries seen
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == ["2 1 4", "2 0 4"]
