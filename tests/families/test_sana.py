"""sana against the stock pipelines: prompts, time, guided samples, Sprint's angles, features, the autoencoder, exports."""

from __future__ import annotations

import inspect
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)
from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0
from support.method_cases import CASES, Bench, difference, equal, saved
from support.tiny_checkpoints import edit, refusal
from torch import nn

import stepdistill
from stepdistill.diffusion.prediction import Prediction, convert_prediction
from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.diffusion.timesteps import student_timesteps, trailing_timesteps
from stepdistill.diffusion.transitions import Transition, TransitionKind
from stepdistill.errors import UserError
from stepdistill.families.base import Checkpoint
from stepdistill.families.checkpoints.loading import inspect_checkpoint, load_checkpoint
from stepdistill.families.conditioning import Conditioning, MicroConditioning
from stepdistill.families.recipe import Recipe
from stepdistill.families.sana import DEFAULT_GUIDANCE_SCALE, Sana
from stepdistill.inference.artifact import draw, load_artifact
from stepdistill.methods.base import Problem
from stepdistill.methods.consistency.scm import SCM, SCMConfig
from stepdistill.methods.matching.dmd2 import DMD2, DMD2Config
from stepdistill.roles.denoiser import Denoiser
from stepdistill.roles.lora import AdapterBank, LoraSettings, count_target_matches
from stepdistill.roles.sampler import sample, teacher_sample
from stepdistill.training.run import train
from stepdistill.training.setup import prepare

SANA = Sana()
VARIANTS = SANA.tiny_variants
PROMPTS = ["a photo of the red cat", "A blue square, " + "very " * 30]
SIZES = [MicroConditioning.plain(32, 32)] * 2
CALL: dict[str, Any] = {"use_resolution_binning": False, "height": 32, "width": 32, "output_type": "latent"}
Tiny = Callable[..., Path]


@cache
def loaded(folder: Path) -> Checkpoint:
    return load_checkpoint(inspect_checkpoint(folder), torch.float32, "cpu")


@cache
def stock(folder: Path) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spied(pipeline: DiffusionPipeline, **call: Any) -> dict[str, Any]:
    """What the pipeline passes to its transformer at the first step."""
    calls: list[dict[str, Any]] = []
    hook = pipeline.transformer.register_forward_pre_hook(lambda _m, _a, told: calls.append(told), with_kwargs=True)
    try:
        pipeline(PROMPTS, num_inference_steps=2, **CALL, **call)
    finally:
        hook.remove()
    return calls[0]


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_tiny_checkpoint_loads_frozen_and_as_it_was_written(tiny: Tiny, tmp_path: Path, variant: str) -> None:
    checkpoint, theirs = loaded(tiny("sana", variant)), stock(tiny("sana", variant)).transformer.state_dict()
    ours = checkpoint.network.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours | theirs)
    assert checkpoint.info.latent_shape() == (4, 8, 8)
    assert checkpoint.info.default_size == (32, 32)
    assert type(checkpoint.pipeline) is (SanaSprintPipeline if variant == "sprint" else SanaPipeline)
    modules = [part for part in checkpoint.pipeline.components.values() if isinstance(part, nn.Module)]
    assert len(modules) == 3
    assert not any(module.training for module in modules)
    assert not any(p.requires_grad for module in modules for p in module.parameters())
    SANA.write_tiny(tmp_path / "same", variant)
    SANA.write_tiny(tmp_path / "other", variant, seed=1)
    files = [path.relative_to(tiny("sana", variant)) for path in tiny("sana", variant).rglob("*.safetensors")]
    assert len(files) == 3
    for path in files:
        assert (tmp_path / "same" / path).read_bytes() == (tiny("sana", variant) / path).read_bytes()
        assert (tmp_path / "other" / path).read_bytes() != (tiny("sana", variant) / path).read_bytes()


