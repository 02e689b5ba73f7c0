"""sd: Stable Diffusion 1.x (epsilon), 2.x (epsilon or v), zero-terminal-SNR fine-tunes, any betas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from transformers import CLIPTextModel

from stepdistill.families.base import Checkpoint
from stepdistill.families.checkpoints.weights import ModelClass
from stepdistill.families.common import tiny
from stepdistill.families.common.pipeline import stock_pipeline
from stepdistill.families.common.unet import UNetFamily
from stepdistill.families.conditioning import Conditioning, MicroConditioning

SCHEDULERS: Mapping[str, tiny.Config] = {
    "default": tiny.SD_SCHEDULER,
    "v": {**tiny.DDIM_SCHEDULER, "prediction_type": "v_prediction"},
    "zsnr": {
        **tiny.DDIM_SCHEDULER,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    },
    "betas": {**tiny.DDIM_SCHEDULER, "beta_schedule": "linear", "beta_start": 0.0002, "beta_end": 0.012},
}


class SD(UNetFamily):
    name: ClassVar[str] = "sd"
    pipeline_name: ClassVar[str] = "StableDiffusionPipeline"
    pipeline_class: ClassVar[type[DiffusionPipeline]] = StableDiffusionPipeline
    text_encoders: ClassVar[Mapping[str, ModelClass]] = {"text_encoder": CLIPTextModel}
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    tiny_variants: ClassVar[tuple[str, ...]] = tuple(SCHEDULERS)

    @torch.no_grad()
    def encode(
        self, checkpoint: Checkpoint, prompts: Sequence[str], sizes: Sequence[MicroConditioning]
    ) -> Conditioning:
        pipeline = stock_pipeline(checkpoint)
        text, _ = pipeline.encode_prompt(list(prompts), pipeline.text_encoder.device, 1, False)
        return Conditioning(text)

    def null(
        self, checkpoint: Checkpoint, sizes: Sequence[MicroConditioning], negative_prompt: str = ""
    ) -> Conditioning:
        # the stock pipeline encodes a negative prompt as it does any other, the empty one included
        return self.encode(checkpoint, [negative_prompt] * len(sizes), sizes)

    def write_tiny(self, folder: Path, variant: str = "default", seed: int = 0) -> None:
        with tiny.seeded(seed):
            pipeline = StableDiffusionPipeline(
                vae=tiny.vae(scaling_factor=4.0),
                text_encoder=tiny.text_encoder(width=32, act="quick_gelu"),
                tokenizer=tiny.tokenizer(),
                unet=tiny.unet((32, 64), cross_attention_dim=32, attention_head_dim=4),
                scheduler=tiny.scheduler(SCHEDULERS[variant]),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        tiny.write(pipeline, folder)
