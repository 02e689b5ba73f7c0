"""sCM and TBCM in closed form: on a Gaussian the consistency function is known, and there the tangent vanishes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.toys import (
    DIMENSION,
    SCHEDULES,
    analytic_triple,
    batch_of,
    disturb,
    draws,
    four_modes,
    gaussian,
    noise,
    problem,
    prompts,
    vp,
)
from torch import Tensor, nn

from stepdistill.diffusion.prediction import Prediction, from_x0_eps
from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.errors import UserError
from stepdistill.families.analytic import Mixture
from stepdistill.families.recipe import Recipe
from stepdistill.methods.base import Batch, Progress
from stepdistill.methods.consistency.continuous import Continuous, TangentConfig, TrigFlowStates
from stepdistill.methods.consistency.scm import SCM, SCMConfig
from stepdistill.methods.consistency.tbcm import TBCM, TBCMConfig, reference_angles
from stepdistill.roles.sampler import teacher_sample
from stepdistill.roles.triple import FAKE_SCORE, GENERATOR, Triple

ALL: dict[str, Callable[[], NoiseSchedule]] = {
    **SCHEDULES, "zsnr": lambda: vp(Prediction.V, rescale_betas_zero_snr=True),
}  # fmt: skip
MEAN, STD = (0.3, -0.7, 1.1), 0.9
JVP = {"warmup": 0, "kind": "jvp"}


class ExactConsistency(nn.Module):
    """The end of the probability flow from x_t to N(mean, std^2 I), said in the schedule's prediction type.

    f(x_t, t) = mean + std (x_t - alpha mean) / sqrt(alpha^2 std^2 + sigma^2)
    """

    def __init__(self, mixture: Mixture, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.mixture, self.schedule = mixture, schedule
        self.unused = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        x = x_t.flatten(1)
        alpha, sigma = self.schedule.alpha(t)[:, None], self.schedule.sigma(t)[:, None]
        mean, std = self.mixture.means, self.mixture.std
        end = mean + std * (x - alpha * mean) / (alpha.square() * std**2 + sigma.square()).sqrt()
        out = from_x0_eps(end, (x - alpha * end) / sigma, alpha, sigma, self.schedule.prediction)
        return (out + 0 * self.unused).reshape(x_t.shape)


def exact(schedule: NoiseSchedule) -> Triple:
    """A teacher that knows a Gaussian, and a generator that is its consistency function."""
    triple = analytic_triple(gaussian(MEAN, STD), schedule)
    triple.networks[GENERATOR] = ExactConsistency(gaussian(MEAN, STD), schedule)
    return triple


def scm(schedule: NoiseSchedule, tangent: dict[str, Any] | None = None, **options: Any) -> SCM:
    config = SCMConfig.model_validate({"guidance": 1.5, "tangent": tangent or JVP, **options})
    return SCM(config, problem(schedule))


def tbcm(schedule: NoiseSchedule, tangent: dict[str, Any] | None = None, **options: Any) -> TBCM:
    config = TBCMConfig.model_validate({"guidance": 1.5, "tangent": tangent or JVP, **options})
    return TBCM(config, problem(schedule))


def with_images(count: int, classes: int = 1, dimension: int = DIMENSION) -> Batch:
    return replace(
        batch_of(count, classes),
        images=0.9 * noise(count, dimension, 1, 1, seed=5) + 0.2,
        image_cond=prompts(count, classes),
    )


def prepared(method: Continuous[Any], triple: Triple) -> Triple:
    method.prepare(triple)
    for heads in triple.heads.values():
        for head in heads.values():
            head.double()
    return triple


def states(method: Continuous[Any], triple: Triple, count: int = 6) -> TrigFlowStates:
    """The states of a method, in a row."""
    rollout = method.rollout(with_images(count), triple, Progress(), draws(range(count)))
    x, angle, velocity = rollout.x_t, rollout.angle, rollout.velocity  # type: ignore[attr-defined]
    if x.ndim == 5:
        x, angle, velocity = x.flatten(0, 1), angle.flatten(), velocity.flatten(0, 1)
    return TrigFlowStates(x, angle, velocity, prompts(len(x)))


def along(method: Continuous[Any], triple: Triple, angle: Tensor) -> TrigFlowStates:
    """States at given angles, with the teacher's velocities."""
    x = method.trigflow.state(
        0.9 * noise(len(angle), DIMENSION, 1, 1), noise(len(angle), DIMENSION, 1, 1, seed=1), angle
    )
    cond = prompts(len(angle))
    return TrigFlowStates(x, angle, method.teacher(triple, x, angle, cond, cond), cond)