def test_a_checkpoint_is_inspected_without_its_weights(copied: Tiny) -> None:
    folder = copied("sana")
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    info = inspect_checkpoint(folder)
    assert info.family == "sana"
    assert info.schedule.is_flow
    refusal(lambda: load_checkpoint(info, torch.float32, "cpu"), "transformer", "there are none")


@pytest.mark.parametrize("parts", [frozenset({"network"}), frozenset({"text"}), frozenset({"images"})])
def test_parts_are_left_out_of_memory(tiny: Tiny, parts: frozenset[Any]) -> None:
    checkpoint = load_checkpoint(inspect_checkpoint(tiny("sana")), torch.float32, "cpu", parts)
    pipeline: Any = checkpoint.pipeline
    assert (pipeline.transformer is not None) == ("network" in parts)
    assert (pipeline.text_encoder is not None) == ("text" in parts)
    assert (pipeline.vae is not None and pipeline.vae.encoder is not None) == ("images" in parts)
    if "network" in parts:
        assert SANA.decode(checkpoint, noise(1, 4, 8, 8)).shape == (1, 3, 32, 32)
    else:
        assert next(checkpoint.network.parameters()).is_meta


def test_the_schedule_is_that_of_the_stock_scheduler(copied: Tiny) -> None:
    folder = copied("sana")
    assert inspect_checkpoint(folder).schedule == NoiseSchedule.flow(3.0)
    FlowMatchEulerDiscreteScheduler(shift=2.5).save_pretrained(folder / "scheduler")
    assert inspect_checkpoint(folder).schedule == NoiseSchedule.flow(2.5)
    DDIMScheduler().save_pretrained(folder / "scheduler")
    refusal(lambda: inspect_checkpoint(folder), "a VP process", "flow matching", "restore the scheduler")
    SCMScheduler().save_pretrained(folder / "scheduler")
    refusal(lambda: inspect_checkpoint(folder), "SCMScheduler is Sana-Sprint's alone")


def test_sprint_counts_in_the_angles_of_its_scheduler(copied: Tiny) -> None:
    folder = copied("sana", "sprint")
    schedule = inspect_checkpoint(folder).schedule
    assert schedule.prediction is Prediction.FLOW
    for steps in (1, 3, 4):
        theirs = SCMScheduler()
        theirs.set_timesteps(steps, max_timesteps=math.pi / 2, intermediate_timesteps=None)
        ladder = torch.tensor(student_timesteps(schedule, steps), dtype=torch.float64)
        torch.testing.assert_close(schedule.angle(ladder).float(), theirs.timesteps[:-1], atol=1e-6, rtol=0)
    fractions = torch.linspace(0.01, 1, 50, dtype=torch.float64)
    torch.testing.assert_close(
        schedule.fraction_at(schedule.time_at_fraction(fractions)), fractions, atol=1e-12, rtol=0
    )
    DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction").save_pretrained(
        folder / "scheduler"
    )
    refusal(lambda: inspect_checkpoint(folder), "DPMSolverMultistepScheduler", "SCMScheduler")


def test_checkpoints_that_do_not_fit_together_are_refused(copied: Tiny, tiny: Tiny, tmp_path: Path) -> None:
    folder = copied("sana")
    config = folder / "transformer" / "config.json"
    original = config.read_text()
    edit(config, guidance_embeds=True)
    refusal(lambda: inspect_checkpoint(folder), "SanaPipeline", "guidance_embeds True")
    config.write_text(original)
    edit(config, out_channels=12)
    refusal(lambda: inspect_checkpoint(folder), "reads 4 channels and writes 12")
    edit(config, out_channels=4, in_channels=8)
    refusal(lambda: inspect_checkpoint(folder), "reads 8 channels", "AutoencoderDC of 4")
    sprint = Path(shutil.copytree(tiny("sana", "sprint"), tmp_path / "sprint"))
    edit(sprint / "transformer" / "config.json", guidance_embeds=False)
    refusal(lambda: inspect_checkpoint(sprint), "SanaSprintPipeline", "guidance_embeds False")
    refusal(lambda: SANA.inspect("a.safetensors", folder, Path("a.safetensors")), "give the folder")


