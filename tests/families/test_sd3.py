"""sd3 against the stock pipeline: prompts, times, guided samples, tokens as maps, latents, exports, plans."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from safetensors.torch import save_file
from support.method_cases import CASES, Bench, difference, saved
from support.proofs import reproduced
from support.tiny_checkpoints import edit, load, refusal
from torch import nn

import stepdistill
from stepdistill.config.reading import parse
from stepdistill.config.registry import load_family
from stepdistill.config.schema import RunConfig
from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.diffusion.timesteps import student_timesteps
from stepdistill.diffusion.transitions import Transition, TransitionKind
from stepdistill.families.base import Checkpoint
from stepdistill.families.checkpoints.loading import inspect_checkpoint, load_checkpoint
from stepdistill.families.checkpoints.single_file import CONFIGS
from stepdistill.families.checkpoints.weights import empty_component
from stepdistill.families.conditioning import Conditioning, MicroConditioning
from stepdistill.families.recipe import Recipe
from stepdistill.families.sd3 import SD3, TINY
from stepdistill.inference.artifact import draw, load_artifact
from stepdistill.methods.base import Problem
from stepdistill.methods.student_recipe import few_step_recipe
from stepdistill.planning.plan import plan
from stepdistill.roles.denoiser import Denoiser
from stepdistill.roles.lora import count_target_matches
from stepdistill.roles.sampler import teacher_sample
from stepdistill.runtime.gradient_checkpointing import StopForward, checkpointed
from stepdistill.training.run import train

FAMILY: SD3 = load_family("sd3")
PROMPTS = ["a photo of the red cat", "a blue square, " + "very " * 80]
SIZES = [MicroConditioning.plain(16, 16)] * 2
Tiny = Callable[..., Path]


@cache
def _loaded(folder: Path) -> Checkpoint:
    return load(folder)


@cache
def _stock(folder: Path) -> StableDiffusion3Pipeline:
    lacking = {} if (folder / "text_encoder_3").is_dir() else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = DiffusionPipeline.from_pretrained(folder, **lacking)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def schedule_of(checkpoint: Checkpoint) -> NoiseSchedule:
    """With a dynamic shift resolved for 16 x 16 pixels, which are 4 x 4 tokens."""
    return checkpoint.info.schedule.for_tokens(16)


def spied(pipeline: StableDiffusion3Pipeline, **call: Any) -> list[dict[str, Any]]:
    """What the stock pipeline passes to its network at each step."""
    calls: list[dict[str, Any]] = []
    hook = pipeline.transformer.register_forward_pre_hook(lambda _m, _a, k: calls.append(k), with_kwargs=True)
    try:
        pipeline(output_type="latent", height=16, width=16, **call)
    finally:
        hook.remove()
    return calls


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("variant", TINY)
def test_a_tiny_checkpoint_loads_frozen_and_as_it_was_written(tiny: Tiny, variant: str) -> None:
    checkpoint, stock = _loaded(tiny("sd3", variant)), _stock(tiny("sd3", variant))
    assert checkpoint.pipeline is not None
    for name, module in stock.components.items():
        ours = checkpoint.pipeline.components[name]
        assert (ours is None) == (module is None), name
        if isinstance(module, nn.Module):
            assert all(torch.equal(ours.state_dict()[key], value) for key, value in module.state_dict().items()), name
            assert not ours.training
            assert not any(p.requires_grad for p in ours.parameters())
    assert sum(p.numel() for p in checkpoint.network.parameters()) < 200_000
    assert checkpoint.info.latent_shape() == (16, 8, 8)
    assert checkpoint.info.default_size == (16, 16)
    assert (stock.text_encoder_3 is None) == (variant == "no_t5")


def test_a_tiny_checkpoint_is_its_seed(tiny: Tiny, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    FAMILY.write_tiny(tmp_path / "same")
    FAMILY.write_tiny(tmp_path / "other", seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    files = [path.relative_to(tiny("sd3")) for path in tiny("sd3").rglob("*") if path.is_file()]
    assert all((tmp_path / "same" / path).read_bytes() == (tiny("sd3") / path).read_bytes() for path in files)
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 5
    assert not any((tmp_path / "other" / path).read_bytes() == (tiny("sd3") / path).read_bytes() for path in weights)


def test_an_inspection_reads_no_weight(tiny: Tiny, no_weights: None) -> None:
    info = inspect_checkpoint(tiny("sd3"))
    assert (info.family, info.schedule.is_flow, info.schedule.shift) == ("sd3", True, 3.0)


@pytest.mark.parametrize("variant", TINY)
def test_the_schedule_is_the_pipeline_s_own(tiny: Tiny, variant: str) -> None:
    """The times that the pipeline tells its network, dynamic shift included, from the same fractions."""
    checkpoint, stock = _loaded(tiny("sd3", variant)), _stock(tiny("sd3", variant))
    fractions = [1.0, 0.7, 0.4, 0.1]
    told = [
        float(call["timestep"][0])
        for call in spied(stock, prompt="a cat", sigmas=fractions, num_inference_steps=4, guidance_scale=1.0)
    ]
    schedule = schedule_of(checkpoint)
    assert (1000 * schedule.time_at_fraction(torch.tensor(fractions))).tolist() == pytest.approx(told, rel=1e-6)
    assert schedule.shift > 1
    assert (schedule.shift == 3.0) == (variant != "no_t5")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("variant", ["default", "no_t5"])
def test_an_outline_is_what_is_loaded(tiny: Tiny, variant: str, dtype: torch.dtype) -> None:
    """T5's widest layers stay in float32 beside float16."""
    info = inspect_checkpoint(tiny("sd3", variant))
    loaded, outlined = load_checkpoint(info, dtype, "cpu"), FAMILY.build_on_meta(info, dtype)
    assert loaded.pipeline is not None
    assert outlined.pipeline is not None
    for name, module in loaded.pipeline.components.items():
        if isinstance(module, nn.Module):
            theirs = dict(outlined.pipeline.components[name].named_parameters())
            assert all(p.is_meta for p in theirs.values())
            found, wanted = (
                {key: (value.shape, value.dtype) for key, value in named.items()}
                for named in (theirs, dict(module.named_parameters()))
            )
            assert found == wanted, name
        else:
            assert (module is None) == (outlined.pipeline.components[name] is None), name