# ---------------------------------------------------------------- the tangent


@pytest.mark.parametrize("make", [scm, tbcm], ids=["scm", "tbcm"])
@pytest.mark.parametrize("name", ALL)
def test_the_tangent_vanishes_for_the_exact_consistency_function(name: str, make: Callable[..., Any]) -> None:
    schedule = ALL[name]()
    method, triple = make(schedule), exact(schedule)
    state = states(method, triple)
    velocity, g = method.tangent(triple.generator, state, 1.0)
    assert velocity.requires_grad
    assert not g.requires_grad
    assert float(g.abs().max()) < 1e-9
    assert float((velocity - state.velocity).abs().max()) > 0.05


@pytest.mark.parametrize("name", ["eps", "v", "flow"])
@pytest.mark.parametrize("fault", ["sign", "sigma_d", "velocity", "share"])
def test_wrong_variants_do_not_vanish(name: str, fault: str) -> None:
    """The sign of the r cos sin term, a missing sigma_d, the velocity's sign, r short of 1."""
    schedule = ALL[name]()
    method, triple = scm(schedule), exact(schedule)
    state = along(method, triple, torch.linspace(0.4, 1.3, 6, dtype=torch.float64))
    tangent_weight = {"sign": -1.0, "share": 0.9}.get(fault, 1.0)
    if fault == "velocity":
        state = replace(state, velocity=-state.velocity)
    if fault == "sigma_d":
        method.config = method.config.model_copy(update={"sigma_data": 1.0})
    _, g = method.tangent(triple.generator, state, tangent_weight)
    assert float(g.abs().flatten(1).max(1).values.min()) > (1e-3 if fault == "share" else 1e-2)


def test_without_r_the_teachers_velocity_is_matched() -> None:
    """r = 0: g = cos^2(T) sigma_d (F_teacher - F)."""
    method, triple = scm(vp()), exact(vp())
    state = states(method, triple)
    velocity, g = method.tangent(triple.generator, state, 0.0)
    cos = state.angle.cos().reshape(-1, 1, 1, 1)
    assert torch.allclose(g, 0.5 * cos**2 * (state.velocity - velocity), atol=1e-12)


def learner(schedule: NoiseSchedule) -> Triple:
    """A generator that has moved away from its teacher by its MLP."""
    triple = analytic_triple(gaussian(MEAN, STD), schedule)
    disturb(triple, 0.1)
    return triple


@pytest.mark.parametrize("name", ["v", "flow"])
def test_the_tangent_is_the_derivative_of_the_consistency_function(name: str) -> None:
    """g = cos(T) df/dT, by differences of f along the teacher's flow."""
    schedule = ALL[name]()
    method, triple = scm(schedule), learner(schedule)
    angle = torch.linspace(0.4, 1.3, 6, dtype=torch.float64)
    state = along(method, triple, angle)
    _, g = method.tangent(triple.generator, state, 1.0)

    def f(h: float) -> Tensor:
        x = state.x + h * method.config.sigma_data * state.velocity
        velocity = triple.generator.trigflow(method.trigflow, x, angle + h, state.cond)
        return method.config.sigma_data * method.trigflow.x0(x, velocity, angle + h)

    h = 1e-5 if schedule.is_flow else 1e-6
    with torch.no_grad():
        expected = angle.cos().reshape(-1, 1, 1, 1) * (f(h) - f(-h)) / (2 * h)
    assert torch.allclose(g, expected, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("name", ["v", "flow"])
@pytest.mark.parametrize(("kind", "order"), [("semi_discrete", 1), ("finite_difference", 2)])
def test_differences_converge_to_the_derivative(name: str, kind: str, order: int) -> None:
    schedule = ALL[name]()
    triple = learner(schedule)
    state = along(scm(schedule), triple, torch.linspace(0.4, 1.3, 6, dtype=torch.float64))
    _, derivative = scm(schedule).tangent(triple.generator, state, 0.7)
    errors = []
    # (a VP table is linear between timesteps, so that steps of a few of them end the convergence)
    for delta in (0.04, 0.02):
        method = scm(schedule, {"warmup": 0, "kind": kind, "delta": delta})
        errors.append(float((method.tangent(triple.generator, state, 0.7)[1] - derivative).norm()))
    assert errors[1] < 0.05 * float(derivative.norm())
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)


