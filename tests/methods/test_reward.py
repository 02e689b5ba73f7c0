"""Climbing a reward: gradients through the last steps against those by hand, and what holds the student."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.method_cases import CASES, Bench, Case, saved
from support.tiny_checkpoints import refusal
from support.toys import SCHEDULES, analytic_triple, batch_of, disturb, draws, four_modes, problem
from torch import Tensor

import stepdistill
from stepdistill.families.recipe import Recipe
from stepdistill.methods.base import Progress
from stepdistill.methods.matching.dmd2 import DMD2, DMD2Config
from stepdistill.methods.preference.reward import RewardConfig, RewardedRollout, RewardTuning
from stepdistill.rewards.base import HELD_OUT, REWARD, FunctionReward
from stepdistill.roles.triple import GENERATOR, Triple
from stepdistill.training.run import train

SHAPE = (2, 1, 1)
BATCH = replace(batch_of(4, 4), prompts=("",) * 4)
NAMES = ["eps", "flow-shift-3"]


def squares(images: Tensor, texts: Sequence[str]) -> Tensor:
    return images.square().flatten(1).sum(1)


def tuning(name: str, function: Any = squares, **options: Any) -> tuple[RewardTuning, Triple]:
    schedule = SCHEDULES[name]()
    method = RewardTuning(RewardConfig.model_validate({"reward": "clip", **options}), problem(schedule, 2))
    triple = analytic_triple(four_modes(std=0.4), schedule)
    triple.frozen = {REWARD: FunctionReward(function), HELD_OUT: FunctionReward(lambda x, texts: x[:, 1, 0, 0])}
    method.prepare(triple, lambda latents: latents)
    disturb(triple)
    return method, triple


def gradients(triple: Triple, total: Tensor) -> Tensor:
    found = torch.autograd.grad(total, list(triple.parameters(GENERATOR).values()))
    return torch.cat([part.flatten() for part in found])


@pytest.mark.parametrize("last", [1, 2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_the_graph_is_that_of_the_last_steps(name: str, last: int) -> None:
    """Walked by hand, cut before step N - K; with K = N it is the derivative of the whole sample."""
    method, triple = tuning(name, last=last, stay=0.3, weight=2.0)
    rollout = method.rollout(BATCH, triple, Progress(), draws())
    terms = method.loss(GENERATOR, rollout, triple, Progress(), draws())
    stream, timesteps, changes = draws().for_role("rollout"), method.timesteps, []
    x = stream.normal("noise", SHAPE)
    for index, t in enumerate(timesteps):
        x0 = triple.generator.x0(x, t, BATCH.cond)
        if index < 4 - last:
            x0 = x0.detach()
        else:
            old = triple.real_score.x0(x.detach(), t, BATCH.cond).detach()
            changes.append(method.error(x0, old, torch.full((4,), t, dtype=torch.float64)).mean())
        if index + 1 < len(timesteps):
            alpha, sigma = method.schedule.levels(timesteps[index + 1], x0)
            x = alpha * x0 + sigma * stream.normal(f"fresh{index}", SHAPE)
    expected = -2.0 * squares(x0, []).mean() + 0.3 * torch.stack(changes).mean()
    torch.testing.assert_close(terms.total, expected)
    torch.testing.assert_close(gradients(triple, terms.total), gradients(triple, expected))
    torch.testing.assert_close(terms.parts["reward"], squares(x0.detach(), []).mean())
    torch.testing.assert_close(terms.parts["held_out"], x0[:, 1].detach().mean())


@pytest.mark.parametrize("name", NAMES)
def test_late_steps_are_drawn_by_lot(name: str) -> None:
    """The estimate there is rewarded, with the graph of that one call; what has reached the margin is left alone."""
    method, triple = tuning(name, form="late", margin=1.0)
    seen = set()
    for step in range(10):
        rollout = method.rollout(BATCH, triple, Progress(), draws(step=step))
        assert isinstance(rollout, RewardedRollout)
        seen |= {*rollout.t.tolist()}
        assert not rollout.x_t.requires_grad
        terms = method.loss(GENERATOR, rollout, triple, Progress(), draws(step=step))
        rewards = squares(triple.generator.x0(rollout.x_t, rollout.t, BATCH.cond), [])
        torch.testing.assert_close(terms.total, torch.relu(1.0 - rewards).mean())
    assert seen == set(method.timesteps[2:])
    generous, triple = tuning(name, form="late", margin=-100.0)
    rollout = generous.rollout(BATCH, triple, Progress(), draws())
    total = generous.loss(GENERATOR, rollout, triple, Progress(), draws()).total
    assert float(gradients(triple, total).abs().max()) == 0


def test_the_reward_rises_and_stay_holds_it_back() -> None:
    moved = {}
    for stay in (0.0, 30.0):
        method, triple = tuning("flow", lambda x, texts: x[:, 0, 0, 0], last=2, stay=stay)
        optimizer = torch.optim.Adam(triple.parameters(GENERATOR).values(), lr=5e-3)
        found = []
        for step in range(20):
            stream = draws(range(32), step=step)
            batch = replace(batch_of(32, 4), prompts=("",) * 32)
            rollout = method.rollout(batch, triple, Progress(), stream)
            terms = method.loss(GENERATOR, rollout, triple, Progress(), stream)
            optimizer.zero_grad()
            terms.total.backward()
            optimizer.step()
            found.append(float(terms.parts["reward"]))
        moved[stay] = sum(found[-3:]) - sum(found[:3])
    assert moved[0.0] > 0.5
    assert moved[30.0] < moved[0.0] / 2


def test_beside_distribution_matching() -> None:
    """DMD2's loss, and the reward's on the same sample."""
    totals, schedule = [], SCHEDULES["eps"]()
    for weight in (0.0, 0.4):
        options = {"guidance": 2.0, "reward": {"name": "clip", "weight": weight, "margin": 9.0, "held_out": "clip"}}
        method = DMD2(DMD2Config.model_validate(options), problem(schedule, 2))
        needs = DMD2.needs(method.config)
        assert (needs.reward, needs.held_out) == (("clip", "clip") if weight else (None, None))
        triple = analytic_triple(four_modes(std=0.4), schedule, four_modes((0.4, 0.3, 0.2, 0.1), std=0.5))
        triple.frozen = {REWARD: FunctionReward(squares)}
        method.prepare(triple, lambda latents: latents)
        rollout = method.rollout(BATCH, triple, Progress(), draws())
        terms = method.loss(GENERATOR, rollout, triple, Progress(), draws())
        totals.append(terms.total)
    torch.testing.assert_close(totals[1] - totals[0], 0.4 * torch.relu(9.0 - squares(rollout.x0, [])).mean())
    torch.testing.assert_close(terms.parts["reward"], squares(rollout.x0.detach(), []).mean())
    refusal(lambda: method.prepare(triple), "no autoencoder")
    refusal(lambda: DMD2(DMD2Config.model_validate({**options, "simulate": False}), method.problem), "method.simulate")


def test_the_feedback_stage_of_a_student_of_segments(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Hyper-SD's order: segments, then a reward on TCD's walk, one LoRA that stock diffusers loads."""
    bench = Bench(tiny, tmp_path)
    train(bench.config(CASES["tscd"], 3, family="sd", dtype="float32"), tmp_path / "segments")
    climbing = Case("reward", {"reward": "critic:brightness", "steps": 2, "transition": "tcd", "guidance": 2.0})
    config = bench.config(climbing, 2, family="sd", dtype="float32", ema=0.0)
    train(config.model_copy(update={"init": str(tmp_path / "segments")}), tmp_path / "climbed")
    recipe = Recipe.read(stepdistill.export(tmp_path / "climbed", "diffusers-lora", tmp_path / "export"))
    assert recipe is not None
    assert recipe.scheduler_class == "TCDScheduler"
    before, after = (saved(tmp_path / name)["generator"] for name in ("segments", "climbed"))
    moved = [float((after[key] - before[key]).abs().max()) for key in after if key in before]
    # two updates of 1e-3 from where the segments ended, and not from the base
    assert 0 < max(moved) <= 2.1e-3


def test_what_cannot_work_is_refused() -> None:
    refusal(lambda: tuning("eps", last=5), "method.last is 5")
    refusal(lambda: tuning("eps", form="late", late=5), "method.late is 5")
    method, triple = tuning("eps", lambda x, texts: x.detach().flatten(1).sum(1))
    rollout = method.rollout(BATCH, triple, Progress(), draws())
    refusal(lambda: method.loss(GENERATOR, rollout, triple, Progress(), draws()), "no gradient", "pso")
    refusal(lambda: method.prepare(triple), "no autoencoder")
