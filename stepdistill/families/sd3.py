"""sd3: Stable Diffusion 3 and 3.5, a transformer with a stream each for image and text; two CLIPs, and T5 if it is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerBase, T5EncoderModel, T5Tokenizer

from stepdistill.errors import UserError
from stepdistill.families.base import ALL_PARTS, Checkpoint, CheckpointInfo, CheckpointPart
from stepdistill.families.checkpoints.files import read_json
from stepdistill.families.checkpoints.weights import ModelClass
from stepdistill.families.common import tiny
from stepdistill.families.common.pipeline import stock_pipeline
from stepdistill.families.common.transformer import NUM_TRAIN_TIMESTEPS, TransformerFamily
from stepdistill.families.conditioning import Conditioning, MicroConditioning

CLIP_TOKENS, T5_TOKENS = 77, 256
"""Lengths that the pipeline pads every prompt to; without T5 its tokens are zeros."""
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_SCHEDULER: tiny.Config = {"num_train_timesteps": 1000, "shift": 3.0}
TINY: Mapping[str, tuple[tiny.Config, tiny.Config, bool]] = {
    "default": ({}, _SCHEDULER, True),
    "sd35": ({"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}, _SCHEDULER, True),
    "no_t5": (
        {},
        {**_SCHEDULER, "use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64},
        False,
    ),
}
"""Variant -> (what its network, what its scheduler has of its own, whether T5 is there)."""


class SD3(TransformerFamily):
    name: ClassVar[str] = "sd3"
    pipeline_name: ClassVar[str] = "StableDiffusion3Pipeline"
    pipeline_class: ClassVar[type[DiffusionPipeline]] = StableDiffusion3Pipeline
    network_class: ClassVar[ModelClass] = SD3Transformer2DModel
    text_encoders: ClassVar[Mapping[str, ModelClass]] = {
        "text_encoder": CLIPTextModelWithProjection,
        "text_encoder_2": CLIPTextModelWithProjection,
        "text_encoder_3": T5EncoderModel,
    }
    optional_encoders: ClassVar[frozenset[str]] = frozenset({"text_encoder_3"})
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer", "tokenizer_2", "tokenizer_3")
    lora_presets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": _ATTENTION,
        # both streams' feed-forward layers, and the modulation by time, as `time_emb_proj` is in DMD2's list for UNets
        "all": (
            *_ATTENTION, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "norm1.linear",
            "norm1_context.linear",
        ),
    }  # fmt: skip
    tiny_variants: ClassVar[tuple[str, ...]] = tuple(TINY)

    def load(
        self,
        info: CheckpointInfo,
        dtype: torch.dtype,
        device: torch.device | str,
        parts: frozenset[CheckpointPart] = ALL_PARTS,
    ) -> Checkpoint:
        checkpoint = super().load(info, dtype, device, parts)
        # without T5 the pipeline asks its network, which may be on the meta device, how wide T5's zeros are
        stock_pipeline(checkpoint).transformer = checkpoint.network
        return checkpoint

    def _tokenizer(self, folder: Path, name: str) -> PreTrainedTokenizerBase:
        if name != "tokenizer_3":
            return super()._tokenizer(folder, name)
        if (folder / name / "tokenizer.json").is_file() or (folder / name / "spiece.model").is_file():
            tokenizer: PreTrainedTokenizerBase = T5Tokenizer.from_pretrained(folder / name, local_files_only=True)
            return tokenizer
        # T5's vocabulary is not packaged, and for an outline's shapes any will do
        return T5Tokenizer(model_max_length=int(read_json(folder / name / "tokenizer_config.json")["model_max_length"]))

    # ---------------------------------------------------------------- prompts

    @torch.no_grad()
    def encode(
        self, checkpoint: Checkpoint, prompts: Sequence[str], sizes: Sequence[MicroConditioning]
    ) -> Conditioning:
        """text (B, 77 + 256, 4096): both CLIPs side by side, zeros up to T5's width, then T5; pooled (B, 2048), of the CLIPs."""
        pipeline = stock_pipeline(checkpoint)
        text, _, pooled, _ = pipeline.encode_prompt(
            list(prompts), None, None, device=pipeline.text_encoder.device, do_classifier_free_guidance=False
        )
        return Conditioning(text, pooled)

    def null(
        self, checkpoint: Checkpoint, sizes: Sequence[MicroConditioning], negative_prompt: str = ""
    ) -> Conditioning:
        # the stock pipeline encodes a negative prompt as it does any other, the empty one included
        return self.encode(checkpoint, [negative_prompt] * len(sizes), sizes)

    def encoding_bytes(self, info: CheckpointInfo, dtype: torch.dtype) -> int:
        network = info.network_config
        tokens = (CLIP_TOKENS + T5_TOKENS) * int(network["joint_attention_dim"])
        return (tokens + int(network["pooled_projection_dim"])) * dtype.itemsize

    # ---------------------------------------------------------------- the network

    def call(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """u = eps - x0, which is the network's own sign; t is sigma."""
        if cond.pooled is None:
            raise ValueError("SD3 needs the pooled text embedding in its conditioning")
        if cond.guidance is not None or cond.second_time is not None:
            raise UserError(
                "the conditioning has a guidance scale or a second time to embed, which SD3's transformer has no input for: use "
                "guidance by two calls and a method with one time"
            )
        return network(  # type: ignore[no-any-return]
            x_t,
            timestep=(NUM_TRAIN_TIMESTEPS * t).float(),
            encoder_hidden_states=cond.text,
            pooled_projections=cond.pooled,
            return_dict=False,
        )[0]

    def tokens(self, output: Any) -> Tensor:
        _, image = output
        return image  # type: ignore[no-any-return]

    # ---------------------------------------------------------------- the test bed

    def write_tiny(self, folder: Path, variant: str = "default", seed: int = 0) -> None:
        network, scheduler, has_t5 = TINY[variant]
        with tiny.seeded(seed):
            pipeline = StableDiffusion3Pipeline(
                vae=tiny.vae(
                    1.5, shift_factor=0.1, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False
                ),
                text_encoder=tiny.text_encoder_with_projection(width=32, act="quick_gelu"),
                text_encoder_2=tiny.text_encoder_with_projection(width=64),
                text_encoder_3=tiny.t5_encoder(width=112) if has_t5 else None,
                tokenizer=tiny.tokenizer(),
                tokenizer_2=tiny.tokenizer(pad="!"),
                tokenizer_3=tiny.t5_tokenizer() if has_t5 else None,
                transformer=_tiny_network(**network),
                scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
            )
        tiny.write(pipeline, folder)


def _tiny_network(**changes: Any) -> SD3Transformer2DModel:
    """Three blocks of three heads on 4 x 4 patches of 8 x 8 latents, cut out of a larger grid of positions."""
    network = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_projection_dim=24,
        joint_attention_dim=112,
        pooled_projection_dim=32 + 64,
        pos_embed_max_size=6,
        **changes,
    )
    # an untrained network hardly heeds its prompt: a louder one makes guidance matter
    with torch.no_grad():
        network.proj_out.weight.mul_(4)
        network.context_embedder.weight.mul_(8)
    return network
