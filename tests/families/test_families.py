"""sd and sdxl against the stock pipelines: prompts, sizes, schedules, guided samples, the autoencoder, what LoRA reaches."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    LatentConsistencyModelPipeline,
    UNet2DConditionModel,
)
from torch import nn

from stepdistill.config import registry
from stepdistill.diffusion.prediction import Prediction
from stepdistill.diffusion.timesteps import trailing_timesteps
from stepdistill.diffusion.transitions import Transition, TransitionKind
from stepdistill.errors import UserError
from stepdistill.families.base import Checkpoint, Family
from stepdistill.families.checkpoints.loading import inspect_checkpoint, load_checkpoint
from stepdistill.families.common.guidance_embedding import guidance_embedding
from stepdistill.families.conditioning import Conditioning, MicroConditioning
from stepdistill.families.sdxl import SDXL
from stepdistill.roles.denoiser import Denoiser
from stepdistill.roles.lora import count_target_matches
from stepdistill.roles.sampler import sample

UNETS = ("sd", "sdxl")
VARIANTS = [(name, variant) for name in UNETS for variant in registry.load_family(name).tiny_variants]
PROMPTS = ["a photo of the red cat", "a blue square, " + "very " * 30]
SIZES = [MicroConditioning.plain(16, 16)] * 2
Tiny = Callable[..., Path]


@cache
def _loaded(folder: Path) -> Checkpoint:
    return load_checkpoint(inspect_checkpoint(folder), torch.float32, "cpu")


@cache
def _stock(folder: Path) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def open_tiny(tiny: Tiny, name: str, variant: str = "default") -> tuple[Family, Checkpoint, DiffusionPipeline]:
    """(family, our checkpoint, the stock pipeline loaded by diffusers alone)."""
    folder = tiny(name, variant)
    return registry.load_family(name), _loaded(folder), _stock(folder)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spied(pipeline: DiffusionPipeline, **call: Any) -> dict[str, Any]:
    """What the stock pipeline passes to its UNet at the first step."""
    calls: list[dict[str, Any]] = []
    hook = pipeline.unet.register_forward_pre_hook(lambda _m, _a, kwargs: calls.append(kwargs), with_kwargs=True)
    try:
        pipeline(num_inference_steps=2, output_type="latent", guidance_scale=4.0, **call)
    finally:
        hook.remove()
    return calls[0]


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_a_tiny_checkpoint_loads_frozen_and_as_it_was_written(tiny: Tiny, name: str, variant: str) -> None:
    _, checkpoint, stock = open_tiny(tiny, name, variant)
    ours, theirs = checkpoint.network.state_dict(), stock.unet.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours | theirs)
    assert sum(p.numel() for p in checkpoint.network.parameters()) < 1_000_000
    assert checkpoint.info.latent_shape() == (4, 8, 8)
    assert checkpoint.info.default_size == (16, 16)
    assert checkpoint.pipeline is not None
    modules = [part for part in checkpoint.pipeline.components.values() if isinstance(part, nn.Module)]
    assert not any(module.training for module in modules)
    assert not any(p.requires_grad for module in modules for p in module.parameters())


@pytest.mark.parametrize("name", UNETS)
def test_a_tiny_checkpoint_is_its_seed(tiny: Tiny, name: str, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    registry.load_family(name).write_tiny(tmp_path / "same")
    registry.load_family(name).write_tiny(tmp_path / "other", seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    files = [path.relative_to(tiny(name)) for path in tiny(name).rglob("*") if path.is_file()]
    assert all((tmp_path / "same" / path).read_bytes() == (tiny(name) / path).read_bytes() for path in files)
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == (4 if name == "sdxl" else 3)
    assert not any((tmp_path / "other" / path).read_bytes() == (tiny(name) / path).read_bytes() for path in weights)


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_the_schedule_is_the_checkpoint_s_own(tiny: Tiny, name: str, variant: str) -> None:
    _, checkpoint, stock = open_tiny(tiny, name, variant)
    schedule = checkpoint.info.schedule
    bar = DDIMScheduler.from_config(stock.scheduler.config).alphas_cumprod.double()
    torch.testing.assert_close(schedule.alpha(torch.arange(1000)), bar.sqrt(), atol=1e-5, rtol=0)
    assert schedule.prediction is Prediction(stock.scheduler.config.get("prediction_type", "epsilon"))
    assert schedule.zero_terminal_snr == (variant == "zsnr")


def test_modified_betas_change_alpha(tiny: Tiny) -> None:
    schedules = [inspect_checkpoint(tiny("sd", variant)).schedule for variant in ("default", "betas")]
    assert abs(float(schedules[0].alpha(500)) - float(schedules[1].alpha(500))) > 0.05


def test_half_precision_leaves_the_autoencoder_in_float32(tiny: Tiny) -> None:
    checkpoint = load_checkpoint(inspect_checkpoint(tiny("sdxl")), torch.bfloat16, "cpu")
    pipeline: Any = checkpoint.pipeline
    assert {p.dtype for p in pipeline.vae.parameters()} == {torch.float32}
    assert {p.dtype for part in (pipeline.unet, pipeline.text_encoder) for p in part.parameters()} == {torch.bfloat16}
    family = registry.load_family("sdxl")
    images = noise(1, 3, 16, 16).clamp(-1, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latents = family.encode_images(checkpoint, images)
        decoded = family.decode(checkpoint, latents.bfloat16())
    assert latents.dtype == decoded.dtype == torch.float32
    assert torch.equal(latents, family.encode_images(_loaded(tiny("sdxl")), images))


# ---------------------------------------------------------------- conditioning


def test_sd_prompts_are_encoded_as_the_pipeline_does(tiny: Tiny) -> None:
    family, checkpoint, stock = open_tiny(tiny, "sd")
    text, negative = stock.encode_prompt(PROMPTS, "cpu", 1, True, negative_prompt=["dog"] * 2)
    assert torch.equal(family.encode(checkpoint, PROMPTS, SIZES).text, text)
    assert torch.equal(family.null(checkpoint, SIZES, "dog").text, negative)
    _, empty = stock.encode_prompt(PROMPTS, "cpu", 1, True)
    null = family.null(checkpoint, SIZES)
    assert torch.equal(null.text, empty)
    assert len(null) == 2
    assert not torch.equal(text, negative)


def test_sdxl_prompts_are_encoded_as_the_pipeline_does(tiny: Tiny) -> None:
    family, checkpoint, stock = open_tiny(tiny, "sdxl")
    text, zeros, pooled, pooled_zeros = stock.encode_prompt(PROMPTS)
    cond = family.encode(checkpoint, PROMPTS, SIZES)
    assert torch.equal(cond.text, text)
    assert cond.pooled is not None
    assert torch.equal(cond.pooled, pooled)
    assert cond.text.shape == (2, 77, 32 + 64)
    null = family.null(checkpoint, SIZES)
    assert null.pooled is not None
    assert torch.equal(null.text, zeros)
    assert torch.equal(null.pooled, pooled_zeros)
    assert not null.text.any()
    assert not null.pooled.any()
    _, negative, _, pooled_negative = stock.encode_prompt(PROMPTS, negative_prompt=["dog"] * 2)
    dog = family.null(checkpoint, SIZES, "dog")
    assert dog.pooled is not None
    assert torch.equal(dog.text, negative)
    assert torch.equal(dog.pooled, pooled_negative)


def test_sdxl_without_forced_zeros_encodes_the_empty_prompt(tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("sdxl"), tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": False}))
    null = SDXL().null(_loaded(folder), SIZES)
    _, text, _, pooled = _stock(folder).encode_prompt(PROMPTS)
    assert null.pooled is not None
    assert torch.equal(null.text, text)
    assert torch.equal(null.pooled, pooled)
    assert text.any()


def test_sdxl_is_told_the_sizes_that_the_pipeline_tells(tiny: Tiny) -> None:
    family, checkpoint, stock = open_tiny(tiny, "sdxl")
    sizes = [MicroConditioning((30, 20), (3, 5), (16, 24))] * 2
    told = spied(
        stock,
        prompt=PROMPTS,
        height=16,
        width=24,
        original_size=(30, 20),
        crops_coords_top_left=(3, 5),
        target_size=(16, 24),
    )
    cond = Conditioning.cat([family.null(checkpoint, sizes), family.encode(checkpoint, PROMPTS, sizes)])
    assert cond.time_ids is not None
    assert cond.pooled is not None
    assert cond.time_ids[0].tolist() == [30, 20, 3, 5, 16, 24]
    assert torch.equal(cond.time_ids, told["added_cond_kwargs"]["time_ids"])
    assert torch.equal(cond.pooled, told["added_cond_kwargs"]["text_embeds"])
    assert torch.equal(cond.text, told["encoder_hidden_states"])
    plain = spied(stock, prompt=PROMPTS, height=16, width=16)["added_cond_kwargs"]["time_ids"]
    assert torch.equal(family.encode(checkpoint, PROMPTS, SIZES).time_ids, plain[:2])


def test_every_image_of_a_batch_has_its_own_sizes(tiny: Tiny) -> None:
    family, checkpoint, _ = open_tiny(tiny, "sdxl")
    sizes = [MicroConditioning((30, 20), (3, 5), (16, 16)), MicroConditioning.plain(16, 16)]
    ids = family.encode(checkpoint, PROMPTS, sizes).time_ids
    assert ids.tolist() == [[30, 20, 3, 5, 16, 16], [16, 16, 0, 0, 16, 16]]


# ---------------------------------------------------------------- the network


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_guided_samples_are_the_stock_pipeline_s(tiny: Tiny, name: str, variant: str) -> None:
    family, checkpoint, _ = open_tiny(tiny, name, variant)
    stock = DiffusionPipeline.from_pretrained(tiny(name, variant))
    stock.set_progress_bar_config(disable=True)
    stock.scheduler = DDIMScheduler.from_config(
        stock.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )
    start = noise(2, 4, 8, 8)
    theirs = stock(
        PROMPTS, num_inference_steps=5, guidance_scale=4.0, height=16, width=16, latents=start, output_type="latent"
    ).images
    schedule = checkpoint.info.schedule
    denoiser = Denoiser(checkpoint.network, family, schedule)
    cond, null = family.encode(checkpoint, PROMPTS, SIZES), family.null(checkpoint, SIZES)
    ours = {
        w: sample(
            lambda x, t: denoiser.guided(x, t, cond, null, w),  # noqa: B023
            schedule,
            start,
            trailing_timesteps(schedule, 5),
            Transition(TransitionKind.DETERMINISTIC),
            step_noise=lambda _: pytest.fail("a deterministic walk draws no noise"),
        )
        for w in (4.0, 1.0)
    }
    # an untrained epsilon network at alpha = 0.07 sends latents to a hundred, where float32 has five digits behind the point
    torch.testing.assert_close(ours[4.0], theirs, atol=1e-4, rtol=1e-5)
    assert (ours[1.0] - theirs).abs().max() > 1e-2


def test_the_guidance_embedding_is_the_one_of_the_lcm_pipeline() -> None:
    w = torch.tensor([1.0, 4.5, 8.0])
    for width in (32, 33):
        theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w - 1, width)
        torch.testing.assert_close(guidance_embedding(w, width), theirs, atol=1e-3, rtol=0)


def test_embedded_guidance_reaches_a_network_that_has_the_input(tiny: Tiny) -> None:
    family, checkpoint, stock = open_tiny(tiny, "sd")
    torch.manual_seed(0)
    network = UNet2DConditionModel.from_config({**stock.unet.config, "time_cond_proj_dim": 32})
    cond = family.encode(checkpoint, PROMPTS, SIZES)
    outs = [
        family.call(network, noise(2, 4, 8, 8), torch.full((2,), 499.0), Conditioning(cond.text, guidance=w))
        for w in (torch.full((2,), 3.0), torch.full((2,), 7.0))
    ]
    assert not torch.allclose(outs[0], outs[1])
    with pytest.raises(UserError, match="time_cond_proj_dim is null"):
        family.call(
            stock.unet, noise(2, 4, 8, 8), torch.full((2,), 499.0), Conditioning(cond.text, guidance=torch.ones(2))
        )


@pytest.mark.parametrize("name", UNETS)
def test_features_come_from_the_mid_block(tiny: Tiny, name: str) -> None:
    family, checkpoint, _ = open_tiny(tiny, name)
    denoiser = Denoiser(checkpoint.network, family, checkpoint.info.schedule)
    features = denoiser.features(noise(2, 4, 8, 8), 499.0, family.encode(checkpoint, PROMPTS, SIZES))
    side = 8 // family.feature_stride(checkpoint.info)
    assert features.shape == (2, family.feature_channels(checkpoint.info), side, side)


@pytest.mark.parametrize("name", UNETS)
def test_every_lora_target_names_modules(tiny: Tiny, name: str) -> None:
    family, checkpoint, _ = open_tiny(tiny, name)
    for preset in ("attention", "all"):
        assert all(count_target_matches(checkpoint.network, family.lora_targets(preset)).values())
    with pytest.raises(UserError, match="did you mean 'attention'"):
        family.lora_targets("atention")


@pytest.mark.parametrize("name", UNETS)
def test_gradient_checkpointing_goes_through_the_function_that_is_given(tiny: Tiny, name: str) -> None:
    family, checkpoint, stock = open_tiny(tiny, name)
    cond, x = family.encode(checkpoint, PROMPTS, SIZES), noise(2, 4, 8, 8).requires_grad_()
    times, called = torch.full((2,), 499.0), []

    def function(module: nn.Module, *args: torch.Tensor) -> torch.Tensor:
        called.append(module)
        return torch.utils.checkpoint.checkpoint(module, *args, use_reentrant=False)

    network = UNet2DConditionModel.from_config(stock.unet.config).eval()
    network.load_state_dict(stock.unet.state_dict())
    (plain,) = torch.autograd.grad(family.call(network, x, times, cond).sum(), x)
    family.enable_gradient_checkpointing(network, function)
    (checkpointed,) = torch.autograd.grad(family.call(network, x, times, cond).sum(), x)
    assert called
    torch.testing.assert_close(plain, checkpointed, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- the autoencoder


@pytest.mark.parametrize("name", UNETS)
def test_latents_are_scaled_as_the_pipeline_expects(tiny: Tiny, name: str) -> None:
    family, checkpoint, stock = open_tiny(tiny, name)
    images, eps = noise(2, 3, 16, 16).clamp(-1, 1), noise(2, 4, 8, 8)
    with torch.no_grad():
        posterior = stock.vae.encode(images).latent_dist
        scale = stock.vae.config.scaling_factor
        torch.testing.assert_close(family.encode_images(checkpoint, images), posterior.mean * scale)
        drawn = (posterior.mean + posterior.std * eps) * scale
        torch.testing.assert_close(family.encode_images(checkpoint, images, eps), drawn)
        theirs = (stock.vae.decode(drawn / scale).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(family.decode(checkpoint, drawn), theirs)
    latents = drawn.clone().requires_grad_()
    family.decode(checkpoint, latents).sum().backward()
    assert latents.grad is not None
    assert latents.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "fields", [{"shift_factor": 0.3}, {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2, 3, 4]}]
)
def test_shifted_latents_come_back(tiny: Tiny, fields: dict[str, Any]) -> None:
    family, checkpoint, stock = open_tiny(tiny, "sdxl")
    vae = AutoencoderKL.from_config({**stock.vae.config, **fields}).eval().requires_grad_(False)
    shifted = Checkpoint(checkpoint.info, checkpoint.network, type(stock)(**{**stock.components, "vae": vae}))
    images = noise(2, 3, 16, 16).clamp(-1, 1)
    raw = vae.encode(images).latent_dist.mean
    shift = fields.get("shift_factor", torch.tensor(fields.get("latents_mean", 0.0)).reshape(1, -1, 1, 1))
    std = torch.tensor(fields.get("latents_std", 1.0)).reshape(1, -1, 1, 1)
    latents = family.encode_images(shifted, images)
    torch.testing.assert_close(latents, (raw - shift) / std * 5.0)
    torch.testing.assert_close(family.decode(shifted, latents), (vae.decode(raw).sample / 2 + 0.5).clamp(0, 1))
