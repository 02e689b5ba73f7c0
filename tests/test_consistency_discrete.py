"""Discrete consistency methods against closed forms in float64: grids, ends, boundaries, solver steps, residuals, recipes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler, TCDScheduler
from torch import Tensor
from toys import (
    DIMENSION,
    SCHEDULES,
    SD,
    analytic_triple,
    disturb,
    draws,
    flow,
    four_modes,
    gaussian,
    noise,
    prompts,
    setting,
    vp,
)

from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.diffusion.timesteps import edges, part_of, spread, uniform_grid
from stepdistill.diffusion.transitions import Transition, TransitionKind
from stepdistill.errors import Refusal
from stepdistill.methods import parts
from stepdistill.methods.base import Batch, Progress
from stepdistill.methods.cm import CM, CMConfig
from stepdistill.methods.consistency import TARGET, Consistency, Leap, jump
from stepdistill.methods.lcm import LCM, LCMConfig, boundary_scalings
from stepdistill.methods.pcm import PCM, PCMConfig
from stepdistill.methods.tcd import TCD, TCDConfig
from stepdistill.methods.tscd import TRAJECTORY, TSCD, Scored, TSCDConfig
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.recipe import Recipe
from stepdistill.models.triple import FAKE_SCORE, GENERATOR, REAL_SCORE, Triple

BETAS = {key: value for key, value in SD.items() if key != "_class_name"}
FIRST = Progress()
MEAN, STD = torch.tensor([0.6, -0.3, 0.2], dtype=torch.float64), 0.9
COUNT = 64
MAKERS: dict[str, Callable[..., Consistency[Any]]] = {
    "lcm": lambda s, **o: LCM(LCMConfig(guidance=1.0, **o), setting(s)),
    "tcd": lambda s, **o: TCD(TCDConfig(guidance=1.0, **o), setting(s)),
    "pcm": lambda s, **o: PCM(PCMConfig(guidance=1.0, **o), setting(s)),
    "tscd": lambda s, **o: TSCD(TSCDConfig(guidance=1.0, **{"target": "student", **o}), setting(s)),
    "cm": lambda s, **o: CM(CMConfig(guidance=1.0, **{"target": "student", **o}), setting(s)),
}


def close(actual: Tensor, expected: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def levels(schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
    return schedule.levels(t, torch.zeros(len(t), DIMENSION, 1, 1, dtype=torch.float64))


def exact(schedule: NoiseSchedule, x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """Where the probability flow of N(MEAN, STD^2) takes x_t: (x - alpha m) / sqrt(alpha^2 c^2 + sigma^2) is kept."""
    (a, s), (b, q), m = levels(schedule, t), levels(schedule, r), MEAN[:, None, None]
    return b * m + (x_t - a * m) * ((b**2 * STD**2 + q**2) / (a**2 * STD**2 + s**2)).sqrt()


def images(count: int = COUNT) -> Batch:
    x0 = MEAN[:, None, None] + STD * noise(count, DIMENSION, 1, 1, seed=3)
    return Batch(prompts(count), prompts(count), images=x0, image_cond=prompts(count))


def leap_of(
    method: Consistency[Any], triple: Any = None, batch: Batch | None = None, progress: Progress = FIRST
) -> Leap:
    triple = triple or analytic_triple(gaussian(MEAN, STD), method.schedule)
    batch = batch or images()
    return method.rollout(batch, triple, progress, draws(range(len(batch))))


def residual(method: Consistency[Any], leap: Leap) -> float:
    """Largest |f(x_s, s -> r) - target| over the spread of the data."""
    reached = method.function(leap.x_t, leap.x0, leap.t, leap.r)
    return float((reached - leap.target).abs().max()) / STD


def with_the_exact_map(method: Consistency[Any]) -> Consistency[Any]:
    method.function = lambda x_t, x0, t, r: exact(method.schedule, x_t, t, r)  # type: ignore[method-assign]
    return method


# ---------------------------------------------------------------- grids, ends, ladders


def test_the_grid_of_lcm() -> None:
    assert uniform_grid(vp(), 50).tolist() == [0.0, *(20.0 * i - 1 for i in range(1, 51))]
    assert uniform_grid(flow(), 4).tolist() == [0, 0.25, 0.5, 0.75, 1]
    close(uniform_grid(flow(3.0), 4), torch.tensor([0, 0.5, 0.75, 0.9, 1.0]).double(), 1e-7)
    with pytest.raises(Refusal, match="use fewer points"):
        uniform_grid(vp(), 1000)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 8])
def test_ladders_are_those_of_the_stock_schedulers(steps: int) -> None:
    """4 -> 999, 759, 499, 259, for LCM and for TCD."""
    for name, scheduler in (("lcm", LCMScheduler(**BETAS)), ("tcd", TCDScheduler(**BETAS))):
        scheduler.set_timesteps(steps)
        method = MAKERS[name](vp(), steps=steps)
        assert list(method.ladder) == scheduler.timesteps.tolist()
        assert list(method.recipe().timesteps) == scheduler.timesteps.tolist()
    assert list(MAKERS["lcm"](vp(), steps=4).ladder) == [999, 759, 499, 259]


def test_phases() -> None:
    assert edges(50, 4).tolist() == [0, 12, 25, 37]
    assert edges(40, 4).tolist() == [0, 10, 20, 30]
    assert part_of(torch.tensor([1, 12, 13, 25, 26, 50]), edges(50, 4)).tolist() == [0, 0, 1, 1, 2, 3]
    assert list(MAKERS["pcm"](vp()).ladder) == [999, 739, 499, 239]
    assert set(MAKERS["pcm"](vp(), phases=2).ladder) >= {999, 499}
    close(torch.tensor(MAKERS["pcm"](flow(3.0), points=100).ladder), torch.tensor([1, 0.9, 0.75, 0.5]), 1e-6)
    with pytest.raises(Refusal, match="multiple of the phases"):
        MAKERS["pcm"](vp(), phases=3)
    with pytest.raises(Refusal, match="use more points"):
        MAKERS["pcm"](vp(), points=3)
    with pytest.raises(Refusal, match="use fewer steps"):
        spread(uniform_grid(vp(), 5), 6)


@pytest.mark.parametrize("name", MAKERS)
def test_ends_of_every_start(name: str) -> None:
    """LCM and CM: the clean end. TCD: U{0..n-1}. PCM: the lower edge of the phase. TSCD: from that edge to n - 1."""
    method, n = MAKERS[name](vp()), torch.arange(1, 51)
    found = {int(s): set[int]() for s in n}
    for u in torch.linspace(0, 1 - 1e-9, 201, dtype=torch.float64):
        for s, e in zip(n.tolist(), method.end(n, u.expand(50), FIRST).tolist(), strict=True):
            found[s].add(e)
    floors = {"tscd": [i * 50 // 8 for i in range(8)], "pcm": [0, 12, 25, 37]}.get(name, [0])
    for start, ends in found.items():
        floor = max(edge for edge in floors if edge < start)
        assert ends == ({floor} if name in ("lcm", "cm", "pcm") else set(range(floor, start)))


def test_starts_cover_the_grid_evenly() -> None:
    method, grid = MAKERS["tcd"](vp()), uniform_grid(vp(), 50)
    u = torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = torch.bincount(method.start(u, grid), minlength=51)
    assert counts[0] == 0
    assert float((counts[1:] / 2000 - 1).abs().max()) < 0.1
    assert method.start(torch.tensor([0.0, 1 - 1e-15], dtype=torch.float64), grid).tolist() == [1, 50]


# ---------------------------------------------------------------- boundaries, steps, distances


def test_boundary_scalings_are_those_of_the_stock_scheduler() -> None:
    scheduler = LCMScheduler(**BETAS)
    for t in (0, 1, 19, 999):
        skip, out = boundary_scalings(torch.tensor(float(t)))
        theirs = scheduler.get_scalings_for_boundary_condition_discrete(t)
        assert (float(skip), float(out)) == pytest.approx(theirs, abs=1e-15)
    assert boundary_scalings(torch.zeros(1))[0].item() == 1
    assert boundary_scalings(torch.tensor([19.0]))[0].item() == pytest.approx(6.9e-6, rel=0.01)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", MAKERS)
def test_f_is_the_identity_at_its_end(name: str, schedule: str) -> None:
    """f(x, r -> r) = x, whatever the network says; for LCM at the clean end alone, which its scalings are made for."""
    method = MAKERS[name](SCHEDULES[schedule]())
    grid, x, x0 = method.grid(FIRST), noise(4, DIMENSION, 1, 1), noise(4, DIMENSION, 1, 1, seed=1)
    ends = {"lcm": [0], "cm": [0]}.get(name, [1, 5, 20])
    for r in grid[ends]:
        if float(r) > 0 or not method.schedule.is_flow:
            close(method.function(x, x0, r.expand(4), r.expand(4)), x)
    if method.schedule.is_flow:  # at sigma = 0 by its limit
        close(method.function(x, x, torch.full((4,), 1e-9).double(), torch.zeros(4)), x, 1e-8)


@pytest.mark.parametrize("index", [1, 2, 25, 50])
def test_the_solver_is_ddim_and_euler(index: int) -> None:
    """One step of the grid, the lowest onto timestep 0."""
    x, x0 = noise(1, DIMENSION, 1, 1), noise(1, DIMENSION, 1, 1, seed=1)
    method = MAKERS["lcm"](vp())
    s, e = method.grid(FIRST)[[index]], method.grid(FIRST)[[index - 1]]
    got = method.solve(lambda x, t: x0, x, s, e)
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False)
    scheduler.num_inference_steps = 50
    alpha, sigma = levels(vp(), s)
    stock = scheduler.step((x - alpha * x0) / sigma, int(s), x).prev_sample
    torch.testing.assert_close(got, stock, rtol=0, atol=1e-5)
    method = MAKERS["lcm"](flow(3.0))
    s, e = method.grid(FIRST)[[index]], method.grid(FIRST)[[index - 1]]
    euler = FlowMatchEulerDiscreteScheduler()
    euler.set_timesteps(sigmas=[float(s), float(e)] if index > 1 else [float(s)])
    u = (x - x0) / s
    torch.testing.assert_close(
        method.solve(lambda x, t: x0, x, s, e), euler.step(u, euler.timesteps[0], x).prev_sample, rtol=0, atol=1e-6
    )


def test_distances() -> None:
    d = noise(3, 4, 2, 2)
    close(parts.distance(d, "l2"), d.square().mean((1, 2, 3)))
    close(parts.distance(d, "huber", 1e-9), d.abs().mean((1, 2, 3)), 1e-8)
    close(parts.distance(d, "huber", 1e4) * 2e4, d.square().mean((1, 2, 3)), 1e-5)
    close(parts.distance(d, "huber"), parts.distance(d, "huber", 1e-3))
    norm = d.flatten(1).norm(dim=1)
    close(parts.distance(d, "pseudo_huber", 1e-9), norm, 1e-8)
    close(parts.distance(d, "pseudo_huber", 1e4) * 2e4, norm.square(), 1e-4)
    close(parts.distance(d, "pseudo_huber"), (norm.square() + 0.00054**2 * 16).sqrt() - 0.00054 * 4)
    for kind in ("l2", "huber", "pseudo_huber"):
        assert parts.distance(torch.zeros(2, 3), kind).tolist() == [0, 0]


# ---------------------------------------------------------------- residuals of exact functions


@pytest.mark.parametrize("schedule", ["eps", "v", "flow", "flow-shift-3"])
@pytest.mark.parametrize("name", MAKERS)
def test_the_exact_map_has_no_residual_but_the_solvers(name: str, schedule: str) -> None:
    """What is left is the error of one step of the teacher; turning the step's noise around leaves much more."""
    method = with_the_exact_map(MAKERS[name](SCHEDULES[schedule](), points=50))
    right = residual(method, leap_of(method))
    bound = {"cm": 2e-3}.get(name, 0.02)
    assert right < bound

    def turned(teacher: Any, x_s: Tensor, s: Tensor, e: Tensor) -> Tensor:
        alpha, _ = levels(method.schedule, e)
        x0 = teacher(x_s, s)
        return alpha * x0 - (jump(method.schedule, x_s, x0, s, e) - alpha * x0)

    method.solve = turned  # type: ignore[method-assign]
    assert residual(method, leap_of(method)) > max(0.1, 10 * right)


