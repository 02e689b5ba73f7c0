"""TCD: Trajectory Consistency Distillation (Zheng et al., arXiv 2402.19159).

Every point of the teacher's trajectory is mapped to a random cleaner point of it (after CTM, Kim et al., arXiv 2310.02279):
m ~ U{0..n-1}. The network is not told the end-time r, which the semi-linear form f = alpha_r x0 + sigma_r eps carries. The
error of a map grows with the length of the leap alone. For flow models f is the Euler line x_r = x_s + (r - s) u.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from stepdistill.methods.base import Problem, Progress
from stepdistill.methods.consistency.discrete import Consistency, ConsistencyConfig
from stepdistill.methods.student_recipe import tcd_transition


class TCDConfig(ConsistencyConfig):
    eta: float | None = Field(
        None,
        ge=0,
        le=1,
        description="stochasticity of the sampler (the paper's gamma): 0 is DDIM, 1 is LCM's; 0.3 by default, as TCDScheduler "
        "has it; flow models know 0, their default, and 1",
    )


class TCD(Consistency[TCDConfig]):
    """L = d(f(x_s, s -> r), sg f^(x_e, e -> r)),   r = grid[m], m ~ U{0..n-1}."""

    Config = TCDConfig
    name = "tcd"

    def __init__(self, config: TCDConfig, problem: Problem) -> None:
        super().__init__(config, problem)
        default = 0.0 if self.schedule.is_flow else 0.3
        self.transition = tcd_transition(self.schedule, default if config.eta is None else config.eta)

    def end(self, start: Tensor, uniform: Tensor, progress: Progress) -> Tensor:
        return (uniform * start).long()
