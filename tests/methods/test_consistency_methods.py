"""What single consistency methods add: adversary, curricula, segments, scores, recipes; and that they learn."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.consistency import (
    COUNT,
    FIRST,
    MAKERS,
    MEAN,
    STD,
    close,
    exact,
    images,
    modes,
    on_modes,
    rollout_of,
)
from support.method_cases import CASES, Bench, Case, saved
from support.toys import (
    DIMENSION,
    SCHEDULES,
    analytic_triple,
    disturb,
    draws,
    flow,
    four_modes,
    gaussian,
    noise,
    problem,
    prompts,
    vp,
)
from torch import Tensor

from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.diffusion.transitions import Transition, TransitionKind
from stepdistill.errors import UserError
from stepdistill.families.conditioning import Conditioning
from stepdistill.families.recipe import Recipe
from stepdistill.methods import parts
from stepdistill.methods.base import Batch, Progress
from stepdistill.methods.consistency.cm import CM, CMConfig
from stepdistill.methods.consistency.discrete import TARGET, Consistency
from stepdistill.methods.consistency.lcm import LCM, LCMConfig
from stepdistill.methods.consistency.tscd import TRAJECTORY, OneStepRollout
from stepdistill.methods.gan import DISCRIMINATOR_HEAD
from stepdistill.roles.triple import FAKE_SCORE, GENERATOR, REAL_SCORE, Triple
from stepdistill.training.run import train
from stepdistill.training.session import open_session
from stepdistill.training.setup import prepare

# ---------------------------------------------------------------- the adversary


def with_heads(method: Consistency[Any], schedule: NoiseSchedule) -> Triple:
    triple = analytic_triple(four_modes(), schedule)
    method.prepare(triple)
    disturb(triple)
    triple.head(FAKE_SCORE, DISCRIMINATOR_HEAD).double()
    return triple


@pytest.mark.parametrize("schedule", ["eps", "flow"])
def test_the_levels_of_a_phase(schedule: str) -> None:
    """a in [r, upper edge) of the phase of s, spread over it; whole timesteps on VP."""
    method = on_modes("pcm", SCHEDULES[schedule](), gan={"weight": 0.1})
    grid = method.grid(FIRST)
    for start in (1, 12, 13, 50):
        n = torch.full((1000,), start)
        end = method.end(n, n, FIRST)
        u = torch.linspace(0, 1 - 1e-9, 1000, dtype=torch.float64)
        level = method.level(end, grid, u, FIRST)
        low, high = {1: (0, 12), 12: (0, 12), 13: (12, 25), 50: (37, 50)}[start]
        assert float(level.min()) == float(grid[low])
        assert float(grid[high]) - 1.01 <= float(level.max()) < float(grid[high])
        if not method.schedule.is_flow:
            assert bool((level == level.floor()).all())


@pytest.mark.parametrize("schedule", ["eps", "flow"])
def test_the_discriminator_sees_both_at_one_level(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """x_a = (alpha_a / alpha_r) x_r + sqrt(sigma_a^2 - (alpha_a sigma_r / alpha_r)^2) n: signal and noise of level a."""
    method = on_modes("pcm", SCHEDULES[schedule](), gan={"weight": 0.1})
    triple, seen = with_heads(method, method.schedule), []
    features = type(triple.real_score).features

    def watched(self: Any, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        seen.append((x_t.detach(), t))
        return features(self, x_t, t, cond)

    monkeypatch.setattr("stepdistill.roles.denoiser.Denoiser.features", watched)
    rollout = method.rollout(modes(), triple, FIRST, draws(range(16)))
    method.loss(FAKE_SCORE, rollout.detach(), triple, FIRST, draws(range(16)))
    (real, t), (_, again) = seen
    assert torch.equal(t, again)
    (a, s), (a_r, s_r) = method.schedule.levels(t, real), method.schedule.levels(rollout.r, real)
    fresh = draws(range(16)).normal("gan.real.eps", (2, 1, 1))
    close(real, a / a_r * rollout.target + (s**2 - (a * s_r / a_r) ** 2).sqrt() * fresh)
    assert bool((t >= rollout.r).all())


def test_the_critic_trains_its_own_and_the_generator_answers() -> None:
    for name, features in (("pcm", REAL_SCORE), ("tscd", FAKE_SCORE)):
        method = on_modes(name, vp(), gan={"weight": 0.5, "features": features})
        triple = with_heads(method, vp())
        assert method.updates(FIRST) == (GENERATOR, FAKE_SCORE)
        rollout = method.rollout(modes(), triple, FIRST, draws(range(16)))
        off = type(method)(
            method.config.model_copy(update={"gan": method.config.gan.model_copy(update={"weight": 0.0})}),
            method.problem,
        )
        terms = method.loss(GENERATOR, rollout, triple, FIRST, draws(range(16)))
        plain = off.loss(GENERATOR, rollout, triple, FIRST, draws(range(16)))
        close(terms.total, plain.total + 0.5 * terms.parts["gan"])
        with triple.training(FAKE_SCORE):
            method.loss(FAKE_SCORE, rollout.detach(), triple, FIRST, draws(range(16))).total.backward()
        grads = {key for key, p in triple.parameters(FAKE_SCORE).items() if p.grad is not None}
        heads = {key for key in triple.parameters(FAKE_SCORE) if key.startswith("head.")}
        assert heads <= grads
        assert (grads == heads) == (features == REAL_SCORE)
        assert all(p.grad is None for p in triple.parameters(GENERATOR).values())


# ---------------------------------------------------------------- CM


def test_curricula() -> None:
    root = CM(
        CMConfig(guidance=1.0, curriculum="root", first_points=2, points=200, curriculum_iterations=1000), problem(vp())
    )
    assert [root.points(Progress(k)) for k in (0, 1000, 5000)] == [2, 201, 201]
    assert root.points(Progress(250)) == math.ceil(math.sqrt(0.25 * (201**2 - 4) + 4) - 1) + 1
    doubling = CM(
        CMConfig(guidance=1.0, curriculum="doubling", first_points=10, points=1280, curriculum_iterations=800),
        problem(vp()),
    )
    assert [doubling.points(Progress(k)) for k in (0, 99, 100, 699, 700, 9999)] == [11, 11, 21, 641, 1281, 1281]
    mu = CM(doubling.config.model_copy(update={"decay": "curriculum"}), problem(vp()))
    assert mu.decay(Progress(100)) == pytest.approx(math.exp(10 * math.log(0.95) / 21))
    assert doubling.decay(Progress(100)) == 0.95
    with pytest.raises(UserError, match="lower the first"):
        CM(CMConfig(guidance=1.0, curriculum="root", first_points=50), problem(vp()))


@pytest.mark.parametrize("schedule", ["eps", "flow"])
def test_the_grid_of_karras(schedule: str) -> None:
    """Even in s~^(1/7), from the model's lowest (0.002 for flow) to its highest (80 for flow, whose last point is noise alone)."""
    method = MAKERS["cm"](SCHEDULES[schedule](), points=18)
    grid = method.grid(FIRST)
    ratio = (method.schedule.sigma(grid) / method.schedule.alpha(grid)) ** (1 / 7)
    if schedule == "flow":
        close(ratio[:-1], torch.linspace(0.002 ** (1 / 7), 80 ** (1 / 7), 18, dtype=torch.float64)[:-1], 1e-9)
        assert float(grid[-1]) == method.timesteps[0] == method.schedule.terminal_time
    else:
        close(grid[[0, -1]], torch.tensor([0.0, 999.0]).double(), 1e-6)
        # between timesteps the schedule is linear in the angle, as the network is told
        close(ratio, torch.linspace(float(ratio[0]), float(ratio[-1]), 18, dtype=torch.float64), 1e-9)
        assert method.recipe().timesteps == (999,)


