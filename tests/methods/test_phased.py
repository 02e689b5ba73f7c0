"""Phased DMD against closed forms: targets without bias, the direction of the KL at s, DMD2 where there is one phase."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.toys import SCHEDULES, analytic_triple, draws, four_modes, noise, problem, prompts

from stepdistill.diffusion.prediction import Prediction, from_x0_eps
from stepdistill.diffusion.schedule import NoiseSchedule, broadcast
from stepdistill.errors import UserError
from stepdistill.families.conditioning import Conditioning
from stepdistill.methods import parts
from stepdistill.methods.base import STUDENT, Batch, Progress, Rollout, Stage
from stepdistill.methods.matching.dmd2 import DMD2, DMD2Config
from stepdistill.methods.matching.phased import Phase, Phased, PhasedConfig, interval_targets
from stepdistill.roles.triple import FAKE_SCORE, GENERATOR, REAL_SCORE, Triple

GRIDS = sorted(SCHEDULES)


def phased(schedule: NoiseSchedule, dimension: int = 2, /, **options: Any) -> Phased:
    config = PhasedConfig.model_validate({"guidance": 2.0, "phase_iterations": 10, **options})
    return Phased(config, problem(schedule, dimension))


def batch() -> Batch:
    """A sample of each class."""
    return Batch(Conditioning(torch.eye(4, dtype=torch.float64)[:, None]), prompts(4, 4))


def trained_apart(schedule: NoiseSchedule) -> Triple:
    """A teacher of four modes, and a fake score that knows other weights."""
    return analytic_triple(four_modes(std=0.4), schedule, four_modes((0.4, 0.3, 0.2, 0.1), std=0.5))


# ---------------------------------------------------------------- the fake score's targets

ATOMS = torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
SAMPLES = 1_000_000


def exact(x_t: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """E[x0 | x_t] of even atoms."""
    weights = torch.softmax(-0.5 * ((x_t[:, None] - alpha * ATOMS) / sigma).square(), 1)
    return weights @ ATOMS


def bias(target: torch.Tensor, truth: torch.Tensor, order: torch.Tensor) -> float:
    """Largest |mean of target - truth| over eight bins of x_t with as many samples each."""
    return max(float(part.mean().abs()) for part in (target - truth)[order].chunk(8))


def biases(schedule: NoiseSchedule, s: float, t: float) -> dict[Prediction, tuple[float, float]]:
    """By prediction type: of the targets, and of those that take x_s for clean."""
    stream = torch.Generator().manual_seed(3)
    x0 = ATOMS[torch.randint(4, (SAMPLES,), generator=stream)]
    first, eps = (torch.randn(SAMPLES, generator=stream, dtype=torch.float64) for _ in range(2))
    x_s = schedule.add_noise(x0, first, s)
    x_t, clean, effective = interval_targets(schedule, x_s, eps, s, t)
    alpha, sigma = schedule.levels(t, x_t)
    mean, order = exact(x_t, alpha, sigma), x_t.argsort()
    found = {}
    for kind in (Prediction.EPSILON, Prediction.V, Prediction.FLOW, Prediction.SAMPLE):
        truth, ours, naive = (
            from_x0_eps(x, noise, alpha, sigma, kind)
            for x, noise in ((mean, (x_t - alpha * mean) / sigma), (clean, effective), (x_s, eps))
        )
        found[kind] = bias(ours, truth, order), bias(naive, truth, order)
    return found


@pytest.mark.parametrize(("name", "s", "times"), [("flow", 0.5, (0.6, 0.8, 0.95)), ("eps", 499, (599, 799))])
def test_targets_are_unbiased_on_four_atoms(name: str, s: float, times: tuple[float, ...]) -> None:
    """For every prediction type; targets that take x_s for clean fail by the same test."""
    found = [biases(SCHEDULES[name](), s, t) for t in times]
    for kind in found[0]:
        assert max(at[kind][0] for at in found) < 2e-2, kind
        # far above s the fresh noise is nearly all there is, and epsilon alone does not show the mistake
        assert max(at[kind][1] for at in found) > 0.1, kind
    assert all(at[Prediction.FLOW][1] > 0.2 for at in found)


@pytest.mark.parametrize("name", GRIDS)
def test_targets_by_the_table(name: str) -> None:
    """The paper's flow and x0 rows, and those of epsilon and v, written out."""
    schedule = SCHEDULES[name]()
    s, t = schedule.time_at_fraction(torch.tensor([0.4, 0.75], dtype=torch.float64)).tolist()
    x_s, eps = noise(5, 2, seed=1), noise(5, 2, seed=2)
    x_t, x0, effective = interval_targets(schedule, x_s, eps, s, t)
    (a, b), (a_s, b_s) = ((schedule.alpha(time), schedule.sigma(time)) for time in (t, s))
    beta = (b.square() - (a / a_s).square() * b_s.square()).sqrt()
    torch.testing.assert_close(x_t, a / a_s * x_s + beta * eps)
    torch.testing.assert_close(x_t, a * x0 + b * effective)
    rows = {
        Prediction.FLOW: (a_s.square() * b + a * b_s.square()) / (a_s.square() * beta) * eps - x_s / a_s,
        Prediction.SAMPLE: x_s / a_s - a * b_s.square() / (a_s.square() * beta) * eps,
        Prediction.EPSILON: b / beta * eps,
    }
    if not schedule.is_flow:
        rows[Prediction.V] = -b / a_s * x_s + a * b / beta * (1 + (b_s / a_s).square()) * eps
    for prediction, row in rows.items():
        torch.testing.assert_close(from_x0_eps(x0, effective, a, b, prediction), row)


