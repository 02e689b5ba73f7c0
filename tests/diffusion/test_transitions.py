"""The steps of few-step samplers against diffusers' schedulers and closed forms."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)
from diffusers.schedulers import scheduling_lcm, scheduling_tcd
from support.toys import SCHEDULES, SD, flow, noise, vp
from torch import Tensor

from stepdistill.diffusion.prediction import Prediction, convert_prediction, from_x0_eps
from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.diffusion.transitions import Gaussian, Transition, TransitionKind
from stepdistill.errors import UserError
from stepdistill.roles.sampler import TrajectoryStep, sample, sample_trajectory

BETAS = {key: value for key, value in SD.items() if key != "_class_name"}
X_T, X0, FRESH = noise(2, 4, 3, 3), noise(2, 4, 3, 3, seed=1), noise(2, 4, 3, 3, seed=2)
LADDER = [999, 749, 499, 249]
JUMPS = [(999, 749), (749, 499), (499, 249), (249, 20)]
KINDS = [
    Transition(TransitionKind.DETERMINISTIC),
    Transition(TransitionKind.RENOISE),
    *(Transition(kind, s) for kind in (TransitionKind.ANCESTRAL, TransitionKind.TCD) for s in (0.0, 0.3, 1.0)),
]
# the float32 tables of diffusers differ from float64 by about 1e-6, times up to 1 / alpha_999 = 14.65
TOLERANCE = {"rtol": 0, "atol": 5e-5}


def eps_of(schedule: NoiseSchedule, x_t: Tensor, x0: Tensor, t: float) -> Tensor:
    alpha, sigma = schedule.levels(t, x_t)
    return (x_t - alpha * x0) / sigma


def stock_noise(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    monkeypatch.setattr(module, "randn_tensor", lambda *_args, **_options: FRESH)


# ---------------------------------------------------------------- against diffusers


@pytest.mark.parametrize(("t", "s"), [*JUMPS, (249, -1)])
def test_deterministic_is_ddim(t: int, s: int) -> None:
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=True)
    scheduler.num_inference_steps = 1
    scheduler.register_to_config(
        num_train_timesteps=t - s
    )  # it steps down by num_train_timesteps // num_inference_steps
    schedule = vp()
    expected = scheduler.step(eps_of(schedule, X_T, X0, t), t, X_T, eta=0.0).prev_sample
    step = Transition(TransitionKind.DETERMINISTIC)(schedule, X_T, X0, t, s)
    assert step.is_deterministic
    torch.testing.assert_close(step.mean, expected, **TOLERANCE)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("t", "s"), JUMPS[1:3])
def test_ancestral_is_ddim_with_eta(t: int, s: int, eta: float) -> None:
    scheduler = DDIMScheduler(**BETAS, clip_sample=False)
    scheduler.num_inference_steps = 4
    schedule = vp()
    out = eps_of(schedule, X_T, X0, t)
    expected = scheduler.step(out, t, X_T, eta=eta, variance_noise=FRESH).prev_sample
    step = Transition(TransitionKind.ANCESTRAL, eta)(schedule, X_T, X0, t, s)
    torch.testing.assert_close(step.sample(FRESH), expected, **TOLERANCE)
    assert float(step.std) == pytest.approx(eta * float(scheduler._get_variance(t, s)) ** 0.5, abs=1e-6)


@pytest.mark.parametrize(("t", "s"), JUMPS[:3])
def test_ancestral_is_euler_ancestral(t: int, s: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In variance-exploding coordinates y = x / alpha, sigma~ = sigma / alpha: mean and std of k-diffusion's step."""
    schedule, scheduler = vp(), EulerAncestralDiscreteScheduler(**BETAS)
    ve = [schedule.sigma(u) / schedule.alpha(u) for u in (t, s)]
    scheduler.timesteps, scheduler.sigmas = torch.tensor([float(t), float(s)]), torch.stack([*ve, ve[0] * 0])
    scheduler.num_inference_steps, scheduler.is_scale_input_called = 2, True
    out, y_t = eps_of(schedule, X_T, X0, t), X_T / schedule.alpha(t)
    got = []
    for fresh in (torch.zeros_like(X_T), torch.ones_like(X_T)):
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor", lambda *_a, f=fresh, **_o: f
        )
        scheduler._step_index = 0
        got.append(scheduler.step(out, scheduler.timesteps[0], y_t).prev_sample.double() * schedule.alpha(s))
    step = Transition(TransitionKind.ANCESTRAL, 1.0)(schedule, X_T, X0, t, s)
    torch.testing.assert_close(step.mean, got[0], **TOLERANCE)
    torch.testing.assert_close(step.std.expand_as(X_T), got[1] - got[0], **TOLERANCE)


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("prediction", [Prediction.EPSILON, Prediction.V, Prediction.SAMPLE])
def test_renoise_is_lcm(index: int, prediction: Prediction, monkeypatch: pytest.MonkeyPatch) -> None:
    """LCM's boundary scalings are the identity to 1e-6 at these times; its last step returns x0."""
    stock_noise(monkeypatch, scheduling_lcm)
    scheduler = LCMScheduler(**BETAS, prediction_type=prediction.value, clip_sample=False)
    scheduler.set_timesteps(timesteps=LADDER)
    schedule, t = vp(prediction), LADDER[index]
    s = [*LADDER, -1][index + 1]
    alpha, sigma = schedule.levels(t, X_T)
    out = from_x0_eps(X0, eps_of(schedule, X_T, X0, t), alpha, sigma, prediction)
    expected = scheduler.step(out, t, X_T).prev_sample
    torch.testing.assert_close(Transition()(schedule, X_T, X0, t, s).sample(FRESH), expected, **TOLERANCE)


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("gamma", [0.0, 0.2, 0.3, 0.8, 1.0])
def test_tcd_is_tcd(index: int, gamma: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step of the ladder, the last one onto timestep 0; 0.3 floors differently in float32, as the stock one does."""
    stock_noise(monkeypatch, scheduling_tcd)
    timesteps = [999, 750, 490, 250]
    scheduler = TCDScheduler(**BETAS)
    scheduler.set_timesteps(timesteps=timesteps)
    schedule, transition = vp(), Transition(TransitionKind.TCD, gamma)
    s = [*timesteps, transition.final_time(schedule)][index + 1]
    expected = scheduler.step(eps_of(schedule, X_T, X0, timesteps[index]), timesteps[index], X_T, eta=gamma).prev_sample
    step = transition(schedule, X_T, X0, timesteps[index], s)
    torch.testing.assert_close(step.sample(FRESH), expected, **TOLERANCE)


def test_tcd_floors_like_the_stock_scheduler() -> None:
    """floor((1 - eta) s) in float32, for every timestep: with eta = 0.3, 16 of them differ from float64."""
    schedule, s = vp(), torch.arange(1000)
    for eta in (0.1, 0.3, 0.8, 0.9):
        middle = torch.floor((1 - eta) * s).long()
        kept = Transition(TransitionKind.TCD, eta).kept_noise(schedule, 999, s)
        expected = schedule.alpha(s) / schedule.alpha(middle) * schedule.sigma(middle)
        torch.testing.assert_close(kept, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("t", "s"), [(1.0, 0.9), (0.9, 0.75), (0.5, 0.0)])
def test_deterministic_flow_is_euler(t: float, s: float) -> None:
    """x_s = x_t + (s - t) u, and FlowMatchEulerDiscreteScheduler."""
    schedule = flow()
    u = eps_of(schedule, X_T, X0, t) - X0
    step = Transition(TransitionKind.DETERMINISTIC)(schedule, X_T, X0, t, s)
    torch.testing.assert_close(step.mean, X_T + (s - t) * u, rtol=0, atol=1e-12)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[t, s] if s else [t])
    expected = scheduler.step(u, scheduler.timesteps[0], X_T).prev_sample
    torch.testing.assert_close(step.mean, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("gamma", "t", "s"), [(0.0, 0.9, 0.5), (0.3, 0.9, 0.5), (1.0, 1.0, 0.75), (0.3, 0.5, 0.0)])
def test_tcd_on_flow(gamma: float, t: float, s: float) -> None:
    """Jump to sigma' = (1 - gamma) s, then x_s = k x_sigma' + sqrt(s^2 - k^2 sigma'^2) n with k = (1 - s) / (1 - sigma')."""
    schedule, middle = flow(), (1 - gamma) * s
    jumped = X_T + (middle - t) * (eps_of(schedule, X_T, X0, t) - X0)
    k = (1 - s) / (1 - middle)
    step = Transition(TransitionKind.TCD, gamma)(schedule, X_T, X0, t, s)
    torch.testing.assert_close(step.mean, k * jumped, rtol=0, atol=1e-12)
    assert float(step.std) == pytest.approx(math.sqrt(max(s**2 - (k * middle) ** 2, 0)), abs=1e-12)


@pytest.mark.parametrize("name", ["v", "flow"])
def test_deterministic_is_a_trigflow_rotation(name: str) -> None:
    """X_R = cos(T - R) X_T - sin(T - R) F in coordinates X = x / sqrt(alpha^2 + sigma^2) (SANA-Sprint; unit data std)."""
    schedule = SCHEDULES[name]()
    t, s = (float(schedule.time_at_fraction(p)) for p in (0.8, 0.4))
    (alpha, sigma), angle = schedule.levels(t, X_T), schedule.angle(t) - schedule.angle(s)
    f = convert_prediction(X0, X_T, alpha, sigma, Prediction.SAMPLE, Prediction.TRIGFLOW)
    norms = [float((schedule.alpha(u) ** 2 + schedule.sigma(u) ** 2).sqrt()) for u in (t, s)]
    rotated = torch.cos(angle) * X_T / norms[0] - torch.sin(angle) * f
    step = Transition(TransitionKind.DETERMINISTIC)(schedule, X_T, X0, t, s)
    torch.testing.assert_close(step.mean / norms[1], rotated, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- identities


@pytest.mark.parametrize("transition", KINDS, ids=lambda k: f"{k.kind.value}-{k.strength}")
@pytest.mark.parametrize("name", SCHEDULES)
def test_marginal_noise_and_landing(name: str, transition: Transition) -> None:
    """c^2 + std^2 = sigma_s^2 with 0 <= c <= sigma_s for every ladder step, per-sample times; the clean end is x0."""
    schedule = SCHEDULES[name]()
    t = schedule.time_at_fraction(torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64))
    s = torch.cat([t[1:], torch.tensor([schedule.clean_time], dtype=torch.float64)])
    x_t, x0 = noise(4, 3), noise(4, 3, seed=1)
    kept, step = transition.kept_noise(schedule, t, s), transition(schedule, x_t, x0, t, s)
    std = step.std.flatten()
    torch.testing.assert_close(kept.square() + std.square(), schedule.sigma(s).square(), rtol=0, atol=1e-14)
    assert bool(((kept >= 0) & (kept <= schedule.sigma(s) + 1e-15)).all())
    eps = torch.stack([eps_of(schedule, x_t[i], x0[i], float(t[i])) for i in range(4)])
    expected = schedule.alpha(s)[:, None] * x0 + kept[:, None] * eps
    torch.testing.assert_close(step.mean, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(step.mean[-1], x0[-1], rtol=0, atol=1e-12)
    assert float(std[-1]) == 0


@pytest.mark.parametrize("name", ["eps", "flow"])
def test_true_noise_gives_the_marginal_of_s(name: str) -> None:
    """If x_t is a true noising of x0, then every transition's x_s has mean alpha_s x0 and std sigma_s."""
    schedule, eps = SCHEDULES[name](), noise(200_000, seed=3)
    t, s = (float(schedule.time_at_fraction(p)) for p in (0.9, 0.5))
    x0 = torch.full_like(eps, 1.5)
    x_t = schedule.add_noise(x0, eps, t)
    for transition in KINDS:
        x_s = transition(schedule, x_t, x0, t, s).sample(noise(200_000, seed=4))
        assert float(x_s.mean()) == pytest.approx(1.5 * float(schedule.alpha(s)), abs=0.01)
        assert float(x_s.std()) == pytest.approx(float(schedule.sigma(s)), abs=0.01)


@pytest.mark.parametrize("name", ["eps", "flow-shift-3"])
def test_ancestral_is_the_posterior(name: str) -> None:
    """q(x_s | x_t, x0) by Bayes from the kernel x_t = a x_s + b n and the marginal of x_s: the kernel's conditional."""
    schedule = SCHEDULES[name]()
    t, s = (float(schedule.time_at_fraction(p)) for p in (0.8, 0.4))
    a, b = (float(v) for v in schedule.kernel(s, t))
    alpha_s, sigma_s = float(schedule.alpha(s)), float(schedule.sigma(s))
    variance = 1 / (a**2 / b**2 + 1 / sigma_s**2)
    step = Transition(TransitionKind.ANCESTRAL, 1.0)(schedule, X_T, X0, t, s)
    torch.testing.assert_close(step.mean, variance * (a / b**2 * X_T + alpha_s / sigma_s**2 * X0), rtol=0, atol=1e-12)
    assert float(step.std) == pytest.approx(variance**0.5, abs=1e-13)


@pytest.mark.parametrize("name", ["eps", "v", "flow"])
def test_phased_targets(name: str) -> None:
    """Phased DMD's target inside (s, 1), from eps_eff = (sigma_t / sigma_{t|s}) eps, equals the closed forms of the paper:
    u: ((a_s^2 s_t + a_t s_s^2) / (a_s^2 s_ts)) eps - x_s / a_s;  x0: x_s / a_s - (a_t s_s^2 / (a_s^2 s_ts)) eps.
    """
    schedule = SCHEDULES[name]()
    s, t = (float(schedule.time_at_fraction(p)) for p in (0.4, 0.8))
    (a_s, s_s), (a_t, s_t), (a_ts, s_ts) = schedule.levels(s, X0), schedule.levels(t, X0), schedule.kernel(s, t)
    x_s, eps = X0, FRESH
    x_t, eps_eff = a_ts * x_s + s_ts * eps, s_t / s_ts * eps
    x0_eff = (x_t - s_t * eps_eff) / a_t
    expected = {
        Prediction.FLOW: (a_s**2 * s_t + a_t * s_s**2) / (a_s**2 * s_ts) * eps - x_s / a_s,
        Prediction.SAMPLE: x_s / a_s - a_t * s_s**2 / (a_s**2 * s_ts) * eps,
    }
    if not schedule.is_flow:
        expected[Prediction.V] = -s_t / a_s * x_s + a_t * s_t / s_ts * (1 + s_s**2 / a_s**2) * eps
    for prediction, target in expected.items():
        got = from_x0_eps(x0_eff, eps_eff, a_t, s_t, prediction)
        torch.testing.assert_close(got, target, rtol=0, atol=1e-10)


# ---------------------------------------------------------------- densities


def test_log_prob_equals_torch() -> None:
    for std in (torch.tensor(0.7).double(), torch.tensor([0.3, 2.0]).double()[:, None, None, None]):
        expected = torch.distributions.Normal(X0, std.expand_as(X0)).log_prob(X_T).flatten(1).sum(1)
        torch.testing.assert_close(Gaussian(X0, std).log_prob(X_T), expected, rtol=0, atol=1e-10)


def test_log_prob_differentiates_to_the_score() -> None:
    mean = X0.clone().requires_grad_()
    (grad,) = torch.autograd.grad(Gaussian(mean, torch.tensor(0.5).double()).log_prob(X_T).sum(), mean)
    torch.testing.assert_close(grad, (X_T - X0) / 0.25)


@pytest.mark.parametrize("transition", [t for t in KINDS if t.strength == 0 or t.kind is TransitionKind.DETERMINISTIC])
def test_deterministic_steps_refuse_log_prob(transition: Transition) -> None:
    step = transition(vp(), X_T, X0, 749, 499)
    assert step.is_deterministic
    with pytest.raises(UserError, match="renoise"):
        step.log_prob(X_T)


# ---------------------------------------------------------------- the walk


@pytest.mark.parametrize("transition", KINDS, ids=lambda k: f"{k.kind.value}-{k.strength}")
@pytest.mark.parametrize("name", ["eps", "flow"])
def test_walk(name: str, transition: Transition) -> None:
    """Steps chain from pure noise to the end; noise is drawn only where used; each step's density is that of its x_s."""
    schedule = SCHEDULES[name]()
    timesteps = tuple(schedule.time_at_fraction(torch.tensor([1.0, 0.6, 0.3], dtype=torch.float64)).tolist())
    drawn: list[int] = []

    def fresh(index: int) -> Tensor:
        drawn.append(index)
        return noise(2, 3, seed=index)

    def predict(x: Tensor, t: float) -> Tensor:
        return torch.tanh(x) * t / timesteps[0]

    steps: list[TrajectoryStep] = list(sample_trajectory(predict, schedule, noise(2, 3), timesteps, transition, fresh))
    stochastic = transition.kind is not TransitionKind.DETERMINISTIC and (
        transition.strength > 0 or transition.kind is TransitionKind.RENOISE
    )
    assert drawn == ([0, 1] if stochastic else [])
    assert [(step.t, step.s) for step in steps] == [
        *itertools.pairwise(timesteps),
        (timesteps[-1], transition.final_time(schedule)),
    ]
    torch.testing.assert_close(steps[0].x_t, noise(2, 3), rtol=0, atol=0)
    for before, after in itertools.pairwise(steps):
        assert after.x_t is before.x_s
    for step in steps:
        torch.testing.assert_close(step.x0, predict(step.x_t, step.t), rtol=0, atol=0)
    final = sample(predict, schedule, noise(2, 3), timesteps, transition, lambda index: noise(2, 3, seed=index))
    torch.testing.assert_close(final, steps[-1].x_s, rtol=0, atol=0)
    if transition.final_time(schedule) == schedule.clean_time:
        torch.testing.assert_close(final, steps[-1].x0, rtol=0, atol=1e-12)