def test_lognormal_times() -> None:
    """p(n) ~ erf((ln s~_n - P) / sqrt(2) S) - erf(the same of n - 1)."""
    method = MAKERS["cm"](vp(), points=10, times="lognormal")
    grid = method.grid(FIRST)
    z = ((method.schedule.sigma(grid) / method.schedule.alpha(grid)).log() + 1.1) / (2.0 * math.sqrt(2))
    odds = torch.erf(z).diff() / torch.erf(z).diff().sum()
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = torch.bincount(method.start(u, grid), minlength=10)[1:] / 200_000
    close(counts.double(), odds, 5e-3)


@pytest.mark.parametrize("schedule", ["eps", "flow"])
def test_without_a_teacher_both_ends_carry_one_noise(schedule: str) -> None:
    """x_e = alpha_e x0 + sigma_e eps, by Heun as by DDIM; guidance is refused."""
    for solver in ("heun", "ddim"):
        method = MAKERS["cm"](SCHEDULES[schedule](), distil=False, solver=solver)
        x0, eps = noise(4, DIMENSION, 1, 1), noise(4, DIMENSION, 1, 1, seed=1)
        s, e = method.grid(FIRST)[[39, 20, 7, 2]], method.grid(FIRST)[[38, 19, 6, 1]]
        teacher = method.teacher(None, images(4), x0, draws())  # type: ignore[arg-type]
        got = method.solver_step(teacher, method.schedule.add_noise(x0, eps, s), s, e)
        close(got, method.schedule.add_noise(x0, eps, e), 1e-9)
    with pytest.raises(UserError, match="guidance to 1"):
        CM(CMConfig(guidance=2.0, distil=False), problem(vp()))


