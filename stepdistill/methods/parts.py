"""What two or more methods share: the distribution-matching gradient, the fake-score loss, rollouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.config.reading import Settings
from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.prediction import from_x0_eps
from stepdistill.diffusion.schedule import NoiseSchedule, broadcast
from stepdistill.diffusion.timesteps import NoiseLevels
from stepdistill.diffusion.transitions import Transition
from stepdistill.families.conditioning import Conditioning
from stepdistill.methods.base import Batch, Rollout
from stepdistill.roles.denoiser import Denoiser
from stepdistill.roles.sampler import sample_step
from stepdistill.roles.triple import Triple

DmWeight = Literal["code", "paper", "exact_kl"]
RolloutEnd = Literal["batch", "sample"]
Distance = Literal["l2", "huber", "pseudo_huber"]


class NoiseLevelConfig(Settings):
    """Noise levels on the fraction axis before the flow shift."""

    low: float = Field(0.02, ge=0, lt=1)
    high: float = Field(0.98, gt=0, le=1)
    shape: Literal["uniform", "logit_normal"] = "uniform"
    mean: float = 0.0
    std: float = Field(1.0, gt=0)

    def levels(self) -> NoiseLevels:
        return NoiseLevels(self.low, self.high, self.shape, self.mean, self.std)


# ---------------------------------------------------------------- distribution matching


def distribution_matching_gradient(
    x: Tensor,
    real_x0: Tensor,
    fake_x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    weight: DmWeight = "code",
    floor: float = 1e-6,
) -> Tensor:
    """Descent direction d of the distribution-matching loss with respect to x, shape of x, without graph.

    exact_kl: d KL / dx = alpha (s_fake - s_real) = (alpha/sigma)^2 (mu_fake - mu_real)                 (DMD eq. 7)
    paper:    alpha (mu_fake - mu_real) / mean|x - mu_real|                                          (DMD eq. 8, 10)
    code:     (mu_fake - mu_real) / mean|x - mu_real|: the released code leaves alpha out
    The mean runs over each sample's own elements, so that a batch of 4 equals four batches of 1; `floor` keeps it off zero.
    """
    gap = fake_x0 - real_x0
    if weight == "exact_kl":
        return ((alpha / sigma).square() * gap).detach()
    direction = gap / dmd_normalizer(x, real_x0, floor)
    return (direction * alpha if weight == "paper" else direction).detach()


def dmd_normalizer(x: Tensor, real_x0: Tensor, floor: float = 1e-6) -> Tensor:
    """mean|x - mu_real| over each sample's own elements, (B, 1, ...), at least `floor`."""
    norm = (x - real_x0).abs().flatten(1).mean(1).clamp_min(floor)
    return norm.reshape(-1, *(1,) * (x.ndim - 1))


def draw_times_below(schedule: NoiseSchedule, uniform: Tensor, low: float, high: Tensor) -> Tensor:
    """Native times drawn evenly between fraction `low` and each sample's own fraction `high`, (B,), before the shift."""
    if schedule.is_flow:
        p = low + (high.double().clamp_min(low) - low) * uniform.double()
        return schedule.time_at_fraction(p.clamp(1e-3, 1.0))
    # whole timesteps, both ends included
    steps = schedule.train_steps
    first, last = round(low * steps), (high.double() * steps).round().clamp_max(steps - 1)
    return first + (uniform.double() * (last.clamp_min(first) - first + 1)).floor()


