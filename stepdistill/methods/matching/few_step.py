"""What few-step students of score distillation share: a ladder, rollouts along it, a fake score that follows, a recipe.

A method over this class is its generator's loss. The fake score is trained at every iteration on that iteration's fresh
sample, the generator at every `ratio`-th, before the fake score and on the same, pre-update sample (two time scales, DMD2).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.config.reading import Settings, WeightedTermConfig
from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.timesteps import student_timesteps
from stepdistill.diffusion.transitions import Transition, TransitionKind
from stepdistill.errors import UserError
from stepdistill.families.recipe import Recipe
from stepdistill.methods import parts
from stepdistill.methods.base import Batch, Decode, Method, Needs, Problem, Progress, Rollout, Terms
from stepdistill.methods.gan import GanConfig, attach_gan, gan_critic_loss, gan_generator_loss, logits_at
from stepdistill.methods.matching.divergence import DivergenceName, DivergenceWeights
from stepdistill.methods.preference.losses import RewardTermConfig, reward_loss
from stepdistill.methods.student_recipe import few_step_recipe, timesteps_of
from stepdistill.roles.blending import blend_role
from stepdistill.roles.denoiser import Denoiser
from stepdistill.roles.triple import FAKE_SCORE, GENERATOR, Triple


class MomentConfig(WeightedTermConfig):
    """Shield by moments (Decoupled DMD's mean-variance KL): each sample's own mean and variance against real latents'."""

    weight: float = Field(0.0, ge=0, description="0 is off; 0.1 beside matching is a safety net")
    mean: float = Field(0.0, description="of real latents, over all elements; 0.075 for SDXL")
    std: float = Field(1.0, gt=0, description="of real latents; 0.9 for SDXL")


class StudentTimestepsConfig(Settings):
    steps: int = Field(4, ge=1, description="network calls of the student")
    timesteps: list[float] | None = Field(
        None,
        description="ladder by hand, native times; [399] for one-step SDXL: the student sees pure noise and is told 399",
    )
    guidance: float = Field(ge=1, description="teacher guidance scale w that the student absorbs; 1 is off")
    ratio: int = Field(5, ge=1, description="fake-score updates per generator update")
    fake_blend: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="lambda of the fake score's blend into the generator after each of its updates: psi <- lambda psi + "
        "(1 - lambda) theta, which lets a ratio of 1 or 2 be stable; 0 is off (SenseFlow, Flash-DMD; 0.97)",
    )
    exits: parts.RolloutEnd = Field(
        "batch",
        description="the step that is trained: one for the whole batch, as published, or drawn for each sample, which gives "
        "the fake score all steps' samples at every update",
    )
    exit_odds: list[float] | None = Field(
        None,
        description="odds of training each step, noisiest first; even as published. More weight on the first keeps diversity",
    )


class FewStepConfig(StudentTimestepsConfig):
    fake_levels: parts.NoiseLevelConfig = parts.NoiseLevelConfig(low=0.0, high=1.0)
    fake_space: Literal["native", "x0"] = "native"
    gan: GanConfig = GanConfig()
    divergence: DivergenceName = Field(
        "reverse_kl",
        description="that matching descends; another than DMD's reverse KL reads density ratios off the GAN",
    )
    moments: MomentConfig = MomentConfig()
    reward: RewardTermConfig = Field(
        RewardTermConfig(), description="climbed by the generator's sample, with distribution matching as what holds it"
    )
    simulate: bool = Field(True, description="train on the student's own rollouts; false noises real images")
    transition: Literal["renoise", "deterministic"] = "renoise"


StudentTimestepsConfigT = TypeVar("StudentTimestepsConfigT", bound=StudentTimestepsConfig)
FewStepConfigT = TypeVar("FewStepConfigT", bound=FewStepConfig)


class FewStepStudent(Method[StudentTimestepsConfigT]):
    """A ladder, and two time scales along it."""

    def __init__(self, config: StudentTimestepsConfigT, problem: Problem) -> None:
        super().__init__(config, problem)
        if config.timesteps is not None:
            self.timesteps = timesteps_of(self.schedule, config.timesteps)
        else:
            self.timesteps = student_timesteps(self.schedule, config.steps)
        end_step_weights = config.exit_odds
        exits = len(self.rollout_timesteps)
        if end_step_weights is not None and (
            len(end_step_weights) != exits or min(end_step_weights) < 0 or max(end_step_weights) <= 0
        ):
            raise UserError(
                f"method.exit_odds is {end_step_weights} and rollouts are left at one of {exits} steps: give as many odds, none below 0"
            )

    @property
    def rollout_timesteps(self) -> Sequence[float]:
        """The steps that a rollout may be left at: the first ones of the ladder, or all."""
        return self.timesteps

    def updates(self, progress: Progress) -> Sequence[str]:
        if progress.stage_iteration % self.config.ratio == 0:
            return GENERATOR, FAKE_SCORE
        return (FAKE_SCORE,)

    def after_update(self, role: str, statistics: Mapping[str, float], triple: Triple, progress: Progress) -> None:
        if role == GENERATOR and self.config.fake_blend > 0:
            blend_role(triple, FAKE_SCORE, GENERATOR, 1 - self.config.fake_blend)


