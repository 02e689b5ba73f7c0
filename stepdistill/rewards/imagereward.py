"""ImageReward v1.0 (Xu et al., NeurIPS 2023, arXiv 2304.05977).

BLIP's text encoder cross-attends to the image, and a linear head reads its first token. Scores are about N(0, 1) over the
images that the model was trained on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertTokenizerFast, BlipConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from stepdistill.errors import UserError
from stepdistill.frozen.vision import builds_on_meta, load_transformers_config
from stepdistill.rewards.base import Reward
from stepdistill.rewards.clip import ClipPreprocessor
from stepdistill.rewards.linear_head import linear_stack

WEIGHTS_FILE = "ImageReward.safetensors"
MAX_PROMPT_TOKENS = 35
"""Maximum number of tokens of a prompt; the rest is cut off."""
SCORE_MEAN, SCORE_STD = 0.16717362830052426, 1.0333394966054072
"""Mean and standard deviation of the head's outputs over the training images (ImageReward/ImageReward.py)."""
KEY_PATTERNS = (
    (r"^visual_encoder\.cls_token$", "embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^visual_encoder\.norm\.", "post_layernorm."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.", r"encoder.layers.\1.self_attn."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^visual_encoder\.blocks\.(\d+)\.", r"encoder.layers.\1."),
)
"""Pattern of a BLIP name in the vision tower -> its name in transformers. The text encoder has the same names in both."""


class ImageReward(Reward):
    """The ImageReward score of images for prompts, which are cut to 35 tokens."""

    def __init__(self, vision: BlipVisionModel, text: BlipTextModel, head: nn.Sequential, tokenizer: object) -> None:
        super().__init__()
        self.vision, self.text, self.head, self.tokenizer = vision, text, head, tokenizer
        self.preprocess = ClipPreprocessor(int(vision.config.image_size), "torchvision")

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        seen = self.vision(pixel_values=self.preprocess(images)).last_hidden_state
        tokens = self.tokenizer(  # type: ignore[operator]
            list(prompts), padding="max_length", truncation=True, max_length=MAX_PROMPT_TOKENS, return_tensors="pt"
        ).to(images.device)
        read = self.text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=images.device),
        ).last_hidden_state
        return (self.head(read[:, 0])[:, 0] - SCORE_MEAN) / SCORE_STD  # type: ignore[no-any-return]


def load(option: str, *, download: bool = True) -> Reward:
    """Loads the reward from a folder.

    Args:
        option: folder with ImageReward.safetensors, BLIP's config.json and BERT's tokenizer. The authors publish a pickle only.
        download: not used, since the folder is local.

    Raises:
        UserError: no folder, or one that lacks a file.
    """
    if not option:
        raise UserError(
            f"the reward 'imagereward' names no weights, and ImageReward is published as a pickle: give imagereward:FOLDER with its "
            f"tensors as {WEIGHTS_FILE}, BLIP's config.json and the tokenizer"
        )
    config, folder = load_transformers_config(option, download=False), Path(option)
    if not isinstance(config, BlipConfig):
        raise UserError(
            f"the reward 'imagereward:{option}' is of type {config.model_type!r}: give a folder with BLIP's config"
        )
    vision, text = BlipVisionModel(config.vision_config), BlipTextModel(config.text_config, add_pooling_layer=False)
    head = linear_stack(int(config.text_config.hidden_size))
    try:
        tokenizer = BertTokenizerFast.from_pretrained(option, local_files_only=True)
        if not builds_on_meta():
            _load_published_weights(load_file(folder / WEIGHTS_FILE), vision, text, head)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"ImageReward cannot be loaded from {option!r} ({' '.join(str(error).split())[:120]}): give a folder that holds its "
            f"tensors as {WEIGHTS_FILE} and BERT's tokenizer"
        ) from None
    return ImageReward(vision, text, nn.Sequential(*head.values()), tokenizer)


def _load_published_weights(tensors: Mapping[str, Tensor], vision: nn.Module, text: nn.Module, head: nn.Module) -> None:
    """Loads tensors that have the published names into the three networks."""
    parts: dict[str, dict[str, Tensor]] = {"visual_encoder": {}, "text_encoder": {}, "mlp": {}}
    for key, value in tensors.items():
        name = key.removeprefix("blip.")
        kind = name.partition(".")[0]
        for pattern, replacement in KEY_PATTERNS:
            renamed = re.sub(pattern, replacement, name)
            if renamed != name:
                name = renamed
                break
        # transformers makes position_ids itself
        if kind in parts and not name.endswith("position_ids"):
            parts[kind][name.removeprefix("text_encoder.").removeprefix("mlp.layers.")] = value
    vision.load_state_dict(parts["visual_encoder"])
    text.load_state_dict(parts["text_encoder"])
    head.load_state_dict(parts["mlp"])
