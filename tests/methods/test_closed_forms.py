"""Losses, gradients, orders and recipes of the methods against closed forms on the analytic teacher, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from support.toys import (
    DIMENSION,
    SCHEDULES,
    SD,
    analytic_triple,
    batch_of,
    disturb,
    draws,
    flow,
    four_modes,
    gaussian,
    noise,
    problem,
    prompts,
    vp,
)
from torch import Tensor

from stepdistill.config.reading import parse
from stepdistill.config.schema import RunConfig
from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.prediction import Prediction
from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.diffusion.timesteps import student_timesteps
from stepdistill.diffusion.transitions import Transition, TransitionKind
from stepdistill.errors import UserError
from stepdistill.families.conditioning import Conditioning
from stepdistill.families.recipe import Recipe
from stepdistill.methods import parts
from stepdistill.methods.base import Batch, Method, Needs, Progress, Rollout, Terms
from stepdistill.methods.gan import DISCRIMINATOR_HEAD, GanConfig
from stepdistill.methods.matching.dmd import DMD, DMDConfig
from stepdistill.methods.matching.dmd2 import DMD2, DMD2Config
from stepdistill.methods.student_recipe import few_step_recipe
from stepdistill.roles.heads import FeatureHead, discriminator_loss, generator_loss
from stepdistill.roles.sampler import sample, sample_trajectory
from stepdistill.roles.triple import FAKE_SCORE, GENERATOR, REAL_SCORE, Triple
from stepdistill.training.run import train

MEAN_T, MEAN_F = (torch.tensor(m, dtype=torch.float64) for m in ([1.0, -2.0, 0.5], [0.2, 1.0, -1.0]))
LEVELS = parts.NoiseLevelConfig()
FIRST = Progress()


def close(actual: Tensor, expected: Tensor, atol: float = 1e-8) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def column(vector: Tensor) -> Tensor:
    return vector[:, None, None]


def two_gaussians(schedule: NoiseSchedule, std: float = 1.0) -> Triple:
    """Teacher N(m_T, std^2 I), fake score N(m_F, std^2 I)."""
    return analytic_triple(gaussian(MEAN_T, std), schedule, gaussian(MEAN_F, std))


def direction(
    triple: Triple, x: Tensor, weight: parts.DmWeight, samples: Sequence[int] = range(4), w: float = 1.0
) -> Tensor:
    count = len(x)
    return parts.distribution_matching_direction(
        x, prompts(count), prompts(count), triple, draws(samples), levels=LEVELS, guidance=w, weight=weight
    )[0]


def drawn(schedule: NoiseSchedule, purpose: str = "dm") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(t, alpha, sigma, eps) of the four samples, from the streams that a loss reads."""
    levels = LEVELS if purpose == "dm" else parts.NoiseLevelConfig(low=0.0, high=1.0)
    t = levels.levels().times(schedule, draws().uniform(f"{purpose}.t"))
    eps = draws().normal(f"{purpose}.eps", (DIMENSION, 1, 1))
    return t, *schedule.levels(t, eps), eps


def posterior(mean: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, std: float) -> Tensor:
    """E[x0 | x_t] for N(mean, std^2 I)."""
    gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
    return column(mean) + gain * (x_t - alpha * column(mean))


# ---------------------------------------------------------------- the distribution-matching gradient


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("std", [1.0, 0.3])
def test_exact_kl_between_gaussians(name: str, std: float) -> None:
    """d KL / dx = alpha (s_F - s_T) = alpha^2 (m_F - m_T) / (alpha^2 std^2 + sigma^2), wherever x is."""
    schedule = SCHEDULES[name]()
    _, alpha, sigma, _ = drawn(schedule)
    expected = (alpha**2 / (alpha**2 * std**2 + sigma**2) * column(MEAN_F - MEAN_T)).expand(4, -1, -1, -1)
    for x in (noise(4, DIMENSION, 1, 1), 5 + noise(4, DIMENSION, 1, 1, seed=9)):
        close(direction(two_gaussians(schedule, std), x, "exact_kl"), expected)


@pytest.mark.parametrize("name", ["eps", "flow"])
def test_the_true_kl_falls_along_it(name: str) -> None:
    """KL between the noised N(m_F, I) and N(m_T, I) is alpha^2 |m_F - m_T|^2 / 2 (alpha^2 + sigma^2): its gradient in m_F."""
    schedule = SCHEDULES[name]()
    _, alpha, sigma, _ = drawn(schedule)
    m = MEAN_F.clone().requires_grad_()
    kl = (alpha**2 * (column(m - MEAN_T) ** 2).sum() / (2 * (alpha**2 + sigma**2))).sum()
    (grad,) = torch.autograd.grad(kl, m)
    got = direction(two_gaussians(schedule), noise(4, DIMENSION, 1, 1), "exact_kl")
    close(got.sum(0).flatten(), grad)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("weight", ["code", "paper"])