@pytest.mark.parametrize(("name", "order"), [("lcm", 2), ("cm", 3)])
@pytest.mark.parametrize("schedule", ["eps", "flow"])
def test_the_residual_falls_at_the_solvers_order(name: str, order: int, schedule: str) -> None:
    """Halving the step divides the error of one DDIM step by 4, that of Heun by 8."""
    found = []
    for points in (50, 100, 200):
        method = with_the_exact_map(MAKERS[name](SCHEDULES[schedule](), points=points + (name == "cm")))
        method.start = lambda u, grid: torch.full_like(u, (len(grid) - 1) // 5 * 3).long()  # type: ignore[method-assign]
        found.append(residual(method, leap_of(method)))
    for coarse, fine in itertools.pairwise(found):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize("schedule", ["eps", "flow"])
@pytest.mark.parametrize(
    ("name", "options"), [("lcm", {"boundary": "none"}), ("pcm", {"phases": 1, "steps": 1}), ("pcm", {})]
)
def test_a_network_that_says_the_exact_map_has_none_either(name: str, options: dict[str, Any], schedule: str) -> None:
    """Through the methods' own f: the x0 whose DDIM leap to the end of its phase is the exact one solves them."""
    method = MAKERS[name](SCHEDULES[schedule](), **options)
    grid = method.grid(FIRST)

    def says(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        start = torch.searchsorted(grid, t)
        r = grid[method.end(start.clamp_min(1), torch.zeros_like(t), FIRST)]
        (a, s), (b, q) = levels(method.schedule, t), levels(method.schedule, r)
        return (exact(method.schedule, x, t, r) - q / s * x) / (b - q * a / s)

    teacher = analytic_triple(gaussian(MEAN, STD), method.schedule)
    oracle = SimpleNamespace(x0=says)
    triple = SimpleNamespace(
        real_score=teacher.real_score, generator=oracle, denoiser=lambda role: oracle, schedule=method.schedule
    )
    leap = leap_of(method, triple)
    assert residual(method, leap) < 0.02
    terms = method.loss(GENERATOR, leap, triple, FIRST, draws(range(COUNT)))  # type: ignore[arg-type]
    assert float(terms.total) < 0.01
    moved = replace(leap, x0=leap.x0 + 0.3)
    assert float(method.loss(GENERATOR, moved, triple, FIRST, draws(range(COUNT))).total) > 0.02  # type: ignore[arg-type]


# ---------------------------------------------------------------- what a rollout holds


def modes(count: int = 16) -> Batch:
    """Images of four modes with prompts of their own."""
    cond = Conditioning(torch.eye(4, dtype=torch.float64).repeat(count // 4, 1)[:, None])
    return Batch(prompts(count, 4), prompts(count, 4), images=noise(count, 2, 1, 1, seed=5), image_cond=cond)


def on_modes(name: str, schedule: NoiseSchedule, **options: Any) -> Consistency[Any]:
    made = MAKERS[name](schedule, **options)
    return type(made)(made.config.model_copy(update={"guidance": 2.5}), setting(schedule, 2))


@pytest.mark.parametrize("schedule", ["eps", "flow"])
def test_a_rollout_by_hand(schedule: str) -> None:
    """TCD: x_s noises the image; x_e is the guided teacher's step; the target is the student's own map, without guidance."""
    method = on_modes("tcd", SCHEDULES[schedule]())
    triple, batch, w = analytic_triple(four_modes(), method.schedule), modes(), 2.5
    disturb(triple)
    stream, grid = draws(range(16)).for_role("rollout"), method.grid(FIRST)
    n = 1 + (stream.uniform("start") * 50).long()
    m = (stream.uniform("end") * n).long()
    s, e, r = grid[n], grid[n - 1], grid[m]
    like = batch.images
    assert like is not None
    assert batch.image_cond is not None
    (a_s, s_s), (a_e, s_e), (a_r, s_r) = (method.schedule.levels(t, like) for t in (s, e, r))
    x_s = a_s * like + s_s * stream.normal("noise", (2, 1, 1))
    real = triple.real_score
    x0 = (1 - w) * real.x0(x_s, s, batch.null) + w * real.x0(x_s, s, batch.image_cond)
    x_e = a_e * x0 + s_e * (x_s - a_s * x0) / s_s
    there = triple.generator.x0(x_e, e, batch.image_cond)
    target = torch.where((m == n - 1)[:, None, None, None], x_e, a_r * there + s_r * (x_e - a_e * there) / s_e)
    leap = method.rollout(batch, triple, FIRST, draws(range(16)))
    close(leap.x_t, x_s)
    close(leap.target, target.detach())
    own = triple.generator.x0(x_s, s, batch.image_cond)
    close(leap.x0.detach(), own.detach())
    terms = method.loss(GENERATOR, leap, triple, FIRST, draws(range(16)))
    d = (a_r * own + s_r * (x_s - a_s * own) / s_s - target).detach()
    close(terms.total.detach(), ((d**2 + 1e-6).sqrt() - 1e-3).mean())
    assert terms.total.requires_grad
    assert not leap.target.requires_grad


def test_only_the_generator_learns() -> None:
    method = on_modes("lcm", vp())
    triple = analytic_triple(four_modes(), vp())
    disturb(triple)
    with triple.training(GENERATOR):
        leap = method.rollout(modes(), triple, FIRST, draws(range(16)))
        method.loss(GENERATOR, leap, triple, FIRST, draws(range(16))).total.backward()
    assert all(p.grad is None for p in triple.base.parameters())
    assert any(p.grad is not None and bool(p.grad.any()) for p in triple.parameters(GENERATOR).values())
    assert method.updates(FIRST) == (GENERATOR,)
    assert type(method).roles(method.config) == {GENERATOR: "generator"}


def test_pairs_are_images_too() -> None:
    batch = modes()
    pairs = replace(batch, images=None, image_cond=None, pair_latents=batch.images, pair_cond=batch.image_cond)
    triple = analytic_triple(four_modes(), vp())
    a = on_modes("lcm", vp()).rollout(batch, triple, FIRST, draws(range(16)))
    b = on_modes("lcm", vp(), source="pairs").rollout(pairs, triple, FIRST, draws(range(16)))
    assert torch.equal(a.target, b.target)
    assert torch.equal(a.x_t, b.x_t)


@pytest.mark.parametrize(
    ("source", "given", "words"),
    [
        ("images", {"images": False, "pairs": True}, "source to pairs"),
        ("pairs", {"images": True, "pairs": False}, "collect pairs"),
    ],
)
def test_missing_data_is_refused(source: Any, given: dict[str, bool], words: str) -> None:
    with pytest.raises(Refusal, match=words):
        LCM.check(LCMConfig(guidance=2.0, source=source), vp(), **given)


def test_a_range_of_guidance_is_drawn_for_each_sample() -> None:
    triple, asked = analytic_triple(four_modes(), vp()), []
    guided = type(triple.real_score).guided
    method = on_modes("lcm", vp(), guidance_range=(3.0, 5.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "stepdistill.models.denoiser.Denoiser.guided",
            lambda self, x, t, c, n, w: (asked.append(w), guided(self, x, t, c, n, w))[1],
        )
        method.rollout(modes(), triple, FIRST, draws(range(16)))
    (w,) = asked
    assert w.shape == (16,)
    assert len(set(w.tolist())) == 16
    assert 3 <= float(w.min()) < float(w.max()) < 5


def test_the_ema_target_is_asked_and_follows() -> None:
    method = on_modes("tcd", vp(), target="ema", target_decay=0.75)
    triple = analytic_triple(four_modes(), vp())
    method.prepare(triple)
    plain = on_modes("tcd", vp()).rollout(modes(), triple, FIRST, draws(range(16))).target
    disturb(triple)
    triple.reset_role(TARGET)
    close(method.rollout(modes(), triple, FIRST, draws(range(16))).target, plain)
    before = {key: p.clone() for key, p in triple.network_parameters(TARGET).items()}
    with torch.no_grad():
        method.after_update(GENERATOR, {}, triple, FIRST)
    now, own = triple.network_parameters(TARGET), triple.network_parameters(GENERATOR)
    for key, was in before.items():
        close(now[key].detach(), 0.75 * was + 0.25 * own[key].detach())
        assert not now[key].requires_grad


# ---------------------------------------------------------------- one method as another


def same(a: Consistency[Any], b: Consistency[Any], triple: Triple, progress: Progress = FIRST) -> None:
    """Losses and gradients to rounding."""
    found = []
    for method in (a, b):
        for p in triple.parameters(GENERATOR).values():
            p.grad = None
        leap = method.rollout(modes(), triple, progress, draws(range(16)))
        total = method.loss(GENERATOR, leap, triple, progress, draws(range(16))).total
        total.backward()
        grads = [p.grad.flatten() for p in triple.parameters(GENERATOR).values() if p.grad is not None]
        found.append((total.detach(), torch.cat(grads)))
    close(found[0][0], found[1][0], 1e-12)
    close(found[0][1], found[1][1], 1e-12)
    assert float(found[0][1].abs().max()) > 1e-6


@pytest.mark.parametrize("schedule", ["eps", "v", "flow"])
def test_special_cases(schedule: str) -> None:
    """PCM with one phase is LCM; TSCD with one segment is TCD; CM with DDIM on LCM's grid is LCM."""
    s = SCHEDULES[schedule]()
    triple = analytic_triple(four_modes(), s)
    disturb(triple)
    lcm = on_modes("lcm", s, boundary="none")
    same(lcm, on_modes("pcm", s, phases=1, steps=1), triple)
    one = on_modes("tscd", s, stages=[{"segments": 1}], distance="huber")
    same(on_modes("tcd", s), one, triple)
    last = on_modes("tscd", s, distance="huber")
    same(on_modes("tcd", s), last, triple, Progress(stage=3))
    cm = on_modes("cm", s, solver="ddim")
    cm.grid = lambda progress: uniform_grid(s, 50)  # type: ignore[method-assign]
    same(lcm, cm, triple)


def test_the_boundary_of_lcm_hardly_matters() -> None:
    """As published and without scalings: alpha_0 x0 + sigma_0 eps against x0."""
    triple = analytic_triple(four_modes(), vp())
    disturb(triple)
    a, b = (
        on_modes("lcm", vp(), boundary=kind).rollout(modes(), triple, FIRST, draws(range(16)))
        for kind in ("scaled", "none")
    )
    at_end = a.t == 19
    assert torch.equal(a.target[at_end], b.target[at_end])
    assert float((a.target - b.target).square().mean().sqrt()) < 0.06


# ---------------------------------------------------------------- the adversary


def with_heads(method: Consistency[Any], schedule: NoiseSchedule) -> Triple:
    triple = analytic_triple(four_modes(), schedule)
    method.prepare(triple)
    disturb(triple)
    triple.head(FAKE_SCORE, parts.HEAD).double()
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

    monkeypatch.setattr("stepdistill.models.denoiser.Denoiser.features", watched)
    leap = method.rollout(modes(), triple, FIRST, draws(range(16)))
    method.loss(FAKE_SCORE, leap.detach(), triple, FIRST, draws(range(16)))
    (real, t), (_, again) = seen
    assert torch.equal(t, again)
    (a, s), (a_r, s_r) = method.schedule.levels(t, real), method.schedule.levels(leap.r, real)
    fresh = draws(range(16)).normal("gan.real.eps", (2, 1, 1))
    close(real, a / a_r * leap.target + (s**2 - (a * s_r / a_r) ** 2).sqrt() * fresh)
    assert bool((t >= leap.r).all())


def test_the_critic_trains_its_own_and_the_generator_answers() -> None:
    for name, features in (("pcm", REAL_SCORE), ("tscd", FAKE_SCORE)):
        method = on_modes(name, vp(), gan={"weight": 0.5, "features": features})
        triple = with_heads(method, vp())
        assert method.updates(FIRST) == (GENERATOR, FAKE_SCORE)
        leap = method.rollout(modes(), triple, FIRST, draws(range(16)))
        off = type(method)(
            method.config.model_copy(update={"gan": method.config.gan.model_copy(update={"weight": 0.0})}),
            method.setting,
        )
        terms = method.loss(GENERATOR, leap, triple, FIRST, draws(range(16)))
        plain = off.loss(GENERATOR, leap, triple, FIRST, draws(range(16)))
        close(terms.total, plain.total + 0.5 * terms.parts["gan"])
        with triple.training(FAKE_SCORE):
            method.loss(FAKE_SCORE, leap.detach(), triple, FIRST, draws(range(16))).total.backward()
        grads = {key for key, p in triple.parameters(FAKE_SCORE).items() if p.grad is not None}
        heads = {key for key in triple.parameters(FAKE_SCORE) if key.startswith("head.")}
        assert heads <= grads
        assert (grads == heads) == (features == REAL_SCORE)
        assert all(p.grad is None for p in triple.parameters(GENERATOR).values())


# ---------------------------------------------------------------- CM


def test_curricula() -> None:
    root = CM(
        CMConfig(guidance=1.0, curriculum="root", first_points=2, points=200, curriculum_iterations=1000), setting(vp())
    )
    assert [root.points(Progress(k)) for k in (0, 1000, 5000)] == [2, 201, 201]
    assert root.points(Progress(250)) == math.ceil(math.sqrt(0.25 * (201**2 - 4) + 4) - 1) + 1
    doubling = CM(
        CMConfig(guidance=1.0, curriculum="doubling", first_points=10, points=1280, curriculum_iterations=800),
        setting(vp()),
    )
    assert [doubling.points(Progress(k)) for k in (0, 99, 100, 699, 700, 9999)] == [11, 11, 21, 641, 1281, 1281]
    mu = CM(doubling.config.model_copy(update={"decay": "curriculum"}), setting(vp()))
    assert mu.decay(Progress(100)) == pytest.approx(math.exp(10 * math.log(0.95) / 21))
    assert doubling.decay(Progress(100)) == 0.95
    with pytest.raises(Refusal, match="lower the first"):
        CM(CMConfig(guidance=1.0, curriculum="root", first_points=50), setting(vp()))


@pytest.mark.parametrize("schedule", ["eps", "flow"])
def test_the_grid_of_karras(schedule: str) -> None:
    """Even in s~^(1/7), from the model's lowest (0.002 for flow) to its highest (80 for flow)."""
    method = MAKERS["cm"](SCHEDULES[schedule](), points=18)
    grid = method.grid(FIRST)
    ratio = (method.schedule.sigma(grid) / method.schedule.alpha(grid)) ** (1 / 7)
    if schedule == "flow":
        close(ratio, torch.linspace(0.002 ** (1 / 7), 80 ** (1 / 7), 18, dtype=torch.float64), 1e-9)
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
        got = method.solve(teacher, method.schedule.add_noise(x0, eps, s), s, e)
        close(got, method.schedule.add_noise(x0, eps, e), 1e-9)
    with pytest.raises(Refusal, match="guidance to 1"):
        CM(CMConfig(guidance=2.0, distil=False), setting(vp()))


def test_weights_of_ict() -> None:
    method = MAKERS["cm"](flow(), weights="gap")
    s, e = torch.tensor([0.5], dtype=torch.float64), torch.tensor([0.2], dtype=torch.float64)
    close(method.weight(s, e), torch.tensor([1 / (1 - 0.25)], dtype=torch.float64))
    leap = leap_of(method)
    each = parts.distance(method.function(leap.x_t, leap.x0, leap.t, leap.r) - leap.target, "huber")
    total = method.loss(GENERATOR, leap, analytic_triple(gaussian(MEAN, STD), flow()), FIRST, draws(range(COUNT))).total
    close(total, (leap.weight * each).mean())
    assert len(set(leap.weight.tolist())) > 5


# ---------------------------------------------------------------- TSCD


def test_stages() -> None:
    method = MAKERS["tscd"](vp())
    assert [(stage.name, stage.iterations) for stage in method.stages()] == [
        ("segments-8", 2000), ("segments-4", 2000), ("segments-2", 2000), ("segments-1", None),
    ]  # fmt: skip
    with pytest.raises(Refusal, match=r"8 segments .* has no iterations"):
        MAKERS["tscd"](vp(), stages=[{"segments": 8}, {"segments": 1}])
    with pytest.raises(Refusal, match=r"1 segments .* has no iterations"):
        MAKERS["tscd"](vp(), stages=[{"segments": 1}], score={})
    shares = [{"segments": 2, "iterations": 5, "gan": 0.0}, {"segments": 1, "gan": 2.0}]
    method = MAKERS["tscd"](vp(), stages=shares, gan={"weight": 0.1})
    assert [method.adversary(Progress(stage=k)).weight for k in (0, 1)] == [0.0, 0.2]
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
    leap = method.rollout(modes(), triple, last, draws(range(16)))
    assert isinstance(leap, Scored)
    assert leap.batch.image_cond is not None
    start = draws(range(16)).for_role("rollout").normal("one", (2, 1, 1))
    close(leap.sample, triple.generator.x0(start, 999.0, leap.batch.image_cond))
    terms = method.loss(GENERATOR, leap, triple, last, draws(range(16)))
    t = parts.LevelConfig().levels().times(vp(), draws(range(16)).uniform("dm.t"))
    x_t = vp().add_noise(leap.sample, draws(range(16)).normal("dm.eps", (2, 1, 1)), t)
    cond = leap.batch.cond
    scores = triple.real_score.guided(x_t, t, cond, leap.batch.null, 2.5)
    if real == "trajectory":
        scores = triple.denoiser(TRAJECTORY).x0(x_t, t, cond)
    d = (triple.fake_score.x0(x_t, t, cond) - scores) / (leap.sample - scores).abs().mean((1, 2, 3), keepdim=True)
    close(terms.total, 0.5 * terms.parts["consistency"] + 3.0 * 0.5 * d.square().mean())
    assert leap.sample.requires_grad
    assert not leap.detach().sample.requires_grad  # type: ignore[attr-defined]


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
        assert (recipe.scheduler_class, recipe.eta, recipe.extra()) == (on_vp, eta, {"eta": eta} if eta else {})
        assert recipe.transition().kind is (TransitionKind.RENOISE if on_vp == "LCMScheduler" else TransitionKind.TCD)
        assert Recipe.from_json(recipe.to_json()) == recipe
        assert MAKERS[name](flow()).recipe().scheduler_class == on_flow
    assert MAKERS["tcd"](vp(), eta=0.0).recipe().transition() == Transition(TransitionKind.TCD, 0.0)
    assert MAKERS["tcd"](flow(), eta=1.0).recipe().scheduler_class == "FlowMatchLCMScheduler"
    with pytest.raises(Refusal, match=r"eta is 0.3 .* choose one"):
        MAKERS["tcd"](flow(), eta=0.3)
    assert MAKERS["tcd"](vp(), points=40).recipe().scheduler_config["original_inference_steps"] == 40


def test_a_recipe_of_before_is_read() -> None:
    """One that was written without eta."""
    import json

    record = json.loads(MAKERS["lcm"](vp()).recipe().to_json())
    del record["eta"]
    assert Recipe.from_json(json.dumps(record)).eta == 0


# ---------------------------------------------------------------- learning


@pytest.mark.parametrize("schedule", ["eps", "flow"])
def test_lcm_learns_the_end_of_the_trajectory(schedule: str) -> None:
    """One step of an untrained student says the mean of the data; a trained one where the trajectory ends."""
    s = SCHEDULES[schedule]()
    method = LCM(LCMConfig(guidance=1.0, steps=1, points=10, target="ema", target_decay=0.9), setting(s))
    triple = analytic_triple(gaussian(MEAN, STD), s, width=64)
    method.prepare(triple)
    start = noise(256, DIMENSION, 1, 1, seed=8)
    top = torch.full((256,), method.ladder[0], dtype=torch.float64)
    end = exact(s, start, top, torch.full_like(top, s.clean_time))

    def error() -> float:
        with torch.no_grad():
            return float((triple.generator.x0(start, top, prompts(256)) - end).square().mean().sqrt())

    before, adam = error(), torch.optim.Adam(triple.parameters(GENERATOR).values(), lr=3e-3)
    for step in range(300):
        stream = draws(range(32), step=step)
        x0 = MEAN[:, None, None] + STD * stream.normal("image", (DIMENSION, 1, 1))
        batch = Batch(prompts(32), prompts(32), images=x0, image_cond=prompts(32))
        leap = method.rollout(batch, triple, FIRST, stream)
        adam.zero_grad()
        method.loss(GENERATOR, leap, triple, FIRST, stream).total.backward()
        adam.step()
        with torch.no_grad():
            method.after_update(GENERATOR, {}, triple, FIRST)
    assert before > 0.8
    assert error() < 0.5 * before
