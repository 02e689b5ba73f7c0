"""PSO against closed forms: log 2 at the start, exact ratios of the sampler's own steps, and what nothing may pull on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_checkpoints import refusal
from support.toys import SCHEDULES, analytic_triple, batch_of, disturb, draws, four_modes, noise, problem, vp
from torch import Tensor

from stepdistill.config.reading import parse
from stepdistill.config.schema import RunConfig
from stepdistill.diffusion.prediction import Prediction
from stepdistill.families.conditioning import Conditioning
from stepdistill.methods.base import Batch, Progress, Rollout
from stepdistill.methods.preference.losses import REFERENCE, clamp_log_ratios, log_ratio, pairwise_loss
from stepdistill.methods.preference.pso import PSO, ImagePairs, PSOConfig, TrajectoryPairs
from stepdistill.rewards.base import REWARD, FunctionReward
from stepdistill.roles.sampler import sample
from stepdistill.roles.triple import GENERATOR, REAL_SCORE, Triple
from stepdistill.training.monitoring.grids import Grid
from stepdistill.training.run import open_run, train

GRIDS = ["eps", "v", "flow", "flow-shift-3"]
KERNELS: dict[str, dict[str, Any]] = {
    "renoise": {},
    "ancestral": {"transition": "deterministic", "kernel": "ancestral", "strength": 0.7},
    "tcd": {"transition": "tcd", "gamma": 0.4},
}
SHAPE = (2, 1, 1)
ONLINE = {"form": "online", "reward": "critic:brightness"}
OFFLINE = {"form": "offline", "losers": "given"}


def first_coordinate(images: Tensor, texts: Sequence[str]) -> Tensor:
    return images[:, 0, 0, 0]


def decode(latents: Tensor) -> Tensor:
    """The latents themselves: what is ranked is known."""
    return latents


def pso(name: str, sign: float = 1.0, initialised: bool = False, **options: Any) -> tuple[PSO, Triple]:
    schedule = SCHEDULES[name]()
    posed = replace(problem(schedule, 2), initialised=initialised)
    method = PSO(PSOConfig.model_validate(options), posed)
    triple = analytic_triple(four_modes(std=0.4), schedule)
    triple.frozen = {REWARD: FunctionReward(lambda x, texts: sign * first_coordinate(x, texts))}
    method.prepare(triple, decode)
    return method, triple


def shown(count: int = 4) -> Batch:
    """With winners, losers, and captions that are not the prompts."""
    cond = Conditioning(torch.eye(4, dtype=torch.float64)[:count, None])
    images, losers = (noise(count, *SHAPE, seed=k) for k in (8, 9))
    return replace(batch_of(count, 4), prompts=("",) * count, images=images, image_cond=cond, losers=losers)


def rolled(method: PSO, triple: Triple, batch: Batch | None = None, step: int = 0) -> Rollout:
    return method.rollout(batch or shown(), triple, Progress(), draws(step=step))


def gradient(method: PSO, triple: Triple, rollout: Rollout) -> Tensor:
    total = method.loss(GENERATOR, rollout, triple, Progress(), draws()).total
    found = torch.autograd.grad(total, list(triple.parameters(GENERATOR).values()))
    return torch.cat([part.flatten() for part in found])


# ---------------------------------------------------------------- online


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", GRIDS)
def test_before_the_first_update_every_ratio_is_1(name: str, kernel: str) -> None:
    """What training says of each transition is what sampling said, and the loss of each is log 2."""
    method, triple = pso(name, **ONLINE, **KERNELS[kernel])
    walks = rolled(method, triple)
    pieces = list(method.pieces(GENERATOR, walks, triple, Progress(), draws()))
    assert len(pieces) == 3
    for piece in pieces:
        assert 3 * float(piece.total.detach()) == pytest.approx(math.log(2), abs=1e-13)
        assert float(piece.parts["resampled"]) < 1e-12
        assert float(piece.parts["kl"]) == pytest.approx(0, abs=1e-13)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", GRIDS)
def test_the_online_loss_by_hand(name: str, kernel: str) -> None:
    """From log densities along two walks that are walked again, the winner's first."""
    method, triple = pso(name, **ONLINE, **KERNELS[kernel], beta=7.0, trust=0.05)
    disturb(triple)
    batch = shown()
    walks = rolled(method, triple, batch)
    assert isinstance(walks, TrajectoryPairs)
    assert walks.rewards is not None
    stream, losses = draws().for_role("rollout"), []
    ratios = []
    for side in ("first", "second"):
        x, found = stream.normal(f"{side}.noise", SHAPE), []
        for index, (t, s) in enumerate(zip(method.timesteps[:-1], method.timesteps[1:], strict=True)):
            ours = method.kernel(method.schedule, x, triple.generator.x0(x, t, batch.cond), t, s)
            theirs = method.kernel(method.schedule, x, triple.real_score.x0(x, t, batch.cond), t, s)
            x_s = (ours.mean + ours.std * stream.normal(f"{side}.fresh{index}", SHAPE)).detach()
            found.append((ours.log_prob(x_s) - theirs.log_prob(x_s)) / 2)
            x = x_s
        ratios.append(torch.stack(found).exp().clamp(0.95, 1.05).log())
        end = triple.generator.x0(x, method.timesteps[-1], batch.cond)
        if kernel != "tcd" or method.schedule.is_flow:
            torch.testing.assert_close(walks.rewards.chunk(2)[len(ratios) - 1], end[:, 0, 0, 0].detach())
    won = (walks.rewards[:4] > walks.rewards[4:]).double() * 2 - 1
    losses = -torch.nn.functional.logsigmoid(7.0 * won * (ratios[0] - ratios[1]))
    terms = method.loss(GENERATOR, walks, triple, Progress(), draws())
    torch.testing.assert_close(terms.total, losses.mean())
    assert abs(float(terms.total.detach()) - math.log(2)) > 1e-4
    parameters = list(triple.parameters(GENERATOR).values())
    pairs = zip(*(torch.autograd.grad(total, parameters) for total in (terms.total, losses.mean())), strict=True)
    assert max(float((a - b).abs().max()) for a, b in pairs) < 1e-12