def test_normalised_weights(name: str, weight: parts.DmWeight) -> None:
    """code: (mu_F - mu_T) / mean|x - mu_T|, the mean over each sample's own elements; paper: alpha times that."""
    schedule, x, std = SCHEDULES[name](), noise(4, DIMENSION, 1, 1), 0.4
    _, alpha, sigma, eps = drawn(schedule)
    x_t = alpha * x + sigma * eps
    real, fake = (posterior(m, x_t, alpha, sigma, std) for m in (MEAN_T, MEAN_F))
    expected = (fake - real) / (x - real).abs().mean((1, 2, 3), keepdim=True)
    got = direction(two_gaussians(schedule, std), x, weight)
    close(got, expected * alpha if weight == "paper" else expected)
    assert not got.requires_grad


def test_the_normaliser_is_kept_off_zero() -> None:
    x = noise(2, 3)
    got = parts.distribution_matching_gradient(x, x, x + 1, torch.tensor(1.0), torch.tensor(1.0), "code", floor=1e-3)
    close(got, torch.full_like(x, 1e3))


@pytest.mark.parametrize("name", ["eps", "flow"])
def test_only_the_teacher_is_guided(name: str) -> None:
    """mu_T = uncond + w (cond - uncond), mu_F conditional."""
    schedule, w = SCHEDULES[name](), 3.0
    triple, x = analytic_triple(four_modes(), schedule), noise(4, 2, 1, 1)
    disturb(triple)
    cond, null = Conditioning(torch.eye(4).double()[:, None]), prompts(4, 4)
    got, _ = parts.distribution_matching_direction(
        x, cond, null, triple, draws(), levels=LEVELS, guidance=w, weight="code"
    )
    t = LEVELS.levels().times(schedule, draws().uniform("dm.t"))
    x_t = schedule.add_noise(x, draws().normal("dm.eps", (2, 1, 1)), t)
    real = (1 - w) * triple.real_score.x0(x_t, t, null) + w * triple.real_score.x0(x_t, t, cond)
    fake = triple.fake_score.x0(x_t, t, cond)
    close(got, ((fake - real) / (x - real).abs().mean((1, 2, 3), keepdim=True)).detach())


@pytest.mark.parametrize("shape", [(4, 3, 1, 1), (2, 4, 8, 8)])
def test_the_surrogate_differentiates_to_d_over_numel(shape: tuple[int, ...]) -> None:
    x, d = noise(*shape).requires_grad_(), noise(*shape, seed=1)
    loss = parts.surrogate_loss(x, d)
    (grad,) = torch.autograd.grad(loss, x)
    close(grad, d / d.numel(), 1e-15)
    assert float(loss.detach()) == pytest.approx(0.5 * float(d.square().mean()), abs=1e-14)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("weight", ["code", "paper", "exact_kl"])
def test_equal_scores_give_exactly_zero(name: str, mode: str, weight: parts.DmWeight) -> None:
    """F = T at the start, unguided: no gradient at all, not a small one."""
    schedule = SCHEDULES[name]()
    triple = analytic_triple(four_modes(), schedule, mode=mode)
    method = DMD2(DMD2Config(guidance=1.0, dm_weight=weight), problem(schedule, 2))
    with triple.training(GENERATOR):
        rollout = method.rollout(batch_of(4, 4), triple, FIRST, draws())
        method.loss(GENERATOR, rollout, triple, FIRST, draws()).total.backward()
    grads = [p.grad for p in triple.parameters(GENERATOR).values() if p.grad is not None]
    assert grads
    assert all(not g.any() for g in grads)


# ---------------------------------------------------------------- layouts of a batch


def full_batch(count: int = 4) -> Batch:
    return Batch(
        Conditioning(torch.eye(4).double()[:count, None]),
        prompts(count, 4),
        images=noise(count, 2, 1, 1, seed=11),
        image_cond=Conditioning(torch.eye(4).double()[:count, None].roll(1, 0)),
        pair_noise=noise(count, 2, 1, 1, seed=12),
        pair_latents=noise(count, 2, 1, 1, seed=13),
        pair_cond=prompts(count, 4),
    )


def rows(batch: Batch, index: int) -> Batch:
    return Batch(**{key: value[index : index + 1] for key, value in vars(batch).items() if value is not None})