def test_sizes_are_multiples_of_the_autoencoder_s(tiny: Tiny, tmp_path: Path) -> None:
    config = Bench(tiny, tmp_path).config(CASES["dmd2"], 1, family="sana")
    prepare(config.model_copy(update={"model": config.model.model_copy(update={"size": (36, 32)})}))
    wrong = config.model_copy(update={"model": config.model.model_copy(update={"size": (34, 32)})})
    refusal(lambda: prepare(wrong), "multiples of 4")


# ---------------------------------------------------------------- conditioning


@pytest.mark.parametrize("negative", ["", "dog"])
def test_prompts_are_encoded_as_the_pipeline_does(tiny: Tiny, negative: str) -> None:
    checkpoint, pipeline = loaded(tiny("sana")), stock(tiny("sana"))
    told = spied(pipeline, guidance_scale=4.0, negative_prompt=negative)
    ours = Conditioning.cat([SANA.null(checkpoint, SIZES, negative), SANA.encode(checkpoint, PROMPTS, SIZES)])
    assert torch.equal(ours.text, told["encoder_hidden_states"])
    assert torch.equal(ours.mask, told["encoder_attention_mask"])
    assert ours.guidance is None
    assert ours.text.shape == (4, 300, 32)
    # the instruction is read before the prompt, and the unconditional branch has none
    plain = pipeline.encode_prompt(PROMPTS, False, device="cpu", complex_human_instruction=None)[0]
    assert (ours.text[2:] - plain)[:, 1:5].abs().max() > 1e-2
    size = SANA.encode(checkpoint, PROMPTS, SIZES)[:1]
    stored = sum(tensor.numel() * tensor.element_size() for tensor in (size.text, size.mask) if tensor is not None)
    assert SANA.encoding_bytes(checkpoint.info, torch.float32) == stored


def test_sprint_is_told_what_its_pipeline_tells(tiny: Tiny) -> None:
    checkpoint, pipeline = loaded(tiny("sana", "sprint")), stock(tiny("sana", "sprint"))
    told, network_told = spied(pipeline), []
    ours = SANA.encode(checkpoint, PROMPTS, SIZES)
    assert torch.equal(ours.text, told["encoder_hidden_states"])
    assert torch.equal(ours.mask, told["encoder_attention_mask"])
    assert ours.guidance.tolist() == [DEFAULT_GUIDANCE_SCALE] * 2 == [4.5] * 2
    hook = checkpoint.network.register_forward_pre_hook(lambda _m, _a, kw: network_told.append(kw), with_kwargs=True)
    SANA.call(checkpoint.network, noise(2, 4, 8, 8), torch.ones(2, dtype=torch.float64), ours)
    hook.remove()
    torch.testing.assert_close(network_told[0]["guidance"], told["guidance"])
    torch.testing.assert_close(network_told[0]["timestep"], told["timestep"], atol=1e-5, rtol=0)


def test_padding_does_not_matter(tiny: Tiny) -> None:
    checkpoint = loaded(tiny("sana"))
    cond = SANA.encode(checkpoint, PROMPTS, SIZES)
    assert (cond.mask == 0).any()
    assert not torch.equal(cond.masked().text, cond.text)
    x, t = noise(2, 4, 8, 8), torch.full((2,), 0.7)
    outs = [SANA.call(checkpoint.network, x, t, told) for told in (cond, cond.masked(), replace(cond, mask=None))]
    assert torch.equal(outs[0], outs[1])
    assert (outs[0] - outs[2]).abs().max() > 1e-3


def test_the_identity_of_encodings_names_the_instruction(tiny: Tiny) -> None:
    files = SANA.encoder_files(loaded(tiny("sana")).info, "text")
    assert files["pipeline of diffusers"] == Path(inspect.getfile(SanaPipeline))
    assert {"text_encoder/model.safetensors", "tokenizer/tokenizer.json"} <= files.keys()
    assert set(SANA.encoder_files(loaded(tiny("sana")).info, "images")) == {
        "vae/config.json", "vae/diffusion_pytorch_model.safetensors"
    }  # fmt: skip


