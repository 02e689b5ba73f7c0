"""Guidance distillation with an embedding of w: beside the network in training, inside it in an export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from support.method_cases import CASES, Bench
from support.proofs import reproduced
from support.toys import TEXT, ToyUNet, disturb, draws, layouts, noise, problem, unet, vp
from torch import Tensor

import stepdistill
from stepdistill.errors import UserError
from stepdistill.families.common.guidance_embedding import (
    GuidanceEmbedding,
    GuidanceEmbeddingSettings,
    guidance_embedding,
)
from stepdistill.families.conditioning import Conditioning
from stepdistill.families.recipe import Recipe
from stepdistill.families.sd import SD
from stepdistill.methods.base import Batch, Progress
from stepdistill.methods.consistency.lcm import LCM, LCMConfig
from stepdistill.methods.consistency.tscd import TSCDConfig
from stepdistill.roles.denoiser import Denoiser
from stepdistill.roles.lora import LoraSettings
from stepdistill.roles.triple import GENERATOR, REAL_SCORE, RoleLayout, Triple
from stepdistill.training.run import train

T = torch.tensor([249.0, 749.0])
W = torch.tensor([2.0, 5.0], dtype=torch.float64)


def embedded_triple(mode: str) -> Triple:
    lora = LoraSettings(4, 2.0, ("to_q", "conv1")) if mode == "lora" else None
    held = layouts("lora", "lora")
    held[GENERATOR] = RoleLayout(mode, lora, GuidanceEmbeddingSettings(16))  # type: ignore[arg-type]
    return Triple(unet(), ToyUNet(), vp(), held)  # type: ignore[arg-type]


def ask(triple: Triple, role: str, w: Tensor | None = W) -> Tensor:
    cond = Conditioning(noise(2, 3, TEXT, seed=5))
    with torch.no_grad():
        return triple.denoiser(role).estimate(noise(2, 4, 8, 8), T, cond if w is None else cond.told(w)).raw


def with_input() -> UNet2DConditionModel:
    """The toy with the input that LCM's UNets have."""
    config = {key: value for key, value in unet().config.items() if not key.startswith("_")}
    network: UNet2DConditionModel = UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": 16})
    return network


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_it_starts_as_the_base_and_is_what_a_unet_has_inside(mode: str) -> None:
    triple = embedded_triple(mode)
    expected = unet()(noise(2, 4, 8, 8), T, noise(2, 3, TEXT, seed=5)).sample.detach()
    assert torch.equal(ask(triple, GENERATOR), expected)
    triple.add_copy("ema", GENERATOR)
    guide = triple.guidance_conditioners[GENERATOR]
    assert isinstance(guide, GuidanceEmbedding)
    with torch.no_grad():
        guide.cond_proj.weight.copy_(0.1 * noise(*guide.cond_proj.weight.shape))
    inside = with_input().double()
    inside.load_state_dict({**unet().state_dict(), "time_embedding.cond_proj.weight": guide.cond_proj.weight})
    with torch.no_grad():
        told = guidance_embedding(W, 16).double()
        by_unet = inside(noise(2, 4, 8, 8), T, noise(2, 3, TEXT, seed=5), timestep_cond=told).sample
    assert torch.allclose(ask(triple, GENERATOR), by_unet, atol=1e-12)
    assert float((by_unet - expected).abs().max()) > 1e-3
    for role, w in ((GENERATOR, None), (REAL_SCORE, None), ("ema", W), ("fake_score", None)):
        assert torch.equal(ask(triple, role, w), expected)
    triple.lerp_role("ema", GENERATOR, 1.0)
    assert torch.allclose(ask(triple, "ema"), by_unet, atol=1e-12)
    triple.reset_role(GENERATOR)
    assert torch.equal(ask(triple, GENERATOR), expected)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_gradients_reach_the_embedding_with_and_without_checkpointing(mode: str) -> None:
    found = []
    for checkpointing in (False, True):
        triple = embedded_triple(mode)
        disturb(triple)
        if checkpointing:
            triple.enable_gradient_checkpointing()
        with triple.training(GENERATOR):
            cond = Conditioning(noise(2, 3, TEXT, seed=5)).told(W)
            loss = triple.generator.estimate(noise(2, 4, 8, 8), T, cond).raw.square().mean()
            ask(triple, GENERATOR, W + 1)
            loss.backward()
        found.append({key: p.grad for key, p in triple.network_parameters(GENERATOR).items()})
    gradient = found[0]["guide.cond_proj.weight"]
    assert gradient is not None
    assert bool(gradient.any())
    for key, value in found[0].items():
        assert (value is None) == (found[1][key] is None)
        assert value is None or torch.allclose(value, found[1][key], rtol=1e-10, atol=1e-14), key


# ---------------------------------------------------------------- students of few steps


