"""The cosine between image and prompt of a CLIP checkpoint, with differentiable preprocessing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizerFast

from stepdistill.errors import UserError
from stepdistill.families.checkpoints.single_file import CONFIGS
from stepdistill.families.common.clip import tokenizer_of
from stepdistill.frozen.vision import CLIP_MEAN, CLIP_STD, builds_on_meta, load_transformers_config
from stepdistill.rewards.base import Reward

DEFAULT, PICKSCORE = "openai/clip-vit-large-patch14", "yuvalkirstain/PickScore_v1"


def _clip_config(width: int, text: tuple[int, int, int], vision: tuple[int, int, int]) -> CLIPConfig:
    """Makes a config from the projection's width and the (width, layers, heads) of both towers, with patches of 14 pixels."""
    towers = [
        {"hidden_size": w, "intermediate_size": 4 * w, "num_hidden_layers": layers, "num_attention_heads": heads}
        for w, layers, heads in (text, vision)
    ]
    return CLIPConfig(text_config=towers[0], vision_config={**towers[1], "patch_size": 14}, projection_dim=width)


PUBLIC_CONFIGS: Mapping[str, Callable[[], CLIPConfig]] = {
    DEFAULT: lambda: _clip_config(768, (768, 12, 12), (1024, 24, 16)),
    PICKSCORE: lambda: _clip_config(1024, (1024, 24, 16), (1280, 32, 16)),
}
"""Configs of public checkpoints, so that `stepdistill plan` needs no download."""
Framing = Literal["transformers", "torchvision", "padded"]
"""How an image becomes a square; see `ClipPixels`."""


class ClipPreprocessor(nn.Module):
    """CLIP's image preprocessing with gradients: bicubic resizing with antialiasing, a square, standardisation.

    The published rewards round differently, which moves images that are not square by a pixel.

    Args:
        side: input size of the network in pixels.
        framing: "transformers" and "torchvision" resize the shorter side and crop the centre; the margin (L - side) / 2 is
            rounded down by transformers' processor and to the nearest even integer by torchvision's `CenterCrop`. "padded"
            (OpenCLIP's `ResizeMaxSize`, used by HPS v2.1) resizes the longer side and pads with black.
    """

    def __init__(self, image_size: int, framing: Framing = "transformers") -> None:
        super().__init__()
        self.image_size, self.framing = image_size, framing
        self.mean: Tensor
        self.deviation: Tensor
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).reshape(3, 1, 1))
        self.register_buffer("deviation", torch.tensor(CLIP_STD).reshape(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Turns images (B, 3, H, W) in [0, 1] into standardised inputs (B, 3, side, side)."""
        images = images.to(self.mean.dtype)
        height, width = images.shape[-2:]
        size = self._resized(height, width)
        if size != (height, width):
            images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        top, left = (self._margin(length - self.image_size) for length in size)
        bottom, right = size[0] - self.image_size - top, size[1] - self.image_size - left
        # a negative padding crops, and a negative margin pads
        images = F.pad(images, (-left, -right, -top, -bottom))
        return (images - self.mean) / self.deviation

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.framing == "padded":
            scale = self.image_size / max(height, width)
            return round(height * scale), round(width * scale)
        shorter = min(height, width)
        return int(self.image_size * height / shorter), int(self.image_size * width / shorter)

    def _margin(self, excess: int) -> int:
        """Returns the pixels to cut off at the top or left of an excess of pixels; negative if pixels are missing."""
        if self.framing == "torchvision":
            return round(excess / 2)
        return int(excess / 2)  # towards zero: both references round the crop and the padding down


class ClipReward(Reward):
    """Cosine in [-1, 1] between image and prompt; prompts are cut to the text encoder's length."""

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizerFast, framing: Framing = "transformers") -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.length = int(model.config.text_config.max_position_embeddings)
        self.preprocess = ClipPreprocessor(int(model.config.vision_config.image_size), framing)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        # padded to the full length, so that a sample's reward does not depend on the other prompts of the batch
        tokens = self.tokenizer(
            list(prompts), truncation=True, max_length=self.length, padding="max_length", return_tensors="pt"
        )
        text = self.model.text_model(**tokens.to(images.device)).pooler_output
        return F.cosine_similarity(self.image_embeddings(images), self.model.text_projection(text), dim=1)

    def image_embeddings(self, images: Tensor) -> Tensor:
        """Returns the projected image embeddings (B, D)."""
        image = self.model.vision_model(pixel_values=self.preprocess(images)).pooler_output
        return self.model.visual_projection(image)  # type: ignore[no-any-return]


def load(option: str, *, download: bool = True) -> Reward:
    """Loads the reward from a transformers folder or hub id; OpenAI's ViT-L/14 by default."""
    return load_clip("clip", option or DEFAULT, download=download)


def load_clip(reward: str, name: str, framing: Framing = "transformers", *, download: bool = True) -> ClipReward:
    """Loads the reward of a CLIP checkpoint.

    Args:
        reward: name of the reward, for error messages.
        name: a transformers folder or hub id.
        framing: how images become squares.
        download: allow fetching from the hub; otherwise only folders and the hub's cache are read.

    Raises:
        UserError: no such checkpoint, or one of another kind.
    """
    known = builds_on_meta() and name in PUBLIC_CONFIGS
    config = PUBLIC_CONFIGS[name]() if known else load_transformers_config(name, download=download)
    if not isinstance(config, CLIPConfig):
        raise UserError(
            f"the reward '{reward}:{name}' is a model of type {config.model_type!r}: give a CLIP checkpoint"
        )
    local = not download
    try:
        # all CLIP checkpoints share one vocabulary
        tokenizer = (
            tokenizer_of(CONFIGS / "sd15" / "tokenizer")
            if known
            else CLIPTokenizerFast.from_pretrained(name, local_files_only=local)
        )
        model = (
            CLIPModel(config)
            if builds_on_meta()
            else CLIPModel.from_pretrained(name, use_safetensors=True, local_files_only=local)
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"the CLIP checkpoint {name!r} cannot be loaded ({' '.join(str(error).split())[:120]}): give a folder or hub id with "
            "safetensors"
        ) from None
    return ClipReward(model, tokenizer, framing)
