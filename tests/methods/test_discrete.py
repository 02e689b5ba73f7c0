"""Discrete consistency methods against closed forms in float64: grids, ends, boundaries, solver steps, residuals."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler, TCDScheduler
from support.consistency import (
    BETAS,
    COUNT,
    FIRST,
    MAKERS,
    MEAN,
    STD,
    close,
    exact,
    levels,
    modes,
    on_modes,
    residual,
    rollout_of,
    with_the_exact_map,
)
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
    vp,
)
from torch import Tensor

from stepdistill.diffusion.timesteps import evenly_spaced_timesteps, segment_edges, segment_of, uniform_grid
from stepdistill.errors import UserError
from stepdistill.families.conditioning import Conditioning
from stepdistill.methods import parts
from stepdistill.methods.base import Progress
from stepdistill.methods.consistency.discrete import TARGET, Consistency, ddim_step
from stepdistill.methods.consistency.lcm import LCM, LCMConfig, boundary_scalings
from stepdistill.roles.triple import GENERATOR, Triple

# ---------------------------------------------------------------- grids, ends, ladders


def test_the_grid_of_lcm() -> None:
    assert uniform_grid(vp(), 50).tolist() == [0.0, *(20.0 * i - 1 for i in range(1, 51))]
    assert uniform_grid(flow(), 4).tolist() == [0, 0.25, 0.5, 0.75, 1]
    close(uniform_grid(flow(3.0), 4), torch.tensor([0, 0.5, 0.75, 0.9, 1.0]).double(), 1e-7)
    with pytest.raises(UserError, match="use fewer points"):
        uniform_grid(vp(), 1000)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 8])
def test_ladders_are_those_of_the_stock_schedulers(steps: int) -> None:
    """4 -> 999, 759, 499, 259, for LCM and for TCD."""
    for name, scheduler in (("lcm", LCMScheduler(**BETAS)), ("tcd", TCDScheduler(**BETAS))):
        scheduler.set_timesteps(steps)
        method = MAKERS[name](vp(), steps=steps)
        assert list(method.timesteps) == scheduler.timesteps.tolist()
        assert list(method.recipe().timesteps) == scheduler.timesteps.tolist()
    assert list(MAKERS["lcm"](vp(), steps=4).timesteps) == [999, 759, 499, 259]


def test_phases() -> None:
    assert segment_edges(50, 4).tolist() == [0, 12, 25, 37]
    assert segment_edges(40, 4).tolist() == [0, 10, 20, 30]
    assert segment_of(torch.tensor([1, 12, 13, 25, 26, 50]), segment_edges(50, 4)).tolist() == [0, 0, 1, 1, 2, 3]
    assert list(MAKERS["pcm"](vp()).timesteps) == [999, 739, 499, 239]
    assert set(MAKERS["pcm"](vp(), phases=2).timesteps) >= {999, 499}
    close(torch.tensor(MAKERS["pcm"](flow(3.0), points=100).timesteps), torch.tensor([1, 0.9, 0.75, 0.5]), 1e-6)
    with pytest.raises(UserError, match="multiple of the phases"):
        MAKERS["pcm"](vp(), phases=3)
    with pytest.raises(UserError, match="use more points"):
        MAKERS["pcm"](vp(), points=3)
    with pytest.raises(UserError, match="use fewer steps"):
        evenly_spaced_timesteps(uniform_grid(vp(), 5), 6)


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
            close(method.consistency_function(x, x0, r.expand(4), r.expand(4)), x)
    if method.schedule.is_flow:  # at sigma = 0 by its limit
        close(method.consistency_function(x, x, torch.full((4,), 1e-9).double(), torch.zeros(4)), x, 1e-8)


@pytest.mark.parametrize("index", [1, 2, 25, 50])
def test_the_solver_is_ddim_and_euler(index: int) -> None:
    """One step of the grid, the lowest onto timestep 0."""
    x, x0 = noise(1, DIMENSION, 1, 1), noise(1, DIMENSION, 1, 1, seed=1)
    method = MAKERS["lcm"](vp())
    s, e = method.grid(FIRST)[[index]], method.grid(FIRST)[[index - 1]]
    got = method.solver_step(lambda x, t: x0, x, s, e)
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
        method.solver_step(lambda x, t: x0, x, s, e),
        euler.step(u, euler.timesteps[0], x).prev_sample,
        rtol=0,
        atol=1e-6,
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
    right = residual(method, rollout_of(method))
    bound = {"cm": 2e-3}.get(name, 0.02)
    assert right < bound

    def turned(teacher: Any, x_s: Tensor, s: Tensor, e: Tensor) -> Tensor:
        alpha, _ = levels(method.schedule, e)
        x0 = teacher(x_s, s)
        return alpha * x0 - (ddim_step(method.schedule, x_s, x0, s, e) - alpha * x0)

    method.solver_step = turned  # type: ignore[method-assign]
    assert residual(method, rollout_of(method)) > max(0.1, 10 * right)


@pytest.mark.parametrize(("name", "order"), [("lcm", 2), ("cm", 3)])
@pytest.mark.parametrize("schedule", ["eps", "flow"])
def test_the_residual_falls_at_the_solvers_order(name: str, order: int, schedule: str) -> None:
    """Halving the step divides the error of one DDIM step by 4, that of Heun by 8."""
    found = []
    for points in (50, 100, 200):
        method = with_the_exact_map(MAKERS[name](SCHEDULES[schedule](), points=points + (name == "cm")))
        method.start = lambda u, grid: torch.full_like(u, (len(grid) - 1) // 5 * 3).long()  # type: ignore[method-assign]
        found.append(residual(method, rollout_of(method)))
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
    rollout = rollout_of(method, triple)
    assert residual(method, rollout) < 0.02
    terms = method.loss(GENERATOR, rollout, triple, FIRST, draws(range(COUNT)))  # type: ignore[arg-type]
    assert float(terms.total) < 0.01
    moved = replace(rollout, x0=rollout.x0 + 0.3)
    assert float(method.loss(GENERATOR, moved, triple, FIRST, draws(range(COUNT))).total) > 0.02  # type: ignore[arg-type]


# ---------------------------------------------------------------- what a rollout holds


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
    rollout = method.rollout(batch, triple, FIRST, draws(range(16)))
    close(rollout.x_t, x_s)
    close(rollout.target, target.detach())
    own = triple.generator.x0(x_s, s, batch.image_cond)
    close(rollout.x0.detach(), own.detach())
    terms = method.loss(GENERATOR, rollout, triple, FIRST, draws(range(16)))
    d = (a_r * own + s_r * (x_s - a_s * own) / s_s - target).detach()
    close(terms.total.detach(), ((d**2 + 1e-6).sqrt() - 1e-3).mean())
    assert terms.total.requires_grad
    assert not rollout.target.requires_grad


@pytest.mark.parametrize("name", ["lcm", "tcd", "pcm", "tscd", "cm"])
def test_the_noisiest_state_is_what_sampling_starts_from(name: str) -> None:
    """SD's schedule has signal left at its end, and the first call of a sampler sees none."""
    method = on_modes(name, vp(), points=8)
    triple, stream = analytic_triple(four_modes(), method.schedule), draws(range(16)).for_role("rollout")
    rollout = method.rollout(modes(), triple, FIRST, draws(range(16)))
    top = rollout.t == method.grid(FIRST)[-1]
    assert 0 < int(top.sum()) < 16
    eps = stream.normal("noise", (2, 1, 1))
    assert torch.equal(rollout.x_t[top], eps[top])
    assert not bool((rollout.x_t[~top] == eps[~top]).any())


def test_only_the_generator_learns() -> None:
    method = on_modes("lcm", vp())
    triple = analytic_triple(four_modes(), vp())
    disturb(triple)
    with triple.training(GENERATOR):
        rollout = method.rollout(modes(), triple, FIRST, draws(range(16)))
        method.loss(GENERATOR, rollout, triple, FIRST, draws(range(16))).total.backward()
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
    with pytest.raises(UserError, match=words):
        LCM.check(LCMConfig(guidance=2.0, source=source), vp(), **given)


def test_a_range_of_guidance_is_drawn_for_each_sample() -> None:
    triple, asked = analytic_triple(four_modes(), vp()), []
    guided = type(triple.real_score).guided
    method = on_modes("lcm", vp(), guidance_range=(3.0, 5.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "stepdistill.roles.denoiser.Denoiser.guided",
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
        rollout = method.rollout(modes(), triple, progress, draws(range(16)))
        total = method.loss(GENERATOR, rollout, triple, progress, draws(range(16))).total
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
