"""How a role's network is told its guidance scale: by adapters beside its attention, or by an embedding beside its time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stepdistill.errors import Refusal
from stepdistill.models.guidance_adapter import AdapterSettings, GuidanceAdapter, Told, read_guidance_adapter


@dataclass(frozen=True)
class EmbeddingSettings:
    """An embedding of w of `width` channels, as LCM's (time_cond_proj_dim)."""

    width: int = 256


@dataclass(frozen=True)
class EmbeddingPlace:
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

    def __init__(self, settings: EmbeddingSettings, place: EmbeddingPlace) -> None:
        super().__init__()
        self.settings = settings
        self.cond_proj = nn.Linear(settings.width, place.channels, bias=False)
        self._path = ""
        self._w: Tensor | float | None = None
        self._told: Tensor | None = None
        self._handles: list[RemovableHandle] = []
        self.silence()

    @contextmanager
    def told(self, w: Tensor | float | None) -> Iterator[None]:
        """Inside, guidance is w: a number, one a row (B,), or None for off."""
        before, self._w = self._w, w
        try:
            yield
        finally:
            self._w = before

    @property
    def heard(self) -> None:
        """Nothing that blocks need to hear again: time is embedded before them."""

    @contextmanager
    def hearing(self, told: Told | None) -> Iterator[None]:
        """Nothing; see `heard`."""
        yield

    @torch.no_grad()
    def silence(self) -> None:
        """Make w say nothing."""
        nn.init.zeros_(self.cond_proj.weight)

    def attach(self, network: nn.Module, place: EmbeddingPlace | None = None) -> GuidanceEmbedding:
        """Stand beside a network; where its time is embedded is remembered from the first time on."""
        if place is not None:
            self._path = next(name for name, module in network.named_modules() if module is place.module)

        def begin(_module: nn.Module, args: tuple[Any, ...]) -> None:
            self._told = None
            if self._w is not None:
                self._told = torch.as_tensor(self._w, dtype=torch.float32, device=args[0].device).expand(len(args[0]))

        def embed(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if self._told is None:
                return None
            own = self.cond_proj.weight
            with torch.autocast(own.device.type, enabled=False):
                more = self.cond_proj(guidance_embedding(self._told, self.settings.width).to(own))
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


Guide: TypeAlias = GuidanceAdapter | GuidanceEmbedding
GuideSettings: TypeAlias = AdapterSettings | EmbeddingSettings
Heard: TypeAlias = Mapping[Guide, Told | None]


def adapter_beside(network: nn.Module, settings: AdapterSettings, seed: int) -> GuidanceAdapter:
    """Adapters that leave the network as it is until they are trained, attached to it; float32 or better, on its device.

    Raises:
        Refusal: the network has no attention that looks at a prompt.
    """
    try:
        adapter = GuidanceAdapter(network, settings, seed)
    except ValueError as error:
        raise Refusal(str(error)) from None
    _place(adapter, network)
    return adapter.attach(network)


def embedding_beside(network: nn.Module, settings: EmbeddingSettings, place: EmbeddingPlace) -> GuidanceEmbedding:
    """An embedding that says nothing until it is trained, attached to the network; float32 or better, on its device."""
    embedding = GuidanceEmbedding(settings, place)
    _place(embedding, network)
    return embedding.attach(network, place)


def read_guide(network: nn.Module, path: str | Path) -> GuidanceAdapter:
    """The adapters of an exported file, frozen and attached to a network.

    Raises:
        Refusal: there is no such file, it is no guidance adapter, or one of another base.
    """
    try:
        adapter = read_guidance_adapter(network, path)
    except (ValueError, OSError) as error:
        raise Refusal(f"model.guidance_adapter cannot be used: {' '.join(str(error).split())}") from None
    _place(adapter, network)
    return adapter.attach(network)


def guidance_embedding(w: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding (B, width) of 1000 (w - 1), as diffusers' LCM pipeline feeds it to `time_cond_proj_dim`.

    w: guidance scale, (B,), 1 = off (Meng et al. 2023, in whose convention it is w - 1).
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=w.device) * (-math.log(10000.0) / (half - 1)))
    angles = 1000 * (w.float()[:, None] - 1) * frequencies
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, width % 2))


@contextmanager
def hearing(heard: Heard) -> Iterator[None]:
    """Inside, every guide hears what it heard when `heard` was noted down."""
    with ExitStack() as stack:
        for guide, told in heard.items():
            stack.enter_context(guide.hearing(told))
        yield


def _place(guide: nn.Module, network: nn.Module) -> None:
    first = next(network.parameters())
    guide.to(first.device, torch.float64 if first.dtype == torch.float64 else torch.float32).eval()