@pytest.mark.parametrize("name", ["eps", "flow"])
def test_the_reversed_reward_reverses_the_gradient(name: str) -> None:
    found = []
    for sign in (1.0, -1.0):
        method, triple = pso(name, sign, **ONLINE)
        found.append(gradient(method, triple, rolled(method, triple)))
    torch.testing.assert_close(found[0], -found[1])
    assert float(found[0].abs().max()) > 1e-6


def test_ties_pull_on_nothing() -> None:
    method, triple = pso("eps", 0.0, **ONLINE)
    walks = rolled(method, triple)
    assert float(gradient(method, triple, walks).abs().max()) == 0
    assert float(method.loss(GENERATOR, walks, triple, Progress(), draws()).parts["ties"]) == 1


def test_the_clamp_ends_the_pull() -> None:
    pulls = {}
    for trust in (1e-9, 0.0):
        method, triple = pso("eps", **ONLINE, trust=trust)
        disturb(triple)
        pulls[trust] = float(gradient(method, triple, rolled(method, triple)).abs().max())
    assert pulls[1e-9] == 0
    assert pulls[0.0] > 1e-6
    ratios = torch.tensor([0.5, 0.95, 1.3], dtype=torch.float64).log()
    torch.testing.assert_close(clamp_log_ratios(ratios, 0.1).exp(), torch.tensor([0.9, 0.95, 1.1], dtype=torch.float64))


def test_rewards_rise() -> None:
    """The first coordinate of samples grows, and under the reversed reward it falls."""
    moved = {}
    for sign in (1.0, -1.0):
        method, triple = pso("flow", sign, **ONLINE, steps=3, beta=5.0, trust=0.0)
        optimizer = torch.optim.Adam(triple.parameters(GENERATOR).values(), lr=1e-2)
        means = []
        for step in range(25):
            stream = draws(range(64), step=step)
            batch = replace(batch_of(64, 4), prompts=("",) * 64)
            with triple.training(GENERATOR):
                rollout = method.rollout(batch, triple, Progress(), stream)
                optimizer.zero_grad()
                method.loss(GENERATOR, rollout, triple, Progress(), stream).total.backward()
            optimizer.step()
            means.append(float(rollout.x0[:, 0].mean()))
        moved[sign] = sum(means[-5:]) / 5 - sum(means[:5]) / 5
    assert moved[1.0] > 0.05
    assert moved[-1.0] < -0.05


