"""Decoupled DMD against closed forms: its coupled form is DMD2, its engine alone has no fixed point, any shield bounds it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.toys import SCHEDULES, analytic_triple, draws, four_modes, noise, problem
from support.whole_batch_draws import WholeBatchDraws
from torch import Tensor

from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.diffusion.timesteps import student_timesteps
from stepdistill.errors import UserError
from stepdistill.families.conditioning import Conditioning
from stepdistill.methods import parts
from stepdistill.methods.base import Batch, Progress, Rollout
from stepdistill.methods.matching.decoupled import Decoupled, DecoupledConfig
from stepdistill.methods.matching.dmd2 import DMD2, DMD2Config
from stepdistill.methods.matching.few_step import moment_penalty
from stepdistill.roles.triple import FAKE_SCORE, GENERATOR, Triple

GRIDS = ["eps", "v", "flow", "flow-shift-3"]
CLASSES = 4


def labels(count: int, empty: bool = False) -> Conditioning:
    """Class k mod 4 of every row, or the empty prompt."""
    rows = torch.ones(count, CLASSES) if empty else torch.eye(CLASSES)[torch.arange(count) % CLASSES]
    return Conditioning(rows.double()[:, None])


def rolled(schedule: NoiseSchedule, step: int = 2) -> Rollout:
    """Four samples of a four-step student that left at ladder entry `step`."""
    t = torch.full((4,), student_timesteps(schedule, 4)[step], dtype=torch.float64)
    x = noise(4, 2, 1, 1, seed=3).requires_grad_()
    return Rollout(Batch(labels(4), labels(4, empty=True)), x, t, x)


def gradient(method: DMD2 | Decoupled, rollout: Rollout, triple: Triple, progress: Progress = Progress()) -> Tensor:  # noqa: B008
    terms = method.loss(GENERATOR, rollout, triple, progress, draws())
    (found,) = torch.autograd.grad(terms.total, rollout.x0)
    return found


def decoupled(schedule: NoiseSchedule, /, **options: Any) -> Decoupled:
    config = DecoupledConfig.model_validate({"guidance": 3.0, **options})
    return Decoupled(config, problem(schedule, 2))


def trained_apart(schedule: NoiseSchedule) -> Triple:
    """A teacher of four modes, and a fake score that knows other weights."""
    return analytic_triple(four_modes(std=0.4), schedule, four_modes((0.4, 0.3, 0.2, 0.1), std=0.5))


# ---------------------------------------------------------------- the split


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("w", [1.0, 3.0, 7.5])
def test_coupled_is_dmd2(name: str, w: float) -> None:
    """One level, one noise, one normaliser for both terms: DMD2's gradient, to rounding."""
    schedule = SCHEDULES[name]()
    triple, rollout = trained_apart(schedule), rolled(schedule)
    ours = gradient(decoupled(schedule, guidance=w, schedule="coupled"), rollout, triple)
    theirs = gradient(DMD2(DMD2Config(guidance=w), problem(schedule, 2)), rollout, triple)
    assert float((ours - theirs).abs().max()) < 1e-10
    assert float(theirs.abs().max()) > 1e-3


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("form", ["coupled", "independent", "restricted", "hybrid"])
def test_augmentation_vanishes_without_guidance(name: str, form: str) -> None:
    schedule = SCHEDULES[name]()
    method = decoupled(schedule, guidance=1.0, schedule=form)
    terms = method.loss(GENERATOR, rolled(schedule), trained_apart(schedule), Progress(), draws())
    assert float(terms.parts["ca"]) == 0
    assert float(terms.parts["dm"]) > 0


