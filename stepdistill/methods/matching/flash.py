"""Flash-DMD (Chen et al., CVPR 2026, arXiv 2511.20549): each loss at the noise levels where it helps, then preferences.

Distribution matching settles structure while it is undecided, and over-smooths afterwards; realism is decided at the last
step. So matching trains every step of the ladder but the last, on the student's own rollouts, and a GAN alone trains the
last, on samples that were drawn to the clean end and noised again to its level. The fake score learns by denoising alone
and is blended into the generator after each update, which makes a ratio of 1 or 2 stable.

A second stage keeps that distillation running, as what holds a preference in check, and between its updates ranks
successors of one noisy state by a reward: at the noisiest steps only, so that texture is left to the GAN. The paper trains a
reward model on noisy latents; here the noisy state's reward is that of the teacher's own estimate of its image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.config.reading import Settings
from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.transitions import TransitionKind
from stepdistill.errors import UserError
from stepdistill.methods import parts
from stepdistill.methods.base import Batch, Decode, Needs, Problem, Progress, Rollout, Stage, Terms
from stepdistill.methods.gan import GanConfig
from stepdistill.methods.matching.few_step import FewStep, FewStepConfig
from stepdistill.methods.preference.losses import (
    REFERENCE,
    compute_rewards,
    log_ratio,
    pairwise_loss,
    select_candidates,
)
from stepdistill.roles.triple import FAKE_SCORE, GENERATOR, Triple


class PreferenceConfig(Settings):
    """The joint stage: pairs of successors, ranked by a reward (section 3.3)."""

    reward: str = Field(
        description="'critic:colour', 'clip', 'clip:FOLDER', any MODULE:FUNCTION of images and prompts, or a sum, '0.5*A + B'"
    )
    start: int = Field(
        ge=0, description="iterations of distillation alone before the stage; 0 where init names such a run"
    )
    per_distillation: int = Field(5, ge=1, description="preference updates for one generator update of distillation")
    candidates: int = Field(4, ge=2, description="successors that are ranked")
    steps: int | None = Field(None, ge=1, description="noisiest steps that are trained; all but two, at least one")
    beta: float = Field(50.0, gt=0, description="of the gap of log ratios over sqrt(elements of a sample)")
    weight: float = Field(1.0, gt=0, description="of the preference loss")


class FlashConfig(FewStepConfig):
    ratio: int = Field(2, ge=1, description="fake-score updates per generator update; 1 or 2 as published")
    fake_blend: float = Field(0.97, ge=0, lt=1, description="lambda of the fake score's blend; 0 is off")
    gan: GanConfig = GanConfig(weight=1e-2, critic_weight=1.0, features="vision")
    dm_weight: parts.DmWeight = "code"
    dm_levels: parts.NoiseLevelConfig = parts.NoiseLevelConfig()
    rl: PreferenceConfig | None = Field(None, description="the joint stage; null is off")


@dataclass(frozen=True)
class FlashRollout(Rollout):
    """With the sample of the last step.

    Attributes:
        last: the generator's answer at the last step, with graph where it is due.
    """

    last: Tensor | None = None


class Flash(FewStep[FlashConfig]):
    """L_G = L_DM(t_1..t_N-1) + w_gan L_GAN(t_N); in the joint stage, most updates are L_G = L_preference."""

    Config = FlashConfig
    name = "flash"

    def __init__(self, config: FlashConfig, problem: Problem) -> None:
        super().__init__(config, problem)
        if len(self.timesteps) < 2:
            raise UserError(
                "method.steps is 1, and flash matches at all steps but the last, which the GAN trains: set it to 2 or more"
            )
        if config.gan.weight == 0 or config.gan.features == "fake_score":
            found = "weight is 0" if config.gan.weight == 0 else "features is 'fake_score'"
            raise UserError(
                f"method.gan.{found}, and flash trains its last step by a GAN alone, whose gradient must not reach the fake "
                "score: set a weight, and features to vision or real_score"
            )
        if not config.simulate:
            raise UserError("method.simulate is false, and flash trains on the student's own rollouts: remove the key")
        if self.divergence_weights is not None:
            raise UserError(
                f"method.divergence is {config.divergence!r}, which reads density ratios off the GAN, and flash's sees the last step "
                "alone, where nothing is matched: set it to reverse_kl"
            )
        if config.rl is not None and not 1 <= self._ranked_steps(config.rl) < len(self.timesteps):
            raise UserError(
                f"method.rl.steps is {config.rl.steps} and the ladder has {len(self.timesteps)} steps, of which the last has no "
                "noisy successor: give fewer"
            )
        if config.rl is not None and config.reward.on:
            raise UserError(
                "method.rl and method.reward both have a reward, and one is held in memory: remove one of the two"
            )
        if config.rl is not None and self.transition.kind is not TransitionKind.RENOISE:
            raise UserError(
                f"method.transition is {config.transition!r} and method.rl ranks random successors, which it does not have: set "
                "it to renoise, or remove method.rl"
            )

    @classmethod
    def needs(cls, config: FlashConfig) -> Needs:
        needs = super().needs(config)
        return replace(needs, reward=config.rl.reward) if config.rl is not None else needs

    def stages(self) -> Sequence[Stage]:
        if self.config.rl is None:
            return super().stages()
        return Stage("distillation", self.config.rl.start), Stage("joint", copies=((GENERATOR, REFERENCE),))

    def prepare(self, triple: Triple, decode: Decode | None = None) -> None:
        super().prepare(triple, decode)
        if self.config.rl is not None:
            if decode is None:
                raise UserError("method.rl is set and the checkpoint has no autoencoder to decode with: remove it")
            triple.add_copy(REFERENCE, GENERATOR)

    def updates(self, progress: Progress) -> Sequence[str]:
        """In the joint stage a period is the preference updates, one generator update of distillation, and the fake
        score's further ones."""
        if not self._is_joint_stage(progress):
            return super().updates(progress)
        place = self._position_in_period(progress)
        return (GENERATOR,) if place < 0 else (GENERATOR, FAKE_SCORE) if place == 0 else (FAKE_SCORE,)

    @property
    def rollout_timesteps(self) -> Sequence[float]:
        return self.timesteps[:-1]

    def rollout(self, batch: Batch, triple: Triple, progress: Progress, draws: Draws) -> Rollout:
        rl = self.config.rl
        if rl is not None and self._is_preference_update(progress):
            timesteps, shape = self.timesteps[: self._ranked_steps(rl)], self.latent_shape(batch)
            return Rollout(
                batch, *parts.roll_out(triple.generator, batch, timesteps, self.transition, shape, draws, graph=True)
            )
        matched = super().rollout(batch, triple, progress, draws)
        return FlashRollout(
            batch,
            matched.x_t,
            matched.t,
            matched.x0,
            last=self._sample_last_step(matched, triple, draws.for_role("rollout")),
        )

    def _sample_last_step(self, rollout: Rollout, triple: Triple, draws: Draws) -> Tensor:
        """Walk on to the clean end without graph, noise that sample to the last step's level, and answer there."""
        cond, shape = rollout.batch.cond, rollout.x0.shape[1:]
        with torch.no_grad():
            x0 = parts.finish_rollout(
                triple.generator, rollout, self.timesteps, self.transition, draws, self.config.exits
            )
            t = self.timesteps[-1]
            x_t = self.schedule.add_noise(x0, draws.normal("last", shape), t)
        with torch.set_grad_enabled(rollout.x0.requires_grad):
            return triple.generator.x0(x_t, t, cond)

    def loss(self, role: str, rollout: Rollout, triple: Triple, progress: Progress, draws: Draws) -> Terms:
        if self.config.rl is not None and self._is_preference_update(progress):
            return self._preference_loss(self.config.rl, rollout, triple, draws)
        return super().loss(role, rollout, triple, progress, draws)

    def discriminator_input(self, rollout: Rollout) -> Tensor:
        if not isinstance(rollout, FlashRollout) or rollout.last is None:
            raise TypeError("flash was given another method's rollout")
        return rollout.last

    def generator_loss(self, rollout: Rollout, triple: Triple, progress: Progress, draws: Draws) -> Terms:
        return self.matching(rollout, triple, draws, self.config.dm_levels, self.config.dm_weight)

    # ---------------------------------------------------------------- the joint stage

    def _preference_loss(self, rl: PreferenceConfig, rollout: Rollout, triple: Triple, draws: Draws) -> Terms:
        """-log sigmoid(beta (log p/p_ref (best) - log p/p_ref (worst))) on the best and worst of some successors of x_t."""
        cond = rollout.batch.cond
        with torch.no_grad():
            reference = triple.denoiser(REFERENCE).x0(rollout.x_t, rollout.t, cond)
            eps = [draws.normal(f"successor{k}", rollout.x0.shape[1:]) for k in range(rl.candidates)]
            s = self._next_timesteps(rollout.t)
            successors = [self.schedule.add_noise(rollout.x0.detach(), noise, s) for noise in eps]
            rewards = torch.stack([self._reward(z, s, rollout.batch, triple) for z in successors])
            best, worst = (select_candidates(successors, index) for index in (rewards.argmax(0), rewards.argmin(0)))
        alpha, sigma = self.schedule.levels(s, rollout.x0)
        mean, anchor = alpha * rollout.x0, alpha * reference
        gap = log_ratio(best, mean, anchor, sigma) - log_ratio(worst, mean, anchor, sigma)
        argument = rl.beta * gap / rollout.x0[0].numel() ** 0.5
        loss = pairwise_loss(argument).mean()
        logged = {
            "preference": loss.detach(),
            "argument": argument.detach().abs().mean(),
            "reward": rewards.mean(),
            "reward_gap": (rewards.amax(0) - rewards.amin(0)).mean(),
        }
        return Terms(rl.weight * loss, {**logged, **parts.sample_statistics(rollout)})

    def _reward(self, z: Tensor, s: Tensor, batch: Batch, triple: Triple) -> Tensor:
        """Of the noisy latents z at times s: that of the teacher's estimate of the image, decoded, (B,)."""
        return compute_rewards(triple.real_score.x0(z, s, batch.cond), batch.prompts, triple, self.decode)

    def _next_timesteps(self, t: Tensor) -> Tensor:
        """The step of the ladder after each sample's own."""
        timesteps = torch.tensor(self.timesteps, dtype=torch.float64, device=t.device)
        return timesteps[(timesteps[None] >= t[:, None]).sum(1)]

    def _ranked_steps(self, rl: PreferenceConfig) -> int:
        return rl.steps if rl.steps is not None else max(1, len(self.timesteps) - 2)

    def _is_joint_stage(self, progress: Progress) -> bool:
        return self.config.rl is not None and progress.stage == 1

    def _position_in_period(self, progress: Progress) -> int:
        """Within a period of the joint stage: below 0 for preferences, 0 for the generator's distillation."""
        ahead = self.config.rl.per_distillation if self.config.rl is not None else 0
        return progress.stage_iteration % (ahead + self.config.ratio) - ahead

    def _is_preference_update(self, progress: Progress) -> bool:
        return self._is_joint_stage(progress) and self._position_in_period(progress) < 0