def test_weights_of_ict() -> None:
    method = MAKERS["cm"](flow(), weights="gap")
    s, e = torch.tensor([0.5], dtype=torch.float64), torch.tensor([0.2], dtype=torch.float64)
    close(method.weight(s, e), torch.tensor([1 / (1 - 0.25)], dtype=torch.float64))
    close(method.weight(torch.ones_like(s), e), torch.tensor([1 / (80 - 0.25)], dtype=torch.float64))
    rollout = rollout_of(method)
    each = parts.distance(
        method.consistency_function(rollout.x_t, rollout.x0, rollout.t, rollout.r) - rollout.target, "huber"
    )
    total = method.loss(
        GENERATOR, rollout, analytic_triple(gaussian(MEAN, STD), flow()), FIRST, draws(range(COUNT))
    ).total
    close(total, (rollout.weight * each).mean())
    assert len(set(rollout.weight.tolist())) > 5


# ---------------------------------------------------------------- TSCD


def test_stages() -> None:
    method = MAKERS["tscd"](vp())
    assert [(stage.name, stage.iterations) for stage in method.stages()] == [
        ("segments-8", 2000), ("segments-4", 2000), ("segments-2", 2000), ("segments-1", None),
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"8 segments .* has no iterations"):
        MAKERS["tscd"](vp(), stages=[{"segments": 8}, {"segments": 1}])
    with pytest.raises(UserError, match=r"1 segments .* has no iterations"):
        MAKERS["tscd"](vp(), stages=[{"segments": 1}], score={})
    shares = [{"segments": 2, "iterations": 5, "gan": 0.0}, {"segments": 1, "gan": 2.0}]
    method = MAKERS["tscd"](vp(), stages=shares, gan={"weight": 0.1})
    assert [method.gan_config(Progress(stage=k)).weight for k in (0, 1)] == [0.0, 0.2]
    assert [method.updates(Progress(stage=k)) for k in (0, 1)] == [(GENERATOR,), (GENERATOR, FAKE_SCORE)]