def test_semi_discrete_is_the_difference_quotient() -> None:
    """At r = 1: cos(T) [f(x_T, T) - f(x_T', T')] / sin(delta), x_T' a DDIM step of the teacher, to rounding."""
    schedule, delta = SCHEDULES["flow"](), 0.05
    method, triple = scm(schedule, {"warmup": 0, "kind": "semi_discrete", "delta": delta}), learner(schedule)
    angle = torch.linspace(0.4, 1.3, 6, dtype=torch.float64)
    state, trigflow = along(method, triple, angle), method.trigflow
    _, g = method.tangent(triple.generator, state, 1.0)
    with torch.no_grad():
        before = trigflow.step(state.x, state.velocity, angle, angle - delta)
        ends = [
            trigflow.x0(x, triple.generator.trigflow(trigflow, x, at, state.cond), at)
            for x, at in ((state.x, angle), (before, angle - delta))
        ]
    quotient = method.config.sigma_data * (ends[0] - ends[1]) / math.sin(delta)
    assert torch.allclose(g, angle.cos().reshape(-1, 1, 1, 1) * quotient, atol=1e-10)


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("bound", ["normalise", "clip"])
def test_the_loss_and_its_gradient(bound: str) -> None:
    """mean_B exp(w) |F - F- - g'|^2 - w, whose gradient in F is -2 exp(w) g' / B and in w is (exp(w) |g'|^2 - 1) / B."""
    schedule = SCHEDULES["flow"]()
    method = scm(schedule, {**JVP, "bound": bound})
    triple = prepared(method, learner(schedule))
    head = triple.head(GENERATOR, "weight")
    with torch.no_grad():
        head.linear.bias.fill_(0.4)  # type: ignore[union-attr, operator]
    state = along(method, triple, torch.linspace(0.4, 1.3, 4, dtype=torch.float64))
    _, g = method.tangent(triple.generator, state, 1.0)
    norm = g.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    bounded = g / (norm + 0.1) if bound == "normalise" else g.clamp(-1, 1)
    squares = bounded.flatten(1).square().sum(1)

    terms = method.consistency_loss(state, triple, Progress())
    assert float(terms.total) == pytest.approx(float((math.exp(0.4) * squares - 0.4).mean()))
    assert float(terms.parts["tangent"]) == pytest.approx(float(norm.mean()) / DIMENSION**0.5)
    terms.total.backward()
    last = triple.networks[GENERATOR].mlp.fc_out.bias  # type: ignore[union-attr]
    x_t, _ = method.trigflow.native(state.x, state.angle)
    one = torch.ones_like(x_t)
    # F is affine in what the network says
    slope = method.trigflow.velocity(one, x_t, state.angle) - method.trigflow.velocity(0 * one, x_t, state.angle)
    expected = (-2 * math.exp(0.4) * bounded * slope).mean(0).flatten()
    assert torch.allclose(last.grad, expected, atol=1e-10)  # type: ignore[union-attr, arg-type]
    assert float(head.linear.bias.grad) == pytest.approx(float((math.exp(0.4) * squares - 1).mean()))  # type: ignore[union-attr, arg-type]