GAN = GanConfig(weight=0.1, critic_weight=0.2, width=8)
METHODS: dict[str, Callable[[NoiseSchedule], Method[Any]]] = {
    "dmd": lambda s: DMD(DMDConfig(guidance=2.0), problem(s, 2)),
    "dmd2": lambda s: DMD2(DMD2Config(guidance=2.0), problem(s, 2)),
    "dmd2-gan": lambda s: DMD2(DMD2Config(guidance=2.0, gan=GAN), problem(s, 2)),
    "dmd2-frozen-features": lambda s: DMD2(
        DMD2Config(guidance=2.0, gan=GAN.model_copy(update={"features": REAL_SCORE, "loss": "hinge"})), problem(s, 2)
    ),
    "dmd2-on-images": lambda s: DMD2(DMD2Config(guidance=2.0, simulate=False, fake_space="x0"), problem(s, 2)),
    "dmd2-euler": lambda s: DMD2(DMD2Config(guidance=2.0, transition="deterministic"), problem(s, 2)),
    "dmd2-exits": lambda s: DMD2(DMD2Config(guidance=2.0, exits="sample"), problem(s, 2)),
}


def ready(name: str, schedule: NoiseSchedule) -> tuple[Method[Any], Triple]:
    method, triple = METHODS[name](schedule), analytic_triple(four_modes(), schedule)
    disturb(triple)
    method.prepare(triple)
    for heads in triple.heads.values():
        for head in heads.values():
            head.double()
    return method, triple


def gradients(
    method: Method[Any], triple: Triple, role: str, parts_of_batch: Sequence[tuple[list[int], Batch]], step: int
) -> list[Tensor]:
    """The role's mean gradient over micro-batches."""
    for parameter in triple.parameters(role).values():
        parameter.grad = None
    for samples, batch in parts_of_batch:
        with triple.training(role):
            rollout = method.rollout(batch, triple, FIRST, draws(samples, role, step))
            loss = method.loss(role, rollout, triple, FIRST, draws(samples, role, step)).total
            (loss / len(parts_of_batch)).backward()
    return [p.grad.clone() for p in triple.parameters(role).values() if p.grad is not None]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("schedule", [vp, flow])