@pytest.mark.parametrize("real", ["trajectory", "teacher"])
def test_the_score_of_the_first_step(real: str) -> None:
    """0.5 mean d^2 on top of the trajectory loss, d from the copy or the guided teacher against the fake score."""
    method = on_modes(
        "tscd", vp(), stages=[{"segments": 1, "iterations": 1}], score={"real": real, "weight": 3.0, "trajectory": 0.5}
    )
    triple = analytic_triple(four_modes(), vp())
    method.prepare(triple)
    disturb(triple)
    last, stage = Progress(1, {}, 1, 0), method.stages()[-1]
    assert stage.copies == ((("student", TRAJECTORY),) if real == "trajectory" else ())
    assert method.updates(FIRST) == (GENERATOR,)
    assert method.updates(last) == (GENERATOR, FAKE_SCORE)
    rollout = method.rollout(modes(), triple, last, draws(range(16)))
    assert isinstance(rollout, OneStepRollout)
    assert rollout.batch.image_cond is not None
    start = draws(range(16)).for_role("rollout").normal("one", (2, 1, 1))
    close(rollout.sample, triple.generator.x0(start, 999.0, rollout.batch.image_cond))
    terms = method.loss(GENERATOR, rollout, triple, last, draws(range(16)))
    t = parts.NoiseLevelConfig().levels().times(vp(), draws(range(16)).uniform("dm.t"))
    x_t = vp().add_noise(rollout.sample, draws(range(16)).normal("dm.eps", (2, 1, 1)), t)
    cond = rollout.batch.cond
    scores = triple.real_score.guided(x_t, t, cond, rollout.batch.null, 2.5)
    if real == "trajectory":
        scores = triple.denoiser(TRAJECTORY).x0(x_t, t, cond)
    d = (triple.fake_score.x0(x_t, t, cond) - scores) / (rollout.sample - scores).abs().mean((1, 2, 3), keepdim=True)
    close(terms.total, 0.5 * terms.parts["consistency"] + 3.0 * 0.5 * d.square().mean())
    assert rollout.sample.requires_grad
    assert not rollout.detach().sample.requires_grad  # type: ignore[attr-defined]


# ---------------------------------------------------------------- recipes


def test_recipes() -> None:
    wanted = {
        "lcm": ("LCMScheduler", 0.0, "FlowMatchLCMScheduler"),
        "tcd": ("TCDScheduler", 0.3, "FlowMatchEulerDiscreteScheduler"),
        "pcm": ("TCDScheduler", 0.0, "FlowMatchEulerDiscreteScheduler"),
        "tscd": ("TCDScheduler", 1.0, "FlowMatchLCMScheduler"),
        "cm": ("LCMScheduler", 0.0, "FlowMatchLCMScheduler"),
    }
    for name, (on_vp, eta, on_flow) in wanted.items():
        recipe = MAKERS[name](vp()).recipe()
        assert (recipe.scheduler_class, recipe.call) == (on_vp, {"eta": eta} if eta else {})
        assert recipe.transition().kind is (TransitionKind.RENOISE if on_vp == "LCMScheduler" else TransitionKind.TCD)
        assert Recipe.from_json(recipe.to_json()) == recipe
        assert MAKERS[name](flow()).recipe().scheduler_class == on_flow
    assert MAKERS["tcd"](vp(), eta=0.0).recipe().transition() == Transition(TransitionKind.TCD, 0.0)
    assert MAKERS["tcd"](flow(), eta=1.0).recipe().scheduler_class == "FlowMatchLCMScheduler"
    with pytest.raises(UserError, match=r"eta is 0.3 .* choose one"):
        MAKERS["tcd"](flow(), eta=0.3)
    assert MAKERS["tcd"](vp(), points=40).recipe().scheduler_config["original_inference_steps"] == 40


def test_a_range_of_guidance_is_recorded_as_its_mean() -> None:
    assert MAKERS["lcm"](vp(), guidance_range=(3.0, 15.0)).recipe().baked_guidance == 9.0
    for bad in ((0.0, 8.0), (9.0, 8.0)):
        with pytest.raises(ValueError, match="w rises in it from 1 or more"):
            MAKERS["lcm"](vp(), guidance_range=bad)