@pytest.mark.parametrize("name", GRIDS)
def test_each_term_by_hand(name: str) -> None:
    """Hybrid: (w - 1)(mu_u - mu_c)/n at t_CA and (mu_F - mu_c)/n at t_DM, with noises of their own."""
    schedule, w = SCHEDULES[name](), 3.0
    triple, rollout = trained_apart(schedule), rolled(schedule)
    x, cond, null = rollout.x0.detach(), labels(4), labels(4, empty=True)
    below = parts.draw_times_below(schedule, draws().uniform("ca.t"), 0.02, schedule.fraction_at(rollout.t))
    everywhere = parts.NoiseLevelConfig().levels().times(schedule, draws().uniform("dm.t"))
    at_ca = schedule.add_noise(x, draws().normal("ca.eps", (2, 1, 1)), below)
    at_dm = schedule.add_noise(x, draws().normal("dm.eps", (2, 1, 1)), everywhere)
    teacher, fake = triple.real_score, triple.fake_score
    c, u = teacher.x0(at_ca, below, cond), teacher.x0(at_ca, below, null)
    real = teacher.x0(at_dm, everywhere, cond)
    mean = lambda gap: gap.abs().mean((1, 2, 3), keepdim=True)  # noqa: E731
    expected = (w - 1) * (u - c) / mean(x - c) + (fake.x0(at_dm, everywhere, cond) - real) / mean(x - real)
    found = gradient(decoupled(schedule), rollout, triple) * x.numel()
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("step", range(4))
def test_augmentation_stays_below_the_generators_level(name: str, step: int) -> None:
    """For every entry of the ladder, after the shift; and its interval is never empty."""
    schedule = SCHEDULES[name]()
    t_gen = student_timesteps(schedule, 4)[step]
    high = schedule.fraction_at(torch.full((2000,), t_gen, dtype=torch.float64))
    u = torch.linspace(0, 1 - 1e-9, 2000, dtype=torch.float64)
    t = parts.draw_times_below(schedule, u, 0.02, high)
    assert float(t.max()) <= t_gen + 1e-9
    low = schedule.time_at_fraction(torch.tensor(0.02, dtype=torch.float64))
    assert float(t.min()) == pytest.approx(float(low), abs=1e-6)
    assert len(t.unique()) > 100


def test_the_first_step_s_level_is_pure_noise_whatever_it_is_told() -> None:
    """One-step SDXL is told 399: below that alone, augmentation would see nearly clean samples, where it collapses."""
    schedule = SCHEDULES["eps"]()
    method = decoupled(schedule, timesteps=[399.0, 199.0])
    bound = method._ca_bound(torch.tensor([399.0, 199.0], dtype=torch.float64))
    assert bound.tolist() == [1.0, pytest.approx(float(schedule.fraction_at(torch.tensor(199.0))))]
    restricted = decoupled(schedule, timesteps=[399.0, 199.0], schedule="restricted")
    t = restricted._dm_times(torch.full((4,), 399.0, dtype=torch.float64), draws())
    assert float(t.max()) <= 980


def test_augmentation_needs_room_below_the_last_step() -> None:
    with pytest.raises(UserError, match=r"lower ca_low, or take fewer steps"):
        decoupled(SCHEDULES["eps"](), timesteps=[999.0, 10.0])
    decoupled(SCHEDULES["eps"](), timesteps=[999.0, 10.0], schedule="independent")


def test_levels_stay_within_the_schedule() -> None:
    schedule = SCHEDULES["eps"]()
    t = parts.draw_times_below(
        schedule, torch.tensor([0.0, 1 - 1e-12], dtype=torch.float64), 0.02, torch.ones(2).double()
    )
    assert t.tolist() == [20, 999]


def test_the_ramp_counts_generator_updates() -> None:
    schedule = SCHEDULES["flow"]()
    method, triple = decoupled(schedule, ramp=4), trained_apart(schedule)
    seen = [
        float(
            method.loss(GENERATOR, rolled(schedule), triple, Progress(updates={GENERATOR: k}), draws()).parts[
                "guidance"
            ]
        )
        for k in range(6)
    ]
    assert seen == [1.5, 2.0, 2.5, 3.0, 3.0, 3.0]


# ---------------------------------------------------------------- shields