def test_share_of_the_tangent() -> None:
    config = TangentConfig(warmup=100, calm_from=200, calm_over=50, calm_to=0.6)
    assert [config.tangent_weight(k) for k in (0, 50, 100, 200, 225, 250, 999)] == pytest.approx(
        [0, 0.5, 1, 1, 0.8, 0.6, 0.6]
    )
    assert TangentConfig(warmup=0).tangent_weight(0) == 1.0
    # the published one of TBCM
    assert TBCMConfig(guidance=4.5).tangent.tangent_weight(20_000) == 0.75


def test_a_loss_is_a_mean_over_samples_and_over_states() -> None:
    """Pieces add up to the loss, and each sample's numbers are its own."""
    schedule = vp()
    for method in (scm(schedule), tbcm(schedule, route_steps=4)):
        triple = prepared(method, learner(schedule))

        def value(rows: range, method: Continuous[Any] = method, triple: Triple = triple) -> float:
            batch = with_images(4)
            own = replace(
                batch,
                cond=batch.cond[list(rows)],
                null=batch.null[list(rows)],
                images=batch.images[list(rows)],  # type: ignore[index]
                image_cond=batch.cond[list(rows)],
            )
            lots = draws(rows)
            rollout = method.rollout(own, triple, Progress(), lots)
            whole = method.loss(GENERATOR, rollout, triple, Progress(), lots)
            pieces = list(method.pieces(GENERATOR, rollout, triple, Progress(), lots))
            assert sum(float(piece.total) for piece in pieces) == pytest.approx(float(whole.total), rel=1e-12)
            for key, said in whole.parts.items():
                assert sum(float(piece.parts[key]) for piece in pieces) == pytest.approx(float(said), rel=1e-12)
            return float(whole.total)

        parts = [value(range(k, k + 1)) for k in range(4)]
        assert value(range(4)) == pytest.approx(sum(parts) / 4, rel=1e-12)


# ---------------------------------------------------------------- states


def test_angles_follow_their_distribution() -> None:
    """Median arctan(exp(P_mean) / sigma_d), quartiles at 0.6745 P_std; ends are the network's."""
    method = scm(SCHEDULES["flow"](), mean=-0.8, std=1.6)
    drawn = method.angles(torch.tensor([0.25, 0.5, 0.75, 0.0, 1 - 1e-9], dtype=torch.float64))
    expected = [math.atan(math.exp(-0.8 + k * 0.6744897501960817 * 1.6) / 0.5) for k in (-1, 0, 1)]
    assert drawn[:3].tolist() == pytest.approx(expected)
    sd = scm(vp()).angles(torch.tensor([0.0, 1 - 1e-9], dtype=torch.float64))
    assert sd.tolist() == pytest.approx([0.0292, 1.5025], abs=1e-4)


def test_scm_notes_real_images_and_starts_from_pure_noise() -> None:
    method, triple = scm(vp(), std=4.0), exact(vp())
    batch = with_images(64)
    rollout = method.rollout(batch, triple, Progress(), draws(range(64)))
    eps = draws(range(64), "rollout").normal("eps", (DIMENSION, 1, 1))
    cos, sin = (level.reshape(-1, 1, 1, 1) for level in (rollout.angle.cos(), rollout.angle.sin()))
    top = rollout.angle == method.trigflow.max_angle
    assert 0 < int(top.sum()) < 64
    assert torch.allclose(rollout.x_t[top], 0.5 * eps[top])
    assert torch.allclose(rollout.x_t[~top], 0.5 * (cos * batch.images + sin * eps)[~top])


def test_the_reference_route_is_the_released_one() -> None:
    noisy = [1.5708, 1.5423, 1.5095, 1.4714, 1.4268, 1.3741, 1.3112, 1.2356]
    clean = [1.1440, 1.0331, 0.8997, 0.7425, 0.5642, 0.3734, 0.1832, 0.0063]
    assert reference_angles(16, 2.5).tolist() == pytest.approx(noisy + clean, abs=5e-5)