@pytest.mark.parametrize("role", [GENERATOR, FAKE_SCORE])
def test_a_batch_of_four_is_four_batches_of_one(name: str, schedule: Callable[[], NoiseSchedule], role: str) -> None:
    method, triple = ready(name, schedule())
    batch = full_batch()
    for step in (0, 1, 2):
        whole = gradients(method, triple, role, [([4, 5, 6, 7], batch)], step)
        split = gradients(method, triple, role, [([4 + i], rows(batch, i)) for i in range(4)], step)
        assert whole
        assert max(float(g.abs().max()) for g in whole) > 0
        for a, b in zip(whole, split, strict=True):
            close(a, b, 1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_left_on_the_other_role(name: str) -> None:
    """The GAN freeze: after a generator backward F and D have no gradient, after a critic backward G has none."""
    method, triple = ready(name, vp())
    for role, other in ((GENERATOR, FAKE_SCORE), (FAKE_SCORE, GENERATOR)):
        gradients(method, triple, role, [([0, 1, 2, 3], full_batch())], 0)
        assert all(p.grad is None for p in triple.parameters(other).values())
        assert all(p.grad is None for p in triple.base.parameters())
        for parameter in triple.parameters(role).values():
            parameter.grad = None


# ---------------------------------------------------------------- the fake score


@pytest.mark.parametrize("name", SCHEDULES)
def test_fake_score_targets(name: str) -> None:
    """Native: eps; v = alpha eps - sigma x; u = eps - x. The answer of an exact N(m_F, std^2) network is known."""
    schedule, std, x = SCHEDULES[name](), 0.4, noise(4, DIMENSION, 1, 1)
    triple = two_gaussians(schedule, std)
    t, alpha, sigma, eps = drawn(schedule, "fake")
    x_t = alpha * x + sigma * eps
    x0 = posterior(MEAN_F, x_t, alpha, sigma, std)
    noise_hat = (x_t - alpha * x0) / sigma
    answer, target = {
        Prediction.EPSILON: (noise_hat, eps),
        Prediction.V: (alpha * noise_hat - sigma * x0, alpha * eps - sigma * x),
        Prediction.FLOW: (noise_hat - x0, eps - x),
    }[schedule.prediction]
    got = parts.fake_score_loss(triple.fake_score, x, t, eps, prompts(4))
    close(got, (answer - target).square().mean(), 1e-10)
    method = DMD2(DMD2Config(guidance=1.0), problem(schedule))
    rollout = Rollout(batch_of(4), x_t, t, x)
    close(method.loss(FAKE_SCORE, rollout, triple, FIRST, draws()).total, got, 1e-12)
    weight = torch.ones_like(alpha) if schedule.is_flow else (alpha / sigma).square().clamp(max=5)
    in_x0 = parts.fake_score_loss(triple.fake_score, x, t, eps, prompts(4), "x0")
    close(in_x0, (weight * (x0 - x).square()).mean(), 1e-10)


# ---------------------------------------------------------------- GAN terms


def test_gan_losses() -> None:
    """Logistic: softplus(-r) + softplus(f), generator softplus(-f) = -log sigmoid(f); hinge likewise."""
    r, f = np.array([-1.0, 0.5, 3.0]), np.array([0.2, -2.0, 1.5])
    real, fake = torch.from_numpy(r), torch.from_numpy(f).requires_grad_()
    softplus = lambda x: np.log1p(np.exp(x))  # noqa: E731
    assert float(discriminator_loss(real, fake, "logistic").detach()) == pytest.approx(
        softplus(-r).mean() + softplus(f).mean()
    )
    assert float(generator_loss(fake, "logistic").detach()) == pytest.approx(softplus(-f).mean())
    hinge = np.maximum(1 - r, 0).mean() + np.maximum(1 + f, 0).mean()
    assert float(discriminator_loss(real, fake, "hinge").detach()) == pytest.approx(hinge)
    assert float(generator_loss(fake, "hinge").detach()) == pytest.approx(-f.mean())
    (grad,) = torch.autograd.grad(generator_loss(fake, "logistic"), fake)
    close(grad, -torch.sigmoid(-fake.detach()) / 3, 1e-12)


@pytest.mark.parametrize(("channels", "size"), [(8, (1, 1)), (32, (4, 4)), (64, (2, 2)), (48, (16, 8)), (1280, (8, 8))])
def test_heads_are_alive_on_any_size(channels: int, size: tuple[int, int]) -> None:
    """One logit a sample, of a batch of one too, and it depends on the features of that sample alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = FeatureHead(channels, size, min(channels, 64)).double()
    features = noise(3, channels, *size).requires_grad_()
    together = head(features)
    assert together.shape == (3,)
    close(head(features[1:2]).detach(), together[1:2].detach(), 1e-10)
    (grad,) = torch.autograd.grad(together[0], features)
    assert float(grad[0].abs().max()) > 1e-6
    assert not grad[1:].any()


def logits(triple: Triple, features: str, x: Tensor, cond: Conditioning, purpose: str, role: str) -> Tensor:
    """D(x_t) by hand."""
    schedule, stream = triple.schedule, draws(role=role)
    t = parts.NoiseLevelConfig(low=0.0, high=1.0).levels().times(schedule, stream.uniform(f"{purpose}.t"))
    x_t = schedule.add_noise(x, stream.normal(f"{purpose}.eps", (2, 1, 1)), t)
    return triple.head(FAKE_SCORE, DISCRIMINATOR_HEAD)(triple.denoiser(features).features(x_t, t, cond))  # type: ignore[no-any-return]


SHAPE = (2, 1, 1)


@pytest.mark.parametrize("exits", ["batch", "sample"])
def test_each_sample_leaves_the_rollout_at_its_own_exit(exits: parts.RolloutEnd) -> None:
    """x_t at every exit is the state of the full walk there, and the network is called as often on every process."""
    schedule = vp()
    _, triple = ready("dmd2", schedule)
    ladder, transition = student_timesteps(schedule, 4), Transition(TransitionKind.RENOISE)
    batch = full_batch()
    for step in range(4):
        stream = draws(step=step)
        x_t, t, x0 = parts.roll_out(
            triple.generator, batch, ladder, transition, SHAPE, stream, graph=False, exits=exits
        )
        roll = stream.for_role("rollout")
        states = list(
            sample_trajectory(
                lambda x, t: triple.generator.x0(x, t, batch.cond), schedule, roll.normal("noise", SHAPE), ladder, transition,
                lambda index, roll=roll: roll.normal(f"fresh{index}", SHAPE),
            )
        )  # fmt: skip
        found = [ladder.index(float(time)) for time in t]
        if exits == "batch":
            assert found == [int(roll.batch_uniform("exit") * 4)] * 4
        else:
            assert found == (roll.uniform("exit") * 4).long().tolist()
        for row, end_step in enumerate(found):
            close(x_t[row], states[end_step].x_t[row], 1e-9)
            close(x0[row], states[end_step].x0[row], 1e-9)


@pytest.mark.parametrize("exits", ["batch", "sample"])
def test_exits_follow_their_odds(exits: parts.RolloutEnd) -> None:
    schedule = vp()
    _, triple = ready("dmd2", schedule)
    ladder, batch = student_timesteps(schedule, 3), full_batch()
    counts = torch.zeros(3)
    for step in range(150):
        _, t, _ = parts.roll_out(
            triple.generator, batch, ladder, Transition(TransitionKind.DETERMINISTIC), SHAPE, draws(step=step), graph=False,
            exits=exits, end_step_weights=[3, 0, 1],
        )  # fmt: skip
        counts += torch.tensor([(t == time).sum() for time in ladder])
    assert counts[1] == 0
    assert float(counts[0] / counts.sum()) == pytest.approx(0.75, abs=0.1 if exits == "batch" else 0.05)
    with pytest.raises(UserError, match=r"exit_odds is \[1.0\] and rollouts are left at one of 4 steps"):
        DMD2(DMD2Config(guidance=2.0, exit_odds=[1.0]), problem(schedule, 2))


@pytest.mark.parametrize("name", ["dmd2-gan", "dmd2-frozen-features"])
def test_gan_terms_add_up(name: str) -> None:
    """L_G = L_DM + w_gan g(D(fake)); L_F + w_cls L_D with noise of their own for real and fake, each with its own prompts."""
    method, triple = ready(name, vp())
    gan, batch = method.config.gan, full_batch()
    rollout = method.rollout(batch, triple, FIRST, draws()).detach()
    plain = DMD2(method.config.model_copy(update={"gan": GanConfig()}), method.problem)
    fake = logits(triple, gan.features, rollout.x0, batch.cond, "gan", GENERATOR)
    expected = plain.loss(GENERATOR, rollout, triple, FIRST, draws()).total + 0.1 * generator_loss(fake, gan.loss)
    close(method.loss(GENERATOR, rollout, triple, FIRST, draws()).total, expected, 1e-12)
    stream = draws(role=FAKE_SCORE)
    assert batch.images is not None
    assert batch.image_cond is not None
    real = logits(triple, gan.features, batch.images, batch.image_cond, "gan.real", FAKE_SCORE)
    fake = logits(triple, gan.features, rollout.x0, batch.cond, "gan.fake", FAKE_SCORE)
    expected = plain.loss(FAKE_SCORE, rollout, triple, FIRST, stream).total + 0.2 * discriminator_loss(
        real, fake, gan.loss
    )
    close(method.loss(FAKE_SCORE, rollout, triple, FIRST, stream).total, expected, 1e-12)
    assert stream.uniform("gan.real.t").tolist() != stream.uniform("gan.fake.t").tolist()


# ---------------------------------------------------------------- order of updates


def test_ratio_and_order() -> None:
    """R = 5 over 20 iterations: 4 generator and 20 fake-score updates, the generator first; counted in its stage."""
    method = DMD2(DMD2Config(guidance=1.0, ratio=5), problem(vp()))
    due = [tuple(method.updates(Progress(100 + i, stage_iteration=i))) for i in range(20)]
    assert [i for i, roles in enumerate(due) if GENERATOR in roles] == [0, 5, 10, 15]
    assert all(roles in {(GENERATOR, FAKE_SCORE), (FAKE_SCORE,)} for roles in due)
    assert DMD(DMDConfig(guidance=1.0), problem(vp())).updates(FIRST) == (GENERATOR, FAKE_SCORE)


def test_the_fake_score_learns_from_the_sample_before_the_update(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the real loop: one rollout an iteration; the generator changes between the two losses, the sample does not."""
    seen: list[tuple[str, Tensor, bool]] = []
    loss = DMD2.loss

    def spy(self: DMD2, role: str, rollout: Rollout, triple: Triple, progress: Progress, stream: Draws) -> Terms:
        with torch.no_grad():
            now = triple.generator.x0(rollout.x_t, rollout.t, rollout.batch.cond)
        seen.append((role, rollout.x0.detach().clone(), bool(torch.equal(now, rollout.x0.detach()))))
        assert rollout.x0.requires_grad == (role == GENERATOR)
        return loss(self, role, rollout, triple, progress, stream)

    monkeypatch.setattr(DMD2, "loss", spy)
    (tmp_path / "prompts.txt").write_text("mode 0\nmode 3\n")
    rate = {"lr": 1e-2}
    config = {
        "model": {"path": str(tiny("analytic")), "dtype": "float64"},
        "method": {"name": "dmd2", "guidance": 2.0, "ratio": 5},
        "optimizers": {"generator": rate, "fake_score": rate},
        "data": {"prompts": str(tmp_path / "prompts.txt")},
        "training": {"max_steps": 20, "batch_size": 2, "device": "cpu"},
    }
    train(parse(RunConfig, config, "test"), tmp_path / "run")
    order = [role for role, _, _ in seen]
    assert order == [GENERATOR, *[FAKE_SCORE] * 5] * 4
    for index in range(0, 24, 6):
        assert torch.equal(seen[index][1], seen[index + 1][1])
        # only right after the generator's update is the sample older than the generator
        assert [fresh for _, _, fresh in seen[index : index + 6]] == [True, False, True, True, True, True]


# ---------------------------------------------------------------- rollouts


def test_one_step_at_399() -> None:
    """SDXL's one-step trick: the network sees pure noise z, is told 399, and x0 = (z - sigma_399 eps) / alpha_399."""
    schedule = vp()
    method = DMD2(DMD2Config(guidance=1.0, timesteps=[399]), problem(schedule))
    triple = analytic_triple(gaussian(MEAN_T), schedule)
    disturb(triple)
    rollout = method.rollout(batch_of(4), triple, FIRST, draws())
    z = draws().for_role("rollout").normal("noise", (DIMENSION, 1, 1))
    assert torch.equal(rollout.x_t, z)
    assert rollout.t.tolist() == [399] * 4
    eps = triple.generator.epsilon(z, 399, prompts(4))
    alpha = float(np.prod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000)[:400] ** 2) ** 0.5)
    close(rollout.x0, (z - (1 - alpha**2) ** 0.5 * eps) / alpha, 1e-10)
    assert alpha == pytest.approx(0.6528, abs=5e-5)
    assert method.recipe().timesteps == (399,)
    on_images = DMD2(method.config.model_copy(update={"simulate": False}), method.problem)
    images = Batch(prompts(4), prompts(4), images=noise(4, DIMENSION, 1, 1), image_cond=prompts(4))
    assert torch.equal(on_images.rollout(images, triple, FIRST, draws()).x_t, z)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("transition", ["renoise", "deterministic"])
