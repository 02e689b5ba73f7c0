"""Noise schedules against diffusers' tables and closed forms."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from support.toys import SCHEDULES, SD, flow, noise, vp

from stepdistill.diffusion.prediction import Prediction
from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.errors import UserError

LINEAR = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
CONFIGS: dict[str, dict[str, Any]] = {
    "linear": LINEAR,
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
    "trained_betas": {"trained_betas": np.linspace(1e-3, 0.3, 50).tolist(), "num_train_timesteps": 50},
    "other-length": {**LINEAR, "num_train_timesteps": 200},
    "zero-snr": {**SD, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "zero-snr-linear": {**LINEAR, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_levels_equal_diffusers(name: str) -> None:
    """diffusers holds alphas_cumprod in float32, hence 1e-6; the config passes through JSON as in a checkpoint."""
    config = {key: value for key, value in CONFIGS[name].items() if key != "_class_name"}
    scheduler = DDIMScheduler(**config)
    schedule = NoiseSchedule.from_config(json.loads(json.dumps(dict(scheduler.config), default=list)))
    t = torch.arange(scheduler.config.num_train_timesteps)
    bar = scheduler.alphas_cumprod.double()
    # the float32 product of up to 1000 factors is what is inexact here
    torch.testing.assert_close(schedule.alpha(t).square(), bar, rtol=3e-5, atol=1e-7)
    torch.testing.assert_close(schedule.sigma(t).square(), 1 - bar, rtol=3e-5, atol=1e-6)
    assert schedule.train_steps == len(bar) == schedule.terminal_time + 1


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_levels_to_the_last_bit(name: str) -> None:
    """alpha^2 = prod (1 - beta) in float64, from the betas that diffusers computed."""
    betas = DDPMScheduler(**CONFIGS[name]).betas
    schedule = NoiseSchedule.vp(betas, Prediction.V)
    expected = np.cumprod(1 - betas.double().numpy())
    np.testing.assert_allclose(schedule.alpha(torch.arange(1000)).numpy() ** 2, expected, rtol=1e-11)


@pytest.mark.parametrize(
    ("t", "alpha", "sigma", "snr"),
    [
        (999, 0.0683, 0.9977, 0.0047),
        (749, 0.2380, 0.9713, 0.060),
        (499, 0.5269, 0.8499, 0.384),
        (399, 0.6528, 0.7576, 0.742),
        (249, 0.8218, 0.5697, 2.08),
        (20, 0.9906, 0.1367, 52.5),
    ],
)
def test_published_levels_of_stable_diffusion(t: int, alpha: float, sigma: float, snr: float) -> None:
    schedule = vp()
    assert float(schedule.alpha(t)) == pytest.approx(alpha, abs=5e-5)
    assert float(schedule.sigma(t)) == pytest.approx(sigma, abs=5e-5)
    assert float(schedule.snr(t)) == pytest.approx(snr, rel=1e-2)
    assert float(schedule.log_snr(t)) == pytest.approx(np.log(float(schedule.snr(t))), abs=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_continuous_time(name: str) -> None:
    """Monotone, on the unit circle for VP, alpha + sigma = 1 for flow, clean at the clean end, time <-> angle inverse."""
    schedule = SCHEDULES[name]()
    t = torch.linspace(schedule.clean_time, schedule.terminal_time, 3001, dtype=torch.float64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    assert bool((alpha.diff() < 0).all())
    assert bool((sigma.diff() > 0).all())
    total = alpha + sigma if schedule.is_flow else alpha.square() + sigma.square()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-14)
    assert (float(alpha[0]), float(sigma[0])) == (1.0, 0.0)
    torch.testing.assert_close(schedule.time_at_angle(schedule.angle(t)), t, rtol=0, atol=1e-9)
    torch.testing.assert_close(schedule.angle(t), torch.atan2(sigma, alpha), rtol=0, atol=1e-14)


def test_vp_between_integer_timesteps() -> None:
    """Linear in the TrigFlow angle; beyond the last timestep's angle there is nothing to find."""
    schedule = vp()
    middle = (schedule.angle(499) + schedule.angle(500)) / 2
    assert float(schedule.angle(499.5)) == pytest.approx(float(middle), abs=1e-15)
    assert float(schedule.time_at_angle(torch.pi / 2)) == 999
    assert float(schedule.angle(999)) == pytest.approx(1.5025, abs=1e-4)
    assert float(schedule.angle(0)) == pytest.approx(0.0292, abs=1e-4)


def test_python_times_keep_float64() -> None:
    """0.9 as a Python number is 0.9, not float32's 0.89999998."""
    assert float(flow().sigma(0.9)) == 0.9
    assert float(flow(3.0).time_at_fraction(0.1)) == pytest.approx(0.25, abs=1e-16)
    assert float(vp().angle(0.1)) == float(vp().angle(torch.tensor(0.1, dtype=torch.float64)))


def test_zero_terminal_snr() -> None:
    """Lin et al. 2023: alpha is exactly 0 at the last timestep, unchanged at the first; v still gives x0 = -v there."""
    schedule = vp(Prediction.V, rescale_betas_zero_snr=True)
    assert schedule.zero_terminal_snr
    assert (float(schedule.alpha(999)), float(schedule.sigma(999))) == (0.0, 1.0)
    assert float(schedule.alpha(0)) == pytest.approx(float(vp().alpha(0)), abs=1e-14)
    assert float(schedule.alpha(998)) > 0
    assert float(schedule.snr(999)) == 0
    assert flow().zero_terminal_snr
    assert not vp().zero_terminal_snr


