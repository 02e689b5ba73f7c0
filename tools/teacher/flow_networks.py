"""The parts of the flow-matching teacher that are not the embedded teacher's own: text encoders as SD3 has them, transformer."""

from __future__ import annotations

import networks
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

SECOND_WIDTH = 32
WIDTH = networks.TEXT_WIDTH + SECOND_WIDTH
LAST = 2
"""Index of the layer that adds nothing."""


@torch.no_grad()
def build_text_encoders(
    teacher: StableDiffusionPipeline,
) -> tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection]:
    """The embedded teacher's encoder, and the second one that SD3 asks for: small, random and never trained.

    SD3 reads the states before the last layer. The first encoder therefore has one more, which adds nothing, so that what is
    read is what the embedded teacher's layers make; its projection is the identity.
    """
    config = teacher.text_encoder.config.to_dict()
    first = CLIPTextModelWithProjection(CLIPTextConfig(**config | {"num_hidden_layers": LAST + 1})).eval()
    own = {key.removeprefix("text_model."): value for key, value in teacher.text_encoder.state_dict().items()}
    left = first.text_model.load_state_dict(own, strict=False)
    if left.unexpected_keys or any(f"layers.{LAST}." not in key for key in left.missing_keys):
        raise RuntimeError(f"the encoder does not fit: {left}")
    for layer in (
        first.text_model.encoder.layers[LAST].self_attn.out_proj,
        first.text_model.encoder.layers[LAST].mlp.fc2,
    ):
        layer.weight.zero_()
        layer.bias.zero_()
    first.text_projection.weight.copy_(torch.eye(networks.TEXT_WIDTH))
    small = {"hidden_size": SECOND_WIDTH, "intermediate_size": 2 * SECOND_WIDTH, "projection_dim": SECOND_WIDTH}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        second = CLIPTextModelWithProjection(CLIPTextConfig(**config | small)).eval()
    return first.requires_grad_(False), second.requires_grad_(False)


def build_transformer() -> SD3Transformer2DModel:
    """Velocities of 8x8 latents, in 16 patches of 2 x 2."""
    return SD3Transformer2DModel(
        sample_size=networks.LATENT_SIZE,
        patch_size=2,
        in_channels=networks.LATENT_CHANNELS,
        out_channels=networks.LATENT_CHANNELS,
        num_layers=6,
        num_attention_heads=5,
        attention_head_dim=32,
        caption_projection_dim=160,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=networks.LATENT_SIZE // 2,
        qk_norm="rms_norm",
    )


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Rectified flow without a shift, which images so small do not need."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