# ---------------------------------------------------------------- offline


def reference_errors(method: PSO, triple: Triple, pairs: ImagePairs, role: str) -> tuple[Tensor, Tensor]:
    """Mean squared errors of eps, or of what a network of velocities predicts, on winners and losers."""
    assert pairs.losers is not None
    assert pairs.loser_x_t is not None
    cond, found = pairs.batch.image_cond, []
    assert cond is not None
    for x_t, x0 in ((pairs.x_t, pairs.x0), (pairs.loser_x_t, pairs.losers)):
        eps = draws().for_role("rollout").normal("eps", SHAPE)
        torch.testing.assert_close(x_t, method.schedule.add_noise(x0, eps, pairs.t))
        estimate = triple.denoiser(role).estimate(x_t, pairs.t, cond)
        alpha, sigma = method.schedule.levels(pairs.t, x0)
        wanted = {
            Prediction.EPSILON: eps, Prediction.V: alpha * eps - sigma * x0, Prediction.FLOW: eps - x0
        }[method.schedule.prediction]  # fmt: skip
        error = estimate.raw - wanted
        found.append(error.square().flatten(1).mean(1))
    return found[0], found[1]


def test_the_noisiest_step_of_a_zero_snr_schedule_counts() -> None:
    """eps is known exactly there, whatever the image: of eps alone its loss would be 0."""
    schedule = vp(Prediction.V, rescale_betas_zero_snr=True)
    method = PSO(PSOConfig.model_validate({**OFFLINE, "beta": 3.0}), problem(schedule, 2))
    x0, t = noise(3, *SHAPE), torch.full((3,), 999.0, dtype=torch.float64)
    assert torch.allclose(method.error(x0 + 0.5, x0, t), torch.full((3,), 0.25, dtype=torch.float64))


@pytest.mark.parametrize("name", ["eps", "flow-shift-3"])
def test_the_released_hinge_of_a_subject_is_the_denoising_loss(name: str) -> None:
    """Its losers are pushed by beta kappa and pulled by the anchor, which are the same number."""
    found = []
    for kappa, anchor in ((0.1, 0.5), (0.0, 0.0), (0.1, 0.0)):
        method, triple = pso(name, form="offline", loss="hinge", losers="prompts", beta=5.0, kappa=kappa, anchor=anchor)
        disturb(triple)
        found.append(gradient(method, triple, rolled(method, triple)))
    released, plain, pushed = found
    assert torch.allclose(released, plain, rtol=0, atol=1e-12)
    assert float((pushed - plain).abs().max()) > 1e-3


@pytest.mark.parametrize("options", [{}, {"kappa": 0.3, "anchor": 0.7}, {"loss": "hinge", "kappa": 0.3, "anchor": 0.7}])
@pytest.mark.parametrize("name", GRIDS)
def test_the_offline_loss_by_hand(name: str, options: dict[str, Any]) -> None:
    method, triple = pso(name, **OFFLINE, beta=3.0, **options)
    disturb(triple)
    pairs = rolled(method, triple)
    assert isinstance(pairs, ImagePairs)
    win, lose = reference_errors(method, triple, pairs, GENERATOR)
    ref_win, ref_lose = reference_errors(method, triple, pairs, REAL_SCORE)
    kappa, anchor = options.get("kappa", 1.0), options.get("anchor", 0.0)
    expected = -torch.nn.functional.logsigmoid(-3.0 * ((win - ref_win) - kappa * (lose - ref_lose)))
    if options.get("loss") == "hinge":
        expected = torch.relu(1 + 3.0 * (win - kappa * lose))
    terms = method.loss(GENERATOR, pairs, triple, Progress(), draws())
    # given losers: held to what the untuned model makes of them
    assert pairs.loser_x_t is not None
    own, before = (
        triple.denoiser(role).x0(pairs.loser_x_t, pairs.t, pairs.batch.image_cond) for role in (GENERATOR, REAL_SCORE)
    )
    held = method.error(own, before.detach(), pairs.t)
    torch.testing.assert_close(terms.total, (expected + anchor * held).mean())
    if anchor:
        sampled = pso(name, **{**OFFLINE, "losers": "captions"}, beta=3.0, **options)[0]
        theirs = sampled.loss(GENERATOR, pairs, triple, Progress(), draws())
        torch.testing.assert_close(theirs.total, (expected + anchor * lose).mean())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", GRIDS)
