"""The critic: a differentiable network for rewards, perceptual losses and GAN features of the embedded teacher.

It shares neither architecture nor seed nor training photographs with the judge, so that a generator trained against it
cannot learn the judge's blind spots.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from stepdistill.data.fashion import BACKGROUNDS, COLOURS, GARMENTS

CHANNELS = (16, 32, 64, 96)


@dataclass(frozen=True)
class AttributeLogits:
    """Logits of the three attributes, in the order of the vocabulary; ``softmax`` gives the probabilities."""

    garment: torch.Tensor  # (B, 10)
    colour: torch.Tensor  # (B, 8)
    background: torch.Tensor  # (B, 7)

    def log_probability(self, garment: torch.Tensor, colour: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
        """Log-probability (B,) of the attributes with indices (B,) each; an index of -1 means that it is not asked for."""
        pairs = ((self.garment, garment), (self.colour, colour), (self.background, background))
        return sum((_log_probability(logits, index) for logits, index in pairs), self.garment.new_zeros(()))


def _log_probability(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    chosen = logits.log_softmax(1).gather(1, index.clamp_min(0)[:, None])[:, 0]
    return torch.where(index >= 0, chosen, torch.zeros_like(chosen))


class _Residual(nn.Module):
    """x + conv(SiLU(norm(x)))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(nn.functional.silu(self.norm(x)))  # type: ignore[no-any-return]


class Critic(nn.Module):
    """A residual network with smooth activations; features at 32, 16, 8 and 4 pixels and three attribute heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS[0], 5, padding=2)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), _Residual(outputs))
            for inputs, outputs in pairwise(CHANNELS)
        )
        # A 2x2 grid of means keeps left/right and top/bottom apart, which tells garments from one another.
        self.pool = nn.Sequential(
            nn.GroupNorm(4, CHANNELS[-1]), nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.1)
        )
        self.garment = nn.Linear(4 * CHANNELS[-1], len(GARMENTS))
        self.colour = nn.Linear(4 * CHANNELS[-1], len(COLOURS))
        self.background = nn.Linear(4 * CHANNELS[-1], len(BACKGROUNDS))

    @classmethod
    def load(cls, path: str | Path) -> Critic:
        """The frozen critic of a safetensors file; gradients still flow to the images."""
        critic = cls()
        critic.load_state_dict(load_file(path))
        return critic.eval().requires_grad_(False)

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps (B, C, S, S) for C, S = 16, 32 | 32, 16 | 64, 8 | 96, 4 of ``images`` (B, 3, 32, 32) in [-1, 1]."""
        maps = [self.stem(images)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps

    def attributes(self, maps: list[torch.Tensor]) -> AttributeLogits:
        """The heads on the feature maps of :meth:`features`."""
        pooled = self.pool(maps[-1])
        return AttributeLogits(self.garment(pooled), self.colour(pooled), self.background(pooled))

    def forward(self, images: torch.Tensor) -> AttributeLogits:
        """The heads for ``images`` (B, 3, 32, 32) in [-1, 1]."""
        return self.attributes(self.features(images))


def perceptual_distance(first: list[torch.Tensor], second: list[torch.Tensor]) -> torch.Tensor:
    """LPIPS-like mean squared distance of channel-normalised feature maps, summed over the scales."""

    def unit(x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-4)

    distances = [(unit(a) - unit(b)).square().mean() for a, b in zip(first, second, strict=True)]
    return torch.stack(distances).sum()
