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
VISION_ENCODER = "vision"
"""In `Triple.frozen`."""
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NUM_FEATURE_MAPS = 4
"""Feature maps of a transformer: after each quarter of its blocks."""
MAX_IMAGE_SIZE = 224
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
class VisionModelKind:
    """A family of transformers.

    Attributes:
        network: its class for images alone.
        own: the part of the checkpoint's config that speaks of images.
        leading: tokens before those of the patches; None where the states are maps (B, h, w, C) already.
        mean, deviation: per channel, of its pixels.
        fixed: the model takes images of its own size only.
    """

    network: Any
    select_vision_config: Callable[[Any], Any]
    num_prefix_tokens: Callable[[Any], int] | None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    fixed_image_size: bool = True


_CLIP = (CLIP_MEAN, CLIP_STD)
KINDS: Mapping[str, VisionModelKind] = {
    "dinov2": VisionModelKind(Dinov2Model, lambda c: c, lambda c: 1, fixed_image_size=False),
    "dinov2_with_registers": VisionModelKind(
        Dinov2WithRegistersModel, lambda c: c, lambda c: 1 + c.num_register_tokens, fixed_image_size=False
    ),
    "clip": VisionModelKind(CLIPVisionModel, lambda c: c.vision_config, lambda c: 1, *_CLIP),
    "clip_vision_model": VisionModelKind(CLIPVisionModel, lambda c: c, lambda c: 1, *_CLIP),
    "sam": VisionModelKind(SamVisionModel, lambda c: c.vision_config, None),
    "sam_vision_model": VisionModelKind(SamVisionModel, lambda c: c, None),
}
PUBLIC_CONFIGS: Mapping[str, Callable[[], Any]] = {
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

    def __init__(self, network: nn.Module, kind: VisionModelKind) -> None:
        super().__init__()
        self.network, self.kind = network, kind
        config: Any = network.config
        blocks, patch = int(config.num_hidden_layers), int(config.patch_size)
        self.layers = tuple(
            sorted({max(1, round((k + 1) * blocks / NUM_FEATURE_MAPS)) for k in range(NUM_FEATURE_MAPS)})
        )
        self.channels = (int(config.hidden_size),) * len(self.layers)
        self.side = (
            int(config.image_size)
            if kind.fixed_image_size
            else min(int(config.image_size), MAX_IMAGE_SIZE) // patch * patch
        )
        self.num_prefix_tokens = None if kind.num_prefix_tokens is None else kind.num_prefix_tokens(config)
        self.register_buffer("mean", torch.tensor(kind.mean).reshape(3, 1, 1))
        self.register_buffer("std", torch.tensor(kind.std).reshape(3, 1, 1))

    def forward(self, images: Tensor) -> list[Tensor]:
        pixels = resize_and_normalize(images.to(self.mean.dtype), self.side, self.mean, self.std)  # type: ignore[arg-type]
        states = self.network(pixel_values=pixels, output_hidden_states=True).hidden_states
        return [self._feature_map(states[layer]) for layer in self.layers]

    def _feature_map(self, state: Tensor) -> Tensor:
        if self.num_prefix_tokens is None:
            return state.movedim(-1, 1)
        tokens = state[:, self.num_prefix_tokens :].mT
        side = round(tokens.shape[2] ** 0.5)
        return tokens.reshape(len(tokens), -1, side, side)


def resize_and_normalize(images: Tensor, side: int, mean: Tensor, std: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1], resized to a square (bicubic, antialiased) and standardised; differentiable."""
    if images.shape[-2:] != (side, side):
        images = F.interpolate(images, (side, side), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return (images - mean) / std


def load_critic() -> Critic:
    """The embedded teacher's critic, frozen; without weights where tensors are made on the meta device."""
    if builds_on_meta():
        return Critic().eval().requires_grad_(False)
    return Critic.load(FOLDER / "critic.safetensors")


def load_vision(name: str) -> VisionEncoder:
    """The encoder of that name, frozen; an outline of it, without any weight, where tensors are made on the meta device.

    Raises:
        UserError: nothing there, or a model of another family.
    """
    if name == CRITIC:
        return CriticVision(load_critic())
    config = PUBLIC_CONFIGS[name]() if builds_on_meta() and name in PUBLIC_CONFIGS else load_transformers_config(name)
    kind = KINDS.get(config.model_type)
    if kind is None:
        raise UserError(
            f"the vision model {name!r} is of type {config.model_type!r}, which is not known here: use one of {', '.join(KINDS)}"
        )
    network = kind.network(kind.select_vision_config(config)) if builds_on_meta() else _load_pretrained(kind, name)
    return TransformerVision(network, kind).eval().requires_grad_(False)


def _load_pretrained(kind: VisionModelKind, name: str) -> nn.Module:
    try:
        return kind.network.from_pretrained(name, use_safetensors=True, trust_remote_code=False)  # type: ignore[no-any-return]
    except OSError as error:
        raise UserError(
            f"the weights of the vision model {name!r} could not be had ({' '.join(str(error).split())[:120]}): give a folder that "
            "holds them in safetensors"
        ) from None


def load_transformers_config(name: str, *, download: bool = True) -> Any:
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


def builds_on_meta() -> bool:
    """Whether models are made without weights: tensors go to the meta device."""
    return torch.empty(0).is_meta
