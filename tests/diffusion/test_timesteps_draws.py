"""Ladders, noise levels and random streams."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from support.toys import SD, flow, vp

from stepdistill.diffusion.draws import Draws, derive_seed
from stepdistill.diffusion.prediction import Prediction
from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.diffusion.timesteps import NoiseLevels, student_timesteps, trailing_timesteps
from stepdistill.errors import UserError

# ---------------------------------------------------------------- ladders


@pytest.mark.parametrize(
    ("steps", "timesteps"),
    [
        (1, [999]),
        (2, [999, 499]),
        (3, [999, 666, 333]),
        (4, [999, 749, 499, 249]),
        (5, [999, 799, 599, 399, 199]),
        (6, [999, 833, 667, 501, 335, 169]),
        (7, [999, 857, 715, 573, 431, 289, 147]),
        (8, [999, 874, 749, 624, 499, 374, 249, 124]),
    ],
)
def test_dmd2_ladders(steps: int, timesteps: list[int]) -> None:
    """From N - 1 down by floor(N / steps), as in DMD2's released code, cut to exactly `steps` entries."""
    assert list(student_timesteps(vp(), steps)) == timesteps


@pytest.mark.parametrize(
    ("shift", "timesteps"), [(1.0, [1, 0.75, 0.5, 0.25]), (3.0, [1, 0.9, 0.75, 0.5]), (5.0, [1, 0.9375, 5 / 6, 0.625])]
)
def test_flow_ladders(shift: float, timesteps: list[float]) -> None:
    """s p / (1 + (s - 1) p) of p = 1, .75, .5, .25."""
    assert student_timesteps(flow(shift), 4) == pytest.approx(timesteps, abs=1e-15)
    assert trailing_timesteps(flow(shift), 4) == student_timesteps(flow(shift), 4)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 7, 8, 10, 25, 30, 50, 100])
def test_trailing_ladder_equals_diffusers(steps: int) -> None:
    scheduler = DDIMScheduler(**{k: v for k, v in SD.items() if k != "_class_name"}, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    assert trailing_timesteps(vp(), steps) == tuple(scheduler.timesteps.tolist())


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_ladders_are_refused(steps: int) -> None:
    with pytest.raises(UserError, match=str(steps)):
        student_timesteps(vp(), steps)


def test_ladder_of_another_length() -> None:
    """Nothing assumes 1000 steps."""
    assert student_timesteps(NoiseSchedule.vp(torch.full((200,), 0.01), Prediction.V), 4) == (199, 149, 99, 49)


# ---------------------------------------------------------------- noise levels

EVEN = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000


@pytest.mark.parametrize(
    ("low", "high", "first", "last"), [(0.02, 0.98, 20, 980), (0.0, 1.0, 0, 999), (0.5, 0.51, 500, 510)]
)
def test_vp_levels_are_uniform_integers(low: float, high: float, first: int, last: int) -> None:
    """U{20..980} for DMD's matching, U{0..999} for the fake score: both ends occur, all equally often."""
    values, counts = NoiseLevels(low, high).times(vp(), EVEN).unique(return_counts=True)
    assert values.tolist() == list(range(first, last + 1))
    assert int(counts.max() - counts.min()) <= 1
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert NoiseLevels(low, high).times(vp(), ends).tolist() == [first, last]


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_levels_are_uniform_before_the_shift(shift: float) -> None:
    t = NoiseLevels(0.02, 0.98).times(flow(shift), EVEN)
    p = flow(shift).fraction_at(t)
    torch.testing.assert_close(p, 0.02 + 0.96 * EVEN, rtol=0, atol=1e-12)
    assert float(NoiseLevels().times(flow(), torch.zeros(1))) == pytest.approx(1e-3)  # never exactly clean


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.7)])
def test_logit_normal_levels(mean: float, std: float) -> None:
    """logit p ~ N(mean, std) (Esser et al. 2024): quantiles at 1, 0 and -1 standard deviations."""
    levels = NoiseLevels(shape="logit_normal", mean=mean, std=std)
    quantiles = torch.special.ndtr(torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64))
    p = levels.times(flow(), quantiles)
    torch.testing.assert_close(p.logit(), mean + std * torch.tensor([-1.0, 0, 1]).double(), rtol=0, atol=1e-10)
    clamped = NoiseLevels(0.3, 0.6, "logit_normal").times(vp(), EVEN)
    assert (float(clamped.min()), float(clamped.max())) == (300, 600)
    assert torch.isfinite(levels.times(flow(), torch.tensor([0.0, 1.0]))).all()


