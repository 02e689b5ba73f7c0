"""What two or more methods share: the distribution-matching gradient, the fake-score loss, rollouts, GAN terms, recipes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.config import Settings
from stepdistill.diffusion.draws import Draws, derive_seed
from stepdistill.diffusion.prediction import from_x0_eps
from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.diffusion.timesteps import NoiseLevels
from stepdistill.diffusion.transitions import Transition, TransitionKind
from stepdistill.errors import Refusal
from stepdistill.methods.base import Batch, Setting
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.heads import GanLoss, discriminator_loss, generator_loss, seeded_head
from stepdistill.models.recipe import SCHEDULERS, Recipe
from stepdistill.models.sampler import advance
from stepdistill.models.triple import FAKE_SCORE, Triple

DmWeight = Literal["code", "paper", "exact_kl"]
Exits = Literal["batch", "sample"]
HEAD = "discriminator"


class LevelConfig(Settings):
    """Noise levels on the fraction axis before the flow shift."""

    low: float = Field(0.02, ge=0, lt=1)
    high: float = Field(0.98, gt=0, le=1)
    shape: Literal["uniform", "logit_normal"] = "uniform"
    mean: float = 0.0
    std: float = Field(1.0, gt=0)

    def levels(self) -> NoiseLevels:
        return NoiseLevels(self.low, self.high, self.shape, self.mean, self.std)


class GanConfig(Settings):
    """Adversarial term on features of noised samples (DMD2, section 4.3)."""

    weight: float = Field(0.0, ge=0, description="in the generator's loss; 0 turns the GAN off")
    critic_weight: float = Field(1e-2, ge=0, description="in the fake score's loss")
    features: Literal["fake_score", "real_score"] = Field(
        "fake_score", description="whose mid-block features; real_score stays frozen"
    )
    loss: GanLoss = "logistic"
    levels: LevelConfig = LevelConfig(low=0.0, high=1.0)
    width: int | None = Field(None, gt=0, description="channels of the head; the features' own by default")


# ---------------------------------------------------------------- distribution matching


def matching_gradient(
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
    direction = gap / normaliser(x, real_x0, floor)
    return (direction * alpha if weight == "paper" else direction).detach()


def normaliser(x: Tensor, real_x0: Tensor, floor: float = 1e-6) -> Tensor:
    """mean|x - mu_real| over each sample's own elements, (B, 1, ...), at least `floor`."""
    norm = (x - real_x0).abs().flatten(1).mean(1).clamp_min(floor)
    return norm.reshape(-1, *(1,) * (x.ndim - 1))


def times_below(schedule: NoiseSchedule, uniform: Tensor, low: float, high: Tensor) -> Tensor:
    """Native times drawn evenly between fraction `low` and each sample's own fraction `high`, (B,), before the shift."""
    if schedule.is_flow:
        p = low + (high.double().clamp_min(low) - low) * uniform.double()
        return schedule.time_at(p.clamp(1e-3, 1.0))
    # whole timesteps, both ends included
    steps = schedule.train_steps
    first, last = round(low * steps), (high.double() * steps).round().clamp_max(steps - 1)
    return first + (uniform.double() * (last.clamp_min(first) - first + 1)).floor()


