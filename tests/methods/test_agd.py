"""Adapter guidance distillation: the adapter as a role, its targets, and what a short run learns."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.method_cases import CASES, Bench, saved
from support.toys import ToyUNet, disturb, layouts, noise, unet, vp
from torch import Tensor

from stepdistill.config.reading import parse
from stepdistill.config.schema import load_config
from stepdistill.diffusion.prediction import Prediction, from_x0_eps, guide
from stepdistill.errors import UserError
from stepdistill.families.conditioning import Conditioning
from stepdistill.methods.base import Batch, Problem, Progress
from stepdistill.methods.guidance.agd import AGD
from stepdistill.methods.guidance.guidance_distillation import GuidanceDistillationConfig, GuidedRollout
from stepdistill.roles.guidance_adapter import settings_metadata
from stepdistill.roles.guidance_modules import GuidanceAdapterSettings
from stepdistill.roles.sampler import guided_trajectory, relative_error
from stepdistill.roles.triple import FAKE_SCORE, GENERATOR, REAL_SCORE, RoleLayout, Triple
from stepdistill.training.run import train

from support.toys import CHANNELS, TEXT, draws  # isort: skip

T = torch.tensor([249.0, 749.0])
W = torch.tensor([2.0, 5.0], dtype=torch.float64)
KINDS = [("cross", False), ("cross", True), ("perceptron", False), ("perceptron", True), ("offset", False)]


def text(count: int = 2, seed: int = 5) -> Conditioning:
    return Conditioning(noise(count, 3, TEXT, seed=seed))


def adapter_triple(kind: str = "cross", shared: bool = False, dtype: torch.dtype = torch.float64) -> Triple:
    """The generator is adapters, the fake score a LoRA on the same base."""
    held = layouts("lora", "lora")
    guide = GuidanceAdapterSettings(kind, 8, shared, 1.0, 8.0)  # type: ignore[arg-type]
    held[GENERATOR] = RoleLayout("adapter", guide=guide)
    return Triple(unet(dtype), ToyUNet(), vp(), held, compute_dtype=dtype)  # type: ignore[arg-type]


def ask(triple: Triple, role: str, w: Tensor | None = W) -> Tensor:
    with torch.no_grad():
        return triple.denoiser(role).estimate(noise(2, 4, 8, 8), T, text() if w is None else text().told(w)).raw


# ---------------------------------------------------------------- the adapter as a role


@pytest.mark.parametrize(("kind", "shared"), KINDS)
def test_at_first_it_is_the_base_and_others_never_hear_it(kind: str, shared: bool) -> None:
    expected = unet()(noise(2, 4, 8, 8), T, text().text).sample.detach()
    triple = adapter_triple(kind, shared)
    for w in (None, W):
        assert torch.equal(ask(triple, GENERATOR, w), expected)
    triple.add_copy("ema", GENERATOR)
    before = ask(triple, FAKE_SCORE, None)
    disturb(triple)
    changed = ask(triple, GENERATOR)
    assert float((changed - expected).abs().max()) > 1e-3
    assert torch.equal(ask(triple, GENERATOR, None), expected)
    assert torch.equal(ask(triple, REAL_SCORE, None), expected)
    assert not torch.equal(ask(triple, FAKE_SCORE, None), before)
    assert not torch.equal(ask(triple, "ema"), changed)
    triple.copy_role(GENERATOR, "ema")
    assert torch.equal(ask(triple, "ema"), changed)
    triple.reset_role(GENERATOR)
    assert torch.equal(ask(triple, GENERATOR), expected)


@pytest.mark.parametrize(("kind", "shared"), KINDS)
def test_only_adapters_take_gradients(kind: str, shared: bool) -> None:
    triple = adapter_triple(kind, shared)
    disturb(triple)
    with triple.training(GENERATOR):
        triple.generator.estimate(noise(2, 4, 8, 8), T, text().told(W)).raw.square().mean().backward()
    own = triple.network_parameters(GENERATOR)
    assert all(key.startswith("guide.") for key in own)
    assert all(p.grad is not None and bool(p.grad.any()) for p in own.values())
    assert all(p.grad is None for p in triple.network_parameters(FAKE_SCORE).values())
    assert all(p.grad is None for key, p in triple.base.named_parameters() if ".lora_" not in key)


@pytest.mark.parametrize(("kind", "shared"), KINDS)
def test_checkpointed_blocks_hear_their_own_pass_again(kind: str, shared: bool) -> None:
    """Other roles, and the same one with another w, come by between forward and backward."""
    found = []
    for checkpointing in (False, True):
        triple = adapter_triple(kind, shared)
        triple.add_copy("ema", GENERATOR)
        disturb(triple)
        if checkpointing:
            triple.enable_gradient_checkpointing()
            triple.base.train()
        with triple.training(GENERATOR):
            loss = triple.generator.estimate(noise(2, 4, 8, 8), T, text().told(W)).raw.square().mean()
            for role, w in ((GENERATOR, W + 1), (REAL_SCORE, None), ("ema", W + 2)):
                ask(triple, role, w)
            loss.backward()
        found.append({key: p.grad for key, p in triple.network_parameters(GENERATOR).items()})
    for key, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][key], rtol=1e-10, atol=1e-14), key


def test_state_comes_back_with_its_frequencies() -> None:
    triple, other = adapter_triple(), adapter_triple()
    disturb(triple)
    other.guidance_conditioners[GENERATOR] = other.guidance_conditioners[GENERATOR]
    for buffer in other.guidance_conditioners[GENERATOR].buffers():
        buffer.zero_()
    other.load_state(GENERATOR, {key: value.clone() for key, value in triple.state(GENERATOR).items()})
    assert torch.equal(ask(triple, GENERATOR), ask(other, GENERATOR))
    with pytest.raises(UserError, match="1 missing"):
        other.load_state(GENERATOR, dict(list(triple.state(GENERATOR).items())[1:]))


def test_full_networks_are_copied_without_adapters() -> None:
    triple = adapter_triple()
    disturb(triple)
    plain = Triple(unet(), ToyUNet(), vp(), {GENERATOR: triple.layouts[GENERATOR], "full": RoleLayout("full")})  # type: ignore[arg-type]
    plain.generator.estimate(noise(2, 4, 8, 8), T, text().told(W))
    assert not any(module._forward_hooks for module in plain.networks["full"].modules())
    assert torch.equal(ask(plain, "full", None), ask(plain, REAL_SCORE, None))


def test_an_adapted_teacher_is_guided_in_one_call(tmp_path: Path) -> None:
    triple = adapter_triple()
    disturb(triple)
    guide_of = triple.guidance_conditioners[GENERATOR]
    file = tmp_path / "guidance_adapter.safetensors"
    save_file(
        {key: value.contiguous() for key, value in guide_of.state_dict().items()},
        file,
        settings_metadata(guide_of.settings),
    )
    adapted = Triple(unet(), ToyUNet(), vp(), layouts("lora", "lora"), teacher_guidance_adapter=str(tmp_path))  # type: ignore[arg-type]
    calls: list[int] = []
    adapted.base.register_forward_pre_hook(lambda _module, args: calls.append(len(args[0])))
    with torch.no_grad():
        guided = adapted.real_score.guided(noise(2, 4, 8, 8), T, text(), text(seed=6), 5.0)
        own = triple.generator.x0(noise(2, 4, 8, 8), T, text().told(5.0))
    assert calls == [2]
    assert torch.allclose(guided, own, atol=1e-12)
    with torch.no_grad():
        plain, guidance_delta = adapted.real_score.guidance_delta(noise(2, 4, 8, 8), T, text(), text(seed=6), 5.0)
    # what guidance adds is what the adapters say, whatever the empty prompt is
    assert torch.allclose(plain + guidance_delta, own, atol=1e-12)
    assert torch.equal(plain, adapted.real_score.x0(noise(2, 4, 8, 8), T, text()))
    assert torch.equal(ask(adapted, GENERATOR, None), ask(adapted, REAL_SCORE, None))
    with pytest.raises(UserError, match=r"model\.guidance_adapter cannot be used: .*nowhere"):
        Triple(unet(), ToyUNet(), vp(), layouts("lora", "lora"), teacher_guidance_adapter=str(tmp_path / "nowhere"))  # type: ignore[arg-type]


def test_a_network_without_attention_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    case = replace(CASES["agd"])
    with pytest.raises(UserError, match="no attention that looks at a prompt"):
        train(Bench(tiny, tmp_path).config(case, 1, family="analytic"), tmp_path / "run")


# ---------------------------------------------------------------- targets


@pytest.mark.parametrize("prediction", [Prediction.EPSILON, Prediction.V])
def test_targets_are_the_guided_prediction_in_the_teacher_s_own_type(prediction: Prediction) -> None:
    """By hand from two calls of the network; with (1 + w) in place of w, or branches swapped, it would differ."""
    network, schedule = unet(), vp(prediction)
    triple = Triple(network, ToyUNet(), schedule, {})  # type: ignore[arg-type]
    cond, null, x = text(), text(seed=6), noise(2, 4, 8, 8)
    times = [torch.full((2,), t, dtype=torch.float64) for t in (999.0, 500.0, 20.0)]
    states = list(guided_trajectory(triple.real_score, cond, null, x, times, W))
    assert len(states) == 3
    for index, state in enumerate(states):
        with torch.no_grad():
            conditional, uncond = (network(state.x_t, state.t.float(), c.text).sample for c in (cond, null))
        expected = uncond + W.reshape(-1, 1, 1, 1) * (conditional - uncond)
        assert torch.allclose(state.target, expected, atol=1e-10)
        assert torch.allclose(state.plain, relative_error(conditional, expected), atol=1e-10)
        if index + 1 < len(states):  # DDIM by hand
            (alpha, sigma), (alpha_s, sigma_s) = (
                (schedule.alpha(t)[:, None, None, None], schedule.sigma(t)[:, None, None, None])
                for t in (state.t, states[index + 1].t)
            )
            out = expected
            x0, eps = (
                ((state.x_t - sigma * out) / alpha, out)
                if prediction is Prediction.EPSILON
                else (alpha * state.x_t - sigma * out, sigma * state.x_t + alpha * out)
            )
            assert torch.allclose(from_x0_eps(x0, eps, alpha, sigma, prediction), out)
            assert torch.allclose(states[index + 1].x_t, alpha_s * x0 + sigma_s * eps, atol=1e-8)


def method(source: str = "rollout", **options: object) -> AGD:
    config = GuidanceDistillationConfig(guidance=3.0, guidance_range=(1.0, 5.0), walk_steps=4, source=source, **options)  # type: ignore[arg-type]
    return AGD(config, Problem(vp(), (4, 8, 8), CHANNELS[-1], (4, 4), (8, 8), "toy"))


def test_walks_cover_all_times_and_w() -> None:
    triple, agd = adapter_triple(), method()
    batch = Batch(text(64), text(64, seed=6))
    agd.problem = replace(agd.problem, latent_shape=(4, 2, 2))
    rolled = agd.rollout(batch, triple, Progress(), draws(range(64)))
    assert rolled.t.shape == (5, 64)
    assert bool((rolled.t[0] == 999).all())
    assert bool((rolled.t.diff(dim=0) <= 0).all())
    for low, high, t in zip((750, 500, 250, 0), (1000, 750, 500, 250), rolled.t[1:], strict=True):
        assert low <= float(t.min()) < low + 30
        assert high - 30 < float(t.max()) <= high
    w = rolled.told.guidance
    assert w is not None
    assert 1 <= float(w.min()) < 1.3
    assert 4.7 < float(w.max()) <= 5
    again = agd.rollout(batch, triple, Progress(), draws(range(64)))
    assert torch.equal(again.x_t, rolled.x_t)


def test_the_loss_is_the_distance_to_the_guided_prediction() -> None:
    triple, agd = adapter_triple(), method()
    batch = Batch(text(), text(seed=6))
    rolled = agd.rollout(batch, triple, Progress(), draws(range(2)))
    terms = agd.loss(GENERATOR, rolled, triple, Progress(), draws(range(2)))
    w, squares, errors = rolled.told.guidance, [], []
    assert w is not None
    for x, t in zip(rolled.x_t, rolled.t, strict=True):
        with torch.no_grad():
            conditional, uncond = (triple.real_score.estimate(x, t, c).raw for c in (batch.cond, batch.null))
        # the untrained student says what the prompt alone does: off by (w - 1) (cond - uncond)
        gap = (w.double() - 1).reshape(-1, 1, 1, 1) * (conditional - uncond)
        squares.append(gap.square().mean())
        errors.append(relative_error(conditional, guide(uncond, conditional, w.double().reshape(-1, 1, 1, 1))).mean())
    assert float(terms.total) == pytest.approx(float(torch.stack(squares).mean()), rel=1e-5)
    assert float(terms.parts["error"]) == pytest.approx(float(terms.parts["error_unguided"]), rel=1e-6)
    assert float(terms.parts["error"]) == pytest.approx(float(torch.stack(errors).mean()), rel=1e-5)
    assert isinstance(rolled.detach(), GuidedRollout)


def test_relative_errors_count_alike_at_any_w() -> None:
    """An untrained student misses all that guidance adds: 1 at every state, but for the floor; a mean of squares grows with w."""
    triple, floor = adapter_triple(), 1e-3
    batch = Batch(text(), text(seed=6))
    losses = {}
    for relative in (None, floor):
        agd = method(relative=relative)
        rolled = agd.rollout(batch, triple, Progress(), draws(range(2)))
        assert isinstance(rolled, GuidedRollout)
        losses[relative] = float(agd.loss(GENERATOR, rolled, triple, Progress(), draws(range(2))).total)
    assert losses[floor] == pytest.approx(float((rolled.plain / (rolled.plain + floor)).mean()), rel=1e-6)
    assert losses[floor] != pytest.approx(losses[None], rel=0.01)


def test_a_teacher_that_is_told_its_guidance_is_refused() -> None:
    cond = text().told(3.0)
    with pytest.raises(UserError, match="told its guidance, in one call"):
        method().rollout(Batch(cond, cond), adapter_triple(), Progress(), draws(range(2)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"roles": {"generator": {"mode": "lora"}}}, "trains it as adapter"),
        ({"method": {"name": "dmd2", "guidance": 2.0}}, "trains it as lora or full"),
        ({"roles": {"generator": {"mode": "adapter", "width": 10, "heads": 4}}}, "choose a divisor of the width"),
        ({"method": {"name": "agd", "guidance": 20.0}}, "is not within guidance_range"),
        ({"method": {"name": "agd", "guidance": 3.0, "source": "trajectories"}}, r"data\.trajectories is not set"),
    ],
)
def test_refusals(tiny: Callable[..., Path], tmp_path: Path, change: dict[str, object], words: str) -> None:
    config = Bench(tiny, tmp_path).config(CASES["agd"], 1).model_dump(mode="json")
    for section, value in change.items():
        config[section] = {**config[section], **value} if section == "roles" else value  # type: ignore[dict-item]
    with pytest.raises(UserError, match=words):
        train(parse(type(Bench(tiny, tmp_path).config(CASES["agd"], 1)), config, "test"), tmp_path / "run")


# ---------------------------------------------------------------- a run


@pytest.mark.ci
def test_a_short_run_learns_guidance_of_the_embedded_teacher(tmp_path: Path) -> None:
    """Forty updates take a fifth of the error away that the prompt alone leaves."""
    config = load_config(
        Path(__file__).parents[2] / "configs/fashion_agd.yaml",
        ["training.max_steps=40", "training.log_every=1", "training.batch_size=4", "method.walk_steps=3",
         "training.grid_prompts=1", "training.grid_seeds=1", "training.grid_every=0", "optimizers.generator.warmup=5",
         "optimizers.generator.lr=3e-3", "method.guidance_range=[4.5, 5.5]"],
    )  # fmt: skip
    train(config, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "stats.jsonl").read_text().splitlines()]
    early, late = (
        sum(line["generator/error"] for line in part) / sum(line["generator/error_unguided"] for line in part)
        for part in (lines[:10], lines[-10:])
    )
    assert late < 0.82 < 0.88 < early < 1.05
    assert set(saved(tmp_path)) >= {"generator", "optimizer.generator"}
