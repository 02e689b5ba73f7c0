"""What discrete consistency methods share: a grid of times, one teacher step along it, a target at its cleaner end, a recipe.

    x_s = alpha_s x0 + sigma_s eps                                     s = grid[n], n drawn evenly
    x_e = one step of the guided teacher from x_s                       e = grid[n - 1]
    L   = d(f(x_s, s -> r), sg f^(x_e, e -> r))                         r = grid[m], m < n
    f(x_t, t -> r) = alpha_r x0 + sigma_r eps                           x0, eps: the network's at (x_t, t)

f^ is f of the target network: the student itself, or its EMA. Where e = r the target is x_e itself: that boundary alone ties
f to the trajectory, without it a constant would do. A method over this class says where r lies (`end`), and what else it is
that it does. Only the generator is trained, a discriminator where there is an adversary, and a fake
score in the last stage of TSCD where it has one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stepdistill.config.reading import Settings, WeightedTermConfig
from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.schedule import NoiseSchedule, Time, broadcast
from stepdistill.diffusion.timesteps import evenly_spaced_timesteps, uniform_grid
from stepdistill.diffusion.transitions import Transition, TransitionKind
from stepdistill.errors import UserError
from stepdistill.families.recipe import Recipe
from stepdistill.methods import parts
from stepdistill.methods.base import Batch, Decode, Method, Needs, Problem, Progress, RoleKind, Rollout, Terms
from stepdistill.methods.gan import discriminator_logits
from stepdistill.methods.student_recipe import few_step_recipe, timesteps_of
from stepdistill.roles.heads import GanLoss, discriminator_loss, generator_loss
from stepdistill.roles.triple import FAKE_SCORE, GENERATOR, Triple

TARGET = "target"
"""Role of the target network where it is an EMA of the generator."""
PredictX0 = Callable[[Tensor, Tensor], Tensor]
"""(x_t, t) -> x0."""


class ConsistencyGanConfig(WeightedTermConfig):
    """A discriminator between f and its target, both noised to one level (PCM, section 3.3).

    It is updated in every iteration, after the generator, with the rates of optimizers.fake_score.
    """

    weight: float = Field(0.0, ge=0, description="in the generator's loss; 0 is off; 0.1 as PCM published")
    features: Literal["fake_score", "real_score"] = Field(
        "real_score",
        description="whose mid-block features: the frozen teacher's (PCM; nothing then asks the fake score's own network, so "
        "leave it a LoRA), or a critic's that starts as the teacher and is trained (Lightning, Hyper-SD)",
    )
    loss: GanLoss = "hinge"
    width: int | None = Field(None, gt=0, description="channels of the head; the features' own by default")


class ConsistencyConfig(Settings):
    steps: int = Field(4, ge=1, description="network calls of the student")
    timesteps: list[float] | None = Field(None, description="ladder by hand, native times; from the grid by default")
    guidance: float = Field(
        ge=1, description="teacher guidance scale w that the student absorbs; 1 is off (LCM's w is w - 1)"
    )
    guidance_range: tuple[float, float] | None = Field(
        None,
        description="w of the teacher's step is drawn from here for each sample; a student that is not told w learns the average, "
        "as the released LoRA scripts have it. `guidance` alone by default",
    )
    tell_guidance: bool = Field(
        False,
        description="the student is told w by an embedding (time_cond_proj_dim) that stock pipelines feed with their guidance_scale, "
        "as LCM published it: one student for every w of guidance_range, exported as a pipeline",
    )
    points: int = Field(50, ge=1, le=500, description="points of the grid: the teacher skips 1000 / points timesteps")
    source: Literal["images", "pairs"] = Field(
        "images",
        description="what is noised: data.images, or the teacher's own samples in data.pairs, which need no images",
    )
    distance: parts.Distance = "huber"
    huber_c: float | None = Field(None, gt=0, description="by default 1e-3, for pseudo_huber 0.00054 sqrt(D)")
    target: Literal["student", "ema"] = Field(
        "student", description="network of the target: the student itself without gradient, or an EMA of it"
    )
    target_decay: float = Field(0.95, ge=0, lt=1, description="of that EMA, per update")

    @model_validator(mode="after")
    def _range_fits(self) -> ConsistencyConfig:
        if self.guidance_range is None:
            if self.tell_guidance:
                raise ValueError("tell_guidance is true and guidance_range, which w is drawn from, is not set")
            return self
        low, high = self.guidance_range
        if not 1 <= low <= high:
            raise ValueError(
                f"guidance_range is {list(self.guidance_range)}, and w rises in it from 1 or more; mend it"
            )
        if self.tell_guidance and not low <= self.guidance <= high:
            raise ValueError(f"guidance {self.guidance:g} is not within guidance_range [{low:g}, {high:g}]")
        return self

    @property
    def absorbed_guidance(self) -> float:
        """w that the student learns: the mean of the range where there is one that it is not told of."""
        if self.guidance_range is None or self.tell_guidance:
            return self.guidance
        return sum(self.guidance_range) / 2


ConfigT = TypeVar("ConfigT", bound=ConsistencyConfig)


@dataclass(frozen=True, kw_only=True)
class ConsistencyRollout(Rollout):
    """A rollout whose x0 was predicted at (x_t, t) = (x_s, s).

    Attributes:
        r: native end-times, (B,).
        target: f^(x_e, e -> r), shape of x0, without graph.
        weight: of each sample in the loss, (B,).
        level: native times at which a discriminator looks at f and its target, (B,), none below r.
    """

    r: Tensor
    target: Tensor
    weight: Tensor
    level: Tensor


class Consistency(Method[ConfigT]):
    """Base of LCM, TCD, PCM, TSCD and CM."""

    name: str
    """In recipes."""
    transition: Transition
    """Of the sampler."""

    def __init__(self, config: ConfigT, problem: Problem) -> None:
        super().__init__(config, problem)
        if config.timesteps is not None:
            self.timesteps = timesteps_of(self.schedule, config.timesteps)
        else:
            self.timesteps = timesteps_of(self.schedule, self.default_timesteps())

    # ---------------------------------------------------------------- what a method says

    def grid(self, progress: Progress) -> Tensor:
        """Native times (N + 1,), rising, float64; the first is the clean end, at which f is the identity."""
        return uniform_grid(self.schedule, self.config.points)

    def end(self, start: Tensor, uniform: Tensor, progress: Progress) -> Tensor:
        """Index of r for each index of s, (B,), below it; `uniform` (B,) in [0, 1). The clean end by default."""
        return torch.zeros_like(start)

    def consistency_function(self, x_t: Tensor, x0: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """f(x_t, t -> r), given the network's x0 there."""
        return ddim_step(self.schedule, x_t, x0, t, r)

    def solver_step(self, teacher: PredictX0, x_s: Tensor, s: Tensor, e: Tensor) -> Tensor:
        """x_e by one step of the teacher: DDIM, which for flow models is Euler."""
        return ddim_step(self.schedule, x_s, teacher(x_s, s), s, e)

    def draw_guidance(self, draws: Draws) -> Tensor | float:
        """w of the teacher's step, one for all or (B,)."""
        if self.config.guidance_range is None:
            return self.config.guidance
        low, high = self.config.guidance_range
        return low + (high - low) * draws.uniform("guidance")

    def teacher(self, triple: Triple, batch: Batch, x0: Tensor, w: Tensor | float) -> PredictX0:
        """What the solver follows: the teacher, guided by w. `x0` is what was noised."""
        return lambda x, t: triple.real_score.guided(x, t, batch.cond, batch.null, w)

    def start(self, uniform: Tensor, grid: Tensor) -> Tensor:
        """Index of s, 1 to N, (B,)."""
        return 1 + (uniform * (len(grid) - 1)).long()

    def weight(self, s: Tensor, e: Tensor) -> Tensor:
        """Of each sample's loss, (B,)."""
        return torch.ones_like(s)

    def level(self, end: Tensor, grid: Tensor, uniform: Tensor, progress: Progress) -> Tensor:
        """Where a discriminator looks, (B,)."""
        return grid[end]

    def gan_config(self, progress: Progress) -> ConsistencyGanConfig:
        """The discriminator at this point of the run; off by default."""
        return ConsistencyGanConfig()

    def default_timesteps(self) -> Sequence[float]:
        return evenly_spaced_timesteps(self.grid(Progress()), self.config.steps)

    # ---------------------------------------------------------------- the interface of methods

    @classmethod
    def needs(cls, config: ConfigT) -> Needs:
        return Needs(images=config.source == "images", pairs=config.source == "pairs")

    @classmethod
    def check(
        cls, config: ConfigT, schedule: NoiseSchedule, *, images: bool, pairs: bool, trajectories: bool = False
    ) -> None:
        if config.source == "images" and not images:
            raise UserError(
                "a consistency method noises real images and data.images is not set: give an image folder, or set "
                "method.source to pairs and data.pairs to what 'stepdistill collect pairs' made"
            )
        if config.source == "pairs" and not pairs:
            raise UserError(
                "method.source is 'pairs' and data.pairs is not set: run 'stepdistill collect pairs' first, or set "
                "method.source to images"
            )
        super().check(config, schedule, images=images, pairs=pairs, trajectories=trajectories)

    @classmethod
    def roles(cls, config: ConfigT) -> Mapping[str, RoleKind]:
        return {GENERATOR: "generator"}

    @classmethod
    def network_guidance_range(cls, config: ConfigT) -> tuple[float, float] | None:
        return config.guidance_range if config.tell_guidance else None

    def prepare(self, triple: Triple, decode: Decode | None = None) -> None:
        if self.config.target == "ema":
            triple.add_copy(TARGET, GENERATOR)

    def updates(self, progress: Progress) -> Sequence[str]:
        return (GENERATOR, FAKE_SCORE) if self.gan_config(progress).weight > 0 else (GENERATOR,)

    def rollout(self, batch: Batch, triple: Triple, progress: Progress, draws: Draws) -> ConsistencyRollout:
        draws = draws.for_role("rollout")
        x0, batch = self._noised_source(batch)
        grid = self.grid(progress).to(x0.device)
        start = self.start(draws.uniform("start"), grid)
        end = self.end(start, draws.uniform("end"), progress)
        s, e, r = grid[start], grid[start - 1], grid[end]
        noise, w = draws.normal("noise", x0.shape[1:]), self.draw_guidance(draws)
        told = batch.cond.told(w) if self.config.tell_guidance else batch.cond
        # sampling starts from pure noise, which the noisiest state of a schedule with signal left at its end is not
        x_s = torch.where(broadcast(start == len(grid) - 1, x0).bool(), noise, self.schedule.add_noise(x0, noise, s))
        with torch.no_grad():
            x_e = self.solver_step(self.teacher(triple, batch, x0, w), x_s, s, e)
            network = triple.denoiser(TARGET if self.config.target == "ema" else GENERATOR)
            target = self.consistency_function(x_e, network.x0(x_e, e, told), e, r)
            target = torch.where(broadcast(end == start - 1, x_e).bool(), x_e, target)
        with torch.set_grad_enabled(GENERATOR in self.updates(progress)):
            predicted = triple.generator.x0(x_s, s, told)
        level = self.level(end, grid, draws.uniform("level"), progress)
        return ConsistencyRollout(batch, x_s, s, predicted, r=r, target=target, weight=self.weight(s, e), level=level)

    def loss(self, role: str, rollout: Rollout, triple: Triple, progress: Progress, draws: Draws) -> Terms:
        if not isinstance(rollout, ConsistencyRollout):
            raise TypeError(f"a consistency loss was given a {type(rollout).__name__}")
        if role == FAKE_SCORE:
            return self.critic_loss(rollout, triple, progress, draws)
        reached = self.consistency_function(rollout.x_t, rollout.x0, rollout.t, rollout.r)
        each = parts.distance(reached - rollout.target, self.config.distance, self.config.huber_c)
        total = (rollout.weight.to(each) * each).mean()
        logged = {"consistency": total.detach(), **parts.latent_statistics(rollout.x0)}
        gan_config = self.gan_config(progress)
        if gan_config.weight > 0:
            fooled = generator_loss(self._logits(triple, gan_config, reached, rollout, "gan", draws), gan_config.loss)
            total, logged = total + gan_config.weight * fooled, {**logged, "gan": fooled.detach()}
        return Terms(total, logged)

    def critic_loss(self, rollout: ConsistencyRollout, triple: Triple, progress: Progress, draws: Draws) -> Terms:
        """L_D: targets are real, f of the student is fake."""
        gan_config = self.gan_config(progress)
        reached = self.consistency_function(rollout.x_t, rollout.x0, rollout.t, rollout.r)
        real = self._logits(triple, gan_config, rollout.target, rollout, "gan.real", draws)
        fake = self._logits(triple, gan_config, reached, rollout, "gan.fake", draws)
        total = discriminator_loss(real, fake, gan_config.loss)
        logged = {"critic": total.detach(), "d_real": real.detach().mean(), "d_fake": fake.detach().mean()}
        return Terms(total, logged)

    def after_update(self, role: str, statistics: Mapping[str, float], triple: Triple, progress: Progress) -> None:
        if role == GENERATOR and self.config.target == "ema":
            triple.lerp_role(TARGET, GENERATOR, 1 - self.decay(progress))

    def decay(self, progress: Progress) -> float:
        """Of the target network's EMA."""
        return self.config.target_decay

    def recipe(self) -> Recipe:
        recipe = self.base_recipe()
        if recipe.scheduler_class not in ("LCMScheduler", "TCDScheduler"):
            return recipe
        # with any other number of steps these two choose among the points that were trained
        grid = {"original_inference_steps": self.config.points}
        return replace(recipe, scheduler_config={**recipe.scheduler_config, **grid})

    def base_recipe(self) -> Recipe:
        """The recipe of the ladder; a student that is told its guidance is told it by the pipeline."""
        w = self.config.guidance
        plain = few_step_recipe(self.problem, self.name, self.timesteps, self.transition, self.config.absorbed_guidance)
        return replace(plain, guidance_scale=w, told_guidance=w) if self.config.tell_guidance else plain

    # ---------------------------------------------------------------- pieces

    def _noised_source(self, batch: Batch) -> tuple[Tensor, Batch]:
        """What is noised, and the batch with its conditioning."""
        x0, cond = batch.images, batch.image_cond
        if self.config.source == "pairs":
            x0, cond = batch.pair_latents, batch.pair_cond
        if x0 is None or cond is None:
            raise ValueError(f"a batch without {self.config.source} reached a consistency method")
        return x0, replace(batch, cond=cond, null=batch.null.with_size_of(cond))

    def _logits(
        self,
        triple: Triple,
        gan_config: ConsistencyGanConfig,
        x_r: Tensor,
        rollout: ConsistencyRollout,
        purpose: str,
        draws: Draws,
    ) -> Tensor:
        """Of x_r, noised on from r to the level: x_a = (alpha_a / alpha_r) x_r + sqrt(sigma_a^2 - ...) n."""
        # a flow model is not defined at sigma = 0 exactly
        level = rollout.level.clamp_min(1e-3) if self.schedule.is_flow else rollout.level
        ratio, std = self.schedule.kernel(rollout.r, level)
        x_a = broadcast(ratio, x_r) * x_r + broadcast(std, x_r) * draws.normal(f"{purpose}.eps", x_r.shape[1:])
        return discriminator_logits(triple, gan_config.features, x_a, level, rollout.batch.cond)


def ddim_step(schedule: NoiseSchedule, x_t: Tensor, x0: Tensor, t: Time, r: Time) -> Tensor:
    """x_r = alpha_r x0 + sigma_r eps, with eps of (x_t, x0): a step of DDIM, of Euler for flow models."""
    return Transition(TransitionKind.DETERMINISTIC)(schedule, x_t, x0, t, r).mean