class FewStep(FewStepStudent[FewStepConfigT]):
    """Base of DMD2 and of what builds on it."""

    name: str
    """In recipes."""

    def __init__(self, config: FewStepConfigT, problem: Problem) -> None:
        super().__init__(config, problem)
        self.transition = Transition(TransitionKind(config.transition))
        if config.exit_odds is not None and not config.simulate:
            raise UserError(
                "method.exit_odds is set and method.simulate is false, where every image is noised to an even draw of the "
                "ladder: remove one of the two"
            )
        if config.reward.on and not config.simulate:
            raise UserError(
                "method.reward is set and method.simulate is false, where samples are told captions that a reward does not see: "
                "remove one of the two"
            )
        self.decode: Decode | None = None
        self.divergence_weights = DivergenceWeights(config.divergence) if config.divergence != "reverse_kl" else None
        if self.divergence_weights is not None and (config.gan.weight == 0 or config.gan.loss != "logistic"):
            raise UserError(
                f"method.divergence is {config.divergence!r}, which reads density ratios off a logistic GAN, and there is none: "
                "set method.gan.weight and method.gan.loss: logistic, or method.divergence: reverse_kl"
            )

    @classmethod
    def needs(cls, config: FewStepConfigT) -> Needs:
        gan = config.gan.needs()
        reward = config.reward if config.reward.on else RewardTermConfig()
        images = gan.images or not config.simulate
        return replace(gan, images=images, reward=reward.name, held_out=reward.held_out)

    def prepare(self, triple: Triple, decode: Decode | None = None) -> None:
        self.decode = decode
        if self.config.reward.on and decode is None:
            raise UserError("method.reward is set and the checkpoint has no autoencoder to decode with: remove it")
        if self.config.gan.weight > 0:
            attach_gan(triple, self.config.gan, self.problem, decode)

    def rollout(self, batch: Batch, triple: Triple, progress: Progress, draws: Draws) -> Rollout:
        graph = GENERATOR in self.updates(progress)
        if self.config.simulate:
            x_t, t, x0 = parts.roll_out(
                triple.generator,
                batch,
                self.rollout_timesteps,
                self.transition,
                self.latent_shape(batch),
                draws,
                graph=graph,
                exits=self.config.exits,
                end_step_weights=self.config.exit_odds,
            )
        else:
            x_t, t, x0 = parts.noised_images(triple.generator, batch, self.timesteps, draws, graph=graph)
        return Rollout(batch, x_t, t, x0)

    def loss(self, role: str, rollout: Rollout, triple: Triple, progress: Progress, draws: Draws) -> Terms:
        rollout = replace(rollout, batch=self._with_sample_conditioning(rollout.batch))
        if role == FAKE_SCORE:
            return self._fake_score_loss(rollout, triple, draws)
        terms = self.generator_loss(rollout, triple, progress, draws)
        terms = replace(terms, parts={**terms.parts, **parts.sample_statistics(rollout)})
        moments, gan = self.config.moments, self.config.gan
        if moments.weight > 0:
            terms = terms.plus("moments", moment_penalty(rollout.x0, moments.mean, moments.std), moments.weight)
        if gan.weight > 0:
            x = self.discriminator_input(rollout)
            adversarial = gan_generator_loss(triple, gan, x, rollout.batch.cond, draws, self.decode)
            terms = terms.plus("gan", adversarial, gan.weight)
        if self.config.reward.on:
            reward = self.config.reward
            climbed, logged = reward_loss(rollout.x0, rollout.batch.prompts, triple, self.decode, reward.margin)
            terms = replace(terms, total=terms.total + reward.weight * climbed, parts={**terms.parts, **logged})
        return terms

    def discriminator_input(self, rollout: Rollout) -> Tensor:
        """The sample that discriminator and generator are at odds about."""
        return rollout.x0

    @abstractmethod
    def generator_loss(self, rollout: Rollout, triple: Triple, progress: Progress, draws: Draws) -> Terms:
        """The generator's loss on its sample, without GAN and moment terms, which are added to it.

        The batch's `cond` and `null` are those of the generated samples.
        """

    def denoising_loss(self, rollout: Rollout, triple: Triple, draws: Draws) -> Terms:
        """L_F = ||pred(x_t) - target||^2."""
        x, cond = rollout.x0, rollout.batch.cond
        t = self.config.fake_levels.levels().times(self.schedule, draws.uniform("fake.t"))
        eps = draws.normal("fake.eps", x.shape[1:])
        denoising = parts.fake_score_loss(triple.fake_score, x, t, eps, cond, self.config.fake_space)
        return Terms(denoising, {"denoising": denoising.detach()})

    def _fake_score_loss(self, rollout: Rollout, triple: Triple, draws: Draws) -> Terms:
        """L_F, plus w_cls L_D on real and generated samples."""
        terms, batch, gan = self.denoising_loss(rollout, triple, draws), rollout.batch, self.config.gan
        if gan.weight == 0:
            return terms
        discriminator_input = self.discriminator_input(rollout)
        critic, real, fake = gan_critic_loss(triple, gan, discriminator_input, batch, batch.cond, draws, self.decode)
        logged = {**terms.parts, "critic": critic.detach(), "d_real": real.mean(), "d_fake": fake.mean()}
        return Terms(terms.total + gan.critic_weight * critic, logged)

    def after_update(self, role: str, statistics: Mapping[str, float], triple: Triple, progress: Progress) -> None:
        super().after_update(role, statistics, triple, progress)
        if role == GENERATOR and self.divergence_weights is not None and statistics:
            self.divergence_weights.update(statistics)

    def state_dict(self) -> dict[str, Tensor]:
        return self.divergence_weights.state_dict() if self.divergence_weights is not None else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if self.divergence_weights is not None:
            self.divergence_weights.load_state_dict(state)

    def matching(
        self,
        rollout: Rollout,
        triple: Triple,
        draws: Draws,
        levels: parts.NoiseLevelConfig,
        weight: parts.DmWeight,
        guidance: float | None = None,
        target: Denoiser | None = None,
    ) -> Terms:
        """Distribution matching on the generator's sample, weighted as the divergence asks.

        guidance, target: the config's, and the teacher, by default.
        """
        statistics: dict[str, Tensor] = {}

        def weigh(x_t: Tensor, t: Tensor) -> Tensor:
            return self.weights(rollout, x_t, t, triple, statistics)

        direction, logged = parts.distribution_matching_direction(
            rollout.x0,
            rollout.batch.cond,
            rollout.batch.null,
            triple,
            draws,
            levels=levels,
            guidance=self.config.guidance if guidance is None else guidance,
            weight=weight,
            weigh=weigh,
            target=target,
        )
        return Terms(parts.surrogate_loss(rollout.x0, direction), logged, statistics)

    @torch.no_grad()
    def weights(
        self, rollout: Rollout, x_t: Tensor, t: Tensor, triple: Triple, statistics: dict[str, Tensor]
    ) -> Tensor:
        """Each sample's weight of matching at (x_t, t), (B,); 1 for the reverse KL. What it learns from is put in `statistics`."""
        if self.divergence_weights is None:
            return torch.ones_like(t)
        x, cond = rollout.x0.detach(), rollout.batch.cond
        logits = logits_at(triple, self.config.gan, x, x_t, t, cond, self.decode)
        found, seen = self.divergence_weights(logits, self.schedule.fraction_at(t))
        statistics.update(seen)
        return found

    def _with_sample_conditioning(self, batch: Batch) -> Batch:
        """The batch with the conditioning of the generated samples: the images' own where rollouts start from images."""
        if self.config.simulate or batch.image_cond is None:
            return batch
        return replace(batch, cond=batch.image_cond, null=batch.null.with_size_of(batch.image_cond))

    def recipe(self) -> Recipe:
        return few_step_recipe(self.problem, self.name, self.timesteps, self.transition, self.config.guidance)


def moment_penalty(x: Tensor, mean: float, std: float) -> Tensor:
    """Mean over samples of KL(N(m, s^2) || N(mean, std^2)), m and s^2 each sample's own over its elements."""
    own = x.flatten(1)
    m, variance = own.mean(1), own.var(1, correction=0).clamp_min(1e-12)
    ratio = variance / std**2
    return (0.5 * (ratio + (m - mean).square() / std**2 - 1 - ratio.log())).mean()
