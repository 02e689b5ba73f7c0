"""The TrigFlow bridge: exact in both directions for VP and flow, and its derivatives are those of the network itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.tiny_checkpoints import load
from support.toys import DIMENSION, SCHEDULES, disturb, four_modes, mixture_network, noise, prompts, unet_triple, vp
from torch import Tensor

from stepdistill.config.registry import load_family
from stepdistill.diffusion.prediction import Prediction, from_x0_eps
from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.diffusion.timesteps import trailing_timesteps
from stepdistill.diffusion.trigflow import TrigFlow
from stepdistill.families.analytic import Analytic
from stepdistill.families.conditioning import Conditioning, MicroConditioning
from stepdistill.roles.denoiser import Denoiser
from stepdistill.roles.sampler import teacher_sample
from stepdistill.roles.triple import GENERATOR

ZERO_SNR = {"zsnr": lambda: vp(Prediction.V, rescale_betas_zero_snr=True)}
ALL: dict[str, Callable[[], NoiseSchedule]] = {**SCHEDULES, **ZERO_SNR}


@pytest.fixture(params=ALL)
def trigflow(request: pytest.FixtureRequest) -> TrigFlow:
    return TrigFlow(ALL[request.param]())


def angles(trigflow: TrigFlow, count: int = 7) -> Tensor:
    """Within the network's range, its ends included."""
    return torch.linspace(trigflow.min_angle, trigflow.max_angle, count, dtype=torch.float64)


def test_an_exact_network_is_an_exact_trigflow_network(trigflow: TrigFlow) -> None:
    """The states, F and x0 that its definition gives, from a network that knows x0 and eps."""
    x0, eps, angle = noise(7, 3), noise(7, 3, seed=1), angles(trigflow)
    schedule = trigflow.schedule
    x = trigflow.state(x0, eps, angle)
    x_t, t = trigflow.native(x, angle)
    assert torch.allclose(x_t, schedule.add_noise(x0, eps, t), atol=1e-12)
    assert torch.allclose(schedule.angle(t), angle, atol=1e-12)
    raw = from_x0_eps(x0, eps, *schedule.levels(t, x0), schedule.prediction)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    velocity = trigflow.velocity(raw, x_t, angle)
    # an epsilon network's F is what it said over alpha
    assert torch.allclose(velocity, cos * eps - sin * x0, atol=1e-11)
    assert torch.allclose(trigflow.x0(x, velocity, angle), x0, atol=1e-11)
    assert torch.allclose(trigflow.velocity_from_x0(x0, x, angle), cos * eps - sin * x0, atol=1e-9)
    assert torch.allclose(trigflow.step(x, velocity, angle, 0.3), trigflow.state(x0, eps, 0.3), atol=1e-11)
    back, found = trigflow.from_native(x_t, t)
    assert torch.allclose(back, x, atol=1e-12)
    assert torch.allclose(found, angle, atol=1e-12)


@pytest.mark.parametrize("name", ["eps", "v"])
def test_the_velocity_of_vp_is_v(name: str) -> None:
    trigflow = TrigFlow(SCHEDULES[name]())
    denoiser = Denoiser(mixture_network(four_modes(), trigflow.schedule), Analytic(), trigflow.schedule)
    x, angle, cond = noise(7, 2, 1, 1), angles(trigflow), prompts(7, 4)
    x_t, t = trigflow.native(x, angle)
    assert torch.allclose(denoiser.trigflow(trigflow, x, angle, cond), denoiser.velocity(x_t, t, cond), atol=1e-10)


