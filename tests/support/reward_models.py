"""Tiny reward models with the published layout of weights."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import BertTokenizerFast, BlipConfig, BlipForImageTextRetrieval

from stepdistill.rewards.linear_head import linear_stack

TEXTS = ["a red bag", "a photo of a blue coat"]


def published_name(key: str) -> str:
    """Returns BLIP's name of a tensor, given its name in transformers."""
    if not key.startswith("vision_model."):
        return f"blip.{key}"
    for ours, theirs in (
        ("vision_model", "visual_encoder"),
        ("embeddings.class_embedding", "cls_token"),
        ("embeddings.position_embedding", "pos_embed"),
        ("embeddings.patch_embedding", "patch_embed.proj"),
        ("post_layernorm", "norm"),
        ("encoder.layers", "blocks"),
        ("self_attn.projection", "attn.proj"),
        ("self_attn", "attn"),
    ):
        key = key.replace(ours, theirs)
    return "blip." + re.sub(r"layer_norm([12])", r"norm\1", key)


def write_blip(folder: Path) -> tuple[Path, BlipForImageTextRetrieval, torch.nn.ModuleDict]:
    """Writes a tiny ImageReward; returns its folder, BLIP and the head."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *" ".join(TEXTS).split()])
    )
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "vocab_size": 32, "encoder_hidden_size": 16, "max_position_embeddings": 64}
    config = BlipConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 8})
    torch.manual_seed(0)
    model, head = BlipForImageTextRetrieval(config).eval(), linear_stack(16)
    config.save_pretrained(folder)
    kept = {k: v for k, v in model.state_dict().items() if k.startswith(("vision_model.", "text_encoder."))}
    tensors = {published_name(key): value.clone() for key, value in kept.items()}
    tensors |= {f"mlp.layers.{key}": value for key, value in head.state_dict().items()}
    tensors["blip.text_encoder.embeddings.position_ids"] = torch.arange(64)[None]
    save_file(tensors, folder / "ImageReward.safetensors")
    return folder, model, head
