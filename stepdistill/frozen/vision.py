"""Frozen vision models: what a discriminator's head reads of decoded images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersModel,
    SamConfig,
    SamVisionModel,
)

from stepdistill.assets import FOLDER
from stepdistill.errors import UserError
from stepdistill.frozen.critic import CHANNELS, Critic

CRITIC = "builtin:critic"
VISION = "vision"
"""In `Triple.frozen`."""
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LEVELS = 4
"""Feature maps of a transformer: after each quarter of its blocks."""
SIDE = 224
"""Pixels of an image for a model that takes any size."""


class VisionEncoder(nn.Module, ABC):
    """Images to feature maps, frozen; gradients flow to the images.

    Attributes:
        channels: of each map.
    """

    channels: tuple[int, ...]

    @abstractmethod
    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps (B, C, h, w) of images (B, 3, H, W) in [0, 1]."""


class CriticVision(VisionEncoder):
    """The embedded teacher's critic, made for 32 x 32 pixels: maps of 32, 16, 8 and 4."""

    channels = CHANNELS

    def __init__(self, critic: Critic) -> None:
        super().__init__()
        self.critic = critic

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.critic.features(2 * images.to(self.critic.stem.weight.dtype) - 1)


@dataclass(frozen=True)
class Kind:
    """A family of transformers.

    Attributes:
        network: its class for images alone.
        own: the part of the checkpoint's config that speaks of images.
        leading: tokens before those of the patches; None where the states are maps (B, h, w, C) already.
        mean, deviation: per channel, of its pixels.
        fixed: the model takes images of its own size only.
    """

    network: Any
    own: Callable[[Any], Any]
    leading: Callable[[Any], int] | None
    mean: tuple[float, ...] = IMAGENET_MEAN
    deviation: tuple[float, ...] = IMAGENET_DEVIATION
    fixed: bool = True


_CLIP = (CLIP_MEAN, CLIP_STD)
KINDS: Mapping[str, Kind] = {
    "dinov2": Kind(Dinov2Model, lambda c: c, lambda c: 1, fixed=False),
    "dinov2_with_registers": Kind(
        Dinov2WithRegistersModel, lambda c: c, lambda c: 1 + c.num_register_tokens, fixed=False
    ),
    "clip": Kind(CLIPVisionModel, lambda c: c.vision_config, lambda c: 1, *_CLIP),
    "clip_vision_model": Kind(CLIPVisionModel, lambda c: c, lambda c: 1, *_CLIP),
    "sam": Kind(SamVisionModel, lambda c: c.vision_config, None),
    "sam_vision_model": Kind(SamVisionModel, lambda c: c, None),
}
PUBLIC: Mapping[str, Callable[[], Any]] = {
    "facebook/dinov2-small": lambda: Dinov2Config(
        hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14
    ),
    "facebook/dinov2-base": lambda: Dinov2Config(
        hidden_size=768, num_attention_heads=12, image_size=518, patch_size=14
    ),
    "facebook/sam-vit-base": SamConfig,
}
"""Configs of public checkpoints, so that a plan needs no download."""


class TransformerVision(VisionEncoder):
    """Hidden states of a vision transformer as maps.

    Args:
        network: of `kind`.
        kind: its family.
    """

    def __init__(self, network: nn.Module, kind: Kind) -> None:
        super().__init__()
        self.network, self.kind = network, kind
        config: Any = network.config
        blocks, patch = int(config.num_hidden_layers), int(config.patch_size)
        self.layers = tuple(sorted({max(1, round((k + 1) * blocks / LEVELS)) for k in range(LEVELS)}))
        self.channels = (int(config.hidden_size),) * len(self.layers)
        self.side = int(config.image_size) if kind.fixed else min(int(config.image_size), SIDE) // patch * patch
        self.leading = None if kind.leading is None else kind.leading(config)
        self.register_buffer("mean", torch.tensor(kind.mean).reshape(3, 1, 1))
        self.register_buffer("deviation", torch.tensor(kind.deviation).reshape(3, 1, 1))

    def forward(self, images: Tensor) -> list[Tensor]:
        pixels = resize_and_normalize(images.to(self.mean.dtype), self.side, self.mean, self.deviation)  # type: ignore[arg-type, union-attr, call-overload]
        states = self.network(pixel_values=pixels, output_hidden_states=True).hidden_states
        return [self._map(states[layer]) for layer in self.layers]

    def _map(self, state: Tensor) -> Tensor:
        if self.leading is None:
            return state.movedim(-1, 1)
        tokens = state[:, self.leading :].mT
        side = round(tokens.shape[2] ** 0.5)
        return tokens.reshape(len(tokens), -1, side, side)


def resize_and_normalize(images: Tensor, side: int, mean: Tensor, deviation: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1], resized to a square (bicubic, antialiased) and standardised; differentiable."""
    if images.shape[-2:] != (side, side):
        images = F.interpolate(images, (side, side), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return (images - mean) / deviation


def load_critic() -> Critic:
    """The embedded teacher's critic, frozen; without weights where tensors are made on the meta device."""
    if is_outline():
        return Critic().eval().requires_grad_(False)
    return Critic.load(FOLDER / "critic.safetensors")


def load_vision(name: str) -> VisionEncoder:
    """The encoder of that name, frozen; an outline of it, without any weight, where tensors are made on the meta device.

    Raises:
        UserError: nothing there, or a model of another family.
    """
    if name == CRITIC:
        return CriticVision(load_critic())
    config = PUBLIC[name]() if is_outline() and name in PUBLIC else config_of(name)
    kind = KINDS.get(config.model_type)
    if kind is None:
        raise UserError(
            f"the vision model {name!r} is of type {config.model_type!r}, which is not known here: use one of {', '.join(KINDS)}"
        )
    network = kind.network(kind.own(config)) if is_outline() else _loaded(kind, name)
    return TransformerVision(network, kind).eval().requires_grad_(False)


def _loaded(kind: Kind, name: str) -> nn.Module:
    try:
        return kind.network.from_pretrained(name, use_safetensors=True, trust_remote_code=False)  # type: ignore[no-any-return]
    except OSError as error:
        raise UserError(
            f"the weights of the vision model {name!r} could not be had ({' '.join(str(error).split())[:120]}): give a folder that "
            "holds them in safetensors"
        ) from None


def config_of(name: str, *, download: bool = True) -> Any:
    """The config of a transformers folder or hub id; only folders and the hub's cache are read if `download` is False.

    Raises:
        UserError: there is none.
    """
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=not download)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the model {name!r} is no transformers folder here and could not be had from the hub or its cache "
            f"({' '.join(str(error).split())[:120]}): give {CRITIC!r}, a folder, or a hub id"
        ) from None


def is_outline() -> bool:
    """Whether models are made without weights: tensors go to the meta device."""
    return torch.empty(0).is_meta