# ---------------------------------------------------------------- the network


def sigma_variant(tiny: Tiny, folder: Path) -> Path:
    """As Sprint's teachers are: time in [0, 1], normalised keys; and with a learned variance, which early ones had."""
    folder = Path(shutil.copytree(tiny("sana"), folder))
    torch.manual_seed(0)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    changes = {"out_channels": 8, "timestep_scale": 0.001, "qk_norm": "rms_norm_across_heads"}
    SanaTransformer2DModel.from_config({**config, **changes}).save_pretrained(folder / "transformer")
    return folder


@pytest.mark.parametrize("variant", ["default", "learned variance"])
def test_guided_samples_are_the_stock_pipeline_s(tiny: Tiny, tmp_path: Path, variant: str) -> None:
    folder = tiny("sana") if variant == "default" else sigma_variant(tiny, tmp_path / "model")
    checkpoint, pipeline = loaded(folder), DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    schedule, start = checkpoint.info.schedule, noise(2, 4, 8, 8)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=schedule.shift)
    fractions = [1 - i / 5 for i in range(5)]
    theirs = pipeline(PROMPTS, sigmas=fractions, guidance_scale=4.0, latents=start, **CALL).images
    cond, null = SANA.encode(checkpoint, PROMPTS, SIZES), SANA.null(checkpoint, SIZES)
    denoiser = Denoiser(checkpoint.network, SANA, schedule)
    ours = {w: teacher_sample(denoiser, cond, null, start, 5, w) for w in (4.0, 1.0)}
    torch.testing.assert_close(ours[4.0], theirs, atol=1e-4, rtol=1e-5)
    assert (ours[1.0] - theirs).abs().max() > 1e-2


def test_the_stock_solver_s_first_order_is_our_sampler(tiny: Tiny) -> None:
    """DPM-Solver's first order is Euler on its own levels; it tells the network whole timesteps, which is mimicked here."""
    checkpoint, pipeline = loaded(tiny("sana")), DiffusionPipeline.from_pretrained(tiny("sana"))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, solver_order=1)
    start, schedule = noise(2, 4, 8, 8), checkpoint.info.schedule
    theirs = pipeline(PROMPTS, num_inference_steps=6, guidance_scale=4.0, latents=start, **CALL).images
    cond, null = SANA.encode(checkpoint, PROMPTS, SIZES), SANA.null(checkpoint, SIZES)

    def predict(x: torch.Tensor, t: float) -> torch.Tensor:
        told = torch.full((2,), math.floor(1000 * t) / 1000)
        u = [SANA.call(checkpoint.network, x, told, branch) for branch in (null, cond)]
        return x - t * (u[0] + 4.0 * (u[1] - u[0]))

    ladder = schedule.time_at_fraction(0.999 * (1 - torch.arange(6, dtype=torch.float64) / 6)).tolist()
    ours = sample(predict, schedule, start, ladder, Transition(TransitionKind.DETERMINISTIC), lambda _: start)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("steps", "call"), [
    (1, {"intermediate_timesteps": None}), (2, {"max_timesteps": math.pi / 2, "intermediate_timesteps": 1.3}),
    (4, {"intermediate_timesteps": None}),
])  # fmt: skip
def test_sprint_s_own_samples_are_the_stock_pipeline_s(tiny: Tiny, steps: int, call: dict[str, Any]) -> None:
    checkpoint, pipeline = loaded(tiny("sana", "sprint")), stock(tiny("sana", "sprint"))
    schedule, seeds = checkpoint.info.schedule, (3, 5)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    theirs = pipeline(PROMPTS, num_inference_steps=steps, generator=generators, guidance_scale=4.0, **call, **CALL)
    ladder = student_timesteps(schedule, steps)
    if steps == 2:
        ladder = tuple(schedule.time_at_angle(torch.tensor([math.pi / 2, 1.3])).tolist())
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    draws = [torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators]) for _ in range(steps)]
    cond, denoiser = SANA.encode(checkpoint, PROMPTS, SIZES), Denoiser(checkpoint.network, SANA, schedule)
    ours = sample(
        lambda x, t: denoiser.guided(x, t, cond, cond, 4.0), schedule, draws[0], ladder,
        Transition(TransitionKind.RENOISE), lambda index: draws[index + 1],
    )  # fmt: skip
    torch.testing.assert_close(ours, theirs.images, atol=1e-4, rtol=1e-5)
    other = denoiser.guided(draws[0], 1.0, cond, cond, 5.0) - denoiser.guided(draws[0], 1.0, cond, cond, 4.0)
    assert other.abs().max() > 1e-3