# ---------------------------------------------------------------- draws


def make(samples: list[int] | None = None, **changes: object) -> Draws:
    return Draws(**{"seed": 0, "step": 3, "role": "generator", "samples": samples or [0, 1, 2, 3], **changes})  # type: ignore[arg-type]


def test_draws_do_not_depend_on_the_layout() -> None:
    """A batch of 4 draws what four batches of 1 draw, in any order."""
    whole = make()
    for index in (2, 0, 3, 1):
        part = make([index])
        assert torch.equal(part.normal("eps", (2, 5))[0], whole.normal("eps", (2, 5))[index])
        assert torch.equal(part.uniform("t")[0], whole.uniform("t")[index])
        assert part.batch_integer("exit", 1000) == whole.batch_integer("exit", 1000)
        assert part.batch_uniform("phase") == whole.batch_uniform("phase")


@pytest.mark.parametrize(
    "draw", [lambda d: d.uniform("t").tolist(), lambda d: d.batch_uniform("t"), lambda d: d.batch_integer("t", 10**9)]
)
def test_seeds_steps_roles_and_purposes_differ(draw: Callable[[Draws], object]) -> None:
    variants = [make(), make(seed=1), make(step=4), make(role="fake_score")]
    drawn = [str(draw(variant)) for variant in variants]
    assert len(set(drawn)) == len(drawn)
    assert make().uniform("t").tolist() != make().uniform("u").tolist()
    assert draw(make(role="fake_score").for_role("generator")) == draw(make())
    assert len(set(make().uniform("t").tolist())) == 4


def test_float32_is_float64_rounded() -> None:
    double = make(dtype=torch.float64).normal("eps", (7,))
    assert double.dtype == torch.float64
    assert torch.equal(make().normal("eps", (7,)), double.float())
    assert torch.equal(make(dtype=torch.bfloat16).normal("eps", (7,)), double.bfloat16())
    assert make().uniform("t").dtype == torch.float64


def test_statistics() -> None:
    """20,000 streams of one number, and of 8: moments and Kolmogorov distance of a standard normal and a uniform."""
    many = make(list(range(20_000)), dtype=torch.float64)
    for values in (many.normal("eps", (8,)).flatten(), many.normal("eps", (1,)).flatten()):
        ranks = torch.special.ndtr(values).sort().values.numpy()
        assert np.abs(ranks - (np.arange(len(ranks)) + 0.5) / len(ranks)).max() < 1.63 / len(ranks) ** 0.5
    uniform = many.uniform("t").sort().values.numpy()
    assert np.abs(uniform - (np.arange(20_000) + 0.5) / 20_000).max() < 1.63 / 20_000**0.5
    pairs = many.normal("eps", (2,))
    assert abs(float(torch.corrcoef(pairs.T)[0, 1])) < 0.03
    assert abs(float(torch.corrcoef(torch.stack([pairs[:-1, 0], pairs[1:, 0]]))[0, 1])) < 0.03


def test_batch_draws_cover_their_range() -> None:
    drawn = [make(step=step).batch_integer("exit", 4) for step in range(400)]
    counts = np.bincount(drawn, minlength=4)
    assert len(counts) == 4
    assert counts.min() > 70


def test_seeds_are_stable() -> None:
    """Written down once: a run must draw the same numbers on every platform and version."""
    assert derive_seed(0, 3, "generator", "eps", 2) == 8976054237966648107
    assert derive_seed("a", "b") != derive_seed("ab")
