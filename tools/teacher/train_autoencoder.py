"""Trains the autoencoder, 32x32 RGB <-> 8x8 latents of 8 channels; the encoder first, then the decoder alone.

PYTHONPATH=. python tools/teacher/train_autoencoder.py --data fashion-mnist.npz --runs runs
PYTHONPATH=. python tools/teacher/train_autoencoder.py --data fashion-mnist.npz --runs runs --phase decoder

Phase ``both``: L1 + perceptual distance on the critic's features + KL. Phase ``decoder``: the encoder stays as it is, so
that the UNet can already train on its latents, and hinge-GAN heads on the critic's features bring back the texture that
the first phase averages away. The judge has no part in this.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import common
import numpy as np
import torch
from diffusers import AutoencoderKL
from networks import build_autoencoder
from torch import nn
from torch.nn import functional as F

from stepdistill.frozen.critic import CHANNELS, Critic, perceptual_distance


class FeatureHeads(nn.Module):
    """A projected discriminator: one small head on each of the critic's feature maps."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(1, channels), nn.Conv2d(channels, 48, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(48, 1, 1)
            )
            for channels in CHANNELS
        )

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        return [head(x) for head, x in zip(self.heads, maps, strict=True)]


@dataclass(frozen=True)
class Weights:
    """Weights of the loss's terms."""

    perceptual: float = 0.3
    kl: float = 2e-4
    adversarial: float = 0.02


def hinge(real: list[torch.Tensor], fake: list[torch.Tensor]) -> torch.Tensor:
    """The discriminator's hinge loss, mean over the heads."""
    return torch.stack(
        [F.relu(1.0 - r).mean() + F.relu(1.0 + f).mean() for r, f in zip(real, fake, strict=True)]
    ).mean()


@torch.no_grad()
def level_channels(autoencoder: AutoencoderKL, images: torch.Tensor) -> None:
    """Gives every latent channel mean 0 and one common standard deviation, in place and without changing a decoded image.

    The affine map is folded into the 1x1 convolutions around the latents, so that one ``scaling_factor`` fits them all.
    """
    latents = torch.cat([autoencoder.encode(part).latent_dist.mean for part in images.split(100)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    gain = std.log().mean().exp() / std
    quant, post = autoencoder.quant_conv, autoencoder.post_quant_conv
    channels = len(mean)
    quant.weight[:channels] *= gain[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) * gain
    quant.bias[channels:] += 2.0 * gain.log()
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
    post.weight /= gain[None, :, None, None]


@torch.no_grad()
def reconstruct(autoencoder: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Decoded posterior means of ``images`` (N, 3, 32, 32)."""
    parts = [autoencoder.decode(autoencoder.encode(part).latent_dist.mode()).sample for part in images.split(100)]
    return torch.cat(parts).clamp(-1.0, 1.0)


def main() -> None:
    parser = common.arguments(__doc__, seed=303)
    parser.add_argument("--phase", choices=("both", "decoder"), default="both")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    options = parser.parse_args()
    common.begin(options)
    torch.manual_seed(options.seed)
    photographs = common.load_photographs(options.data, common.TRAINING)
    shown = common.render_random(
        common.load_photographs(options.data, common.HELD_OUT), np.arange(40), common.step_rng(1, 1)
    )
    critic = Critic.load(common.ASSETS / "critic.safetensors")
    autoencoder, heads, weights = build_autoencoder(), FeatureHeads(), Weights()
    if options.phase == "decoder":
        common.load_checkpoint(options.runs / "autoencoder_both_ema.safetensors", {"autoencoder": autoencoder}, {})
        autoencoder.encoder.requires_grad_(False)
        autoencoder.quant_conv.requires_grad_(False)
    average = copy.deepcopy(autoencoder).requires_grad_(False)
    trained = [p for p in autoencoder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.rate, betas=(0.9, 0.99), weight_decay=1e-3)
    head_optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-3, betas=(0.5, 0.99), weight_decay=1e-3)
    networks = {"autoencoder": autoencoder, "heads": heads, "average": average}
    optimizers = {"autoencoder": optimizer, "heads": head_optimizer}
    checkpoint = options.runs / f"autoencoder_{options.phase}.safetensors"
    step, saved = common.load_checkpoint(checkpoint, networks, optimizers), time.monotonic()
    adversarial = options.phase == "decoder"

    while step < options.steps:
        progress = step / options.steps
        rate = options.rate * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1.0 + np.cos(np.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        rng, noise = common.step_rng(options.seed, step), common.step_torch_rng(options.seed, step)
        rows = rng.integers(len(photographs), size=options.batch)
        images = common.to_tensor(common.render_random(photographs, rows, rng).images)
        posterior = autoencoder.encode(images).latent_dist
        decoded = autoencoder.decode(posterior.sample(generator=noise)).sample
        with torch.no_grad():
            real_maps = critic.features(images)
        fake_maps = critic.features(decoded)
        l1, perceptual = F.l1_loss(decoded, images), perceptual_distance(fake_maps, real_maps)
        loss = l1 + weights.perceptual * perceptual
        if adversarial:
            heads.requires_grad_(False)
            loss = loss - weights.adversarial * torch.stack([score.mean() for score in heads(fake_maps)]).mean()
            heads.requires_grad_(True)
        else:
            loss = loss + weights.kl * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if adversarial:
            head_loss = hinge(heads(real_maps), heads([x.detach() for x in fake_maps]))
            head_optimizer.zero_grad(set_to_none=True)
            head_loss.backward()
            head_optimizer.step()
        step += 1
        common.update_ema(average, autoencoder, min(0.995, (1 + step) / (10 + step)))
        if step % 100 == 0:
            kl, extra = posterior.kl().mean().item(), head_loss.item() if adversarial else 0.0
            common.log.info(
                "step %d progress %.2f l1 %.4f perceptual %.4f kl %.1f posterior std %.3f mean std %.3f heads %.3f",
                step, progress, l1.item(), perceptual.item(), kl, posterior.std.mean().item(),
                posterior.mean.std().item(), extra,
            )  # fmt: skip
        if time.monotonic() - saved > 90.0:
            saved = time.monotonic()
            common.save_checkpoint(checkpoint, networks, optimizers, step)
    common.save_checkpoint(checkpoint, networks, optimizers, step)
    if options.phase == "both":
        sample = common.render_random(photographs, np.arange(2000), common.step_rng(options.seed, 0))
        level_channels(average, common.to_tensor(sample.images))
    common.save_checkpoint(
        options.runs / f"autoencoder_{options.phase}_ema.safetensors", {"autoencoder": average}, {}, step
    )
    pairs = np.stack([shown.images, common.to_uint8(reconstruct(average, common.to_tensor(shown.images)))], axis=1)
    common.save_grid(options.runs / f"autoencoder_{options.phase}.png", pairs.reshape(-1, 32, 32, 3), 20)


if __name__ == "__main__":
    main()