@pytest.mark.parametrize("name", GRIDS)
def test_targets_of_clean_samples_are_the_usual_ones(name: str) -> None:
    schedule = SCHEDULES[name]()
    t = schedule.time_at_fraction(torch.tensor([0.2, 0.9], dtype=torch.float64))
    x, eps = noise(2, 3, seed=1), noise(2, 3, seed=2)
    x_t, x0, effective = interval_targets(schedule, x, eps, schedule.clean_time, t)
    torch.testing.assert_close(x_t, schedule.add_noise(x, eps, t), rtol=0, atol=1e-12)
    torch.testing.assert_close(x0, x, rtol=0, atol=1e-12)
    torch.testing.assert_close(effective, eps, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", GRIDS)
def test_the_weight_tames_the_singular_target(name: str) -> None:
    """min(1, 10 b^2) ||pred - target||^2 = min(1 / b^2, 10) ||b pred - b target||^2, and b target has no pole at t = s."""
    schedule = SCHEDULES[name]()
    method = phased(schedule)
    triple, rollout = trained_apart(schedule), rolled(schedule, method)
    phase = method.phases[0]
    terms = method.loss(FAKE_SCORE, rollout, triple, Progress(), draws(role=FAKE_SCORE))
    stream = draws(role=FAKE_SCORE)
    low = float(schedule.fraction_at(phase.s)) + 0.02
    t = parts.NoiseLevelConfig(low=low, high=1.0).levels().times(schedule, stream.uniform("fake.t"))
    x_s = method.transition(schedule, rollout.x_t, rollout.x0, rollout.t, phase.s).mean.detach()
    eps = stream.normal("fake.eps", (2, 1, 1))
    x_t, x0, effective = interval_targets(schedule, x_s, eps, phase.s, t)
    alpha, sigma = schedule.levels(t, x_t)
    spread = broadcast(schedule.kernel(phase.s, t)[1], x_t)
    target = from_x0_eps(x0, effective, alpha, sigma, schedule.prediction)
    raw = triple.fake_score.estimate(x_t, t, rollout.batch.cond).raw
    expected = ((1 / spread.square()).clamp(max=10) * (spread * raw - spread * target).square()).mean()
    torch.testing.assert_close(terms.total, expected, rtol=1e-10, atol=0)
    near = interval_targets(schedule, x_s, eps, phase.s, phase.s + 1e-6)
    spread = schedule.kernel(phase.s, phase.s + 1e-6)[1]
    assert all(float((spread * part).abs().max()) < 20 for part in near[1:])
    assert float(near[2].abs().max()) > 100


def rolled(schedule: NoiseSchedule, method: Phased) -> Rollout:
    """Four samples of the first phase's second step."""
    t = torch.full((4,), method.timesteps[1], dtype=torch.float64)
    x0 = noise(4, 2, 1, 1, seed=3).requires_grad_()
    return Rollout(batch(), noise(4, 2, 1, 1, seed=4), t, x0)


# ---------------------------------------------------------------- the generator's direction


@pytest.mark.parametrize("name", GRIDS)
def test_the_direction_is_that_of_the_kl_at_s(name: str) -> None:
    """d / d x_s = alpha_{t|s} (s_F - s_T), which the paper writes w_{t|s} (T_u - F_u); both by hand."""
    schedule = SCHEDULES[name]()
    method = phased(schedule, dm_weight="exact_kl", guidance=1.0)
    triple, rollout = trained_apart(schedule), rolled(schedule, method)
    s = method.phases[0].s
    terms = method.loss(GENERATOR, rollout, triple, Progress(), draws())
    (found,) = torch.autograd.grad(terms.total, rollout.x0)
    x_s = method.transition(schedule, rollout.x_t, rollout.x0, rollout.t, s).mean
    t = (
        parts.NoiseLevelConfig(low=float(schedule.fraction_at(s)) + 0.02)
        .levels()
        .times(schedule, draws().uniform("dm.t"))
    )
    x_t = schedule.add_noise(x_s.detach(), draws().normal("dm.eps", (2, 1, 1)), t, s)
    assert float(t.min()) > s
    alpha, sigma = schedule.levels(t, x_t)
    ratio = broadcast(schedule.kernel(s, t)[0], x_t)
    cond = rollout.batch.cond
    fake, real = (network.epsilon(x_t, t, cond) for network in (triple.fake_score, triple.real_score))
    scores = ratio * (-fake / sigma + real / sigma)
    u_fake, u_real = (
        network.epsilon(x_t, t, cond) - network.x0(x_t, t, cond) for network in (triple.fake_score, triple.real_score)
    )
    velocities = alpha * ratio / (alpha * sigma + sigma.square()) * (u_real - u_fake)
    torch.testing.assert_close(velocities, scores, rtol=1e-8, atol=1e-10)
    (expected,) = torch.autograd.grad((x_s * scores.detach()).sum() / x_s.numel(), rollout.x0)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)
    assert float(expected.abs().max()) > 1e-4