def test_training_walks_what_inference_walks(name: str, transition: str) -> None:
    """(x_t, t) of a training rollout is a step of the inference sampler at the same draws; all exits occur; the graph is
    that of the exit call alone."""
    schedule = SCHEDULES[name]()
    method = DMD2(DMD2Config(guidance=1.0, steps=4, transition=transition), problem(schedule))  # type: ignore[arg-type]
    triple = analytic_triple(gaussian(MEAN_T), schedule)
    disturb(triple)
    exits = []
    for step in range(40):
        stream = draws(step=step).for_role("rollout")
        rollout = method.rollout(batch_of(4), triple, FIRST, draws(step=step))
        steps = list(
            sample_trajectory(
                lambda x, t: triple.generator.x0(x, t, prompts(4)).detach(),
                schedule,
                stream.normal("noise", (DIMENSION, 1, 1)),
                method.timesteps,
                method.transition,
                lambda index, stream=stream: stream.normal(f"fresh{index}", (DIMENSION, 1, 1)),
            )
        )
        chosen = steps[method.timesteps.index(float(rollout.t[0]))]
        assert set(rollout.t.tolist()) == {chosen.t}
        close(rollout.x_t, chosen.x_t, 0)
        close(rollout.x0.detach(), chosen.x0, 1e-12)
        assert rollout.x0.requires_grad
        assert not rollout.x_t.requires_grad
        exits.append(chosen.t)
        # the fake score's own iterations see the same sample, without graph
        idle = method.rollout(batch_of(4), triple, Progress(stage_iteration=1), draws(role=FAKE_SCORE, step=step))
        assert torch.equal(idle.x0, rollout.x0)
        assert not idle.x0.requires_grad
    assert set(exits) == set(method.timesteps)