def test_refusals(tiny: Tiny, copied: Callable[..., Path], tmp_path: Path) -> None:
    folder = copied("sd3")
    scheduler = folder / "scheduler/scheduler_config.json"
    edit(scheduler, num_train_timesteps=500)
    refusal(lambda: inspect_checkpoint(folder), "500 timesteps", "flow matching of 1000")
    edit(scheduler, num_train_timesteps=1000, _class_name="DDIMScheduler")
    refusal(lambda: inspect_checkpoint(folder), "a VP process", "SD3Transformer2DModel")
    edit(scheduler, _class_name="FlowMatchEulerDiscreteScheduler")
    (folder / "text_encoder_3/model.safetensors").unlink()
    refusal(lambda: load(folder), "text_encoder_3", "none")
    edit(folder / "vae/config.json", latent_channels=4)
    refusal(lambda: inspect_checkpoint(folder), "reads 16 channels", "latents have 4")
    file = tmp_path / "sd3.safetensors"
    save_file({"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": torch.zeros(1)}, file)
    refusal(lambda: inspect_checkpoint(file), "an SD3 model, which is read from a folder only")


# ---------------------------------------------------------------- conditioning


@pytest.mark.parametrize("variant", TINY)
def test_prompts_are_encoded_as_the_pipeline_does(tiny: Tiny, variant: str) -> None:
    checkpoint, stock = _loaded(tiny("sd3", variant)), _stock(tiny("sd3", variant))
    told = spied(stock, prompt=PROMPTS, negative_prompt=["dog"] * 2, num_inference_steps=1)[0]
    cond = Conditioning.cat([FAMILY.null(checkpoint, SIZES, "dog"), FAMILY.encode(checkpoint, PROMPTS, SIZES)])
    assert cond.pooled is not None
    assert torch.equal(cond.text, told["encoder_hidden_states"])
    assert torch.equal(cond.pooled, told["pooled_projections"])
    assert cond.text.shape == (4, 77 + 256, 112)
    empty = spied(stock, prompt=PROMPTS, num_inference_steps=1)[0]["encoder_hidden_states"]
    assert torch.equal(FAMILY.null(checkpoint, SIZES).text, empty[:2])
    assert not torch.equal(empty[:2], cond.text[:2])
    assert cond.text[:, 77:].any() == (variant != "no_t5")
    assert not cond.text[:, :77, 96:].any()