@pytest.mark.parametrize("route", ["random_interval", "fixed", "logit_normal"])
@pytest.mark.parametrize("name", ["eps", "zsnr", "flow"])
def test_routes_fall_within_the_networks_range(name: str, route: str) -> None:
    schedule = ALL[name]()
    method = tbcm(schedule, route=route)
    angles = method._draw_angles(draws(range(8)))
    assert angles.shape == (16, 8)
    assert bool((angles[1:] <= angles[:-1]).all())
    assert torch.equal(angles[0], torch.full((8,), method.trigflow.max_angle, dtype=torch.float64))
    assert float(angles.min()) >= method.trigflow.min_angle
    squeezed = (reference_angles(16, 2.5) * method.trigflow.max_angle / (math.pi / 2)).clamp_min(
        method.trigflow.min_angle
    )
    if route == "fixed":
        assert torch.allclose(angles, squeezed[:, None].expand(-1, 8))
    if route == "random_interval":
        assert bool((angles[1:] <= squeezed[:-1, None]).all())
        assert bool((angles[1:] >= squeezed[1:, None]).all())
        assert len(set(angles[5].tolist())) == 8


@pytest.mark.parametrize("name", ALL)
def test_a_walk_is_the_teachers_own(name: str) -> None:
    """Each state follows from the one before by the guided teacher's DDIM step; its end is the teacher's sample."""
    schedule = ALL[name]()
    method, triple = tbcm(schedule, guidance=2.0), analytic_triple(four_modes(), schedule)
    method.problem = replace(method.problem, latent_shape=(2, 1, 1))
    cond = replace(prompts(3, 4), text=torch.eye(4, dtype=torch.float64)[:3, None])
    walk = method.rollout(Batch(cond, prompts(3, 4)), triple, Progress(), draws(range(3)))
    assert walk.x_t.shape == (15 if schedule.zero_terminal_snr else 16, 3, 2, 1, 1)
    start = 0.5 * draws(range(3), "rollout").normal("noise", (2, 1, 1))
    if not schedule.zero_terminal_snr:
        assert torch.equal(walk.x_t[0], start)
    ends = [*zip(walk.x_t[1:], walk.t[1:], strict=True), (0.5 * walk.x0, torch.full((3,), schedule.clean_time))]
    for x, t, (after, s) in zip(walk.x_t, walk.t, ends, strict=True):
        x_t, same = method.trigflow.native(x, schedule.angle(t))
        assert torch.allclose(same, t)
        x0 = triple.real_score.guided(x_t, t, cond, prompts(3, 4), 2.0)
        alpha, sigma = schedule.levels(t, x_t)
        to, noisy = schedule.levels(s, x_t)
        x_s = to * x0 + noisy * (x_t - alpha * x0) / sigma
        assert torch.allclose(method.trigflow.from_native(x_s, s)[0], after, atol=1e-9)
    assert not walk.x_t.requires_grad
    # from a mode in the end
    assert float((walk.x0.flatten(1) - four_modes().means[:3]).norm(dim=1).max()) < 1.5


# ---------------------------------------------------------------- the adversary


def test_the_adversary_is_there_only_when_asked_for() -> None:
    config = SCMConfig(guidance=1.0)
    assert dict(SCM.roles(config)) == {GENERATOR: "generator"}
    assert SCM.needs(config).images
    assert not TBCM.needs(TBCMConfig(guidance=1.0)).images
    both = SCMConfig.model_validate({"guidance": 1.0, "gan": {"weight": 0.5}})
    assert set(SCM.roles(both)) == {GENERATOR, FAKE_SCORE}


def test_the_adversary_reaches_the_student_and_its_own_head() -> None:
    schedule = SCHEDULES["flow"]()
    method = scm(schedule, gan={"weight": 0.5, "loss": "hinge"}, pure_noise=0.5)
    triple = prepared(method, learner(schedule))
    batch, lots = with_images(8), draws(range(8))
    rollout = method.rollout(batch, triple, Progress(), lots)
    assert rollout.x0.requires_grad
    alone = method.consistency_loss(
        TrigFlowStates(rollout.x_t, rollout.angle, rollout.velocity, prompts(8)), triple, Progress()
    ).total
    terms = method.loss(GENERATOR, rollout, triple, Progress(), lots)
    assert float(terms.total.detach()) == pytest.approx(float(alone + 0.5 * terms.parts["gan"]))
    critic = method.loss(FAKE_SCORE, rollout.detach(), triple, Progress(), draws(range(8), FAKE_SCORE))
    critic.total.backward()
    grads = {key: p.grad for key, p in triple.parameters(FAKE_SCORE).items()}
    assert all(grad is not None for key, grad in grads.items() if key.startswith("head."))
    assert all(p.grad is None for p in triple.parameters(GENERATOR).values())