def test_what_sprint_s_pipeline_makes_of_the_velocity_is_trigflow_s_prediction() -> None:
    angle = torch.linspace(0.05, math.pi / 2, 20, dtype=torch.float64)[:, None]
    x0, eps = (noise(20, 7, seed=seed).double() for seed in (1, 2))
    t = angle.sin() / (angle.sin() + angle.cos())
    shown = (angle.cos() * x0 + angle.sin() * eps) * (t**2 + (1 - t) ** 2).sqrt()
    torch.testing.assert_close(shown, (1 - t) * x0 + t * eps)
    f = ((1 - 2 * t) * shown + (1 - 2 * t + 2 * t**2) * (eps - x0)) / (t**2 + (1 - t) ** 2).sqrt()
    torch.testing.assert_close(f, angle.cos() * eps - angle.sin() * x0)
    torch.testing.assert_close(f, convert_prediction(eps - x0, shown, 1 - t, t, Prediction.FLOW, Prediction.TRIGFLOW))


def test_a_network_that_is_told_its_guidance_is_called_once(tiny: Tiny) -> None:
    checkpoint = loaded(tiny("sana", "sprint"))
    cond, x = SANA.encode(checkpoint, PROMPTS, SIZES), noise(2, 4, 8, 8)
    denoiser, rows = Denoiser(checkpoint.network, SANA, checkpoint.info.schedule), []
    hook = checkpoint.network.register_forward_pre_hook(lambda _m, args: rows.append(len(args[0])))
    each = denoiser.guided(x, 0.8, cond, cond, torch.tensor([1.0, 5.0]))
    hook.remove()
    assert rows == [2]
    for row, w in enumerate((1.0, 5.0)):
        told = replace(cond, guidance=torch.full((2,), w))
        torch.testing.assert_close(each[row], denoiser.x0(x, 0.8, told)[row], atol=1e-5, rtol=1e-5)


def test_inputs_that_the_network_lacks_are_refused(tiny: Tiny) -> None:
    x, t = noise(2, 4, 8, 8), torch.full((2,), 0.5)
    plain, sprint = loaded(tiny("sana")), loaded(tiny("sana", "sprint"))
    cond = SANA.encode(plain, PROMPTS, SIZES)
    told = replace(cond, guidance=torch.ones(2))
    refusal(lambda: SANA.call(plain.network, x, t, told), "a guidance scale", "guidance_embeds is False")
    refusal(lambda: SANA.call(sprint.network, x, t, cond), "no guidance scale", "guidance_embeds is True")
    refusal(lambda: SANA.call(plain.network, x, t, replace(cond, second_time=t)), "second time")