@pytest.mark.parametrize("variant", TINY)
def test_a_row_is_the_same_whatever_its_neighbours(tiny: Tiny, variant: str) -> None:
    """Also where the text encoders alone were loaded."""
    info = inspect_checkpoint(tiny("sd3", variant))
    checkpoint = load_checkpoint(info, torch.float32, "cpu", frozenset({"text"}))
    assert all(p.is_meta for p in checkpoint.network.parameters())
    both = FAMILY.encode(_loaded(tiny("sd3", variant)), PROMPTS, SIZES)
    rows = Conditioning.cat([FAMILY.encode(checkpoint, [prompt], SIZES[:1]) for prompt in PROMPTS])
    torch.testing.assert_close(rows.text, both.text)
    torch.testing.assert_close(rows.pooled, both.pooled)
    assert rows.pooled is not None
    assert FAMILY.encoding_bytes(info, torch.float32) == rows[[0]].text.nbytes + rows[[0]].pooled.nbytes  # type: ignore[union-attr]


def test_encoder_files_name_the_encoders_that_there_are(tiny: Tiny) -> None:
    full, without = (FAMILY.encoder_files(inspect_checkpoint(tiny("sd3", v)), "text") for v in ("default", "no_t5"))
    extra = {name.split("/")[0] for name in full.keys() - without.keys()}
    assert extra == {"text_encoder_3", "tokenizer_3"}
    assert "model_index.json" in without
    assert set(FAMILY.encoder_files(inspect_checkpoint(tiny("sd3")), "images")) == {
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }


# ---------------------------------------------------------------- the network


@pytest.mark.parametrize("variant", TINY)
def test_guided_samples_are_the_stock_pipeline_s(tiny: Tiny, variant: str) -> None:
    checkpoint, stock = _loaded(tiny("sd3", variant)), _stock(tiny("sd3", variant))
    start, steps = noise(2, 16, 8, 8), 5
    theirs = stock(
        PROMPTS, num_inference_steps=steps, sigmas=[1 - i / steps for i in range(steps)], guidance_scale=4.0, height=16,
        width=16, latents=start, output_type="latent",
    ).images  # fmt: skip
    denoiser = Denoiser(checkpoint.network, FAMILY, schedule_of(checkpoint))
    cond, null = FAMILY.encode(checkpoint, PROMPTS, SIZES), FAMILY.null(checkpoint, SIZES)
    ours = {w: teacher_sample(denoiser, cond, null, start, steps, w) for w in (4.0, 1.0)}
    torch.testing.assert_close(ours[4.0], theirs, atol=1e-4, rtol=1e-5)
    assert (ours[1.0] - theirs).abs().max() > 1e-2
    wrong = Denoiser(checkpoint.network, FAMILY, replace(schedule_of(checkpoint), shift=9.0))
    assert (teacher_sample(wrong, cond, null, start, steps, 4.0) - theirs).abs().max() > 1e-2


def test_conditioning_that_the_network_has_no_input_for_is_refused(tiny: Tiny) -> None:
    checkpoint = _loaded(tiny("sd3"))
    cond = FAMILY.encode(checkpoint, PROMPTS, SIZES)
    for field in ("guidance", "second_time"):
        told = replace(cond, **{field: torch.ones(2)})
        refusal(lambda: FAMILY.call(checkpoint.network, noise(2, 16, 8, 8), torch.ones(2), told), "no input for")  # noqa: B023


@pytest.mark.parametrize("variant", ["default", "sd35"])
def test_every_lora_target_names_modules(tiny: Tiny, variant: str) -> None:
    network = _loaded(tiny("sd3", variant)).network
    for preset in ("attention", "all"):
        assert all(count_target_matches(network, FAMILY.lora_targets(preset)).values())
    linears = [name for name, module in network.named_modules() if isinstance(module, nn.Linear) and "blocks" in name]
    targets = FAMILY.lora_targets("all")
    assert [name for name in linears if not name.endswith(tuple(f".{target}" for target in targets))] == []
    refusal(lambda: FAMILY.lora_targets("atention"), "did you mean 'attention'")


