"""The cosine between image and prompt under a CLIP checkpoint of transformers, with preprocessing that gradients cross."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizerFast

from stepdistill.errors import Refusal
from stepdistill.models.vision import CLIP_DEVIATION, CLIP_MEAN, config_of, is_outline, standardised
from stepdistill.rewards.base import Reward

DEFAULT = "openai/clip-vit-large-patch14"


class ClipReward(Reward):
    """Cosine in [-1, 1]; prompts longer than CLIP's are cut, images are resized to its square."""

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizerFast) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.length = int(model.config.text_config.max_position_embeddings)
        self.side = int(model.config.vision_config.image_size)
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).reshape(3, 1, 1))
        self.register_buffer("deviation", torch.tensor(CLIP_DEVIATION).reshape(3, 1, 1))

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        # to the full length, so that a sample's reward does not depend on its neighbours' prompts
        tokens = self.tokenizer(
            list(prompts), truncation=True, max_length=self.length, padding="max_length", return_tensors="pt"
        )
        text = self.model.text_model(**tokens.to(images.device)).pooler_output
        pixels = standardised(images.to(self.mean.dtype), self.side, self.mean, self.deviation)  # type: ignore[arg-type, union-attr, call-overload]
        image = self.model.vision_model(pixel_values=pixels).pooler_output
        return F.cosine_similarity(self.model.visual_projection(image), self.model.text_projection(text), dim=1)


def load(option: str) -> Reward:
    """`option` is a transformers folder or hub id; OpenAI's ViT-L/14 by default."""
    name = option or DEFAULT
    config = config_of(name)
    if not isinstance(config, CLIPConfig):
        raise Refusal(f"the reward 'clip:{name}' is a model of type {config.model_type!r}: give a CLIP checkpoint")
    try:
        tokenizer = CLIPTokenizerFast.from_pretrained(name)
        model = CLIPModel(config) if is_outline() else CLIPModel.from_pretrained(name, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise Refusal(
            f"the CLIP checkpoint {name!r} cannot be loaded ({' '.join(str(error).split())[:120]}): give a folder or hub id with "
            "safetensors"
        ) from None
    return ClipReward(model, tokenizer)