@pytest.mark.parametrize("target", ["student", "ema"])
def test_a_consistency_student_is_told_the_scale_of_its_teachers_step(
    monkeypatch: pytest.MonkeyPatch, target: Literal["student", "ema"]
) -> None:
    """Student and target alike; whoever looks at the batch's own conditioning is told nothing."""
    config = LCMConfig(guidance=3, guidance_range=(1.5, 6), tell_guidance=True, steps=2, points=10, target=target)
    method = LCM(config, problem(vp()))
    triple, scales, heard = embedded_triple("lora"), [], []
    method.prepare(triple)
    guided, x0 = Denoiser.guided, Denoiser.x0

    def seen_guided(
        self: Denoiser, x_t: Tensor, t: Tensor, cond: Conditioning, null: Conditioning, w: Tensor
    ) -> Tensor:
        scales.append(w)
        return guided(self, x_t, t, cond, null, w)

    def seen_x0(self: Denoiser, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        heard.append(cond.guidance)
        return x0(self, x_t, t, cond)

    monkeypatch.setattr(Denoiser, "guided", seen_guided)
    monkeypatch.setattr(Denoiser, "x0", seen_x0)
    cond = Conditioning(noise(2, 3, TEXT, seed=5))
    batch = Batch(cond, cond, images=noise(2, 4, 8, 8), image_cond=cond)
    rollout = method.rollout(batch, triple, Progress(), draws(range(2)))
    (w,) = scales
    assert w.shape == (2,)
    assert bool(((w >= 1.5) & (w <= 6)).all())
    assert float(w[0]) != float(w[1])
    assert [told.tolist() for told in heard] == [w.float().tolist()] * 2
    assert rollout.batch.cond.guidance is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"guidance": 3.0, "tell_guidance": True}, "guidance_range, which w is drawn from, is not set"),
        ({"guidance": 9.0, "tell_guidance": True, "guidance_range": [1.5, 6.0]}, "is not within guidance_range"),
    ],
)
def test_what_cannot_be_told_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LCMConfig.model_validate(options)
    with pytest.raises(ValueError, match="score distils one guidance scale"):
        TSCDConfig.model_validate({"guidance": 3.0, "tell_guidance": True, "guidance_range": [1.5, 6.0], "score": {}})


# ---------------------------------------------------------------- exports


@pytest.fixture(scope="module")
def run(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A short run that moves far enough for w to matter."""
    root = tmp_path_factory.mktemp("guidance")

    def make(family: str = "sd", layout: str = "lora", case: str = "guidance") -> Path:
        folder = root / f"{family}-{layout}-{case}"
        if not folder.exists():
            config = Bench(tiny, root).config(CASES[case], 3, family=family, layout=layout, dtype="float32", ema=0.0)
            faster = config.optimizers.model_copy(
                update={"generator": config.optimizers.generator.model_copy(update={"lr": 1e-2, "warmup": 0})}
            )
            train(config.model_copy(update={"optimizers": faster}), folder)
        return folder

    return make


@pytest.mark.ci
@pytest.mark.parametrize(
    ("family", "layout", "case"),
    [
        ("sd", "lora", "guidance"),
        ("sd", "full", "guidance"),
        ("sdxl", "lora", "guidance"),
        ("sd", "lora", "lcm-told"),
        ("sdxl", "full", "lcm-told"),
    ],
)
def test_stock_pipelines_tell_the_exported_network_its_guidance(
    run: Callable[..., Path], tmp_path: Path, family: str, layout: str, case: str
) -> None:
    """One call a step at any guidance_scale, and the proof's images by a script without this package."""
    folder = stepdistill.export(run(family, layout, case), "pipeline", tmp_path / "export")
    recipe = Recipe.read(folder)
    assert recipe is not None
    w = CASES[case].options["guidance"]
    assert recipe.guidance_scale == recipe.told_guidance == w
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert pipe.unet.config.time_cond_proj_dim == 256
    pipe.set_progress_bar_config(disable=True)
    calls: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda _module, args: calls.append(len(args[0])))
    drawn = [
        pipe(
            "a cat",
            num_inference_steps=2,
            guidance_scale=w,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        )
        for w in (1.5, 4.5)
    ]
    assert calls == [1] * 4
    assert not torch.equal(drawn[0].images, drawn[1].images)
    if (family, layout) == ("sd", "lora"):
        assert reproduced(folder)
        assert f"told `guidance_scale={w:g}`" in (folder / "README.md").read_text()


def test_a_fixed_scale_is_a_plain_lora(run: Callable[..., Path], tmp_path: Path) -> None:
    folder = stepdistill.export(run(case="guidance-fixed"), "diffusers-lora", tmp_path / "export")
    recipe = Recipe.read(folder)
    assert recipe is not None
    assert (recipe.guidance_scale, recipe.told_guidance, recipe.baked_guidance) == (1.0, None, 3.0)
    assert not any("guide" in key for key in load_file(folder / "pytorch_lora_weights.safetensors"))


def test_refusals(run: Callable[..., Path], tmp_path: Path, tiny: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"no LoRA file can hold: export it with --format pipeline"):
        stepdistill.export(run(), "diffusers-lora", tmp_path / "export")
    with pytest.raises(UserError, match=r"'sd3' have no embedding .*guidance_range to null"):
        train(Bench(tiny, tmp_path).config(CASES["guidance"], 1, family="sd3"), tmp_path / "run")
    network = with_input()
    with pytest.raises(UserError, match="told a guidance scale already"):
        SD().guidance_embedding_target(network)