def test_the_one_step_sample_is_told_what_sampling_tells_it() -> None:
    """The score stage of a one-step student that is told 800."""
    score = {"iterations": None, "weight": 1.0}
    stages = [{"segments": 1, "iterations": 1}]
    method = on_modes("tscd", vp(), steps=1, timesteps=[800.0], stages=stages, score=score)
    triple = analytic_triple(four_modes(), vp())
    method.prepare(triple)
    batch = modes(4)
    rollout = method.rollout(batch, triple, Progress(stage=1), draws(range(4)))
    assert isinstance(rollout, OneStepRollout)
    noise_ = draws(range(4)).for_role("rollout").normal("one", rollout.x_t.shape[1:])
    close(rollout.sample.detach(), triple.generator.x0(noise_, 800.0, rollout.batch.cond).detach())
    assert method.recipe().timesteps == (800,)


def test_a_recipe_of_before_is_read() -> None:
    """One that was written without further arguments."""
    import json

    record = json.loads(MAKERS["lcm"](vp()).recipe().to_json())
    del record["call"]
    assert Recipe.from_json(json.dumps(record)).call == {}


# ---------------------------------------------------------------- learning


@pytest.mark.parametrize("schedule", ["eps", "flow"])
def test_lcm_learns_the_end_of_the_trajectory(schedule: str) -> None:
    """One step of an untrained student says the mean of the data; a trained one where the trajectory ends."""
    s = SCHEDULES[schedule]()
    method = LCM(LCMConfig(guidance=1.0, steps=1, points=10, target="ema", target_decay=0.9), problem(s))
    triple = analytic_triple(gaussian(MEAN, STD), s, width=64)
    method.prepare(triple)
    start = noise(256, DIMENSION, 1, 1, seed=8)
    top = torch.full((256,), method.timesteps[0], dtype=torch.float64)
    end = exact(s, start, top, torch.full_like(top, s.clean_time))

    def error() -> float:
        with torch.no_grad():
            return float((triple.generator.x0(start, top, prompts(256)) - end).square().mean().sqrt())

    before, adam = error(), torch.optim.Adam(triple.parameters(GENERATOR).values(), lr=3e-3)
    for step in range(300):
        stream = draws(range(32), step=step)
        x0 = MEAN[:, None, None] + STD * stream.normal("image", (DIMENSION, 1, 1))
        batch = Batch(prompts(32), prompts(32), images=x0, image_cond=prompts(32))
        rollout = method.rollout(batch, triple, FIRST, stream)
        adam.zero_grad()
        method.loss(GENERATOR, rollout, triple, FIRST, stream).total.backward()
        adam.step()
        with torch.no_grad():
            method.after_update(GENERATOR, {}, triple, FIRST)
    assert before > 0.8
    assert error() < 0.5 * before


def test_copies_of_the_generator_follow_init(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """A run that starts from another's student starts its target there too."""
    bench = Bench(tiny, tmp_path)
    case = CASES["tcd"]
    train(bench.config(case, 3), tmp_path / "first")
    config = bench.config(case, 1).model_copy(update={"init": str(tmp_path / "first")})
    session = open_session(prepare(config), "cpu")
    own, target = (session.triple.network_parameters(role) for role in (GENERATOR, TARGET))
    assert all(torch.equal(own[key], target[key]) for key in own)
    assert any(bool(value.any()) for key, value in target.items() if ".lora_B." in key)


def test_a_run_on_images(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """LCM by its published route: images and captions are read, encoded and noised; one role is trained and saved."""
    bench = Bench(tiny, tmp_path)
    case = Case("lcm", {"guidance": 2.0, "steps": 2, "points": 10})
    assert case.family == "sd"
    train(bench.config(case, 1, dtype="float32", batch_size=2), tmp_path / "run")
    groups = saved(tmp_path / "run")
    assert {"generator", "optimizer.generator"} < groups.keys()
    assert not [name for name in groups if "fake" in name]
    assert any(bool(value.any()) for key, value in groups["generator"].items() if ".lora_B." in key)
