"""sdxl: Stable Diffusion XL base and its fine-tunes; two text encoders, a pooled embedding, sizes and crop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from stepdistill.families.base import Checkpoint, CheckpointInfo
from stepdistill.families.checkpoints.files import read_json
from stepdistill.families.checkpoints.weights import ModelClass
from stepdistill.families.common import tiny
from stepdistill.families.common.pipeline import stock_pipeline
from stepdistill.families.common.unet import UNetFamily
from stepdistill.families.conditioning import Conditioning, MicroConditioning

SCHEDULERS: Mapping[str, tiny.Config] = {
    "default": tiny.SDXL_SCHEDULER,
    "v": {**tiny.SDXL_SCHEDULER, "prediction_type": "v_prediction"},
}


class SDXL(UNetFamily):
    name: ClassVar[str] = "sdxl"
    pipeline_name: ClassVar[str] = "StableDiffusionXLPipeline"
    pipeline_class: ClassVar[type[DiffusionPipeline]] = StableDiffusionXLPipeline
    text_encoders: ClassVar[Mapping[str, ModelClass]] = {
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer", "tokenizer_2")
    tiny_variants: ClassVar[tuple[str, ...]] = tuple(SCHEDULERS)

    @torch.no_grad()
    def encode(
        self, checkpoint: Checkpoint, prompts: Sequence[str], sizes: Sequence[MicroConditioning]
    ) -> Conditioning:
        pipeline = stock_pipeline(checkpoint)
        text, _, pooled, _ = pipeline.encode_prompt(
            list(prompts), device=pipeline.text_encoder_2.device, do_classifier_free_guidance=False
        )
        return Conditioning(text, pooled, self.time_ids(sizes).to(text.device))

    @torch.no_grad()
    def null(
        self, checkpoint: Checkpoint, sizes: Sequence[MicroConditioning], negative_prompt: str = ""
    ) -> Conditioning:
        """Zeros, text and pooled, where no negative prompt is given and `force_zeros_for_empty_prompt` is set; this is
        the branch of the pipeline called without a negative prompt, not with an empty one."""
        pipeline = stock_pipeline(checkpoint)
        _, text, _, pooled = pipeline.encode_prompt(
            [""] * len(sizes),
            device=pipeline.text_encoder_2.device,
            do_classifier_free_guidance=True,
            negative_prompt=[negative_prompt] * len(sizes) if negative_prompt else None,
        )
        return Conditioning(text, pooled, self.time_ids(sizes).to(text.device))

    def time_ids(self, sizes: Sequence[MicroConditioning]) -> Tensor:
        """(B, 6) float32: original height and width, crop top and left, target height and width."""
        return torch.tensor([size.time_ids() for size in sizes], dtype=torch.float32)

    def encoding_bytes(self, info: CheckpointInfo, dtype: torch.dtype) -> int:
        pooled = int(read_json(info.folder / "text_encoder_2" / "config.json")["projection_dim"])
        return super().encoding_bytes(info, dtype) + pooled * dtype.itemsize

    def added_cond_kwargs(self, cond: Conditioning) -> dict[str, Tensor] | None:
        if cond.pooled is None or cond.time_ids is None:
            raise ValueError("SDXL needs the pooled text embedding and the time ids in its conditioning")
        return {"text_embeds": cond.pooled, "time_ids": cond.time_ids}

    def write_tiny(self, folder: Path, variant: str = "default", seed: int = 0) -> None:
        with tiny.seeded(seed):
            pipeline = StableDiffusionXLPipeline(
                vae=tiny.vae(scaling_factor=5.0),
                text_encoder=tiny.text_encoder(width=32, act="quick_gelu"),
                text_encoder_2=tiny.text_encoder_with_projection(width=64),
                tokenizer=tiny.tokenizer(),
                tokenizer_2=tiny.tokenizer(pad="!"),
                unet=tiny.unet(
                    (32, 32),
                    cross_attention_dim=32 + 64,
                    attention_head_dim=(2, 4),
                    transformer_layers_per_block=(1, 2),
                    use_linear_projection=True,
                    addition_embed_type="text_time",
                    addition_time_embed_dim=8,
                    projection_class_embeddings_input_dim=6 * 8 + 64,
                ),
                scheduler=tiny.scheduler(SCHEDULERS[variant]),
                force_zeros_for_empty_prompt=True,
                add_watermarker=False,
            )
        tiny.write(pipeline, folder)