def matching_direction(
    x: Tensor,
    cond: Conditioning,
    null: Conditioning,
    triple: Triple,
    draws: Draws,
    *,
    levels: LevelConfig,
    guidance: float,
    weight: DmWeight,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Noise x, ask both scores without graph, and return (d, what to log). Teacher guided, fake score never."""
    t = levels.levels().times(triple.schedule, draws.uniform("dm.t"))
    with torch.no_grad():
        x_t = triple.schedule.add_noise(x, draws.normal("dm.eps", x.shape[1:]), t)
        real = triple.real_score.guided(x_t, t, cond, null, guidance)
        fake = triple.fake_score.x0(x_t, t, cond)
    alpha, sigma = triple.schedule.levels(t, real)
    direction = matching_gradient(x.detach(), real, fake, alpha, sigma, weight)
    own = x.detach().flatten(1)
    # of each sample first: a mean over samples is the same for any division into micro-batches and processes
    gap = (fake - real).flatten(1).norm(dim=1) / (own - real.flatten(1)).norm(dim=1).clamp_min(1e-6)
    logged = {"dm": 0.5 * direction.square().mean(), "score_gap": gap.mean(), **latent_statistics(x)}
    return direction, logged


def latent_statistics(x: Tensor) -> dict[str, Tensor]:
    """Mean and standard deviation of each sample's elements, averaged over samples: to log."""
    own = x.detach().flatten(1)
    return {"latent_mean": own.mean(), "latent_std": own.std(1, correction=0).mean()}


def surrogate(x: Tensor, direction: Tensor) -> Tensor:
    """0.5 mean (x - sg(x - d))^2: a scalar whose gradient with respect to x is d / numel. Its value does not fall."""
    return 0.5 * (x - (x - direction).detach()).square().mean()


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
    ladder: Sequence[float],
    transition: Transition,
    shape: Sequence[int],
    draws: Draws,
    *,
    graph: bool,
    exits: Exits = "batch",
    odds: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward simulation (DMD2, section 4.5): (x_t, t, x0 at t). Steps before the exit run without graph.

    `odds` are those of leaving at each step of the ladder, even by default.

    The exit call keeps a graph if `graph`. Samples that have left the walk cost nothing more; the number of calls is the
    same on every process all the same, since a sharded network needs everyone at each of them.
    """
    draws = draws.for_role("rollout")
    weights = torch.tensor(odds if odds is not None else [1.0] * len(ladder), dtype=torch.float64)
    bounds = (weights.cumsum(0) / weights.sum())[:-1]
    if exits == "batch":
        calls = int(torch.bucketize(draws.batch_uniform("exit"), bounds, right=True))
        exit_step = torch.full((len(batch),), calls)
    else:
        calls = len(ladder) - 1
        exit_step = torch.bucketize(draws.uniform("exit").cpu(), bounds, right=True)
    x_t = draws.normal("noise", shape)
    exit_step = exit_step.to(x_t.device)
    for index in range(calls):
        walking = torch.nonzero(exit_step > index)[:, 0]
        rows = walking if len(walking) else exit_step.new_zeros(1)
        cond = batch.cond[rows]
        with torch.no_grad():
            step = advance(
                lambda x, t, cond=cond: generator.x0(x, t, cond),  # type: ignore[misc]
                generator.schedule,
                x_t[rows],
                ladder[index],
                ladder[index + 1],
                transition,
                lambda index=index, rows=rows: draws.normal(f"fresh{index}", shape)[rows],  # type: ignore[misc]
            )
        if len(walking):
            x_t = x_t.index_copy(0, rows, step.x_s)
    t = torch.tensor(ladder, dtype=torch.float64, device=x_t.device)[exit_step]
    with torch.set_grad_enabled(graph):
        return x_t, t, generator.x0(x_t, t, batch.cond)


def noised_images(
    generator: Denoiser, batch: Batch, ladder: Sequence[float], draws: Draws, *, graph: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Without simulation: real images noised to a step drawn per sample. The first step still sees pure noise."""
    if batch.images is None or batch.image_cond is None:
        raise ValueError("a batch without images reached a rollout on images")
    draws = draws.for_role("rollout")
    index = (draws.uniform("exit") * len(ladder)).long()
    t = torch.tensor(ladder, dtype=torch.float64, device=batch.images.device)[index]
    eps = draws.normal("noise", batch.images.shape[1:])
    first = (index == 0).reshape(-1, *(1,) * (batch.images.ndim - 1))
    x_t = torch.where(first, eps, generator.schedule.add_noise(batch.images, eps, t))
    with torch.set_grad_enabled(graph):
        return x_t, t, generator.x0(x_t, t, batch.image_cond)


# ---------------------------------------------------------------- GAN


def attach_discriminator(triple: Triple, gan: GanConfig, setting: Setting) -> None:
    """Give the role `fake_score` the head that `gan_logits` reads features with."""
    seed = derive_seed(triple.seed, "head")
    triple.attach_head(FAKE_SCORE, HEAD, seeded_head(setting.feature_channels, setting.feature_size, seed, gan.width))


def gan_logits(triple: Triple, gan: GanConfig, x: Tensor, cond: Conditioning, purpose: str, draws: Draws) -> Tensor:
    """Logits (B,) of samples x, noised to levels of their own."""
    network = triple.denoiser(gan.features)
    t = gan.levels.levels().times(triple.schedule, draws.uniform(f"{purpose}.t"))
    x_t = triple.schedule.add_noise(x, draws.normal(f"{purpose}.eps", x.shape[1:]), t)
    return triple.head(FAKE_SCORE, HEAD)(network.features(x_t, t, cond))  # type: ignore[no-any-return]


def gan_generator_loss(triple: Triple, gan: GanConfig, x: Tensor, cond: Conditioning, draws: Draws) -> Tensor:
    """The generator's adversarial loss; gradient flows through the features into x."""
    return generator_loss(gan_logits(triple, gan, x, cond, "gan", draws), gan.loss)


def gan_critic_loss(
    triple: Triple, gan: GanConfig, x: Tensor, batch: Batch, cond: Conditioning, draws: Draws
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, real logits, fake logits) of the discriminator; real and fake draw noise levels of their own."""
    if batch.images is None or batch.image_cond is None:
        raise ValueError("a batch without images reached a GAN term")
    real = gan_logits(triple, gan, batch.images, batch.image_cond, "gan.real", draws)
    fake = gan_logits(triple, gan, x, cond, "gan.fake", draws)
    return discriminator_loss(real, fake, gan.loss), real.detach(), fake.detach()


# ---------------------------------------------------------------- recipes


def few_step_recipe(
    setting: Setting, method: str, ladder: Sequence[float], transition: Transition, baked_guidance: float
) -> Recipe:
    """The stock scheduler that walks this ladder with this transition.

    Raises:
        Refusal: no stock scheduler does.
    """
    schedule = setting.schedule
    name = SCHEDULERS.get((transition.kind, schedule.is_flow))
    if name is None:
        raise Refusal(
            f"no stock scheduler walks a custom ladder with the {transition.kind.value!r} transition: use 'renoise' or 'deterministic'"
        )
    config: dict[str, object] = {"prediction_type": schedule.prediction.value, "clip_sample": False}
    # whatever the base's scheduler does to a list of sigmas must not be done to the ladder again
    as_given = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
    if schedule.is_flow:
        config = {"shift": schedule.shift, "use_dynamic_shifting": False, "shift_terminal": None, **as_given}
    elif transition.kind is TransitionKind.DETERMINISTIC:
        # with "leading" the first call sees noise of std 1, as in training; with "trailing" of std sigma (0.9977 for SD)
        config |= {"timestep_spacing": "leading", "final_sigmas_type": "zero", **as_given}
    return Recipe(
        scheduler_class=name,
        scheduler_config=config,
        num_inference_steps=len(ladder),
        prediction_type=schedule.prediction.value,
        timesteps=() if schedule.is_flow else tuple(round(t) for t in ladder),
        sigmas=tuple(schedule.fraction_at(torch.tensor(ladder, dtype=torch.float64)).tolist())
        if schedule.is_flow
        else (),
        base=setting.base,
        method=method,
        baked_guidance=baked_guidance,
        resolution=setting.size,
    )


def ladder_of(schedule: NoiseSchedule, timesteps: Sequence[float]) -> tuple[float, ...]:
    """A ladder written by hand, checked: native times, strictly falling, within the schedule."""
    ladder = tuple(float(t) for t in timesteps)
    top = schedule.terminal_time
    if not ladder or any(a <= b for a, b in pairwise(ladder)) or ladder[0] > top or ladder[-1] <= schedule.clean_time:
        raise Refusal(
            f"method.timesteps is {list(timesteps)}, but a ladder falls strictly and lies in ({schedule.clean_time:g}, {top:g}]: mend it"
        )
    if not schedule.is_flow and any(t != round(t) for t in ladder):
        raise Refusal(f"method.timesteps is {list(timesteps)}, but stock schedulers take whole timesteps: round them")
    return ladder