# ---------------------------------------------------------------- sampling


def test_ladders_in_native_times() -> None:
    """Angles 1.3, 1.1 and 0.6 are timesteps of SD's table, and sigma / (alpha + sigma) of flow matching."""
    sd = scm(vp(), steps=4)
    assert sd.timesteps == (999.0, *(float(vp().time_at_angle(a).round()) for a in (1.3, 1.1, 0.6)))
    recipe = sd.recipe()
    assert (recipe.scheduler_class, recipe.timesteps[0], recipe.num_inference_steps) == ("LCMScheduler", 999, 4)
    flow = scm(SCHEDULES["flow-shift-3"](), steps=2)
    assert flow.timesteps == pytest.approx((1.0, math.sin(1.3) / (math.sin(1.3) + math.cos(1.3))))
    told: Recipe = flow.recipe()
    assert told.scheduler_class == "FlowMatchLCMScheduler"
    assert told.native_timesteps(flow.schedule) == pytest.approx(flow.timesteps)
    assert scm(vp(), steps=3, angles=[1.57, 1.2, 0.8]).timesteps[0] == 999.0
    assert tbcm(vp()).timesteps == (999.0,)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 3}, "write method.angles out"),
        ({"steps": 3, "angles": [1.57, 1.2]}, "make them agree"),
        ({"steps": 3, "angles": [1.57, 0.8, 1.2]}, "falls strictly"),
    ],
)
def test_ladders_that_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        scm(vp(), **options)


def test_the_exact_consistency_function_draws_the_data_in_one_step() -> None:
    """From pure noise at pi/2: x0 = mean + std eps."""
    schedule = SCHEDULES["flow"]()
    triple, eps = exact(schedule), noise(5, DIMENSION, 1, 1)
    x0 = triple.generator.x0(eps, tbcm(schedule).timesteps[0], prompts(5))
    expected = torch.tensor(MEAN, dtype=torch.float64).reshape(1, -1, 1, 1) + STD * eps
    assert torch.allclose(x0, expected, atol=1e-10)


# ---------------------------------------------------------------- learning


@pytest.mark.parametrize("name", ["v", "flow"])
def test_a_student_learns_where_the_flow_ends(name: str) -> None:
    """From its teacher's x0, the mean at pure noise, to the end of the probability flow, in one step and without an image."""
    schedule, mixture, count = SCHEDULES[name](), gaussian((0.5, -1.0), 0.5), 32
    triple = analytic_triple(mixture, schedule, width=64)
    options = {"guidance": 1.0, "route_steps": 6, "tangent": {"warmup": 10}}
    method = TBCM(TBCMConfig.model_validate(options), problem(schedule, 2))
    prepared(method, triple)
    eps = noise(256, 2, 1, 1, seed=9)
    told = prompts(len(eps))
    with torch.no_grad():
        end = teacher_sample(triple.real_score, told, told, eps, 50, 1.0)

    def distance() -> float:
        with torch.no_grad():
            return float((triple.generator.x0(eps, method.timesteps[0], told) - end).flatten(1).norm(dim=1).mean())

    before, batch, steps = distance(), batch_of(count), 60
    optimizer = torch.optim.Adam(triple.parameters(GENERATOR).values(), lr=3e-3, betas=(0.9, 0.99))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, 2 - 2 * step / steps)
        optimizer.zero_grad()
        progress, lots = Progress(step, {GENERATOR: step}), draws(range(count), step=step)
        rollout = method.rollout(batch, triple, progress, lots)
        for terms in method.pieces(GENERATOR, rollout, triple, progress, lots):
            terms.total.backward()
        optimizer.step()
    assert before > 0.5
    # with r = 0 it would stay where it is, and with the wrong sign leave
    assert distance() < 0.6 * before
