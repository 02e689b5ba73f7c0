"""Conditioning on the guidance scale by an embedding that is added to the time embedding (LCM's `time_cond_proj_dim`)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class GuidanceEmbeddingSettings:
    """An embedding of w of `width` channels, as LCM's (time_cond_proj_dim)."""

    width: int = 256


@dataclass(frozen=True)
class GuidanceEmbeddingTarget:
    """The module that embeds a network's time, and the channels of its input, to which the embedded w is added."""

    module: nn.Module
    channels: int


class GuidanceEmbedding(nn.Module):
    """cond_proj(embedding of w), added to a network's time features before its time MLP; zero at first.

    What an export has inside its UNet stands here beside a network that may be shared with other roles.

    Args:
        settings: width of the embedding.
        place: where the network embeds its time.
    """

    def __init__(self, settings: GuidanceEmbeddingSettings, place: GuidanceEmbeddingTarget) -> None:
        super().__init__()
        self.settings = settings
        self.cond_proj = nn.Linear(settings.width, place.channels, bias=False)
        self._path = ""
        self._w: Tensor | float | None = None
        self._recorded_guidance: Tensor | None = None
        self._handles: list[RemovableHandle] = []
        self.zero_output()

    @contextmanager
    def told(self, w: Tensor | float | None) -> Iterator[None]:
        """Inside, guidance is w: a number, one a row (B,), or None for off."""
        before, self._w = self._w, w
        try:
            yield
        finally:
            self._w = before

    @property
    def recorded_guidance(self) -> None:
        """Nothing that blocks need to hear again: time is embedded before them."""

    @contextmanager
    def restore_guidance(self, told: object | None) -> Iterator[None]:
        """Nothing; see `heard`."""
        yield

    @torch.no_grad()
    def zero_output(self) -> None:
        """Make w say nothing."""
        nn.init.zeros_(self.cond_proj.weight)

    def attach(self, network: nn.Module, place: GuidanceEmbeddingTarget | None = None) -> GuidanceEmbedding:
        """Stand beside a network; where its time is embedded is remembered from the first time on."""
        if place is not None:
            self._path = next(name for name, module in network.named_modules() if module is place.module)

        def begin(_module: nn.Module, args: tuple[Any, ...]) -> None:
            self._recorded_guidance = None
            if self._w is not None:
                self._recorded_guidance = torch.as_tensor(self._w, dtype=torch.float32, device=args[0].device).expand(
                    len(args[0])
                )

        def embed(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if self._recorded_guidance is None:
                return None
            own = self.cond_proj.weight
            with torch.autocast(own.device.type, enabled=False):
                more = self.cond_proj(guidance_embedding(self._recorded_guidance, self.settings.width).to(own))
            return (args[0] + more.to(args[0]), *args[1:])

        self._handles = [
            network.register_forward_pre_hook(begin),
            network.get_submodule(self._path).register_forward_pre_hook(embed),
        ]
        return self

    def detach(self) -> None:
        """Leave the network as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def guidance_embedding(w: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding (B, width) of 1000 (w - 1), as diffusers' LCM pipeline feeds it to `time_cond_proj_dim`.

    w: guidance scale, (B,), 1 = off (Meng et al. 2023, in whose convention it is w - 1).
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=w.device) * (-math.log(10000.0) / (half - 1)))
    angles = 1000 * (w.float()[:, None] - 1) * frequencies
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, width % 2))
