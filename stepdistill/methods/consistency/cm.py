"""CM: Consistency Models (Song et al., ICML 2023, arXiv 2303.01469), with the grids of iCT (arXiv 2310.14189) by option.

The grid is Karras' in the noise-to-signal ratio s~ = sigma / alpha, so that any teacher has one, and a step of the teacher is
Heun's there (Euler's from noise alone). The network keeps its own parametrisation: f = alpha_r x0 + sigma_r eps is the identity
at the lowest point, as the paper's c_skip and c_out make theirs, and stock schedulers sample it.

N(k), the points of the grid at iteration k, grows by the paper's root or by doubling; the decay of the target network is fixed
or follows mu(k) = exp(s0 ln mu0 / N(k)). Without a teacher's step (`distil: false`) both ends carry the same noise of the same
image: consistency training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.diffusion.timesteps import evenly_spaced_timesteps
from stepdistill.diffusion.transitions import Transition, TransitionKind
from stepdistill.errors import UserError
from stepdistill.families.recipe import Recipe
from stepdistill.methods.base import Batch, Problem, Progress
from stepdistill.methods.consistency.discrete import Consistency, ConsistencyConfig, PredictX0, ddim_step
from stepdistill.roles.triple import Triple

RHO, SIGMA_MIN, SIGMA_MAX = 7.0, 0.002, 80.0
"""Of the grid, on s~; a VP model's own range is narrower, but for zero SNR, where s~ has no end as on a flow."""


class CMConfig(ConsistencyConfig):
    steps: int = Field(1, ge=1, description="network calls of the student")
    points: int = Field(40, ge=2, description="points of the grid; with a curriculum the most there will be (s1)")
    curriculum: Literal["fixed", "root", "doubling"] = Field("fixed", description="N(k): CM's root, or iCT's doubling")
    first_points: int = Field(10, ge=2, description="points at the start of a curriculum (s0)")
    curriculum_iterations: int = Field(10000, ge=1, description="iterations over which a curriculum grows (K)")
    decay: Literal["fixed", "curriculum"] = Field("fixed", description="target_decay itself, or mu(k) from it (mu0)")
    target: Literal["student", "ema"] = "ema"
    solver: Literal["heun", "ddim"] = Field("heun", description="two calls of the teacher a step, or one")
    distil: bool = Field(True, description="follow the teacher; false is consistency training on the data alone")
    times: Literal["uniform", "lognormal"] = Field("uniform", description="odds of the grid's points")
    times_mean: float = Field(-1.1, description="of ln s~, for lognormal times (iCT)")
    times_std: float = Field(2.0, gt=0)
    weights: Literal["one", "gap"] = Field("one", description="of a sample: 1, or 1 / (s~_s - s~_e) (iCT)")


class CM(Consistency[CMConfig]):
    """L = lambda d(f(x_s, s), sg f^(x_e, e)),   f mapping to the grid's lowest point."""

    Config = CMConfig
    name = "cm"
    transition = Transition(TransitionKind.RENOISE)

    def __init__(self, config: CMConfig, problem: Problem) -> None:
        if not config.distil and (config.guidance != 1 or config.guidance_range is not None):
            raise UserError(
                f"method.distil is false and method.guidance is {config.guidance:g}, but data alone cannot teach guidance: set "
                "method.guidance to 1, without a range"
            )
        if config.curriculum != "fixed" and config.first_points > config.points:
            raise UserError(
                f"method.first_points is {config.first_points} and method.points {config.points}: a curriculum grows, so "
                "lower the first"
            )
        super().__init__(config, problem)

    def points(self, progress: Progress) -> int:
        """N(k)."""
        config, s0, s1 = self.config, self.config.first_points, self.config.points
        k = min(progress.iteration, config.curriculum_iterations)
        if config.curriculum == "root":
            return math.ceil(math.sqrt(k / config.curriculum_iterations * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1) + 1
        if config.curriculum == "doubling":
            every = max(1, int(config.curriculum_iterations / (math.log2(s1 // s0) + 1)))
            return min(s0 * 2 ** (k // every), s1) + 1  # type: ignore[no-any-return]
        return config.points

    def grid(self, progress: Progress) -> Tensor:
        schedule = self.schedule
        ends = torch.tensor([max(schedule.clean_time, 0.0), schedule.terminal_time], dtype=torch.float64)
        low, high = self._ratio(ends).clamp_min(SIGMA_MIN) ** (1 / RHO)
        sigmas = (low + (high - low) * torch.linspace(0, 1, self.points(progress), dtype=torch.float64)) ** RHO
        # where the last ratio is infinite, SIGMA_MAX spaces the grid; what sampling starts from is noise alone all the same
        return torch.cat([schedule.time_at_angle(torch.atan(sigmas[:-1])), ends[1:]])

    def start(self, uniform: Tensor, grid: Tensor) -> Tensor:
        if self.config.times == "uniform":
            return super().start(uniform, grid)
        log_sigma = self._ratio(grid).log()
        below = torch.erf((log_sigma - self.config.times_mean) / (math.sqrt(2) * self.config.times_std))
        return 1 + torch.bucketize(uniform, ((below - below[0]) / (below[-1] - below[0]))[1:-1], right=True)

    def teacher(self, triple: Triple, batch: Batch, x0: Tensor, w: Tensor | float) -> PredictX0:
        return super().teacher(triple, batch, x0, w) if self.config.distil else lambda x, t: x0

    def solver_step(self, teacher: PredictX0, x_s: Tensor, s: Tensor, e: Tensor) -> Tensor:
        """Heun: x_e = (alpha_e / alpha_s) x_s + (sigma_e - alpha_e s~_s) eps, the mean of eps at both ends."""
        first = teacher(x_s, s)
        euler = ddim_step(self.schedule, x_s, first, s, e)
        if self.config.solver == "ddim":
            return euler
        (alpha_s, sigma_s), (alpha_e, sigma_e) = self.schedule.levels(s, x_s), self.schedule.levels(e, x_s)
        eps = 0.5 * ((x_s - alpha_s * first) / sigma_s + (euler - alpha_e * teacher(euler, e)) / sigma_e)
        heun = alpha_e / alpha_s * x_s + (sigma_e - alpha_e * sigma_s / alpha_s) * eps
        # from noise alone s~ has no finite step, which both ends could be the mean of
        return torch.where(alpha_s < 1e-6, euler, heun)

    def weight(self, s: Tensor, e: Tensor) -> Tensor:
        if self.config.weights == "one":
            return super().weight(s, e)
        return 1 / (self._ratio(s) - self._ratio(e))

    def decay(self, progress: Progress) -> float:
        if self.config.decay == "fixed":
            return self.config.target_decay
        return math.exp(self.config.first_points * math.log(self.config.target_decay) / self.points(progress))

    def default_timesteps(self) -> Sequence[float]:
        timesteps = evenly_spaced_timesteps(self.grid(Progress(self.config.curriculum_iterations)), self.config.steps)
        return timesteps if self.schedule.is_flow else [float(round(t)) for t in timesteps]

    def recipe(self) -> Recipe:
        # the grid is not LCMScheduler's, which therefore gets no number of points
        return self.base_recipe()

    def _ratio(self, t: Tensor) -> Tensor:
        """s~ = sigma / alpha, SIGMA_MAX at most."""
        return (self.schedule.sigma(t) / self.schedule.alpha(t)).clamp_max(SIGMA_MAX)