def test_zero_terminal_snr_refuses_epsilon() -> None:
    with pytest.raises(UserError, match=r"zero terminal SNR.*v_prediction"):
        vp(Prediction.EPSILON, rescale_betas_zero_snr=True)


@pytest.mark.parametrize(("key", "value"), [("beta_schedule", "sigmoid"), ("prediction_type", "score")])
def test_unknown_configs_are_refused(key: str, value: str) -> None:
    with pytest.raises(UserError, match=value):
        NoiseSchedule.from_config({**SD, key: value})


FRACTIONS = np.array([1.0, 0.75, 0.5, 0.25, 0.1])


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_static_flow_shift_equals_diffusers(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=FRACTIONS.tolist())
    schedule = NoiseSchedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", **scheduler.config})
    times = schedule.time_at_fraction(torch.from_numpy(FRACTIONS))
    torch.testing.assert_close(times, scheduler.sigmas[:-1].double(), rtol=0, atol=1e-7)
    torch.testing.assert_close(schedule.fraction_at(times), torch.from_numpy(FRACTIONS), rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("tokens", [256, 1024, 1560, 4096])
def test_dynamic_flow_shift_equals_diffusers(kind: str, tokens: int) -> None:
    """As the Flux pipeline calls it: mu is linear in the number of image tokens."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind, shift=3.0)
    scheduler.set_timesteps(sigmas=FRACTIONS.tolist(), mu=0.5 + (1.15 - 0.5) / (4096 - 256) * (tokens - 256))
    dynamic = NoiseSchedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", **scheduler.config})
    schedule = dynamic.for_tokens(tokens)
    assert schedule.dynamic_shift is None
    assert schedule.for_tokens(17) is schedule
    times = schedule.time_at_fraction(torch.from_numpy(FRACTIONS))
    torch.testing.assert_close(times, scheduler.sigmas[:-1].double(), rtol=0, atol=2e-7)


def test_vp_fractions() -> None:
    """Fraction p is timestep floor(p N), capped at N - 1; every timestep survives the way there and back."""
    for steps in (1000, 49):
        schedule, t = NoiseSchedule.vp(torch.full((steps,), 0.01), Prediction.V), torch.arange(steps).double()
        torch.testing.assert_close(schedule.time_at_fraction(schedule.fraction_at(t)), t, rtol=0, atol=0)
    assert [float(vp().time_at_fraction(p)) for p in (0.0, 0.02, 0.98, 1.0)] == [0, 20, 980, 999]


@pytest.mark.parametrize("name", SCHEDULES)
def test_two_noisings_are_one(name: str) -> None:
    """x_t | x_s composed with x_s | x_r is x_t | x_r: ratios multiply and variances add; from clean it is (alpha, sigma)."""
    schedule = SCHEDULES[name]()
    r, s, t = schedule.time_at_fraction(torch.tensor([0.1, 0.45, 0.9], dtype=torch.float64))
    (a, b), (c, d), (e, f) = schedule.kernel(r, s), schedule.kernel(s, t), schedule.kernel(r, t)
    assert float(c * a) == pytest.approx(float(e), abs=1e-14)
    assert float((c * b).square() + d.square()) == pytest.approx(float(f.square()), abs=1e-14)
    clean = schedule.kernel(schedule.clean_time, t)
    assert [float(v) for v in clean] == pytest.approx([float(schedule.alpha(t)), float(schedule.sigma(t))], abs=1e-14)
    assert [float(v) for v in schedule.kernel(t, t)] == pytest.approx([1, 0], abs=1e-7)


def test_noising_equals_diffusers() -> None:
    x0, eps, t = noise(3, 4, 2, 2), noise(3, 4, 2, 2, seed=1), torch.tensor([5, 500, 999])
    scheduler = DDPMScheduler(**CONFIGS["scaled_linear"])
    torch.testing.assert_close(vp().add_noise(x0, eps, t), scheduler.add_noise(x0, eps, t), rtol=0, atol=1e-5)
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    euler.set_timesteps(sigmas=FRACTIONS.tolist())
    chosen = euler.timesteps[[0, 2, 3]]
    expected = euler.scale_noise(x0, chosen, eps)
    torch.testing.assert_close(flow(3.0).add_noise(x0, eps, chosen / 1000), expected, rtol=0, atol=1e-6)


def test_noising_in_half_precision_is_done_in_float32() -> None:
    x0, eps = noise(2, 4).bfloat16(), noise(2, 4, seed=1).bfloat16()
    x_t = vp().add_noise(x0, eps, torch.tensor([20, 980]))
    assert x_t.dtype == torch.float32
    torch.testing.assert_close(
        x_t.double(), vp().add_noise(x0.double(), eps.double(), torch.tensor([20, 980])), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "KarrasVeScheduler"])
def test_schedules_that_are_not_given_by_betas_are_refused(name: str) -> None:
    with pytest.raises(
        UserError, match=f"the checkpoint's scheduler is {name}, whose noise levels are not those of betas"
    ):
        NoiseSchedule.from_config({"_class_name": name, "sigma_max": 120.0, "prediction_type": "v_prediction"})
