"""Flash-DMD against closed forms: which loss moves which step, and a preference that starts at log 2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.tiny_checkpoints import refusal
from support.toys import SCHEDULES, analytic_triple, batch_of, draws, four_modes, noise, problem, prompts
from torch import Tensor

from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.diffusion.transitions import Transition
from stepdistill.frozen.vision import VISION_ENCODER, VisionEncoder
from stepdistill.methods.base import Batch, Progress
from stepdistill.methods.gan import gan_generator_loss
from stepdistill.methods.matching.dmd2 import DMD2, DMD2Config
from stepdistill.methods.matching.flash import Flash, FlashConfig, FlashRollout
from stepdistill.methods.preference.losses import REFERENCE, log_ratio, select_candidates
from stepdistill.rewards.base import REWARD, FunctionReward
from stepdistill.roles.triple import FAKE_SCORE, GENERATOR, Triple

GRIDS = ["eps", "v", "flow", "flow-shift-3"]
SHAPE = (2, 1, 1)
RL = {"reward": "critic:brightness", "start": 4}
JOINT = Progress(stage=1)


class Pixels(VisionEncoder):
    channels = (3,)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [images]


def decode(latents: Tensor) -> Tensor:
    """Three channels, none of them constant, in (0, 1)."""
    return torch.cat([latents, latents[:, :1] - latents[:, 1:]], 1).sigmoid().expand(-1, -1, 4, 4)


def first_coordinate(images: Tensor, texts: Sequence[str]) -> Tensor:
    return images[:, 0].mean((1, 2)).logit()


def flash(name: str, sign: float = 1.0, **options: Any) -> tuple[Flash, Triple]:
    schedule = SCHEDULES[name]()
    config = {"guidance": 2.0, "gan": {"weight": 0.3, "features": "vision", "reals": "pairs", "width": 8}, **options}
    method = Flash(FlashConfig.model_validate(config), problem(schedule, 2))
    triple = analytic_triple(four_modes(std=0.4), schedule, four_modes((0.4, 0.3, 0.2, 0.1), std=0.5))
    triple.frozen = {
        VISION_ENCODER: Pixels(),
        REWARD: FunctionReward(lambda x, texts: sign * first_coordinate(x, texts)),
    }
    method.prepare(triple, decode)
    triple.heads[FAKE_SCORE]["discriminator"].double()
    return method, triple


def paired(count: int = 4) -> Batch:
    """With the teacher's samples as reals."""
    cond = prompts(count, 4)
    return replace(batch_of(count, 4), pair_latents=noise(count, *SHAPE, seed=8), pair_cond=cond, prompts=("",) * count)


def matched_and_last(schedule: NoiseSchedule, method: Flash) -> FlashRollout:
    x0, last = noise(4, *SHAPE, seed=3).requires_grad_(), noise(4, *SHAPE, seed=4).requires_grad_()
    return FlashRollout(paired(), x0, torch.full((4,), method.timesteps[1], dtype=torch.float64), x0, last=last)


# ---------------------------------------------------------------- the split


def test_what_the_last_step_s_gan_cannot_serve_is_refused() -> None:
    options = {"divergence": "jeffreys", "gan": {"weight": 0.1, "features": "real_score"}}
    refusal(lambda: flash("eps", **options), "sees the last step alone", "reverse_kl")


def test_a_reward_is_climbed_where_the_sample_is_matched() -> None:
    """At high noise; the last step is the GAN's."""
    (method, triple), (rewarded, other) = flash("flow"), flash("flow", reward={"name": "x:y", "weight": 0.5})
    found = []
    for own, its in ((method, triple), (rewarded, other)):
        rollout = matched_and_last(own.schedule, own)
        total = own.loss(GENERATOR, rollout, its, Progress(), draws()).total
        found.append(torch.autograd.grad(total, [rollout.x0, rollout.last]))  # type: ignore[list-item]
    assert float((found[0][0] - found[1][0]).abs().max()) > 1e-6
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("name", GRIDS)
def test_matching_moves_the_first_steps_and_the_gan_the_last(name: str) -> None:
    """Each gradient is that of its loss alone: DMD2's on the one sample, the GAN's on the other."""
    method, triple = flash(name)
    rollout = matched_and_last(method.schedule, method)
    total = method.loss(GENERATOR, rollout, triple, Progress(), draws()).total
    to_matched, to_last = torch.autograd.grad(total, [rollout.x0, rollout.last])  # type: ignore[list-item]
    plain = DMD2(DMD2Config(guidance=2.0), method.problem).loss(GENERATOR, rollout, triple, Progress(), draws()).total
    (expected,) = torch.autograd.grad(plain, rollout.x0)
    torch.testing.assert_close(to_matched, expected, rtol=0, atol=1e-14)
    assert rollout.last is not None
    adversarial = 0.3 * gan_generator_loss(triple, method.config.gan, rollout.last, prompts(4, 4), draws(), decode)
    (expected,) = torch.autograd.grad(adversarial, rollout.last)
    torch.testing.assert_close(to_last, expected, rtol=0, atol=1e-14)
    assert min(float(to_matched.abs().max()), float(to_last.abs().max())) > 1e-4


