"""LCM: Latent Consistency Models (Luo et al., arXiv 2310.04378), and LCM-LoRA (arXiv 2311.05556).

Every point of the guided teacher's trajectory is mapped to its clean end: r is the grid's lowest point. The teacher skips k
timesteps at once (section 4.3), k = 20 on a grid of 50 points. A LoRA learns one fixed guidance scale, as PixArt-delta does; with
`tell_guidance` the student is told w as published, by an embedding that starts at zero.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from stepdistill.diffusion.schedule import broadcast, full
from stepdistill.diffusion.transitions import Transition, TransitionKind
from stepdistill.methods.consistency.discrete import Consistency, ConsistencyConfig

SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0
"""Of the boundary scalings, as LCMScheduler has them."""


class LCMConfig(ConsistencyConfig):
    boundary: Literal["scaled", "none"] = Field(
        "scaled",
        description="VP models: c_skip x + c_out x0 as published, or f = alpha_0 x0 + sigma_0 eps, which is the identity at "
        "timestep 0 by itself, as it is for flow models without any scaling",
    )


class LCM(Consistency[LCMConfig]):
    """L = d(f(x_s, s), sg f^(x_e, e)),   f(x, t) = c_skip(t) x + c_out(t) x0."""

    Config = LCMConfig
    name = "lcm"
    transition = Transition(TransitionKind.RENOISE)

    def consistency_function(self, x_t: Tensor, x0: Tensor, t: Tensor, r: Tensor) -> Tensor:
        if self.schedule.is_flow or self.config.boundary == "none":
            return super().consistency_function(x_t, x0, t, r)
        skip, out = (broadcast(c, x_t) for c in boundary_scalings(t))
        return skip * full(x_t) + out * full(x0)


def boundary_scalings(t: Tensor) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) at timesteps t, float64: (1, 0) at 0, (7e-6, 1) at 19."""
    scaled = TIMESTEP_SCALING * t.double()
    norm = scaled.square() + SIGMA_DATA**2
    return SIGMA_DATA**2 / norm, scaled / norm.sqrt()