def test_features_are_a_block_s_tokens_in_their_places(tiny: Tiny) -> None:
    """24 channels and 4 x 6 patches: rows and columns, or tokens and channels, could be taken for one another."""
    checkpoint = _loaded(tiny("sd3"))
    network, info = checkpoint.network, checkpoint.info
    denoiser = Denoiser(network, FAMILY, checkpoint.info.schedule)
    x, cond = noise(2, 16, 8, 12), FAMILY.encode(checkpoint, PROMPTS, SIZES)
    seen: list[torch.Tensor] = []
    last: list[int] = []
    hooks = [
        FAMILY.feature_module(network).register_forward_hook(lambda _m, _a, out: seen.append(out[1])),
        network.get_submodule("norm_out").register_forward_hook(lambda *_: last.append(1)),
    ]
    features = denoiser.features(x, 0.7, cond)
    assert not last
    FAMILY.call(network, x, torch.full((2,), 0.7), cond)
    assert last
    for hook in hooks:
        hook.remove()
    assert features.shape == (2, FAMILY.feature_channels(info), 8 // FAMILY.feature_stride(info), 6)
    for row, column in ((0, 0), (0, 5), (3, 0), (2, 1)):
        assert torch.equal(features[:, :, row, column], seen[1][:, row * 6 + column])


def test_checkpointed_blocks_may_be_left_for_their_features(tiny: Tiny) -> None:
    """Same features, same gradient; and nothing of the checkpoint that was left stays on later passes."""
    checkpoint = _loaded(tiny("sd3"))
    network = SD3Transformer2DModel.from_config(checkpoint.network.config).eval()
    network.load_state_dict(checkpoint.network.state_dict())
    cond, called = FAMILY.encode(checkpoint, PROMPTS, SIZES), []
    denoiser = Denoiser(network, FAMILY, checkpoint.info.schedule)

    def function(module: nn.Module, *args: torch.Tensor) -> Any:
        called.append(module)
        return checkpointed(module, *args)

    results = []
    for turn in range(2):
        x = noise(2, 16, 8, 8).requires_grad_()
        features = denoiser.features(x, 0.7, cond)
        out = denoiser.x0(x, 0.7, cond)
        results.append((features, out, *torch.autograd.grad(features.sum() + out.square().sum(), x)))
        if turn == 0:
            assert not called
            FAMILY.enable_gradient_checkpointing(network, function)
    assert called == [*network.transformer_blocks[:2], *network.transformer_blocks]
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed, atol=1e-5, rtol=1e-4)


def test_leaving_a_checkpoint_carries_the_graph_along() -> None:
    weight = torch.full((3,), 2.0, requires_grad=True)
    leaving = [True]

    def function(x: torch.Tensor) -> torch.Tensor:
        out = (x * weight).sin()
        if leaving:
            leaving.clear()
            raise StopForward(out)
        return out.exp()

    with pytest.raises(StopForward) as caught:
        checkpointed(function, torch.ones(3))
    output = caught.value.output
    assert isinstance(output, torch.Tensor)
    (gradient,) = torch.autograd.grad(output.sum(), weight)
    torch.testing.assert_close(gradient, torch.full((3,), 2.0).cos())


# ---------------------------------------------------------------- the autoencoder


