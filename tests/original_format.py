"""The inverse of diffusers' single-file conversion: a pipeline's tensors under the keys of the original LDM and SGM files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding", "embeddings.token_embedding": "token_embedding",
    "final_layer_norm": "ln_final", "encoder.layers.": "transformer.resblocks.", "layer_norm1": "ln_1",
    "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn": "attn",
}  # fmt: skip


def unet(weights: Weights, layers: int) -> dict[str, Tensor]:
    """layers: `layers_per_block`."""
    with_attention = {m[1] for key in weights if (m := re.match(r"(up_blocks\.\d+)\.attentions", key))}

    def rename(key: str) -> str:
        if match := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", key):
            side, block, kind, layer, rest = match.groups()
            index = int(block) * (layers + 1) + int(layer) + (side == "down")
            where = f"{'input' if side == 'down' else 'output'}_blocks.{index}"
            return f"{where}.0.{_replaced(rest, _RESNET)}" if kind == "resnets" else f"{where}.1.{rest}"
        if match := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.+)", key):
            return f"input_blocks.{(int(match[1]) + 1) * (layers + 1)}.0.op.{match[2]}"
        if match := re.match(r"(up_blocks\.(\d+))\.upsamplers\.0\.(.+)", key):
            place = 2 if match[1] in with_attention else 1
            return f"output_blocks.{int(match[2]) * (layers + 1) + layers}.{place}.{match[3]}"
        if match := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", key):
            if match[1] == "attentions":
                return f"middle_block.1.{match[3]}"
            return f"middle_block.{2 * int(match[2])}.{_replaced(match[3], _RESNET)}"
        return _replaced(key, _UNET)

    return _renamed(weights, "model.diffusion_model.", rename)


def vae(weights: Weights) -> dict[str, Tensor]:
    last = max(int(m[1]) for key in weights if (m := re.match(r"decoder\.up_blocks\.(\d+)", key)))

    def rename(key: str) -> str:
        key = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", key)
        key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
        key = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{last - int(m[1])}.block", key)
        key = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", key)
        key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
        if "mid_block.attentions.0" in key:
            return _replaced(key.replace("mid_block.attentions.0", "mid.attn_1"), _VAE_ATTENTION)
        return key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")

    renamed = _renamed(weights, "first_stage_model.", rename)
    return {  # the original attention is made of 1 x 1 convolutions
        key: value[:, :, None, None] if "attn_1" in key and value.ndim == 2 else value for key, value in renamed.items()
    }


def clip_l(weights: Weights, prefix: str) -> dict[str, Tensor]:
    named = {key.removeprefix("text_model."): value for key, value in weights.items()}
    stored = _renamed(named, prefix + "text_model.", lambda key: key)
    return stored | {prefix + "text_model.embeddings.position_ids": torch.arange(77)[None]}


def open_clip(weights: Weights, prefix: str) -> dict[str, Tensor]:
    named = {key.removeprefix("text_model."): value for key, value in weights.items()}
    merged: dict[str, Tensor] = {}
    for key, value in named.items():
        if key == "text_projection.weight":
            merged["text_projection"] = value.T.contiguous()
        elif match := re.fullmatch(r"(.+self_attn)\.q_proj\.(weight|bias)", key):
            parts = [named[f"{match[1]}.{name}_proj.{match[2]}"] for name in "qkv"]
            merged[f"{match[1]}.in_proj_{match[2]}"] = torch.cat(parts)
        elif not re.search(r"\.[kv]_proj\.", key):
            merged[key] = value
    return _renamed(merged, prefix, lambda key: _replaced(key, _OPEN_CLIP)) | {prefix + "logit_scale": torch.ones(())}


def sd1(unet_: Weights, vae_: Weights, text: Weights, layers: int) -> dict[str, Tensor]:
    return unet(unet_, layers) | vae(vae_) | clip_l(text, "cond_stage_model.transformer.")


def sd2(unet_: Weights, vae_: Weights, text: Weights, layers: int) -> dict[str, Tensor]:
    return unet(unet_, layers) | vae(vae_) | open_clip(text, "cond_stage_model.model.")


def sdxl(unet_: Weights, vae_: Weights, text: Weights, text_2: Weights, layers: int) -> dict[str, Tensor]:
    encoders = clip_l(text, "conditioner.embedders.0.transformer.") | open_clip(
        text_2, "conditioner.embedders.1.model."
    )
    return unet(unet_, layers) | vae(vae_) | encoders


def _renamed(weights: Weights, prefix: str, rename: Callable[[str], str]) -> dict[str, Tensor]:
    return {prefix + rename(key): value for key, value in weights.items()}


def _replaced(key: str, names: Mapping[str, str]) -> str:
    for ours, theirs in names.items():
        key = re.sub(rf"(^|(?<=\.)){re.escape(ours)}", theirs, key, count=1)
    return key
