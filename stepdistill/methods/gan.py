"""The adversarial term: whose features the discriminator's head reads, of what reals, and the two losses."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from stepdistill.config.reading import WeightedTermConfig
from stepdistill.diffusion.draws import Draws, derive_seed
from stepdistill.errors import UserError
from stepdistill.families.conditioning import Conditioning
from stepdistill.frozen.vision import CRITIC, VISION_ENCODER, VisionEncoder
from stepdistill.methods.base import Batch, Decode, Needs, Problem
from stepdistill.methods.parts import NoiseLevelConfig
from stepdistill.roles.heads import GanLoss, discriminator_loss, generator_loss, seeded_head, seeded_multi_map_head
from stepdistill.roles.triple import FAKE_SCORE, Triple

DISCRIMINATOR_HEAD = "discriminator"


class GanConfig(WeightedTermConfig):
    """Adversarial term on features of noised samples (DMD2, section 4.3), or of decoded images (SenseFlow, Flash-DMD)."""

    weight: float = Field(0.0, ge=0, description="in the generator's loss; 0 turns the GAN off")
    critic_weight: float = Field(1e-2, ge=0, description="in the fake score's loss")
    features: Literal["fake_score", "real_score", "vision"] = Field(
        "fake_score",
        description="fake_score, real_score: mid-block features of noised latents, the latter frozen; vision: features that a "
        "frozen vision model has of the decoded images, without noise",
    )
    vision: str = Field(
        CRITIC,
        description="vision model: 'builtin:critic' for the embedded teacher, else a transformers folder or hub id of the "
        "DINOv2, CLIP or SAM family",
    )
    reals: Literal["images", "pairs"] = Field(
        "images", description="what is real: data.images, or the teacher's own samples in data.pairs"
    )
    loss: GanLoss = "logistic"
    levels: NoiseLevelConfig = NoiseLevelConfig(low=0.0, high=1.0)
    width: int | None = Field(
        None, gt=0, description="channels of the head; the features' own by default, 64 for vision features"
    )

    def needs(self) -> Needs:
        """Data and models of a term that is on."""
        return Needs(
            images=self.weight > 0 and self.reals == "images",
            pairs=self.weight > 0 and self.reals == "pairs",
            vision=self.vision if self.weight > 0 and self.features == "vision" else None,
        )


def attach_gan(triple: Triple, gan: GanConfig, problem: Problem, decode: Decode | None) -> None:
    """Give the fake score's optimizer a head for these features.

    Raises:
        UserError: vision features of a family without images.
    """
    if gan.features != "vision":
        attach_discriminator(triple, problem, gan.width)
    elif decode is None:
        raise UserError(
            "method.gan.features is 'vision' and the checkpoint has no autoencoder to decode with: set it to real_score"
        )
    else:
        seed = derive_seed(triple.seed, "head")
        triple.attach_head(
            FAKE_SCORE, DISCRIMINATOR_HEAD, seeded_multi_map_head(_encoder(triple).channels, seed, gan.width or 64)
        )


def attach_discriminator(triple: Triple, problem: Problem, width: int | None) -> None:
    """A head on mid-block features of one network, owned by the fake score's optimizer."""
    seed = derive_seed(triple.seed, "head")
    triple.attach_head(
        FAKE_SCORE, DISCRIMINATOR_HEAD, seeded_head(problem.feature_channels, problem.feature_size, seed, width)
    )


def discriminator_logits(triple: Triple, features: str, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """The head's logits (B,) of samples that are noised already, on the features of the role `features`."""
    return triple.head(FAKE_SCORE, DISCRIMINATOR_HEAD)(triple.denoiser(features).features(x_t, t, cond))  # type: ignore[no-any-return]


def gan_logits(
    triple: Triple, gan: GanConfig, x: Tensor, cond: Conditioning, purpose: str, draws: Draws, decode: Decode | None
) -> Tensor:
    """Logits (B,) of samples x, noised to levels of their own where the features are of latents."""
    if gan.features == "vision":
        return logits_at(triple, gan, x, x, None, cond, decode)
    t = gan.levels.levels().times(triple.schedule, draws.uniform(f"{purpose}.t"))
    x_t = triple.schedule.add_noise(x, draws.normal(f"{purpose}.eps", x.shape[1:]), t)
    return logits_at(triple, gan, x, x_t, t, cond, decode)


def logits_at(
    triple: Triple, gan: GanConfig, x: Tensor, x_t: Tensor, t: Tensor | None, cond: Conditioning, decode: Decode | None
) -> Tensor:
    """Logits (B,) of samples x noised to x_t at times t, (B,); vision features are of the clean x."""
    if gan.features == "vision":
        if decode is None:
            raise ValueError("vision features were asked for without a decoder")
        return triple.head(FAKE_SCORE, DISCRIMINATOR_HEAD)(_encoder(triple)(decode(x)))  # type: ignore[no-any-return]
    if t is None:
        raise ValueError("features of latents were asked for without their times")
    return discriminator_logits(triple, gan.features, x_t, t, cond)


def gan_generator_loss(
    triple: Triple, gan: GanConfig, x: Tensor, cond: Conditioning, draws: Draws, decode: Decode | None = None
) -> Tensor:
    """The generator's adversarial loss; gradient flows through the features into x."""
    return generator_loss(gan_logits(triple, gan, x, cond, "gan", draws, decode), gan.loss)


def gan_critic_loss(
    triple: Triple,
    gan: GanConfig,
    x: Tensor,
    batch: Batch,
    cond: Conditioning,
    draws: Draws,
    decode: Decode | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, real logits, fake logits) of the discriminator; real and fake draw noise levels of their own."""
    latents, captions = reals(batch, gan)
    real = gan_logits(triple, gan, latents, captions, "gan.real", draws, decode)
    fake = gan_logits(triple, gan, x, cond, "gan.fake", draws, decode)
    return discriminator_loss(real, fake, gan.loss), real.detach(), fake.detach()


def reals(batch: Batch, gan: GanConfig) -> tuple[Tensor, Conditioning]:
    """Scaled latents of what is real, and their conditioning."""
    latents, cond = (batch.images, batch.image_cond) if gan.reals == "images" else (batch.pair_latents, batch.pair_cond)
    if latents is None or cond is None:
        raise ValueError("a batch without reals reached a GAN term")
    return latents, cond


def _encoder(triple: Triple) -> VisionEncoder:
    encoder = triple.frozen[VISION_ENCODER]
    if not isinstance(encoder, VisionEncoder):
        raise TypeError(f"{type(encoder).__name__} is no vision encoder")
    return encoder