def distribution_matching_direction(
    x: Tensor,
    cond: Conditioning,
    null: Conditioning,
    triple: Triple,
    draws: Draws,
    *,
    levels: NoiseLevelConfig,
    guidance: float,
    weight: DmWeight,
    weigh: Callable[[Tensor, Tensor], Tensor] | None = None,
    target: Denoiser | None = None,
    anchor: tuple[Tensor, float] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Noise x, ask both scores without graph, and return (d, what to log). Target guided, fake score never.

    target: whose distribution x is to have; the teacher by default.
    anchor: (x_s, s) to noise in place of x, by the kernel from its own time s.
    weigh: (x_t, t) -> each sample's factor of d, (B,).
    """
    t = levels.levels().times(triple.schedule, draws.uniform("dm.t"))
    x_s, s = anchor or (x, None)
    with torch.no_grad():
        x_t = triple.schedule.add_noise(x_s, draws.normal("dm.eps", x.shape[1:]), t, s)
        real = (target or triple.real_score).guided(x_t, t, cond, null, guidance)
        fake = triple.fake_score.x0(x_t, t, cond)
    alpha, sigma = triple.schedule.levels(t, real)
    direction = distribution_matching_gradient(x.detach(), real, fake, alpha, sigma, weight)
    if weigh is not None:
        direction = direction * broadcast(weigh(x_t, t), direction)
    return direction, {"dm": 0.5 * direction.square().mean(), "score_gap": score_gap(x, real, fake)}


def score_gap(x: Tensor, real_x0: Tensor, fake_x0: Tensor) -> Tensor:
    """Mean over samples of |mu_fake - mu_real| / |x - mu_real|: to log."""
    # of each sample first: a mean over samples is the same for any division into micro-batches and processes
    gap, own = (fake_x0 - real_x0).detach().flatten(1), (x - real_x0).detach().flatten(1)
    return (gap.norm(dim=1) / own.norm(dim=1).clamp_min(1e-6)).mean()  # type: ignore[no-any-return]


def ramped_guidance(guidance: float, done: int, ramp: int) -> float:
    """w of the update that follows `done` others, w - 1 growing evenly from 0 to its all over `ramp` of them; 0 is none."""
    share = min(1.0, (done + 1) / ramp) if ramp else 1.0
    return 1 + share * (guidance - 1)


def latent_statistics(x: Tensor, of: str = "latent") -> dict[str, Tensor]:
    """Mean and standard deviation of each sample's elements, averaged over samples: to log, as `OF_mean` and `OF_std`."""
    own = x.detach().flatten(1)
    return {f"{of}_mean": own.mean(), f"{of}_std": own.std(1, correction=0).mean()}


def sample_statistics(rollout: Rollout) -> dict[str, Tensor]:
    """Those of the generator's samples, and of the batch's real latents where it has some."""
    real = rollout.batch.images
    return {**latent_statistics(rollout.x0), **({} if real is None else latent_statistics(real, "real"))}


def surrogate_loss(x: Tensor, direction: Tensor) -> Tensor:
    """0.5 mean (x - sg(x - d))^2: a scalar whose gradient with respect to x is d / numel. Its value does not fall."""
    return 0.5 * (x - (x - direction).detach()).square().mean()


def distance(error: Tensor, kind: Distance, c: float | None = None) -> Tensor:
    """Each sample's distance (B,) from its error (B, ...).

    l2:           mean of d^2
    huber:        mean of sqrt(d^2 + c^2) - c, element by element; c = 1e-3 by default             (LCM)
    pseudo_huber: sqrt(||d||^2 + c^2) - c of the whole sample of D elements; c = 0.00054 sqrt(D)    (iCT)
    """
    own = error.flatten(1)
    if kind == "l2":
        return own.square().mean(1)
    if kind == "huber":
        c = 1e-3 if c is None else c
        return ((own.square() + c**2).sqrt() - c).mean(1)
    c = 0.00054 * own.shape[1] ** 0.5 if c is None else c
    return (own.square().sum(1) + c**2).sqrt() - c


def fake_score_loss(
    fake: Denoiser,
    x: Tensor,
    t: Tensor,
    eps: Tensor,
    cond: Conditioning,
    space: Literal["native", "x0"] = "native",
    snr_gamma: float = 5.0,
) -> Tensor:
    """Denoising loss on generated samples x (no graph), in the network's own prediction type.

    space = "x0" measures x0 instead, for VP weighted by min(SNR, gamma), without which high noise drowns the rest.
    """
    schedule = fake.schedule
    x_t = schedule.add_noise(x, eps, t)
    alpha, sigma = schedule.levels(t, x_t)
    estimate = fake.estimate(x_t, t, cond)
    if space == "native":
        return (estimate.raw - from_x0_eps(x, eps, alpha, sigma, schedule.prediction)).square().mean()
    error = (estimate.x0 - x).square()
    if not schedule.is_flow:
        error = error * (alpha / sigma).square().clamp(max=snr_gamma)
    return error.mean()


# ---------------------------------------------------------------- rollouts


def roll_out(
    generator: Denoiser,
    batch: Batch,
    timesteps: Sequence[float],
    transition: Transition,
    shape: Sequence[int],
    draws: Draws,
    *,
    graph: bool,
    exits: RolloutEnd = "batch",
    end_step_weights: Sequence[float] | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward simulation (DMD2, section 4.5): (x_t, t, x0 at t). Steps before the exit run without graph.

    `odds` are those of leaving at each step of the ladder, even by default; `start` is x at its first entry, noise by default.

    The exit call keeps a graph if `graph`. Samples that have left the walk cost nothing more; the number of calls is the
    same on every process all the same, since a sharded network needs everyone at each of them.
    """
    draws = draws.for_role("rollout")
    weights = torch.tensor(
        end_step_weights if end_step_weights is not None else [1.0] * len(timesteps), dtype=torch.float64
    )
    bounds = (weights.cumsum(0) / weights.sum())[:-1]
    if exits == "batch":
        calls = int(torch.bucketize(draws.batch_uniform("exit"), bounds, right=True))
        end_step = torch.full((len(batch),), calls)
    else:
        calls = len(timesteps) - 1
        end_step = torch.bucketize(draws.uniform("exit").cpu(), bounds, right=True)
    x_t = draws.normal("noise", shape) if start is None else start
    end_step = end_step.to(x_t.device)
    for index in range(calls):
        walking = torch.nonzero(end_step > index)[:, 0]
        rows = walking if len(walking) else end_step.new_zeros(1)
        cond = batch.cond[rows]
        with torch.no_grad():
            step = sample_step(
                lambda x, t, cond=cond: generator.x0(x, t, cond),  # type: ignore[misc]
                generator.schedule,
                x_t[rows],
                timesteps[index],
                timesteps[index + 1],
                transition,
                lambda index=index, rows=rows: draws.normal(f"fresh{index}", shape)[rows],  # type: ignore[misc]
            )
        if len(walking):
            x_t = x_t.index_copy(0, rows, step.x_s)
    t = torch.tensor(timesteps, dtype=torch.float64, device=x_t.device)[end_step]
    with torch.set_grad_enabled(graph):
        return x_t, t, generator.x0(x_t, t, batch.cond)


def finish_rollout(
    generator: Denoiser,
    rollout: Rollout,
    timesteps: Sequence[float],
    transition: Transition,
    draws: Draws,
    exits: RolloutEnd = "batch",
) -> Tensor:
    """From where a rollout was left to the clean end of the whole ladder, (B, C, h, w), without graph.

    Every process makes the same calls, as in `roll_out`.
    """
    x_t, x0, shape = rollout.x_t, rollout.x0.detach(), rollout.x0.shape[1:]
    top = float(rollout.t[0]) if exits == "batch" else timesteps[0]
    for index, (t, s) in enumerate(pairwise(timesteps)):
        if t > top:
            continue
        walking = torch.nonzero(rollout.t >= t)[:, 0]
        rows = walking if len(walking) else walking.new_zeros(1)
        with torch.no_grad():
            x_s = transition(generator.schedule, x_t[rows], x0[rows], t, s).sample(
                draws.normal(f"on{index}", shape)[rows]
            )
            answer = generator.x0(x_s, s, rollout.batch.cond[rows])
        if len(walking):
            x_t, x0 = x_t.index_copy(0, rows, x_s), x0.index_copy(0, rows, answer)
    return x0


def noised_images(
    generator: Denoiser, batch: Batch, timesteps: Sequence[float], draws: Draws, *, graph: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Without simulation: real images noised to a step drawn per sample. The first step still sees pure noise."""
    if batch.images is None or batch.image_cond is None:
        raise ValueError("a batch without images reached a rollout on images")
    draws = draws.for_role("rollout")
    index = (draws.uniform("exit") * len(timesteps)).long()
    t = torch.tensor(timesteps, dtype=torch.float64, device=batch.images.device)[index]
    eps = draws.normal("noise", batch.images.shape[1:])
    first = (index == 0).reshape(-1, *(1,) * (batch.images.ndim - 1))
    x_t = torch.where(first, eps, generator.schedule.add_noise(batch.images, eps, t))
    with torch.set_grad_enabled(graph):
        return x_t, t, generator.x0(x_t, t, batch.image_cond)