def test_the_moment_penalty_is_a_divergence_of_gaussians() -> None:
    """KL(N(m, s^2) || N(mean, std^2)) of each sample; 0 with gradient 0 where the moments agree."""
    x = noise(5, 4, 8, 8)
    own = x.flatten(1)
    one, other = (
        torch.distributions.Normal(own.mean(1), own.std(1, correction=0)),
        torch.distributions.Normal(torch.tensor(0.075).double(), torch.tensor(0.9).double()),
    )
    expected = torch.distributions.kl_divergence(one, other).mean()
    torch.testing.assert_close(moment_penalty(x, 0.075, 0.9), expected)
    fitted = (x - own.mean(1)[:, None, None, None]) / own.std(1, correction=0)[:, None, None, None] * 0.9 + 0.075
    fitted.requires_grad_()
    penalty = moment_penalty(fitted, 0.075, 0.9)
    (found,) = torch.autograd.grad(penalty, fitted)
    assert float(penalty) == pytest.approx(0, abs=1e-12)
    assert float(found.abs().max()) < 1e-12


def test_no_shield_is_refused() -> None:
    with pytest.raises(UserError, match="nothing bounds CFG augmentation: turn one of the three on"):
        decoupled(SCHEDULES["eps"](), matching=False)


RATIO, UPDATES = 2, 150
TRUE_RADIUS = 2.0


def radii(options: dict[str, Any], images: bool = False) -> tuple[float, float]:
    """Mean distance of the class centroids from the origin, half-way and at the end of a run at w = 3; the data's is 2."""
    schedule, mixture = SCHEDULES["flow"](), four_modes((0.25,) * 4, std=0.4)
    triple = analytic_triple(mixture, schedule, width=64)
    method = Decoupled(
        DecoupledConfig.model_validate({"guidance": 3.0, "ratio": RATIO, "steps": 2, **options}),
        problem(schedule, 2, width=64),
    )
    method.prepare(triple)
    for heads in triple.heads.values():
        for head in heads.values():
            head.double()
    rates = {GENERATOR: 3e-3, FAKE_SCORE: 6e-3}
    optimizers = {
        role: torch.optim.Adam(triple.parameters(role).values(), lr=rate, betas=(0.0, 0.999))
        for role, rate in rates.items()
    }
    batch = Batch(labels(256), labels(256, empty=True))
    if images:
        spread = 0.4 * noise(256, 2, 1, 1, seed=5)
        batch = replace(
            batch, images=mixture.means[torch.arange(256) % CLASSES][:, :, None, None] + spread, image_cond=labels(256)
        )

    @torch.no_grad()
    def radius() -> float:
        x0 = triple.generator.x0(noise(2048, 2, 1, 1, seed=9), method.timesteps[0], labels(2048)).flatten(1)
        return float(torch.stack([x0[k::CLASSES].mean(0) for k in range(CLASSES)]).norm(dim=1).mean())

    found = []
    for iteration in range(RATIO * UPDATES):
        progress, rollout = Progress(iteration, stage_iteration=iteration), None
        for role in method.updates(progress):
            stream = WholeBatchDraws(0, iteration, role, range(256), dtype=torch.float64)
            with triple.training(role):
                rollout = rollout.detach() if rollout else method.rollout(batch, triple, progress, stream)
                optimizers[role].zero_grad()
                method.loss(role, rollout, triple, progress, stream).total.backward()
            optimizers[role].step()
        if iteration + 1 in (RATIO * UPDATES // 2, RATIO * UPDATES):
            found.append(radius())
    return found[0], found[1]


@pytest.mark.ci
def test_augmentation_alone_diverges_and_each_shield_bounds_it() -> None:
    """Alone it gathers pace; under a shield the centroids stay near where guidance puts them, a little outside the data's."""
    runs = {
        "alone": radii({"matching": False, "moments": {"weight": 1e-12}}),
        "matching": radii({}),
        "moments": radii({"matching": False, "moments": {"weight": 3.0, "std": 1.47}}),
        "gan": radii({"matching": False, "gan": {"weight": 3.0, "critic_weight": 1.0}}, images=True),
    }
    half, end = runs.pop("alone")
    assert end > 1.5 * half > 1.5 * TRUE_RADIUS
    for name, (before, after) in runs.items():
        assert after < 0.5 * end, name
        assert after / before < 0.6 * end / half, name