def test_latents_are_shifted_and_scaled_as_the_pipeline_expects(tiny: Tiny) -> None:
    checkpoint, stock = _loaded(tiny("sd3")), _stock(tiny("sd3"))
    images, eps = noise(2, 3, 16, 16).clamp(-1, 1), noise(2, 16, 8, 8)
    with torch.no_grad():
        raw = stock.vae.encode(images).latent_dist
        latents = (raw.mean + raw.std * eps - 0.1) * 1.5
        torch.testing.assert_close(FAMILY.encode_images(checkpoint, images, eps), latents)
        decoded = (stock.vae.decode(latents / 1.5 + 0.1).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(FAMILY.decode(checkpoint, latents), decoded)


# ---------------------------------------------------------------- recipes and exports


def recipe_of(schedule: NoiseSchedule, kind: TransitionKind, steps: int = 4) -> Recipe:
    problem = Problem(schedule, (16, 8, 8), 24, (4, 4), (16, 16), "base")
    return few_step_recipe(problem, "dmd2", student_timesteps(schedule, steps), Transition(kind), 4.0)


@pytest.mark.parametrize("variant", ["default", "no_t5"])
@pytest.mark.parametrize("kind", [TransitionKind.RENOISE, TransitionKind.DETERMINISTIC])
def test_stock_schedulers_walk_the_trained_sigmas(tiny: Tiny, variant: str, kind: TransitionKind) -> None:
    """The recipe's sigmas are those before the shift, which the scheduler applies: once."""
    checkpoint = _loaded(tiny("sd3", variant))
    schedule = schedule_of(checkpoint)
    recipe, ladder = recipe_of(schedule, kind), student_timesteps(schedule, 4)
    stock = recipe.scheduler(dict(checkpoint.info.scheduler_config))
    wanted = FlowMatchLCMScheduler if kind is TransitionKind.RENOISE else FlowMatchEulerDiscreteScheduler
    assert type(stock) is wanted
    stochastic = FlowMatchEulerDiscreteScheduler.from_config(
        {**checkpoint.info.scheduler_config, **recipe.scheduler_config, "stochastic_sampling": True}
    )
    for scheduler in (stock, stochastic):
        scheduler.set_timesteps(sigmas=list(recipe.sigmas))
        assert scheduler.sigmas.tolist() == pytest.approx([*ladder, 0.0], abs=1e-6)
        assert scheduler.timesteps.tolist() == pytest.approx([1000 * t for t in ladder], rel=1e-6)
        scheduler.set_timesteps(sigmas=list(ladder))
        assert abs(float(scheduler.sigmas[1]) - ladder[1]) > 0.02
    assert recipe.native_timesteps(schedule) == pytest.approx(ladder)
    if variant == "default":
        assert ladder == pytest.approx((1.0, 0.9, 0.75, 0.5))


def test_an_image_depends_on_its_own_seed_alone(tiny: Tiny) -> None:
    """SD3's pipeline leaves its scheduler to the global generator; here it is given the images' own."""
    pipeline = load_artifact(str(tiny("sd3")), None, torch.float32, "cpu").pipeline
    recipe = recipe_of(schedule_of(_loaded(tiny("sd3"))), TransitionKind.RENOISE, steps=2)
    drawn = []
    for batch_size in (2, 1):
        torch.manual_seed(batch_size)
        drawn.append(np.concatenate(list(draw(pipeline, PROMPTS, [3, 4], recipe=recipe, batch_size=batch_size))))
    assert np.abs(drawn[0].astype(int) - drawn[1].astype(int)).max() <= 1
    assert "step" not in vars(pipeline.scheduler)
    other = next(draw(pipeline, PROMPTS[:1], [4], recipe=recipe))
    assert np.abs(other[0].astype(int) - drawn[0][0].astype(int)).max() > 3


def test_schedulers_by_name_are_those_of_flows(tiny: Tiny) -> None:
    pipeline = load_artifact(str(tiny("sd3")), None, torch.float32, "cpu").pipeline
    images = [
        next(draw(pipeline, PROMPTS[:1], [0], steps=2, scheduler=name)) for name in (None, "ddim", "euler", "lcm")
    ]
    assert all(np.array_equal(images[0], other) for other in images[1:3])
    assert not np.array_equal(images[0], images[3])
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    stock = _stock(tiny("sd3"))(
        PROMPTS[0], num_inference_steps=2, guidance_scale=7.5, generator=generator, output_type="np"
    )
    assert np.abs(images[0][0] / 255 - stock.images[0]).max() < 3e-3
    refusal(lambda: next(draw(pipeline, PROMPTS[:1], [0], scheduler="tcd")), "'tcd' does not walk a flow")


def test_more_steps_than_the_recipe_s_start_at_pure_noise(tiny: Tiny) -> None:
    pipeline = load_artifact(str(tiny("sd3")), None, torch.float32, "cpu").pipeline
    recipe = recipe_of(schedule_of(_loaded(tiny("sd3"))), TransitionKind.RENOISE, steps=2)
    told: list[float] = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda _m, _a, k: told.append(float(k["timestep"][0])), with_kwargs=True
    )
    next(draw(pipeline, PROMPTS[:1], [0], recipe=recipe, steps=4))
    hook.remove()
    assert told == pytest.approx([1000, 900, 750, 500])
    assert all(a > b for a, b in pairwise(told))