def test_the_velocity_of_flow_is_sana_sprints_formula() -> None:
    """F = ((1 - 2t) x_t + (1 - 2t + 2t^2) u) / sqrt(t^2 + (1 - t)^2)   (arXiv 2503.09641, eq. 6 to 8)."""
    trigflow = TrigFlow(SCHEDULES["flow-shift-3"]())
    x_t, u, angle = noise(7, 3), noise(7, 3, seed=1), angles(trigflow)
    t = (angle.sin() / (angle.sin() + angle.cos()))[:, None]
    theirs = ((1 - 2 * t) * x_t + (1 - 2 * t + 2 * t**2) * u) / (t**2 + (1 - t) ** 2).sqrt()
    assert torch.allclose(trigflow.velocity(u, x_t, angle), theirs, atol=1e-12)
    assert torch.allclose(trigflow.native(x_t, angle)[1][:, None], t, atol=1e-12)


def rotated(
    denoiser: Denoiser, trigflow: TrigFlow, cond: Conditioning, null: Conditioning, eps: Tensor, w: float
) -> Tensor:
    """The guided teacher walked as a TrigFlow network, in 50 rotations."""
    timesteps = trailing_timesteps(denoiser.schedule, 50)
    x, _ = trigflow.from_native(eps, timesteps[0])
    for t, s in zip(timesteps, [*timesteps[1:], denoiser.schedule.clean_time], strict=True):
        angle, to = denoiser.schedule.angle(t), denoiser.schedule.angle(s)
        both = [denoiser.trigflow(trigflow, x, angle, told) for told in (null, cond)]
        x = trigflow.step(x, both[0] + w * (both[1] - both[0]), angle, to)
    return x / trigflow.sigma_data


def test_a_converted_teachers_samples_are_the_teachers(trigflow: TrigFlow) -> None:
    denoiser = Denoiser(mixture_network(four_modes(), trigflow.schedule), Analytic(), trigflow.schedule)
    eps, null = noise(6, 2, 1, 1), prompts(6, 4)
    cond = Conditioning(torch.eye(4, dtype=torch.float64)[[0, 1, 2, 3, 0, 1]][:, None])
    with torch.no_grad():
        theirs = teacher_sample(denoiser, cond, null, eps, 50, 2.0)
        ours = rotated(denoiser, trigflow, cond, null, eps, 2.0)
    assert float((ours - theirs).abs().max()) < 1e-9


@pytest.mark.parametrize(("family", "variant"), [("sd", "default"), ("sd", "zsnr")])
def test_a_converted_checkpoints_samples_are_its_own(tiny: Callable[..., Path], family: str, variant: str) -> None:
    """In float32, where an epsilon network's x0 at the last timestep is 15 times as inexact as what it said."""
    checkpoint = load(tiny(family, variant))
    told, schedule = load_family(family), checkpoint.info.schedule
    denoiser, size = (
        Denoiser(checkpoint.network, told, schedule),
        MicroConditioning.plain(*checkpoint.info.default_size),
    )
    cond, null = told.encode(checkpoint, ["a red cat"], [size]), told.null(checkpoint, [size])
    eps = noise(1, *checkpoint.info.latent_shape()).float()
    with torch.no_grad():
        theirs = teacher_sample(denoiser, cond, null, eps, 50, 3.0)
        ours = rotated(denoiser, TrigFlow(schedule), cond, null, eps, 3.0)
    assert float((ours - theirs).abs().max()) < 1e-3 * float(theirs.abs().max())


# ---------------------------------------------------------------- derivatives


def central(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, angle: Tensor, dx: Tensor, da: Tensor) -> Tensor:
    """Fourth-order central difference along (dx, da)."""
    h = 1e-3
    at = {k: function(x + k * h * dx, angle + k * h * da) for k in (-2, -1, 1, 2)}
    return (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * h)


