"""What tests of the discrete consistency methods share: the methods, exact maps of a Gaussian, batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.families.conditioning import Conditioning
from stepdistill.methods.base import Batch, Progress
from stepdistill.methods.consistency.cm import CM, CMConfig
from stepdistill.methods.consistency.discrete import Consistency, ConsistencyRollout
from stepdistill.methods.consistency.lcm import LCM, LCMConfig
from stepdistill.methods.consistency.pcm import PCM, PCMConfig
from stepdistill.methods.consistency.tcd import TCD, TCDConfig
from stepdistill.methods.consistency.tscd import TSCD, TSCDConfig
from support.toys import (
    DIMENSION,
    SD,
    analytic_triple,
    draws,
    gaussian,
    noise,
    problem,
    prompts,
)

BETAS = {key: value for key, value in SD.items() if key != "_class_name"}
FIRST = Progress()
MEAN, STD = torch.tensor([0.6, -0.3, 0.2], dtype=torch.float64), 0.9
COUNT = 64
MAKERS: dict[str, Callable[..., Consistency[Any]]] = {
    "lcm": lambda s, **o: LCM(LCMConfig(guidance=1.0, **o), problem(s)),
    "tcd": lambda s, **o: TCD(TCDConfig(guidance=1.0, **o), problem(s)),
    "pcm": lambda s, **o: PCM(PCMConfig(guidance=1.0, **o), problem(s)),
    "tscd": lambda s, **o: TSCD(TSCDConfig(guidance=1.0, **{"target": "student", **o}), problem(s)),
    "cm": lambda s, **o: CM(CMConfig(guidance=1.0, **{"target": "student", **o}), problem(s)),
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


def rollout_of(
    method: Consistency[Any], triple: Any = None, batch: Batch | None = None, progress: Progress = FIRST
) -> ConsistencyRollout:
    triple = triple or analytic_triple(gaussian(MEAN, STD), method.schedule)
    batch = batch or images()
    return method.rollout(batch, triple, progress, draws(range(len(batch))))


def residual(method: Consistency[Any], rollout: ConsistencyRollout) -> float:
    """Largest |f(x_s, s -> r) - target| over the spread of the data."""
    reached = method.consistency_function(rollout.x_t, rollout.x0, rollout.t, rollout.r)
    return float((reached - rollout.target).abs().max()) / STD


def with_the_exact_map(method: Consistency[Any]) -> Consistency[Any]:
    method.consistency_function = lambda x_t, x0, t, r: exact(method.schedule, x_t, t, r)  # type: ignore[method-assign]
    return method


def modes(count: int = 16) -> Batch:
    """Images of four modes with prompts of their own."""
    cond = Conditioning(torch.eye(4, dtype=torch.float64).repeat(count // 4, 1)[:, None])
    return Batch(prompts(count, 4), prompts(count, 4), images=noise(count, 2, 1, 1, seed=5), image_cond=cond)


def on_modes(name: str, schedule: NoiseSchedule, **options: Any) -> Consistency[Any]:
    made = MAKERS[name](schedule, **options)
    return type(made)(made.config.model_copy(update={"guidance": 2.5}), problem(schedule, 2))
