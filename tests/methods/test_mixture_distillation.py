"""DMD2 on a teacher whose distribution is known: a one-step generator learns the share of every mode.

The generator starts from an exact x0 prediction, which at pure noise is the mean of the mixture and has no modes at all.
"""

from __future__ import annotations

import pytest
import torch
from support.toys import analytic_triple, batch_of, flow, four_modes, noise, problem, prompts, vp
from support.whole_batch_draws import WholeBatchDraws
from torch import Tensor

from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.methods.base import Progress
from stepdistill.methods.matching.dmd2 import DMD2, DMD2Config
from stepdistill.roles.triple import FAKE_SCORE, GENERATOR, Triple

ITERATIONS, BATCH, RATE, DIMENSION, CLASSES = 1800, 256, 3e-3, 2, 4


def train(triple: Triple, method: DMD2, seed: int) -> None:
    """Alternating Adam, the rate falling to nothing in the second half."""
    optimizers = {
        role: torch.optim.Adam(triple.parameters(role).values(), lr=RATE, betas=(0.0, 0.999))
        for role in (GENERATOR, FAKE_SCORE)
    }
    batch = batch_of(BATCH, CLASSES)
    for iteration in range(ITERATIONS):
        progress, rollout = Progress(iteration, stage_iteration=iteration), None
        for role in method.updates(progress):
            draws = WholeBatchDraws(seed, iteration, role, range(BATCH), dtype=torch.float64)
            with triple.training(role):
                rollout = rollout.detach() if rollout else method.rollout(batch, triple, progress, draws)
                optimizers[role].zero_grad()
                method.loss(role, rollout, triple, progress, draws).total.backward()
            for group in optimizers[role].param_groups:
                group["lr"] = RATE * min(1.0, 2.0 * (1.0 - iteration / ITERATIONS))
            optimizers[role].step()


@pytest.mark.ci
@pytest.mark.parametrize("schedule", [vp(), flow()], ids=["vp", "flow"])
def test_every_mode_ends_within_five_points_of_its_share(schedule: NoiseSchedule) -> None:
    mixture = four_modes()
    triple = analytic_triple(mixture, schedule, width=64)
    method = DMD2(DMD2Config(guidance=1.0, ratio=2, steps=1), problem(schedule, DIMENSION))

    def shares() -> Tensor:
        z = noise(8192, DIMENSION, 1, 1, seed=99)
        with torch.no_grad():
            x0 = triple.generator.x0(z, method.timesteps[0], prompts(len(z), CLASSES)).flatten(1).double()
        return torch.cdist(x0, mixture.means).argmin(1).bincount(minlength=CLASSES) / len(z)

    assert (shares() - mixture.weights).abs().max() > 0.2  # before: no modes
    train(triple, method, seed=0)
    assert (shares() - mixture.weights).abs().max() < 0.05