@pytest.mark.parametrize("mlp", [0.0, 0.3])
def test_jvp_of_the_analytic_teacher_and_an_mlp(trigflow: TrigFlow, mlp: float) -> None:
    """Differences stay within one timestep of a VP table, which is linear there."""
    network = mixture_network(four_modes(std=0.8), trigflow.schedule)
    for index, parameter in enumerate(network.parameters()):
        parameter.data += mlp * noise(*parameter.shape, seed=index)
    denoiser = Denoiser(network, Analytic(), trigflow.schedule)
    x, dx, cond = noise(6, 2, 1, 1), noise(6, 2, 1, 1, seed=1), prompts(6, 4)
    if trigflow.schedule.is_flow:
        angle, step = torch.linspace(0.1, 1.5, 6, dtype=torch.float64), 1.0
    else:
        angle = trigflow.schedule.angle(torch.tensor([20.5, 200.5, 400.5, 600.5, 800.5, 900.5], dtype=torch.float64))
        step = 0.1
    da = torch.full((6,), step, dtype=torch.float64)

    def function(x: Tensor, angle: Tensor) -> Tensor:
        return denoiser.trigflow(trigflow, x, angle, cond)

    value, tangent = denoiser.jvp(function, (x, angle), (dx, da))
    with torch.no_grad():
        assert torch.equal(value, function(x, angle))
        expected = central(function, x, angle, dx, da)
    assert float((tangent - expected).abs().max()) < 1e-8 * max(1.0, float(expected.abs().max()))
    assert not tangent.requires_grad


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_jvp_of_a_unet_and_its_adapter(mode: str) -> None:
    """In x to 1e-8 in float64. In t diffusers embeds time in float32: 2e-3 of a difference over a hundredth of a timestep,
    since the embedding's fastest wave is 2 pi timesteps long."""
    triple = unet_triple(mode, mode)
    disturb(triple)
    triple.enable_gradient_checkpointing()
    trigflow, cond = TrigFlow(triple.schedule), Conditioning(noise(2, 5, 16, seed=3))
    x, dx = noise(2, 4, 8, 8), noise(2, 4, 8, 8, seed=1)
    angle = triple.schedule.angle(torch.tensor([200.5, 700.5], dtype=torch.float64))
    still = torch.zeros_like(angle)
    # the angle that a timestep takes
    moving = triple.schedule.angle(torch.tensor([201.0, 701.0])) - triple.schedule.angle(torch.tensor([200.0, 700.0]))

    def function(x: Tensor, angle: Tensor) -> Tensor:
        return triple.generator.trigflow(trigflow, x, angle, cond)

    _, in_x = triple.generator.jvp(function, (x, angle), (dx, still))
    _, in_t = triple.generator.jvp(function, (x, angle), (torch.zeros_like(dx), moving))
    with torch.no_grad():
        assert float((in_x - central(function, x, angle, dx, still)).abs().max()) < 1e-8
        h = 1e-2
        difference = (function(x, angle + h * moving) - function(x, angle - h * moving)) / (2 * h)
        teacher = triple.real_score.trigflow(trigflow, x, angle, cond)
        assert float((teacher - function(x, angle)).abs().max()) > 1e-3
    assert float((in_t - difference).norm() / difference.norm()) < 2e-3
    # after it everything is as before: a graph, fused attention, no gradient left anywhere
    function(x, angle).square().sum().backward()
    assert all(p.grad is not None for p in triple.network_parameters(GENERATOR).values())


@pytest.mark.parametrize("name", ["eps", "zsnr"])
def test_derivatives_flow_through_the_time_of_a_table(name: str) -> None:
    """The map from angles to timesteps has the slope of its table."""
    trigflow = TrigFlow(ALL[name]())
    angle = trigflow.schedule.angle(torch.tensor([10.5, 500.5, 900.5], dtype=torch.float64)).requires_grad_()
    (slope,) = torch.autograd.grad(trigflow.native(noise(3, DIMENSION), angle)[1].sum(), angle)
    table = trigflow.schedule.angle(torch.tensor([[10.0, 500.0, 900.0], [11.0, 501.0, 901.0]], dtype=torch.float64))
    assert torch.allclose(slope, 1 / (table[1] - table[0]), rtol=1e-9)


def test_ends_of_the_range() -> None:
    assert TrigFlow(SCHEDULES["flow"]()).max_angle == pytest.approx(math.pi / 2)
    sd = TrigFlow(vp())
    assert (round(sd.min_angle, 4), round(sd.max_angle, 4)) == (0.0292, 1.5025)