@pytest.mark.parametrize("name", GRIDS)
def test_the_normalised_direction_is_parallel_to_the_exact_one(name: str) -> None:
    """Per sample, with a positive factor: x_s is an affine function of x0 with a positive slope."""
    schedule = SCHEDULES[name]()
    found = []
    for weight in ("code", "exact_kl"):
        method = phased(schedule, dm_weight=weight)
        rollout = rolled(schedule, method)
        terms = method.loss(GENERATOR, rollout, trained_apart(schedule), Progress(), draws())
        found.append(torch.autograd.grad(terms.total, rollout.x0)[0].flatten(1))
    cosine = torch.nn.functional.cosine_similarity(found[0], found[1], dim=1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


@pytest.mark.parametrize("weight", ["code", "exact_kl"])
@pytest.mark.parametrize("name", GRIDS)
def test_one_phase_is_deterministic_dmd2(name: str, weight: str) -> None:
    """Rollouts, both losses and both gradients."""
    schedule = SCHEDULES[name]()
    options: dict[str, Any] = {"guidance": 3.0, "steps": 3, "exits": "sample", "dm_weight": weight}
    ours = Phased(PhasedConfig(phases=1, **options), problem(schedule, 2))
    theirs = DMD2(DMD2Config(transition="deterministic", **options), problem(schedule, 2))
    found = []
    for method in (ours, theirs):
        triple = trained_apart(schedule)
        rollout = method.rollout(batch(), triple, Progress(), draws())
        numbers = [rollout.x_t, rollout.t, rollout.x0.detach()]
        for role, rolled_out in ((GENERATOR, rollout), (FAKE_SCORE, rollout.detach())):
            total = method.loss(role, rolled_out, triple, Progress(), draws(role=role)).total
            parameters = [p for key, p in triple.network_parameters(role).items() if "fc" in key]
            numbers += [total.detach(), *torch.autograd.grad(total, parameters)]
        found.append(numbers)
    for mine, its in zip(*found, strict=True):
        assert float((mine - its).abs().max()) < 1e-10
    assert ours.recipe().experts == ()
    assert ours.recipe() == replace(theirs.recipe(), method="phased")
    assert ours.stages() == (Stage("phase_1"),)


# ---------------------------------------------------------------- phases


def test_pieces_of_the_ladder() -> None:
    schedule = SCHEDULES["eps"]()
    assert phased(schedule).phases == [Phase(0, 2, 499.0), Phase(2, 4, -1.0)]
    assert phased(schedule, phases=[749.0, 499.0]).phases == [Phase(0, 1, 749.0), Phase(1, 2, 499.0), Phase(2, 4, -1.0)]
    assert phased(schedule, steps=3).phases == [Phase(0, 1, 666.0), Phase(1, 3, -1.0)]
    assert phased(schedule, phases=4).recipe().experts == (1, 1, 1, 1)
    shifted = phased(SCHEDULES["flow-shift-3"]())
    assert [phase.s for phase in shifted.phases] == [0.75, 0.0]


def test_stages_carry_experts_over() -> None:
    method = phased(SCHEDULES["eps"](), phases=3, phase_iterations=[7, 8])
    both = (GENERATOR, FAKE_SCORE)
    assert method.stages() == (
        Stage("phase_1", 7),
        Stage("phase_2", 8, ((STUDENT, "expert_1"),), both),
        Stage("phase_3", None, ((STUDENT, "expert_2"),), both),
    )
    assert method.experts(GENERATOR, 0) == (GENERATOR, REAL_SCORE, REAL_SCORE)
    assert method.experts("generator_ema", 2) == ("expert_1", "expert_2", "generator_ema")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"phases": 5}, "ladder has 4 steps"),
        ({"phases": [999.0]}, "falling entries of the ladder"),
        ({"phases": [249.0, 749.0]}, "falling entries of the ladder"),
        ({"phase_iterations": None}, "give one number, or 1"),
        ({"phase_iterations": [3, 4]}, "give one number, or 1"),
        ({"exit_odds": [1, 1, 0, 0]}, "trains no step of ladder entries 3 to 4"),
        ({"margin": 0.6}, "leaves no noise level between"),
        ({"dm_levels": {"shape": "logit_normal"}}, "piles up where the phase ends"),
    ],
)
def test_refusals(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        phased(SCHEDULES["eps"](), **options)


def test_the_latents_statistics_are_logged_in_every_phase() -> None:
    """The alarms of contrast and brightness read them."""
    schedule = SCHEDULES["eps"]()
    method = phased(schedule)
    terms = method.loss(GENERATOR, rolled(schedule, method), trained_apart(schedule), Progress(), draws())
    assert {"latent_mean", "latent_std", "score_gap"} <= set(terms.parts)


def test_a_time_that_is_the_phase_s_end_divides_by_nothing() -> None:
    found = interval_targets(
        SCHEDULES["eps"](), noise(2, 2, 1, 1), noise(2, 2, 1, 1, seed=1), 499.0, torch.tensor([499.0, 700.0])
    )
    assert all(bool(tensor.isfinite().all()) for tensor in found)


@pytest.mark.parametrize("name", GRIDS)
def test_a_phase_starts_where_the_experts_before_it_end(name: str) -> None:
    """Every later expert's first input is the frozen ones' walk, at the draws of phase 1; gradients reach none of them."""
    schedule = SCHEDULES[name]()
    method = phased(schedule, exit_odds=[1, 1, 1, 0])
    triple = trained_apart(schedule)
    method.prepare(triple)
    for parameter in triple.network_parameters("expert_1").values():
        parameter.data += 0.1
    rollout = method.rollout(batch(), triple, Progress(stage=1), draws())
    x = draws().for_role("rollout").normal("noise", (2, 1, 1))
    expert = triple.denoiser("expert_1")
    for t, s in ((0, 1), (1, 2)):
        x0 = expert.x0(x, method.timesteps[t], rollout.batch.cond)
        x = method.transition(schedule, x, x0, method.timesteps[t], method.timesteps[s]).mean
    torch.testing.assert_close(rollout.x_t, x.detach(), rtol=0, atol=1e-12)
    assert rollout.t.tolist() == [method.timesteps[2]] * 4
    method.loss(GENERATOR, rollout, triple, Progress(stage=1), draws()).total.backward()
    assert all(p.grad is None for p in triple.network_parameters("expert_1").values())
    assert any(p.grad is not None for p in triple.network_parameters(GENERATOR).values())