@pytest.fixture
def run(tiny: Tiny, tmp_path: Path) -> Callable[..., Path]:
    def make(variant: str, transition: str) -> Path:
        data = {
            "model": {"path": str(tiny("sd3", variant))},
            "method": {"name": "dmd2", "guidance": 2.0, "steps": 2, "ratio": 1, "transition": transition},
            "roles": {"generator": {"rank": 4, "targets": "all"}, "fake_score": {"rank": 4}},
            "optimizers": {"generator": {"lr": 1e-2}, "fake_score": {"lr": 1e-3}},
            "data": {"prompts": "builtin:general"},
            "training": {"max_steps": 1, "batch_size": 1, "grid_prompts": 1, "device": "cpu"},
        }
        train(parse(RunConfig, data, "test"), tmp_path / "run")
        return tmp_path / "run"

    return make


def test_a_deterministic_lora_is_exported_and_kohya_refused(run: Callable[..., Path], tmp_path: Path) -> None:
    folder = run("sd35", "deterministic")
    refusal(lambda: stepdistill.export(folder, "kohya-lora", tmp_path / "kohya"), "'sd3'", "diffusers-lora")
    assert not (tmp_path / "kohya").exists()
    exported = stepdistill.export(folder, "diffusers-lora", tmp_path / "lora")
    assert json.loads((exported / "recipe.json").read_text())["scheduler"]["class_name"] == (
        "FlowMatchEulerDiscreteScheduler"
    )
    card = (exported / "README.md").read_text()
    assert "ComfyUI" in card
    assert "kohya" not in card


@pytest.mark.ci
def test_a_pipeline_without_t5_is_reproduced_by_plain_diffusers(run: Callable[..., Path], tmp_path: Path) -> None:
    """Re-noised, and told that T5 is left out, which its loader must be."""
    exported = stepdistill.export(run("no_t5", "renoise"), "pipeline", tmp_path / "pipeline")
    assert "text_encoder_3=None, tokenizer_3=None)" in (exported / "README.md").read_text()
    moved = Path(shutil.move(exported, tmp_path / "elsewhere"))
    assert reproduced(moved)


# ---------------------------------------------------------------- invariants and plans


def test_accumulation_changes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    bench = Bench(tiny, tmp_path)
    for batch, accumulation in ((2, 1), (1, 2)):
        config = bench.config(
            CASES["dmd2-gan"], 3, family="sd3", batch_size=batch, accumulation=accumulation, gradient_checkpointing=True
        )
        train(config, tmp_path / f"{batch}")
    assert difference(saved(tmp_path / "2"), saved(tmp_path / "1")) < 1e-10


@pytest.mark.parametrize(
    ("name", "parameters"), [("sd3", 2_028_328_000), ("sd35m", 2_243_171_520), ("sd35l", 8_056_627_520)]
)
def test_packaged_configs_are_of_the_published_size(name: str, parameters: int) -> None:
    """As many weights as the published files hold, with the positions that are stored beside them."""
    info = FAMILY.inspect(name, CONFIGS / name, None)
    assert info.default_size == (1024, 1024)
    assert info.schedule.shift == 3.0
    network = empty_component(CONFIGS / name, "transformer", SD3Transformer2DModel)
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_a_plan_counts_t5_s_embeddings_once() -> None:
    data = {
        "model": {"path": "stabilityai/stable-diffusion-3-medium-diffusers", "dtype": "bfloat16"},
        "method": {"name": "dmd2", "guidance": 4.0},
        "data": {"prompts": "builtin:general"},
        "training": {"max_steps": 10, "batch_size": 1, "gradient_checkpointing": True, "device": "cuda"},
    }
    forecast = plan(parse(RunConfig, data, "test"))
    counts = {item.name: item.count for item in forecast.parameters}
    assert counts["real_score (the base)"] == 2_028_328_000
    assert counts["text_encoder_3"] == 4_762_310_656
    assert forecast.disk.prompt == (333 * 4096 + 2048) * 2
