"""Conversions among prediction types: closed loops, known identities, guidance."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from support.toys import (
    SCHEDULES,
    ToyUNet,
    analytic_triple,
    flow,
    four_modes,
    gaussian,
    mixture_network,
    noise,
    prompts,
    unet,
    vp,
)
from torch import Tensor

from stepdistill.diffusion.prediction import Prediction, convert_prediction, from_x0_eps, guide, to_eps, to_x0
from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.diffusion.timesteps import student_timesteps
from stepdistill.errors import UserError
from stepdistill.families.analytic import Analytic
from stepdistill.families.conditioning import Conditioning
from stepdistill.roles.denoiser import Denoiser

ALL = list(Prediction)
LEVELS = [(name, t) for name in ("eps", "flow-shift-3") for t in student_timesteps(SCHEDULES[name](), 8)]


def close(actual: Tensor, expected: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def levels(name: str, t: float) -> tuple[Tensor, Tensor]:
    return SCHEDULES[name]().levels(t, noise(1))


@pytest.mark.parametrize(("name", "t"), LEVELS)
@pytest.mark.parametrize("source", ALL)
def test_closed_loop(source: Prediction, name: str, t: float) -> None:
    """From the truth to any type and back is the truth, at every ladder time."""
    alpha, sigma = levels(name, t)
    x0, eps = noise(2, 5), noise(2, 5, seed=1)
    x_t = alpha * x0 + sigma * eps
    out = from_x0_eps(x0, eps, alpha, sigma, source)
    if source is Prediction.EPSILON and alpha == 0:
        return  # refused when the schedule is built
    close(to_x0(out, x_t, alpha, sigma, source), x0)
    close(to_eps(out, x_t, alpha, sigma, source), eps)
    for target in ALL:
        if alpha > 0 or target is not Prediction.EPSILON:
            there = convert_prediction(out, x_t, alpha, sigma, source, target)
            close(convert_prediction(there, x_t, alpha, sigma, target, source), out)


def test_definitions() -> None:
    """out of each type for x0, eps: v (Salimans & Ho), u (Lipman et al.), F (TrigFlow) = v on the unit circle."""
    x0, eps = noise(4), noise(4, seed=1)
    for alpha, sigma in (levels("eps", 500), levels("flow", 0.3)):
        norm = (alpha**2 + sigma**2).sqrt()
        expected = {
            "epsilon": eps,
            "sample": x0,
            "v_prediction": alpha * eps - sigma * x0,
            "flow_prediction": eps - x0,
            "trigflow": (alpha * eps - sigma * x0) / norm,
        }
        for name, value in expected.items():
            close(from_x0_eps(x0, eps, alpha, sigma, Prediction.parse(name)), value)
    with pytest.raises(UserError, match="'score'"):
        Prediction.parse("score")


@pytest.mark.parametrize("name", ["eps", "flow"])
def test_one_network_read_in_five_ways(name: str) -> None:
    """Raw outputs of a random U-Net read as any type give a consistent (x0, eps) pair at x_t and return to themselves."""
    schedule, x_t = SCHEDULES[name](), noise(2, 4, 8, 8)
    t = schedule.time_at_fraction(torch.tensor([0.35, 0.8], dtype=torch.float64))
    cond = Conditioning(noise(2, 3, 16, seed=2))
    for prediction in ALL:
        reading = NoiseSchedule(prediction, schedule.angles)
        estimate = Denoiser(unet(), ToyUNet(), reading).estimate(x_t, t, cond)  # type: ignore[arg-type]
        alpha, sigma = reading.levels(t, x_t)
        close(alpha * estimate.x0 + sigma * estimate.eps, x_t)
        for target in ALL:
            there = convert_prediction(estimate.raw, x_t, alpha, sigma, prediction, target)
            close(to_x0(there, x_t, alpha, sigma, target), estimate.x0)
            close(to_eps(there, x_t, alpha, sigma, target), estimate.eps)


@pytest.mark.parametrize("name", ["eps", "flow"])
def test_every_type_of_gaussian_teacher_gives_the_same_x0(name: str) -> None:
    """E[x0 | x_t] = m + alpha std^2 / (alpha^2 std^2 + sigma^2) (x_t - alpha m), whatever the network predicts."""
    schedule, std, mean = SCHEDULES[name](), 0.5, torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    x_t = noise(6, 3, 1, 1)
    t = schedule.time_at_fraction(torch.linspace(0.05, 0.95, 6, dtype=torch.float64))
    alpha, sigma = schedule.levels(t, x_t)
    m = mean[:, None, None]
    expected = m + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x_t - alpha * m)
    for prediction in ALL:
        reading = NoiseSchedule(prediction, schedule.angles)
        denoiser = Denoiser(mixture_network(gaussian(mean, std), reading), Analytic(), reading)
        estimate = denoiser.estimate(x_t, t, prompts(6))
        close(estimate.x0, expected)
        close(estimate.eps, (x_t - alpha * expected) / sigma)
        close(denoiser.x0(x_t, t, prompts(6)), estimate.x0)
        close(denoiser.epsilon(x_t, t, prompts(6)), estimate.eps)
        velocity = Prediction.FLOW if schedule.is_flow else Prediction.V
        close(denoiser.velocity(x_t, t, prompts(6)), from_x0_eps(estimate.x0, estimate.eps, alpha, sigma, velocity))


@pytest.mark.parametrize("name", ["eps", "flow"])
def test_differences_at_one_point(name: str) -> None:
    """s_F - s_T = (alpha/sigma^2)(mu_F - mu_T); mu_F - mu_T = -(sigma/alpha) d_eps = -sigma d_v (VP) = -sigma d_u (flow)."""
    schedule, x_t = SCHEDULES[name](), noise(8, 2, 1, 1)
    alpha, sigma = schedule.levels(schedule.time_at_fraction(torch.linspace(0.1, 0.9, 8, dtype=torch.float64)), x_t)
    fake, real = noise(8, 2, 1, 1, seed=1), noise(8, 2, 1, 1, seed=2)  # x0 of two models

    def difference(target: Prediction) -> Tensor:
        both = [convert_prediction(x0, x_t, alpha, sigma, Prediction.SAMPLE, target) for x0 in (fake, real)]
        return both[0] - both[1]

    score = -difference(Prediction.EPSILON) / sigma
    close(score, alpha / sigma**2 * (fake - real))
    close(fake - real, -sigma / alpha * difference(Prediction.EPSILON))
    close(fake - real, -sigma * difference(Prediction.FLOW if schedule.is_flow else Prediction.V))


@pytest.mark.parametrize(("name", "prediction"), product(["eps", "flow"], ALL))
def test_guidance_is_the_same_in_every_space(name: str, prediction: Prediction) -> None:
    alpha, sigma = levels(name, 700 if name == "eps" else 0.7)
    x_t, uncond, cond = noise(2, 3), noise(2, 3, seed=1), noise(2, 3, seed=2)
    there = [convert_prediction(x0, x_t, alpha, sigma, Prediction.SAMPLE, prediction) for x0 in (uncond, cond)]
    close(to_x0(guide(*there, 7.5), x_t, alpha, sigma, prediction), uncond + 7.5 * (cond - uncond))


def of_classes(*rows: int) -> Conditioning:
    return Conditioning(torch.eye(4, dtype=torch.float64)[list(rows)][:, None])


@pytest.mark.parametrize("schedule", [vp, flow])
def test_guided_denoiser(schedule: Callable[[], NoiseSchedule]) -> None:
    """uncond + w (cond - uncond) in one batched call; w = 1 is off and calls the network on B rows only."""
    triple = analytic_triple(four_modes(), schedule())
    teacher, x_t, cond, null = triple.real_score, noise(3, 2, 1, 1), of_classes(0, 1, 3), prompts(3, 4)
    t = triple.schedule.time_at_fraction(torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64))
    plain, empty = teacher.x0(x_t, t, cond), teacher.x0(x_t, t, null)
    sizes: list[int] = []
    triple.base.register_forward_pre_hook(lambda _module, args: sizes.append(len(args[0])))
    close(teacher.guided(x_t, t, cond, null, 4.0), empty + 4 * (plain - empty))
    w = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    close(teacher.guided(x_t, t, cond, null, w), empty + w[:, None, None, None] * (plain - empty))
    close(teacher.guided(x_t, t, cond, null, 1.0), plain, 0)
    assert sizes == [6, 6, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conditional_mixture_does_not_leak(dtype: torch.dtype) -> None:
    """At little noise and near another mode, the teacher of class 0 still speaks of class 0: m_0 + gain (x_t - alpha m_0)."""
    mixture, schedule = four_modes(std=0.05), vp()
    x_t = mixture.means[2:3, :, None, None].to(dtype)
    denoiser = Denoiser(mixture_network(mixture, schedule).to(dtype), Analytic(), schedule)
    alpha, sigma = schedule.levels(5, x_t)
    m = mixture.means[0:1, :, None, None].to(dtype)
    expected = m + alpha * 0.05**2 / (alpha**2 * 0.05**2 + sigma**2) * (x_t - alpha * m)
    close(denoiser.x0(x_t, 5, of_classes(0)), expected, 1e-4 if dtype == torch.float32 else 1e-10)