def test_rollouts_on_images() -> None:
    """Without simulation: images noised to a ladder time drawn per sample; the first step sees pure noise."""
    schedule = vp()
    method = DMD2(DMD2Config(guidance=1.0, simulate=False), problem(schedule))
    triple, count = analytic_triple(gaussian(MEAN_T), schedule), 64
    images = noise(count, DIMENSION, 1, 1)
    batch = Batch(prompts(count), prompts(count), images=images, image_cond=prompts(count))
    rollout = method.rollout(batch, triple, FIRST, draws(range(count)))
    eps = draws(range(count)).for_role("rollout").normal("noise", (DIMENSION, 1, 1))
    first = rollout.t == 999
    assert torch.equal(rollout.x_t[first], eps[first])
    close(rollout.x_t[~first], schedule.add_noise(images, eps, rollout.t)[~first], 1e-14)
    assert set(rollout.t.tolist()) == {999, 749, 499, 249}


# ---------------------------------------------------------------- DMD's regression


@pytest.mark.parametrize(("distance", "of"), [("l2", lambda e: e**2), ("huber", lambda e: (e**2 + 1e-6).sqrt() - 1e-3)])
def test_regression_on_pairs(distance: str, of: Callable[[Tensor], Tensor]) -> None:
    """matching L_DM + lambda_reg d(G(z), y), and the regression alone with matching = 0."""
    schedule, batch = flow(), full_batch()
    triple = analytic_triple(four_modes(), schedule)
    disturb(triple)
    config = DMDConfig(guidance=2.0, regression=0.25, distance=distance)  # type: ignore[arg-type]
    assert batch.pair_noise is not None
    assert batch.pair_latents is not None
    answer = triple.generator.x0(batch.pair_noise, 1.0, prompts(4, 4)).detach()
    expected = 0.25 * of(answer - batch.pair_latents).mean()

    def total(**changes: float) -> Tensor:
        method = DMD(config.model_copy(update=changes), problem(schedule, 2))
        return method.loss(GENERATOR, method.rollout(batch, triple, FIRST, draws()), triple, FIRST, draws()).total

    close(total(matching=0.0), expected, 1e-12)
    close(total() - total(regression=0.0), expected, 1e-12)
    close(total(matching=2.0) - expected, 2 * total(regression=0.0), 1e-12)