def test_the_exact_weights_are_the_expected_ratio(name: str, kernel: str) -> None:
    """Over next states that follow the image: two of them on either side of their mean already have that expectation."""
    method, triple = pso(name, **OFFLINE, **KERNELS[kernel], weighting="transition", beta=2.0)
    disturb(triple)
    pairs = rolled(method, triple)
    assert isinstance(pairs, ImagePairs)
    assert pairs.losers is not None
    assert pairs.loser_x_t is not None
    assert pairs.index is not None
    cond, found = pairs.batch.image_cond, []
    assert cond is not None
    s = torch.tensor([method.timesteps[i + 1] for i in pairs.index.tolist()], dtype=torch.float64)
    for x_t, x0 in ((pairs.x_t, pairs.x0), (pairs.loser_x_t, pairs.losers)):
        true, ours, theirs = (
            method.kernel(method.schedule, x_t, of, pairs.t, s)
            for of in (x0, triple.generator.x0(x_t, pairs.t, cond), triple.real_score.x0(x_t, pairs.t, cond))
        )
        step = true.std * noise(*x_t.shape, seed=5)
        sides = [ours.log_prob(x_s) - theirs.log_prob(x_s) for x_s in (true.mean + step, true.mean - step)]
        found.append((sides[0] + sides[1]) / 2 / 2)
    expected = -torch.nn.functional.logsigmoid(2.0 * (found[0] - found[1])).mean()
    torch.testing.assert_close(method.loss(GENERATOR, pairs, triple, Progress(), draws()).total, expected)


@pytest.mark.parametrize("weighting", ["denoising", "transition"])
def test_swapping_a_pair_reverses_the_gradient_at_the_start(weighting: str) -> None:
    found = []
    for swap in (False, True):
        method, triple = pso("eps", **OFFLINE, weighting=weighting)
        batch = shown()
        if swap:
            batch = replace(batch, images=batch.losers, losers=batch.images)
        pairs = rolled(method, triple, batch)
        loss = float(method.loss(GENERATOR, pairs, triple, Progress(), draws()).total.detach())
        assert loss == pytest.approx(math.log(2), abs=1e-13)
        found.append(gradient(method, triple, pairs))
    torch.testing.assert_close(found[0], -found[1])
    assert float(found[0].abs().max()) > 1e-4


@pytest.mark.parametrize("disturbed", [False, True])
def test_a_pair_of_the_same_image_pulls_on_nothing(disturbed: bool) -> None:
    method, triple = pso("flow", **OFFLINE)
    if disturbed:
        disturb(triple)
    batch = shown()
    pairs = rolled(method, triple, replace(batch, losers=batch.images))
    assert float(method.loss(GENERATOR, pairs, triple, Progress(), draws()).total.detach()) == pytest.approx(
        math.log(2)
    )
    assert float(gradient(method, triple, pairs).abs().max()) < 1e-14


@pytest.mark.parametrize("weighting", ["denoising", "transition"])
@pytest.mark.parametrize("name", ["eps", "flow-shift-3"])
def test_times_are_the_samplers_own(name: str, weighting: str) -> None:
    """The noisiest is trained, the clean end is not; the last transition has no density."""
    method, triple = pso(name, **OFFLINE, weighting=weighting)
    seen = {t for step in range(12) for t in rolled(method, triple, step=step).t.tolist()}
    assert seen == set(method.timesteps if weighting == "denoising" else method.timesteps[:-1])
    assert max(seen) == method.schedule.terminal_time
    if name == "eps":
        assert method.timesteps == (999.0, 749.0, 499.0, 249.0)