def test_features_are_the_block_s_tokens_also_under_checkpointing(tiny: Tiny) -> None:
    checkpoint = loaded(tiny("sana"))
    cond, caught, called = SANA.encode(checkpoint, PROMPTS, SIZES), [], []
    network = SANA.empty_like(checkpoint.network).eval()
    network.load_state_dict(checkpoint.network.state_dict())
    denoiser = Denoiser(network, SANA, checkpoint.info.schedule)
    hook = SANA.feature_module(network).register_forward_hook(lambda _m, _a, out: caught.append(out.detach()))
    denoiser.x0(noise(2, 4, 8, 12), 0.5, cond)
    hook.remove()
    x = noise(2, 4, 8, 12).requires_grad_()
    features = denoiser.features(x, 0.5, cond)
    assert features.shape == (2, SANA.feature_channels(checkpoint.info), 8, 12)
    assert SANA.feature_stride(checkpoint.info) == 1
    torch.testing.assert_close(features[1, :, 2, 7], caught[0][1, 2 * 12 + 7])
    (plain,) = torch.autograd.grad(features.square().sum(), x)

    def function(module: nn.Module, *args: torch.Tensor) -> torch.Tensor:
        called.append(module)
        return torch.utils.checkpoint.checkpoint(module, *args, use_reentrant=False)

    SANA.enable_gradient_checkpointing(network, function)
    (checkpointed,) = torch.autograd.grad(denoiser.features(x, 0.5, cond).square().sum(), x)
    assert called
    torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_lora_target_names_modules(tiny: Tiny, variant: str) -> None:
    network = SANA.empty_like(loaded(tiny("sana", variant)).network)
    for preset in ("attention", "all"):
        assert all(count_target_matches(network, SANA.lora_targets(preset)).values())
    AdapterBank(network).add("generator", LoraSettings(2, 2, SANA.lora_targets("all")), seed=0)
    # all but the depthwise convolutions and the one that makes patches of the latents
    reached = {name.partition(".lora_A.")[0] for name, _ in network.named_parameters() if ".lora_A." in name}
    layers = {
        name for name, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and "lora" not in name
    }
    left = {name.removesuffix(".base_layer") for name in layers} - reached
    assert {name.rpartition(".")[2] for name in left} == {"conv_depth", "proj"}
    with pytest.raises(UserError, match="did you mean 'attention'"):
        SANA.lora_targets("atention")


# ---------------------------------------------------------------- the autoencoder


def test_latents_are_scaled_as_the_pipeline_expects(tiny: Tiny) -> None:
    checkpoint, pipeline = loaded(tiny("sana")), stock(tiny("sana"))
    images = noise(2, 3, 32, 32).clamp(-1, 1)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        posterior = SANA.posterior(checkpoint, images)
    raw = pipeline.vae.encode(images).latent
    torch.testing.assert_close(posterior.mean, raw * 0.41)
    assert not posterior.std.any()
    assert torch.equal(posterior.draw(noise(2, 4, 8, 8)), posterior.mean)
    theirs = (pipeline.vae.decode(raw).sample / 2 + 0.5).clamp(0, 1)
    latents = posterior.mean.clone().requires_grad_()
    decoded = SANA.decode(checkpoint, latents)
    torch.testing.assert_close(decoded, theirs)
    decoded.sum().backward()
    assert latents.grad.abs().sum() > 0
    half = load_checkpoint(checkpoint.info, torch.bfloat16, "cpu")
    assert {p.dtype for p in half.pipeline.vae.parameters()} == {torch.float32}
    assert {p.dtype for p in half.pipeline.text_encoder.parameters()} == {torch.bfloat16}


# ---------------------------------------------------------------- recipes, runs, exports


def recipe_of(info: Any, **config: Any) -> Recipe:
    problem = Problem(info.schedule, (4, 8, 8), 32, (8, 8), (32, 32), "base")
    return SANA.stock_recipe(info, DMD2(DMD2Config(guidance=4.5, **config), problem).recipe())


def test_continuous_students_of_sprint_walk_evenly(tiny: Tiny) -> None:
    """Its pipeline has no other way but in two steps; elsewhere the published angles stand."""
    plain, sprint = (loaded(tiny("sana", variant)).info for variant in VARIANTS)

    def ladder(info: Any, steps: int) -> tuple[float, ...]:
        problem = Problem(info.schedule, (4, 8, 8), 32, (8, 8), (32, 32), "base")
        method = SCM(SCMConfig(guidance=4.5, steps=steps), problem)
        SANA.stock_recipe(info, method.recipe())
        return tuple(info.schedule.angle(torch.tensor(method.timesteps, dtype=torch.float64)).tolist())

    assert ladder(sprint, 4) == pytest.approx([math.pi / 2 * p for p in (1, 0.75, 0.5, 0.25)])
    assert ladder(sprint, 2)[1] == pytest.approx(1.3)
    assert ladder(plain, 4)[1:] == pytest.approx((1.3, 1.1, 0.6))