# ---------------------------------------------------------------- needs and refusals


def test_needs() -> None:
    assert DMD2.needs(DMD2Config(guidance=1)) == Needs()
    assert DMD2.needs(DMD2Config(guidance=1, gan=GAN)).images
    assert DMD2.needs(DMD2Config(guidance=1, simulate=False)).images
    assert DMD.needs(DMDConfig(guidance=1)).pairs
    assert not DMD.needs(DMDConfig(guidance=1, regression=0)).pairs


def test_check_refuses_what_is_missing() -> None:
    with pytest.raises(UserError, match=r"data\.images is not set"):
        DMD2.check(DMD2Config(guidance=1, gan=GAN), vp(), images=False, pairs=True)
    with pytest.raises(UserError, match=r"data\.pairs is not set"):
        DMD.check(DMDConfig(guidance=1), vp(), images=True, pairs=False)
    DMD2.check(DMD2Config(guidance=1, gan=GAN), vp(), images=True, pairs=False)

    class OnlyV(DMD2):
        @classmethod
        def needs(cls, config: DMD2Config) -> Needs:
            return Needs(predictions=(Prediction.V,))

    with pytest.raises(UserError, match=r"predicts epsilon.*v_prediction"):
        OnlyV.check(DMD2Config(guidance=1), vp(), images=False, pairs=False)
    OnlyV.check(DMD2Config(guidance=1), vp(Prediction.V), images=False, pairs=False)
    with pytest.raises(UserError, match="no loss"):
        DMD(DMDConfig(guidance=1, matching=0, regression=0), problem(vp()))


@pytest.mark.parametrize("ladder", [[], [499, 749], [499, 499], [1000], [0, -1], [499.5]])
def test_ladders_that_are_none(ladder: list[float]) -> None:
    with pytest.raises(UserError, match=r"method\.timesteps"):
        DMD2(DMD2Config(guidance=1, timesteps=ladder), problem(vp()))


# ---------------------------------------------------------------- recipes