@pytest.mark.parametrize("exits", ["batch", "sample"])
@pytest.mark.parametrize("name", GRIDS)
def test_the_last_step_sees_clean_samples_noised_again(name: str, exits: str) -> None:
    """Walked by hand from where the rollout was left; no rollout is left at the last step."""
    method, triple = flash(name, exits=exits)
    schedule, timesteps, cond, seen = method.schedule, method.timesteps, prompts(4, 4), set()
    for step in range(6):
        stream = draws(step=step).for_role("rollout")
        found = method.rollout(paired(), triple, Progress(), draws(step=step))
        assert isinstance(found, FlashRollout)
        expected = []
        for row, time in enumerate(found.t.tolist()):
            seen.add(time)
            x0 = found.x0[row : row + 1].detach()
            for index in range(timesteps.index(time), len(timesteps) - 1):
                fresh = stream.normal(f"on{index}", SHAPE)[row : row + 1]
                x0 = triple.generator.x0(
                    schedule.add_noise(x0, fresh, timesteps[index + 1]), timesteps[index + 1], cond[[row]]
                )
            x_t = schedule.add_noise(x0, stream.normal("last", SHAPE)[row : row + 1], timesteps[-1])
            expected.append(triple.generator.x0(x_t, timesteps[-1], cond[[row]]))
        torch.testing.assert_close(found.last, torch.cat(expected))
        assert found.last is not None
        assert found.last.requires_grad
    assert seen == set(timesteps[:-1])


