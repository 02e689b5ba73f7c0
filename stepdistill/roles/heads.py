"""Small trainable modules beside a network: discriminator heads on its features, a learned weight of angles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FeatureHead(nn.Module):
    """DMD2's classifier on mid-block features (its section 4.3 and code): strided convolutions down to one logit.

    (B, C, h, w) -> (B,), the mean over positions where more than one is left. `size` is (h, w) of the smallest features
    it will see, larger ones are welcome. The number of stride-2 stages follows from h, w, so that SD at 512 px (8x8 features), SDXL at
    1024 px (32x32) and an 8x8-latent toy (4x4) all end at 1x1.
    """

    def __init__(self, channels: int, size: tuple[int, int], width: int | None = None) -> None:
        super().__init__()
        width = width or channels
        # 32 groups as in DMD2, but at least 8 channels in each: at 1x1 a group of one channel is normalised to nothing
        groups = next(g for g in (32, 16, 8, 4, 2, 1) if g == 1 or (width % g == 0 and width // g >= 8))
        layers: list[nn.Module] = []
        side, inputs = min(size), channels
        while side > 4:
            layers += [nn.Conv2d(inputs, width, 4, 2, 1), nn.GroupNorm(groups, width), nn.SiLU()]
            side, inputs = side // 2, width
        layers += [nn.Conv2d(inputs, width, side, side), nn.GroupNorm(groups, width), nn.SiLU(), nn.Conv2d(width, 1, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features.to(next(self.parameters()).dtype)).flatten(1).mean(1)  # type: ignore[no-any-return]


class AdaptiveWeight(nn.Module):
    """A number for every angle, learned: TrigFlow angles (B,) in [0, pi/2] -> (B,), 0 before training.

    Linear in the first harmonics, smooth enough for what an angle contributes to a loss.
    """

    def __init__(self, harmonics: int = 16) -> None:
        super().__init__()
        self.harmonics = harmonics
        self.linear = nn.Linear(2 * harmonics, 1)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, angle: Tensor) -> Tensor:
        weight = self.linear.weight
        phases = angle.to(weight)[:, None] * torch.arange(1, self.harmonics + 1).to(weight)
        return self.linear(torch.cat([phases.cos(), phases.sin()], 1))[:, 0]  # type: ignore[no-any-return]


GanLoss = Literal["logistic", "hinge"]


def discriminator_loss(real: Tensor, fake: Tensor, kind: GanLoss) -> Tensor:
    """Non-saturating logistic (Goodfellow et al. 2014) or hinge loss of the discriminator; logits (B,)."""
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(fake: Tensor, kind: GanLoss) -> Tensor:
    """The generator's side of the same game."""
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def seeded_head(channels: int, size: tuple[int, int], seed: int, width: int | None = None) -> FeatureHead:
    """A head with weights drawn from `seed`, leaving the global generator untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FeatureHead(channels, size, width)


class MultiMapHead(nn.Module):
    """One logit (B,) from several feature maps (B, C, h, w): the mean over the positions of each, then over the maps."""

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        # one group: maps of different depths and models come in very different sizes
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(1, inputs), nn.Conv2d(inputs, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, 1, 1)
            )
            for inputs in channels
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        dtype = next(self.parameters()).dtype
        logits = [layer(own.to(dtype)).flatten(1).mean(1) for layer, own in zip(self.layers, maps, strict=True)]
        return torch.stack(logits).mean(0)


def seeded_multi_map_head(channels: Sequence[int], seed: int, width: int) -> MultiMapHead:
    """As `seeded_head`, for several maps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MultiMapHead(channels, width)