def test_recipes_of_four_steps() -> None:
    recipe = DMD2(DMD2Config(guidance=8.0), problem(vp())).recipe()
    assert (recipe.scheduler_class, recipe.timesteps, recipe.num_inference_steps) == (
        "LCMScheduler",
        (999, 749, 499, 249),
        4,
    )
    assert (recipe.guidance_scale, recipe.baked_guidance, recipe.prediction_type) == (1.0, 8.0, "epsilon")
    recipe = DMD2(DMD2Config(guidance=4.0), problem(flow(3.0))).recipe()
    assert recipe.scheduler_class == "FlowMatchLCMScheduler"
    assert recipe.sigmas == pytest.approx((1, 0.75, 0.5, 0.25), abs=1e-15)  # before the scheduler's own shift
    assert recipe.scheduler_config["shift"] == 3.0
    assert replace(Recipe.from_json(recipe.to_json())) == recipe
    one = DMD(DMDConfig(guidance=3.0), problem(vp())).recipe()
    assert (one.scheduler_class, one.timesteps) == ("LCMScheduler", (999,))


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_an_ancestral_walk_is_exported_for_its_stock_scheduler(steps: int) -> None:
    """EulerAncestral takes no ladder: it is told its last timestep, and the first call sees noise of std 1 as in training."""
    ladder = student_timesteps(vp(), steps)
    recipe = few_step_recipe(problem(vp()), "x", ladder, Transition(TransitionKind.ANCESTRAL), 1.0)
    assert (recipe.spaced, recipe.timesteps, recipe.native_timesteps(vp())) == (ladder, (), ladder)
    assert recipe.transition() == Transition(TransitionKind.ANCESTRAL)
    assert Recipe.from_json(recipe.to_json()) == recipe
    scheduler = recipe.scheduler({**SD, "timestep_spacing": "trailing"})
    assert isinstance(scheduler, EulerAncestralDiscreteScheduler)
    scheduler.set_timesteps(steps)
    assert tuple(scheduler.timesteps.tolist()) == ladder
    seen = scheduler.scale_model_input(scheduler.init_noise_sigma * torch.ones(1), scheduler.timesteps[0])
    assert float(seen) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("schedule", "ladder", "strength", "words"),
    [
        (vp(), (999, 499), 0.7, "strength 0.7"),
        (vp(), (999, 600), 1.0, "leave method.timesteps out"),
        (vp(Prediction.V, rescale_betas_zero_snr=True), (999, 499), 1.0, "ancestral"),
        (flow(3.0), (1.0, 0.5), 1.0, "ancestral"),
        (vp(Prediction.SAMPLE), (999, 499), 1.0, "ancestral"),
    ],
    ids=["strength", "uneven", "zero-snr", "flow", "sample"],
)
def test_ancestral_walks_that_no_stock_scheduler_makes(
    schedule: NoiseSchedule, ladder: tuple[float, ...], strength: float, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        few_step_recipe(problem(schedule), "x", ladder, Transition(TransitionKind.ANCESTRAL, strength), 1.0)


def test_a_walk_without_noise_from_zero_snr_is_exported_for_tcd_s_scheduler() -> None:
    """Euler's first sigma is 4096 there: what is left of the sample in float32 would not be the one that was trained."""
    deterministic = DMD2Config(guidance=3.0, transition="deterministic")
    schedule = vp(Prediction.V, rescale_betas_zero_snr=True)
    recipe = DMD2(deterministic, problem(schedule)).recipe()
    assert (recipe.scheduler_class, recipe.scheduler_config["original_inference_steps"]) == ("TCDScheduler", 1000)
    assert recipe.transition() == Transition(TransitionKind.TCD, 0.0)
    assert DMD2(deterministic, problem(vp())).recipe().scheduler_class == "EulerDiscreteScheduler"
    assert DMD2(deterministic, problem(flow(3.0))).recipe().scheduler_class == "FlowMatchEulerDiscreteScheduler"


HOSTILE = {"use_karras_sigmas": True, "timestep_spacing": "trailing", "steps_offset": 1, "set_alpha_to_one": False}
HOSTILE_FLOW = {"use_dynamic_shifting": True, "shift_terminal": 0.02, "shift": 7.0, "use_karras_sigmas": True}


@pytest.mark.parametrize("hostile", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("transition", ["renoise", "deterministic"])
def test_the_stock_scheduler_of_a_recipe_walks_our_walk(
    name: str, transition: str, hostile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Called as a pipeline calls it, on a base scheduler config that would bend the ladder if left as it is."""
    schedule = SCHEDULES[name]()
    method = DMD2(DMD2Config(guidance=1.0, transition=transition), problem(schedule))  # type: ignore[arg-type]
    triple = analytic_triple(gaussian(MEAN_T), schedule)
    disturb(triple)
    z = noise(2, DIMENSION, 1, 1).float()

    def fresh(index: int) -> Tensor:
        return noise(2, DIMENSION, 1, 1, seed=20 + index).float()

    ours = sample(
        lambda x, t: triple.generator.x0(x, t, prompts(2)), schedule, z, method.timesteps, method.transition, fresh
    )
    recipe = method.recipe()
    base: dict[str, Any] = {} if schedule.is_flow else {**SD, "prediction_type": schedule.prediction.value}
    if hostile:
        base |= HOSTILE_FLOW if schedule.is_flow else HOSTILE
    scheduler: Any = recipe.scheduler(base)
    if schedule.is_flow:
        scheduler.set_timesteps(sigmas=list(recipe.sigmas))
    else:
        scheduler.set_timesteps(timesteps=list(recipe.timesteps))
    calls = iter(range(9))
    for module in ("lcm", "flow_match_lcm", "euler_discrete", "flow_match_euler_discrete"):
        target = f"diffusers.schedulers.scheduling_{module}.randn_tensor"
        monkeypatch.setattr(target, lambda *_args, **_options: fresh(next(calls)), raising=False)
    x = z * getattr(scheduler, "init_noise_sigma", 1.0)
    assert len(scheduler.timesteps) == 4
    for t in scheduler.timesteps:
        seen = x if schedule.is_flow else scheduler.scale_model_input(x, t)
        native = float(t) / 1000 if schedule.is_flow else float(t)
        with torch.no_grad():
            out = triple.generator.estimate(seen, native, prompts(2)).raw
        x = scheduler.step(out, t, x).prev_sample
    torch.testing.assert_close(x, ours, rtol=0, atol=2e-4)