def test_the_gan_never_reaches_the_fake_score() -> None:
    """Its loss leaves nothing on the network, from either side; the head learns."""
    found = []
    for weight in (0.0, 5.0):
        method, triple = flash(
            "eps", gan={"weight": 0.3, "critic_weight": weight, "features": "vision", "reals": "pairs"}
        )
        with triple.training(FAKE_SCORE):
            rollout = method.rollout(paired(), triple, Progress(), draws())
            method.loss(FAKE_SCORE, rollout.detach(), triple, Progress(), draws(role=FAKE_SCORE)).total.backward()
        found.append([p.grad.clone() for p in triple.network_parameters(FAKE_SCORE).values() if p.grad is not None])
        heads = [p.grad for p in triple.heads[FAKE_SCORE]["discriminator"].parameters() if p.grad is not None]
        assert (sum(float(g.abs().sum()) for g in heads) > 0) == (weight > 0)
    assert len(found[0]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_cannot_work_is_refused() -> None:
    refusal(lambda: flash("eps", steps=1), "method.steps is 1")
    refusal(lambda: flash("eps", gan={"weight": 0.0}), "method.gan.weight is 0")
    refusal(lambda: flash("eps", gan={"weight": 1.0, "features": "fake_score"}), "'fake_score'")
    refusal(lambda: flash("eps", simulate=False), "method.simulate is false")
    refusal(lambda: flash("eps", rl={**RL, "steps": 4}), "method.rl.steps is 4")
    refusal(lambda: flash("eps", rl=RL, transition="deterministic"), "random successors")
    method, triple = flash("eps")
    refusal(lambda: method.prepare(triple), "no autoencoder")


# ---------------------------------------------------------------- preferences


@pytest.mark.parametrize("name", GRIDS)
def test_the_gap_of_log_ratios_is_that_of_the_transitions(name: str) -> None:
    """log p(z)/p_ref(z) from the densities of the sampler's own step."""
    schedule = SCHEDULES[name]()
    t, s = (schedule.time_at_fraction(torch.tensor(p, dtype=torch.float64)) for p in (0.8, 0.5))
    x_t, x0, other = (noise(3, *SHAPE, seed=k) for k in range(3))
    best, worst = (noise(3, *SHAPE, seed=k) for k in (5, 6))
    ours, theirs = (Transition()(schedule, x_t, x, t, s) for x in (x0, other))
    expected = ours.log_prob(best) - theirs.log_prob(best) - ours.log_prob(worst) + theirs.log_prob(worst)
    alpha, sigma = schedule.levels(s, x0)
    found = [log_ratio(z, alpha * x0, alpha * other, sigma) for z in (best, worst)]
    torch.testing.assert_close(found[0] - found[1], expected)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", GRIDS)
def test_at_the_start_it_is_log_2_and_pulls_toward_the_best(name: str, sign: float) -> None:
    """dL/dx0 = -beta/2 alpha (z_best - z_worst) / (sigma^2 sqrt(n) B), so that the reversed reward reverses it."""
    method, triple = flash(name, sign, rl={**RL, "beta": 7.0, "candidates": 3})
    rollout = method.rollout(paired(), triple, JOINT, draws())
    assert {*rollout.t.tolist()} <= {*method.timesteps[:2]}
    terms = method.loss(GENERATOR, rollout, triple, JOINT, draws())
    assert float(terms.total.detach()) == pytest.approx(math.log(2), abs=1e-15)
    (found,) = torch.autograd.grad(terms.total, rollout.x0)
    s = torch.tensor([method.timesteps[method.timesteps.index(t) + 1] for t in rollout.t.tolist()], dtype=torch.float64)
    z = [method.schedule.add_noise(rollout.x0.detach(), draws().normal(f"successor{k}", SHAPE), s) for k in range(3)]
    rewards = torch.stack(
        [sign * triple.real_score.x0(own, s, rollout.batch.cond)[:, 0].flatten() for own in z]
    ).detach()
    alpha, sigma = method.schedule.levels(s, z[0])
    gap = select_candidates(z, rewards.argmax(0)) - select_candidates(z, rewards.argmin(0))
    expected = -7.0 / 2 * alpha * gap / sigma.square() / 2**0.5 / 4
    torch.testing.assert_close(found, expected)
    assert float(terms.parts["reward_gap"]) == pytest.approx(float((rewards.amax(0) - rewards.amin(0)).mean()))
    reversed_method, reversed_triple = flash(name, -sign, rl={**RL, "beta": 7.0, "candidates": 3})
    again = reversed_method.rollout(paired(), reversed_triple, JOINT, draws())
    other = reversed_method.loss(GENERATOR, again, reversed_triple, JOINT, draws()).total
    torch.testing.assert_close(torch.autograd.grad(other, again.x0)[0], -found)


def test_equal_rewards_prefer_nothing() -> None:
    method, triple = flash("flow", 0.0, rl=RL)
    rollout = method.rollout(paired(), triple, JOINT, draws())
    (found,) = torch.autograd.grad(method.loss(GENERATOR, rollout, triple, JOINT, draws()).total, rollout.x0)
    assert float(found.abs().max()) == 0


def test_rows_are_chosen_one_by_one() -> None:
    candidates = [noise(3, *SHAPE, seed=k) for k in range(4)]
    found = select_candidates(candidates, torch.tensor([2, 0, 3]))
    assert all(torch.equal(found[row], candidates[k][row]) for row, k in enumerate((2, 0, 3)))


def test_updates_of_both_stages() -> None:
    """Ratio 2 in the first; in the second three preferences, then distillation at its own ratio."""
    method, _ = flash("eps", rl={**RL, "per_distillation": 3})
    both, fake, generator = (GENERATOR, FAKE_SCORE), (FAKE_SCORE,), (GENERATOR,)
    first = [tuple(method.updates(Progress(stage_iteration=k))) for k in range(4)]
    assert first == [both, fake, both, fake]
    joint = [tuple(method.updates(Progress(stage=1, stage_iteration=k))) for k in range(6)]
    assert joint == [generator, generator, generator, both, fake, generator]
    stages = method.stages()
    assert [stage.iterations for stage in stages] == [4, None]
    assert stages[1].copies == ((GENERATOR, REFERENCE),)


def test_distillation_goes_on_in_the_joint_stage() -> None:
    method, triple = flash("flow", rl={**RL, "per_distillation": 1})
    progress = Progress(stage=1, stage_iteration=1)
    rollout = method.rollout(paired(), triple, progress, draws())
    assert isinstance(rollout, FlashRollout)
    assert {"dm", "gan"} <= method.loss(GENERATOR, rollout, triple, progress, draws()).parts.keys()


def test_preferences_raise_the_reward() -> None:
    """The first coordinate of samples grows, and the reversed reward makes it fall."""
    moved = {}
    for sign in (1.0, -1.0):
        method, triple = flash("flow", sign, rl={**RL, "start": 0}, steps=3)
        optimizer = torch.optim.Adam(triple.parameters(GENERATOR).values(), lr=1e-2)
        means = []
        for step in range(25):
            stream = draws(range(64), step=step)
            with triple.training(GENERATOR):
                rollout = method.rollout(paired(64), triple, JOINT, stream)
                optimizer.zero_grad()
                method.loss(GENERATOR, rollout, triple, JOINT, stream).total.backward()
            optimizer.step()
            means.append(float(rollout.x0[:, 0].mean()))
        moved[sign] = sum(means[-5:]) / 5 - sum(means[:5]) / 5
    assert moved[1.0] > 0.05
    assert moved[-1.0] < -0.05


def test_a_latent_gan_serves_as_well() -> None:
    method, triple = flash("eps", gan={"weight": 0.3, "features": "real_score", "reals": "pairs"})
    rollout = method.rollout(paired(), triple, Progress(), draws())
    terms = method.loss(GENERATOR, rollout, triple, Progress(), draws())
    assert {"dm", "gan"} <= terms.parts.keys()