def test_recipes_are_in_the_words_of_the_pipeline(tiny: Tiny) -> None:
    plain, sprint = (loaded(tiny("sana", variant)).info for variant in VARIANTS)
    recipe = recipe_of(plain, steps=4)
    assert recipe.scheduler_class == "FlowMatchLCMScheduler"
    assert recipe.sigmas == pytest.approx((1, 0.75, 0.5, 0.25))
    assert recipe.native_timesteps(plain.schedule) == pytest.approx((1, 0.9, 0.75, 0.5))
    assert recipe.call == {"use_resolution_binning": False}
    assert recipe.guidance_scale == 1
    recipe = Recipe.from_json(recipe_of(sprint, steps=4).to_json())
    assert recipe.scheduler_class == "SCMScheduler"
    assert recipe.guidance_scale == 4.5
    assert recipe.angles == pytest.approx([math.pi / 2 * p for p in (1, 0.75, 0.5, 0.25)])
    assert recipe.native_timesteps(sprint.schedule) == pytest.approx(student_timesteps(sprint.schedule, 4))
    assert recipe.transition().kind is TransitionKind.RENOISE
    # written by hand to four digits, an even ladder is one
    by_hand = [round(t, 4) for t in student_timesteps(sprint.schedule, 4)]
    assert recipe_of(sprint, timesteps=by_hand).angles == pytest.approx(recipe.angles, abs=1e-4)
    two = recipe_of(sprint, timesteps=[1.0, 0.7827])
    assert two.call["intermediate_timesteps"] == pytest.approx(1.3, abs=1e-3)


def test_what_sprint_s_pipeline_cannot_walk_is_refused(tiny: Tiny) -> None:
    sprint = loaded(tiny("sana", "sprint")).info
    refusal(lambda: recipe_of(sprint, transition="deterministic"), "re-noises", "FlowMatchEulerDiscreteScheduler")
    refusal(lambda: recipe_of(sprint, timesteps=[1.0, 0.75, 0.5, 0.25]), "even angles", "[1.0, 0.7071, 0.5, 0.2929]")
    refusal(lambda: recipe_of(sprint, timesteps=[0.9, 0.5]), "starts at 0.9", "start at 1")


def test_a_run_with_a_cache_is_the_run_without(tiny: Tiny, tmp_path: Path) -> None:
    """Texts without their padding, and latents without a spread."""
    bench, cache_section = Bench(tiny, tmp_path), {"folder": str(tmp_path / "cache")}
    config = bench.config(CASES["dmd2-gan"], 2, family="sana", variant="sprint", dtype="float32", batch_size=2)
    train(config, tmp_path / "live")
    with_cache = type(config).model_validate({**config.model_dump(), "cache": cache_section})
    train(with_cache, tmp_path / "cold")
    train(with_cache, tmp_path / "warm")
    assert equal(saved(tmp_path / "live"), saved(tmp_path / "cold"))
    assert equal(saved(tmp_path / "live"), saved(tmp_path / "warm"))


