"""sCM: Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models (Lu & Song, ICLR 2025, arXiv 2410.11081).

Consistency distillation on noised real latents: x_T = sigma_d (cos(T) x0 + sin(T) eps), dx/dT the guided teacher's (sCD).
The latent adversarial term is SANA-Sprint's (Chen et al. 2025, arXiv 2503.09641): L = L_sCM + 0.5 L_adv on samples of the
student drawn from noisy latents, half of them from pure noise. The discriminator is the role `fake_score`, there only then,
with a head on one block of its features; theirs has heads on four blocks of the frozen teacher (`gan.features: real_score`
is nearer to it), and a noise of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.diffusion.draws import Draws
from stepdistill.families.conditioning import Conditioning
from stepdistill.methods import parts
from stepdistill.methods.base import Batch, Decode, Needs, Progress, RoleKind, Rollout, Terms
from stepdistill.methods.consistency.continuous import Continuous, ContinuousConfig, TrigFlowStates
from stepdistill.methods.gan import GanConfig, attach_gan, gan_critic_loss, gan_generator_loss
from stepdistill.roles.triple import FAKE_SCORE, GENERATOR, Triple


class SCMConfig(ContinuousConfig):
    steps: int = Field(2, ge=1, description="network calls of the student")
    gan: GanConfig = GanConfig(weight=0.0, loss="hinge")
    pure_noise: float = Field(0.5, ge=0, le=1, description="share of the GAN's samples that start from pure noise")


@dataclass(frozen=True, kw_only=True)
class NoisedImages(Rollout):
    """x_t = X_T; x0 is the student's sample for the discriminator, the image itself without one.

    Attributes:
        angle: T, (B,), float64.
        velocity: the guided teacher's F.
    """

    angle: Tensor
    velocity: Tensor


class SCM(Continuous[SCMConfig]):
    Config = SCMConfig
    name = "scm"

    @classmethod
    def roles(cls, config: SCMConfig) -> Mapping[str, RoleKind]:
        discriminator: dict[str, RoleKind] = {FAKE_SCORE: "fake_score"} if config.gan.weight > 0 else {}
        return {**super().roles(config), **discriminator}

    @classmethod
    def needs(cls, config: SCMConfig) -> Needs:
        return replace(config.gan.needs(), images=True, jvp=super().needs(config).jvp)

    def prepare(self, triple: Triple, decode: Decode | None = None) -> None:
        super().prepare(triple, decode)
        self.decode = decode
        if self.config.gan.weight > 0:
            attach_gan(triple, self.config.gan, self.problem, decode)

    def updates(self, progress: Progress) -> Sequence[str]:
        return (GENERATOR, FAKE_SCORE) if self.config.gan.weight > 0 else (GENERATOR,)

    def rollout(self, batch: Batch, triple: Triple, progress: Progress, draws: Draws) -> NoisedImages:
        images, cond = _images(batch)
        draws = draws.for_role("rollout")
        angle = self.angles(draws.uniform("angle"))
        x = self._noised(images, angle, draws, "eps")
        velocity = self.teacher(triple, x, angle, cond, batch.null.with_size_of(cond))
        sample = images
        if self.config.gan.weight > 0:
            other = self.angles(draws.uniform("gan.angle"))
            other = torch.where(draws.uniform("gan.pure") < self.config.pure_noise, self.trigflow.max_angle, other)
            noised = self._noised(images, other, draws, "gan.eps")
            sample = triple.generator.x0(*self.trigflow.native(noised, other), cond)
        t = self.schedule.time_at_angle(angle)
        return NoisedImages(batch=batch, x_t=x, t=t, x0=sample, angle=angle, velocity=velocity)

    def loss(self, role: str, rollout: Rollout, triple: Triple, progress: Progress, draws: Draws) -> Terms:
        if not isinstance(rollout, NoisedImages):
            raise TypeError(f"a rollout of {self.name} was expected, not a {type(rollout).__name__}")
        batch, (_, cond) = rollout.batch, _images(rollout.batch)
        if role == FAKE_SCORE:
            critic, real, fake = gan_critic_loss(triple, self.config.gan, rollout.x0, batch, cond, draws, self.decode)
            logged = {"critic": critic.detach(), "d_real": real.mean(), "d_fake": fake.mean()}
            return Terms(self.config.gan.critic_weight * critic, logged)
        terms = self.consistency_loss(
            TrigFlowStates(rollout.x_t, rollout.angle, rollout.velocity, cond), triple, progress
        )
        if self.config.gan.weight == 0:
            return terms
        adversarial = gan_generator_loss(triple, self.config.gan, rollout.x0, cond, draws, self.decode)
        logged = {**terms.parts, "gan": adversarial.detach(), **parts.latent_statistics(rollout.x0)}
        return Terms(terms.total + self.config.gan.weight * adversarial, logged)

    def _noised(self, images: Tensor, angle: Tensor, draws: Draws, purpose: str) -> Tensor:
        """X_T of images; at the noisiest angle pure noise, which is what sampling starts from where alpha is not 0 there."""
        eps = draws.normal(purpose, images.shape[1:])
        first = (angle >= self.trigflow.max_angle).reshape(-1, *(1,) * (images.ndim - 1))
        return torch.where(first, self.config.sigma_data * eps, self.trigflow.state(images, eps, angle))


def _images(batch: Batch) -> tuple[Tensor, Conditioning]:
    if batch.images is None or batch.image_cond is None:
        raise ValueError("a batch without images reached a loss on images")
    return batch.images, batch.image_cond
