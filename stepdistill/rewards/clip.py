"""The cosine between image and prompt under a CLIP checkpoint of transformers, with preprocessing that gradients cross."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizerFast

from stepdistill.errors import UserError
from stepdistill.families.checkpoints.single_file import CONFIGS
from stepdistill.families.common.clip import tokenizer_of
from stepdistill.frozen.vision import CLIP_MEAN, CLIP_STD, config_of, is_outline
from stepdistill.rewards.base import Reward

DEFAULT, PICKSCORE = "openai/clip-vit-large-patch14", "yuvalkirstain/PickScore_v1"


def _clip_config(width: int, text: tuple[int, int, int], vision: tuple[int, int, int]) -> CLIPConfig:
    """Of a projection's width and both towers' (width, layers, heads), with patches of 14 pixels."""
    towers = [
        {"hidden_size": w, "intermediate_size": 4 * w, "num_hidden_layers": layers, "num_attention_heads": heads}
        for w, layers, heads in (text, vision)
    ]
    return CLIPConfig(text_config=towers[0], vision_config={**towers[1], "patch_size": 14}, projection_dim=width)


PUBLIC_CONFIGS: Mapping[str, Callable[[], CLIPConfig]] = {
    DEFAULT: lambda: _clip_config(768, (768, 12, 12), (1024, 24, 16)),
    PICKSCORE: lambda: _clip_config(1024, (1024, 24, 16), (1280, 32, 16)),
}
"""Configs of public checkpoints, so that a plan needs no download."""


class ClipPreprocessor(nn.Module):
    """What CLIP's image processor does, with gradients: the shorter side resized (bicubic, antialiased), the middle cut out.

    Args:
        side: of the square that the network looks at.
        padded: the longer side is resized instead, and black fills the square, so that nothing is cut off.
    """

    def __init__(self, image_size: int, pad_to_square: bool = False) -> None:
        super().__init__()
        self.image_size, self.pad_to_square = image_size, pad_to_square
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).reshape(3, 1, 1))
        self.register_buffer("deviation", torch.tensor(CLIP_STD).reshape(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, side, side), standardised, of images (B, 3, H, W) in [0, 1]."""
        images = images.to(self.mean.dtype)  # type: ignore[arg-type, call-overload]
        height, width = images.shape[-2:]
        fitted = max(height, width) if self.pad_to_square else min(height, width)
        size = (int(self.image_size * height / fitted), int(self.image_size * width / fitted))
        if size != (height, width):
            images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        top, left = (round((long - self.image_size) / 2) for long in size)
        # a negative margin cuts
        edges = (-left, size[1] - self.image_size - left, -top, size[0] - self.image_size - top)
        images = F.pad(images, (edges[0], -edges[1], edges[2], -edges[3]))
        return (images - self.mean) / self.deviation  # type: ignore[operator]


class ClipReward(Reward):
    """Cosine in [-1, 1]; prompts longer than CLIP's are cut."""

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizerFast, pad_to_square: bool = False) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.length = int(model.config.text_config.max_position_embeddings)
        self.preprocess = ClipPreprocessor(int(model.config.vision_config.image_size), pad_to_square)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        # to the full length, so that a sample's reward does not depend on its neighbours' prompts
        tokens = self.tokenizer(
            list(prompts), truncation=True, max_length=self.length, padding="max_length", return_tensors="pt"
        )
        text = self.model.text_model(**tokens.to(images.device)).pooler_output
        return F.cosine_similarity(self.image_embeddings(images), self.model.text_projection(text), dim=1)

    def image_embeddings(self, images: Tensor) -> Tensor:
        """The images' projected embeddings, (B, D)."""
        image = self.model.vision_model(pixel_values=self.preprocess(images)).pooler_output
        return self.model.visual_projection(image)  # type: ignore[no-any-return]


def load(option: str) -> Reward:
    """`option` is a transformers folder or hub id; OpenAI's ViT-L/14 by default."""
    return load_clip("clip", option or DEFAULT)


def load_clip(reward: str, name: str, pad_to_square: bool = False) -> ClipReward:
    """The reward of a CLIP checkpoint, a transformers folder or hub id.

    reward: whose name messages give.

    Raises:
        UserError: no such checkpoint, or one of another kind.
    """
    known = is_outline() and name in PUBLIC_CONFIGS
    config = PUBLIC_CONFIGS[name]() if known else config_of(name)
    if not isinstance(config, CLIPConfig):
        raise UserError(
            f"the reward '{reward}:{name}' is a model of type {config.model_type!r}: give a CLIP checkpoint"
        )
    try:
        # all CLIPs share one vocabulary
        tokenizer = tokenizer_of(CONFIGS / "sd15" / "tokenizer") if known else CLIPTokenizerFast.from_pretrained(name)
        model = CLIPModel(config) if is_outline() else CLIPModel.from_pretrained(name, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the CLIP checkpoint {name!r} cannot be loaded ({' '.join(str(error).split())[:120]}): give a folder or hub id with "
            "safetensors"
        ) from None
    return ClipReward(model, tokenizer, pad_to_square)