def test_micro_batches_change_nothing(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, attention = Bench(tiny, tmp_path), SanaLinearAttnProcessor2_0.__call__

    def whole(*args: Any, **more: Any) -> torch.Tensor:
        """In the dtype of the network: diffusers' goes to float32, whose products of one row and of four round differently."""
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "float", lambda tensor: tensor)
            return attention(*args, **more)

    monkeypatch.setattr(SanaLinearAttnProcessor2_0, "__call__", whole)
    for batch, accumulation in ((4, 1), (1, 4)):
        config = bench.config(
            CASES["dmd2-gan"], 3, family="sana", layout="mixed", batch_size=batch, accumulation=accumulation
        )
        train(config, tmp_path / f"{batch}x{accumulation}")
    assert difference(saved(tmp_path / "4x1"), saved(tmp_path / "1x4")) < 1e-10


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_deterministic_or_full_student_exports(tiny: Tiny, tmp_path: Path, variant: str) -> None:
    """Other ways than the matrix': every target, Euler, four steps; a second export of it, and no kohya file."""
    case = replace(CASES["dmd2"], options={"guidance": 2.0, "ratio": 1, "steps": 4})
    if variant == "default":
        case = replace(case, options={**case.options, "transition": "deterministic"})
    config = Bench(tiny, tmp_path).config(case, 2, family="sana", variant=variant, dtype="float32", batch_size=2)
    data = config.model_dump()
    data["roles"]["generator"]["targets"] = "all"
    train(type(config).model_validate(data), tmp_path / "run")
    refusal(lambda: stepdistill.export(tmp_path / "run", "kohya-lora", tmp_path / "kohya"), "'sana'", "diffusers-lora")
    folder = stepdistill.export(tmp_path / "run", "pipeline", tmp_path / "export")
    loaded = load_artifact(str(folder), None, torch.float32, "cpu")
    pipeline, recipe = loaded.pipeline, loaded.recipe
    wanted = "SCMScheduler" if variant == "sprint" else "FlowMatchEulerDiscreteScheduler"
    assert type(pipeline.scheduler).__name__ == recipe.scheduler_class == wanted
    card = (folder / "README.md").read_text()
    assert f"{type(pipeline).__name__}.from_pretrained" in card
    assert "use_resolution_binning=False" in card
    assert ("the network is told `guidance_scale=4.5`" in card) == (variant == "sprint")
    lora = stepdistill.export(tmp_path / "run", "diffusers-lora", tmp_path / "lora")
    assert (lora / "pytorch_lora_weights.safetensors").is_file()


def test_ladders_of_the_teacher_are_those_of_the_shift(tiny: Tiny) -> None:
    info = loaded(tiny("sana")).info
    assert trailing_timesteps(info.schedule, 2) == pytest.approx((1.0, 0.75))


@pytest.mark.parametrize("variant", VARIANTS)
def test_bases_are_drawn_by_the_solvers_that_their_pipelines_take(tiny: Tiny, variant: str) -> None:
    """At the size of the checkpoint, which is no size of the pipeline's list, and with its shift under any solver."""
    loaded = load_artifact(str(tiny("sana", variant)), None, torch.float32, "cpu")
    pipeline, recipe = loaded.pipeline, loaded.recipe
    assert recipe is None
    drawn = {
        steps: next(draw(pipeline, PROMPTS, [1, 2], steps=steps, guidance=3.0)) for steps in (2, 3)
    }  # fmt: skip
    assert drawn[2].shape == (2, 32, 32, 3)
    assert next(draw(pipeline, PROMPTS, [1, 2], size=(32, 64), steps=1)).shape == (2, 32, 64, 3)
    if variant == "sprint":
        call = {"intermediate_timesteps": 1.3, "guidance_scale": 3.0, **CALL, "output_type": "np"}
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        theirs = pipeline(PROMPTS, num_inference_steps=2, generator=generators, **call).images
        refusal(lambda: next(draw(pipeline, PROMPTS, [1, 2], scheduler="euler")), "'euler'", "SanaSprintPipeline")
        refusal(lambda: next(draw(pipeline, PROMPTS, [1, 2], negative_prompt="dog")), "remove it")
    else:
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        call = {"guidance_scale": 3.0, **CALL, "output_type": "np"}
        theirs = pipeline(PROMPTS, num_inference_steps=2, generator=generators, **call).images
        solver = next(draw(pipeline, PROMPTS, [1, 2], steps=2, guidance=3.0, scheduler="dpm++2m"))
        assert not np.array_equal(solver, drawn[2])
    assert np.abs(drawn[2] - (theirs * 255).round()).max() <= 1
