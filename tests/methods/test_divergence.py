"""Weights of other divergences than the reverse KL, and the running means that keep them near 1."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.tiny_checkpoints import refusal
from support.toys import SCHEDULES, analytic_triple, draws, four_modes, noise, problem, prompts
from torch import Tensor

from stepdistill.methods.base import Batch, Progress, Rollout
from stepdistill.methods.gan import DISCRIMINATOR_HEAD
from stepdistill.methods.matching.decoupled import Decoupled, DecoupledConfig
from stepdistill.methods.matching.divergence import BINS, EMA_DECAY, WEIGHT_FUNCTIONS, DivergenceName, DivergenceWeights
from stepdistill.methods.matching.dmd2 import DMD2, DMD2Config
from stepdistill.roles.triple import FAKE_SCORE, GENERATOR

F: dict[DivergenceName, Callable[[Tensor], Tensor]] = {
    "reverse_kl": lambda r: -r.log(),
    "forward_kl": lambda r: r * r.log(),
    "jensen_shannon": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "softened": lambda r: (r + 1) * (0.5 + 0.5 / r).log(),
    "squared_hellinger": lambda r: 4 * (1 - r.sqrt()),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "neyman": lambda r: 1 / (2 * r),
}
"""Generators of D_f = E_fake f(p_real / p_fake), scaled so that f''(1) is what h(1) says."""


@pytest.mark.parametrize("name", WEIGHT_FUNCTIONS)
def test_the_weight_is_r_squared_times_the_second_derivative(name: DivergenceName) -> None:
    r = torch.tensor([0.1, 0.5, 1.0, 3.0, 20.0], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(F[name](r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    torch.testing.assert_close(WEIGHT_FUNCTIONS[name](r), r.square() * second)


def test_statistics_are_means_over_samples_and_bins_follow_them() -> None:
    weights = DivergenceWeights("forward_kl")
    logits, fraction = torch.tensor([0.5, -1.0, 2.0, 30.0]).double(), torch.tensor([0.05, 0.07, 0.95, 1.0]).double()
    found, statistics = weights(logits, fraction)
    r = torch.cat([logits[:3].exp(), torch.tensor([20.0]).double()])
    torch.testing.assert_close(found, r)
    weights.update({key: float(value) for key, value in statistics.items()})
    expected = torch.ones(BINS).double()
    for k, rows in ((0, slice(0, 2)), (9, slice(2, 4))):
        expected[k] = EMA_DECAY + (1 - EMA_DECAY) * r[rows].mean()
    torch.testing.assert_close(weights.ratio, expected)
    assert float(weights.weight) == pytest.approx(float(EMA_DECAY + (1 - EMA_DECAY) * r.mean()))
    resumed = DivergenceWeights("forward_kl")
    resumed.load_state_dict(weights.state_dict())
    for a, b in zip(resumed(logits, fraction), weights(logits, fraction), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", [name for name in WEIGHT_FUNCTIONS if name != "reverse_kl"])
def test_the_mean_weight_comes_to_one(name: DivergenceName) -> None:
    """However badly the discriminator is calibrated, at each level by its own factor."""
    weights, stream = DivergenceWeights(name), torch.Generator().manual_seed(0)
    means = []
    for _ in range(150):
        fraction = torch.rand(512, generator=stream, dtype=torch.float64)
        logits = 0.5 * torch.randn(512, generator=stream, dtype=torch.float64) + fraction
        found, statistics = weights(logits, fraction)
        weights.update({key: float(value) for key, value in statistics.items()})
        means.append(float(found.mean()))
    assert sum(means[-50:]) / 50 == pytest.approx(1, abs=0.02)


GAN = {"weight": 0.1, "features": "real_score", "width": 8}


@pytest.mark.parametrize("method_class", [DMD2, Decoupled])
def test_each_samples_gradient_is_weighted(method_class: type[DMD2] | type[Decoupled]) -> None:
    """By the logit of the very sample that both scores are asked about; the rest of the loss is left alone."""
    schedule = SCHEDULES["eps"]()
    config = DMD2Config if method_class is DMD2 else DecoupledConfig
    found: dict[str, Tensor] = {}
    for name in ("reverse_kl", "forward_kl"):
        method = method_class(
            config.model_validate({"guidance": 1.0, "gan": GAN, "divergence": name}), problem(schedule, 2)
        )
        triple = analytic_triple(four_modes(std=0.4), schedule, four_modes((0.4, 0.3, 0.2, 0.1), std=0.5))
        method.prepare(triple)
        triple.heads[FAKE_SCORE][DISCRIMINATOR_HEAD].double()
        x = noise(4, 2, 1, 1, seed=3).requires_grad_()
        cond = prompts(4, 4)
        rollout = Rollout(Batch(cond, cond), x, torch.full((4,), 499.0).double(), x)
        terms = method.generator_loss(rollout, triple, Progress(), draws())
        (found[name],) = torch.autograd.grad(terms.total, x)
        assert bool(terms.statistics) == (name == "forward_kl")
    t = method.config.dm_levels.levels().times(schedule, draws().uniform("dm.t"))
    x_t = schedule.add_noise(x.detach(), draws().normal("dm.eps", (2, 1, 1)), t)
    logits = triple.head(FAKE_SCORE, DISCRIMINATOR_HEAD)(triple.real_score.features(x_t, t, cond))
    torch.testing.assert_close(found["forward_kl"], logits.exp()[:, None, None, None] * found["reverse_kl"])
    method.after_update(GENERATOR, {k: float(v.detach()) for k, v in terms.statistics.items()}, triple, Progress())
    assert float((method.state_dict()["divergence.ratio"] - 1).abs().max()) > 0


def test_a_ratio_needs_a_logistic_gan() -> None:
    schedule = SCHEDULES["eps"]()
    for gan in ({}, {**GAN, "loss": "hinge"}):
        config = DMD2Config.model_validate({"guidance": 1.0, "gan": gan, "divergence": "jeffreys"})
        refusal(lambda c=config: DMD2(c, problem(schedule, 2)), "'jeffreys'", "logistic GAN")  # type: ignore[misc]
