"""What few-step students of score distillation share: a ladder, rollouts along it, a fake score that follows, a recipe.

A method over this class is its generator's loss. The fake score is trained at every iteration on that iteration's fresh
sample, the generator at every `ratio`-th, before the fake score and on the same, pre-update sample (two time scales, DMD2).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, TypeVar

from pydantic import Field

from stepdistill.config import Settings
from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.timesteps import few_step_ladder
from stepdistill.diffusion.transitions import Transition, TransitionKind
from stepdistill.errors import Refusal
from stepdistill.methods import parts
from stepdistill.methods.base import Batch, Decode, Method, Needs, Progress, Rollout, Setting, Terms
from stepdistill.models.recipe import Recipe
from stepdistill.models.triple import FAKE_SCORE, GENERATOR, Triple


class FewStepConfig(Settings):
    steps: int = Field(4, ge=1, description="network calls of the student")
    timesteps: list[float] | None = Field(
        None,
        description="ladder by hand, native times; [399] for one-step SDXL: the student sees pure noise and is told 399",
    )
    guidance: float = Field(description="teacher guidance scale w that the student absorbs; 1 is off")
    ratio: int = Field(5, ge=1, description="fake-score updates per generator update")
    fake_levels: parts.LevelConfig = parts.LevelConfig(low=0.0, high=1.0)
    fake_space: Literal["native", "x0"] = "native"
    gan: parts.GanConfig = parts.GanConfig()
    simulate: bool = Field(True, description="train on the student's own rollouts; false noises real images")
    exits: parts.Exits = Field(
        "batch",
        description="the step that is trained: one for the whole batch, as published, or drawn for each sample, which gives "
        "the fake score all steps' samples at every update",
    )
    exit_odds: list[float] | None = Field(
        None,
        description="odds of training each step, noisiest first; even as published. More weight on the first keeps diversity",
    )
    transition: Literal["renoise", "deterministic"] = "renoise"


FewStepConfigT = TypeVar("FewStepConfigT", bound=FewStepConfig)


class FewStep(Method[FewStepConfigT]):
    """Base of DMD2 and of what builds on it."""

    name: str
    """In recipes."""

    def __init__(self, config: FewStepConfigT, setting: Setting) -> None:
        super().__init__(config, setting)
        self.transition = Transition(TransitionKind(config.transition))
        if config.timesteps is not None:
            self.ladder = parts.ladder_of(self.schedule, config.timesteps)
        else:
            self.ladder = few_step_ladder(self.schedule, config.steps)
        odds = config.exit_odds
        if odds is not None and not config.simulate:
            raise Refusal(
                "method.exit_odds is set and method.simulate is false, where every image is noised to an even draw of the "
                "ladder: remove one of the two"
            )
        if odds is not None and (len(odds) != len(self.ladder) or min(odds) < 0 or max(odds) <= 0):
            raise Refusal(
                f"method.exit_odds is {odds} and the ladder has {len(self.ladder)} steps: give as many odds, none below 0"
            )

    @classmethod
    def needs(cls, config: FewStepConfigT) -> Needs:
        return Needs(images=config.gan.weight > 0 or not config.simulate)

    def prepare(self, triple: Triple, decode: Decode | None = None) -> None:
        if self.config.gan.weight > 0:
            parts.attach_discriminator(triple, self.config.gan, self.setting)

    def updates(self, progress: Progress) -> Sequence[str]:
        if progress.stage_iteration % self.config.ratio == 0:
            return GENERATOR, FAKE_SCORE
        return (FAKE_SCORE,)

    def rollout(self, batch: Batch, triple: Triple, progress: Progress, draws: Draws) -> Rollout:
        graph = GENERATOR in self.updates(progress)
        if self.config.simulate:
            x_t, t, x0 = parts.roll_out(
                triple.generator,
                batch,
                self.ladder,
                self.transition,
                self.latent_shape(batch),
                draws,
                graph=graph,
                exits=self.config.exits,
                odds=self.config.exit_odds,
            )
        else:
            x_t, t, x0 = parts.noised_images(triple.generator, batch, self.ladder, draws, graph=graph)
        return Rollout(batch, x_t, t, x0)

    def loss(self, role: str, rollout: Rollout, triple: Triple, progress: Progress, draws: Draws) -> Terms:
        rollout = replace(rollout, batch=self._told(rollout.batch))
        if role == FAKE_SCORE:
            return self._critic_loss(rollout, triple, draws)
        terms = self.generator_loss(rollout, triple, progress, draws)
        if self.config.gan.weight == 0:
            return terms
        adversarial = parts.gan_generator_loss(triple, self.config.gan, rollout.x0, rollout.batch.cond, draws)
        logged = {**terms.parts, "gan": adversarial.detach()}
        return Terms(terms.total + self.config.gan.weight * adversarial, logged)

    @abstractmethod
    def generator_loss(self, rollout: Rollout, triple: Triple, progress: Progress, draws: Draws) -> Terms:
        """The generator's loss on its sample, without the GAN term, which is added to it.

        The batch's `cond` and `null` are those of the generated samples.
        """

    def _critic_loss(self, rollout: Rollout, triple: Triple, draws: Draws) -> Terms:
        """L_F = ||pred(x_t) - target||^2, plus w_cls L_D on real and generated samples."""
        x, batch = rollout.x0, rollout.batch
        t = self.config.fake_levels.levels().times(self.schedule, draws.uniform("fake.t"))
        eps = draws.normal("fake.eps", x.shape[1:])
        denoising = parts.fake_score_loss(triple.fake_score, x, t, eps, batch.cond, self.config.fake_space)
        if self.config.gan.weight == 0:
            return Terms(denoising, {"denoising": denoising.detach()})
        critic, real, fake = parts.gan_critic_loss(triple, self.config.gan, x, batch, batch.cond, draws)
        logged = {
            "denoising": denoising.detach(),
            "critic": critic.detach(),
            "d_real": real.mean(),
            "d_fake": fake.mean(),
        }
        return Terms(denoising + self.config.gan.critic_weight * critic, logged)

    def _told(self, batch: Batch) -> Batch:
        """The batch with the conditioning of the generated samples: the images' own where rollouts start from images."""
        if self.config.simulate or batch.image_cond is None:
            return batch
        return replace(batch, cond=batch.image_cond, null=batch.null.sized_like(batch.image_cond))

    def recipe(self) -> Recipe:
        return parts.few_step_recipe(self.setting, self.name, self.ladder, self.transition, self.config.guidance)