@pytest.mark.parametrize("losers", ["captions", "prompts"])
def test_losers_are_samples_of_the_untuned_model(losers: str) -> None:
    method, triple = pso("eps", form="offline", losers=losers)
    before = rolled(method, triple)
    disturb(triple)
    after = rolled(method, triple)
    assert isinstance(before, ImagePairs)
    assert isinstance(after, ImagePairs)
    assert before.losers is not None
    assert torch.equal(before.losers, after.losers)  # type: ignore[arg-type]
    stream, batch = draws().for_role("rollout"), shown()
    cond = batch.image_cond if losers == "captions" else batch.cond
    assert cond is not None
    expected = sample(
        lambda x, t: triple.real_score.x0(x, t, cond),
        method.schedule,
        stream.normal("loser.noise", SHAPE),
        method.timesteps,
        method.transition,
        lambda index: stream.normal(f"loser.fresh{index}", SHAPE),
    )
    torch.testing.assert_close(before.losers, expected)


def test_the_reference_is_the_student_as_it_was_given() -> None:
    """A copy where `init` brought one, which training leaves alone, and the base elsewhere."""
    assert pso("eps", **OFFLINE)[0].beside == REAL_SCORE
    method, triple = pso("eps", initialised=True, **OFFLINE)
    assert method.beside == REFERENCE
    disturb(triple)
    triple.copy_role(GENERATOR, REFERENCE)
    loss = method.loss(GENERATOR, rolled(method, triple), triple, Progress(), draws()).total
    assert float(loss.detach()) == pytest.approx(math.log(2), abs=1e-13)
    assert REFERENCE in triple.layouts
    assert not any(parameter.requires_grad for parameter in triple.network_parameters(REFERENCE).values())


# ---------------------------------------------------------------- one Gaussian


@pytest.mark.parametrize("beta", [0.5, 4.0])
def test_two_gaussians(beta: float) -> None:
    """Of images at -1 and 1 the right one wins with odds of 4 to 1: the mean moves right, and by ln 4 / (2 beta) std^2."""
    std = torch.tensor(0.5, dtype=torch.float64)
    mean, reference = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True), torch.zeros(1, 1, dtype=torch.float64)
    wins = torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0], dtype=torch.float64)[:, None]
    optimizer = torch.optim.LBFGS([mean], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def closure() -> Tensor:
        optimizer.zero_grad()
        gap = log_ratio(wins, mean, reference, std) - log_ratio(-wins, mean, reference, std)
        loss = pairwise_loss(beta * gap).mean()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    assert float(mean.detach()) == pytest.approx(math.log(4) / (2 * beta) * 0.25, rel=1e-5)


def test_what_cannot_work_is_refused() -> None:
    refusal(lambda: pso("eps", form="online"), "method.form is 'online'")
    refusal(lambda: pso("eps", form="offline", reward="clip"), "'clip'")
    refusal(lambda: pso("eps", **ONLINE, steps=1), "one step")
    refusal(lambda: pso("eps", **ONLINE, transition="deterministic"), "'deterministic'", "method.kernel")
    refusal(lambda: pso("eps", **ONLINE, transition="tcd", gamma=0.0), "'tcd'")
    refusal(lambda: pso("flow", **OFFLINE, transition="deterministic", weighting="transition"), "no density")
    refusal(lambda: pso("eps", **ONLINE, loss="hinge"), "'hinge'")
    method, triple = pso("eps", **ONLINE)
    refusal(lambda: method.prepare(triple), "no autoencoder")


# ---------------------------------------------------------------- images


@pytest.mark.parametrize("method", ["pso", "reward"])
def test_pictures_of_the_embedded_teacher_grow_brighter(method: str, tmp_path: Path) -> None:
    """A short run of each; on the grid's noise the student is brighter than it was, which is what the grid has beside it."""
    options = {"pso": {"form": "online", "trust": 0.0, "beta": 200.0}, "reward": {"last": 1}}[method]
    config = {
        "model": {"path": "builtin:teacher"},
        "method": {"name": method, "steps": 2, "reward": "critic:brightness", **options},
        "roles": {"generator": {"rank": 8, "alpha": 8, "targets": "all"}},
        "optimizers": {"generator": {"lr": 1e-3, "clip": 0.0}},
        "data": {"prompts": "builtin:fashion_train"},
        "training": {"max_steps": 8, "batch_size": 8, "device": "cpu", "log_every": 1, "grid_prompts": 4, "grid_seeds": 1},
    }  # fmt: skip
    train(parse(RunConfig, config, "test"), tmp_path / "run")
    drift = Grid(open_run(tmp_path / "run")[0], tmp_path / "grids", 8, 1.0).draw(0)["signals/brightness_drift"]
    assert drift > 0.01
