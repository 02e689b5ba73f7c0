"""sana: Sana and Sana-Sprint, a linear transformer on latents of a deep-compression autoencoder, told prompts by Gemma 2.

Both networks are flow matching's: u = eps - x0 at x_t = (1 - t) x0 + t eps. Sana-Sprint's pipeline speaks TrigFlow, but around
the network only: at the angle T it shows it X_T / (sd (sin T + cos T)), which is x_t at t = sin T / (sin T + cos T), and makes
F = ((1 - 2t) x_t + (1 - 2t + 2t^2) u) / sqrt(t^2 + (1 - t)^2) of the answer (Chen et al. 2025, arXiv 2503.09641). So a Sprint
checkpoint is here what its network is: flow matching, told t where Sana is told 1000 t, and told a guidance scale. Its
scheduler's angles are the axis on which ladders and noise levels are even.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import (
    AutoencoderDC,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)
from torch import Tensor, nn
from transformers import Gemma2Model, GemmaTokenizer

from stepdistill.diffusion.transitions import TransitionKind
from stepdistill.errors import UserError
from stepdistill.families.base import Checkpoint, CheckpointInfo, Posterior
from stepdistill.families.checkpoints.component_check import ModelClass
from stepdistill.families.checkpoints.files import read_json
from stepdistill.families.common import tiny
from stepdistill.families.common.pipeline import stock_pipeline
from stepdistill.families.common.transformer import NUM_TRAIN_TIMESTEPS, TransformerFamily
from stepdistill.families.conditioning import Conditioning, MicroConditioning
from stepdistill.families.recipe import TRIGFLOW_SCHEDULER, Recipe

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# as published with Sana
TINY_SCHEDULER: tiny.Config = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def _default_argument(name: str, pipeline_class: type[DiffusionPipeline] = SanaPipeline) -> Any:
    """What an argument of the pipeline's call is where nobody gives it."""
    return inspect.signature(pipeline_class.__call__).parameters[name].default


MAX_SEQUENCE_LENGTH = int(_default_argument("max_sequence_length"))
DEFAULT_GUIDANCE_SCALE = float(_default_argument("guidance_scale", SanaSprintPipeline))
"""What a Sprint network is told unless a method says otherwise."""


class Sana(TransformerFamily):
    name: ClassVar[str] = "sana"
    pipeline_name: ClassVar[str] = "SanaPipeline"
    other_pipelines: ClassVar[tuple[str, ...]] = ("SanaSprintPipeline",)
    pipeline_class: ClassVar[type[DiffusionPipeline]] = SanaPipeline
    network_class: ClassVar[ModelClass] = SanaTransformer2DModel
    vae_class: ClassVar[ModelClass] = AutoencoderDC
    text_encoders: ClassVar[Mapping[str, ModelClass]] = {"text_encoder": Gemma2Model}
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    is_known_to_comfyui: ClassVar[bool] = False
    lora_presets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": _ATTENTION,
        # every linear layer and 1 x 1 convolution; the depthwise ones have no low rank to speak of
        "all": (*_ATTENTION, "conv_inverted", "conv_point", "linear_1", "linear_2", "time_embed.linear", "proj_out"),
    }
    tiny_variants: ClassVar[tuple[str, ...]] = ("default", "sprint")

    # ---------------------------------------------------------------- checkpoints

    def inspect(self, source: str, folder: Path, single_file: Path | None) -> CheckpointInfo:
        if single_file is not None:
            raise UserError(
                f"{source!r} is a single file, and Sana is read from diffusers folders only: give the folder"
            )
        info = super().inspect(source, folder, None)
        sprint = _is_sprint(info.network_config)
        pipeline = read_json(folder / "model_index.json").get("_class_name")
        if sprint != (pipeline == SanaSprintPipeline.__name__):
            raise UserError(
                f"{str(folder)!r} is a {pipeline} whose transformer has guidance_embeds {sprint}, and that input is "
                "Sana-Sprint's alone: give model_index.json and transformer of one checkpoint"
            )
        if sprint != info.schedule.fraction_is_angle:
            raise UserError(
                f"the scheduler in {str(folder)!r} is a {info.scheduler_config.get('_class_name')}, and {TRIGFLOW_SCHEDULER} is "
                f"Sana-Sprint's{'' if sprint else ' alone'}: restore the scheduler config of the original checkpoint"
            )
        return replace(info, latent_multiple=self.feature_stride(info))

    def _latent_space(self, folder: Path, network: Mapping[str, Any], vae: Mapping[str, Any]) -> tuple[int, int]:
        channels = int(network["in_channels"])
        told = network.get("out_channels") or channels
        if vae.get("_class_name") != "AutoencoderDC" or vae["latent_channels"] != channels:
            raise UserError(
                f"the transformer in {str(folder)!r} reads {channels} channels, and its VAE is an {vae.get('_class_name')} of "
                f"{vae.get('latent_channels')}: give a checkpoint with an AutoencoderDC of as many"
            )
        if told not in ((channels,) if _is_sprint(network) else (channels, 2 * channels)):
            raise UserError(
                f"the transformer in {str(folder)!r} reads {channels} channels and writes {told}, which are neither a velocity nor "
                "one with a learned variance: give a text-to-image checkpoint"
            )
        return channels, 2 ** (len(vae["encoder_block_out_channels"]) - 1)

    def pipeline_class_name(self, info: CheckpointInfo) -> str:
        return self._pipeline_class_of(info).__name__

    def _pipeline_class_of(self, info: CheckpointInfo) -> type[DiffusionPipeline]:
        return SanaSprintPipeline if _is_sprint(info.network_config) else SanaPipeline  # type: ignore[no-any-return]

    def _tokenizer(self, folder: Path, name: str) -> GemmaTokenizer:
        if (folder / name / "tokenizer.json").is_file():
            return GemmaTokenizer.from_pretrained(folder / name, local_files_only=True)
        # Gemma's vocabulary is not packaged, and for an outline's shapes any will do that reads the instruction by words
        return tiny.gemma_tokenizer(" ".join(_default_argument("complex_human_instruction")))

    def encoder_files(self, info: CheckpointInfo, part: Literal["text", "images"]) -> dict[str, Path]:
        found = super().encoder_files(info, part)
        if part == "text":
            # the instruction that goes before every prompt is written there
            found["pipeline of diffusers"] = Path(inspect.getfile(self._pipeline_class_of(info)))
        return found

    def encoding_bytes(self, info: CheckpointInfo, dtype: torch.dtype) -> int:
        hidden = int(read_json(info.folder / "text_encoder" / "config.json")["hidden_size"])
        told = torch.float32.itemsize if _is_sprint(info.network_config) else 0
        return MAX_SEQUENCE_LENGTH * (hidden * dtype.itemsize + torch.int64.itemsize) + told

    # ---------------------------------------------------------------- prompts

    def encode(
        self, checkpoint: Checkpoint, prompts: Sequence[str], sizes: Sequence[MicroConditioning]
    ) -> Conditioning:
        instruction = _default_argument("complex_human_instruction", self._pipeline_class_of(checkpoint.info))
        return _encode_prompts(checkpoint, prompts, instruction)

    def null(
        self, checkpoint: Checkpoint, sizes: Sequence[MicroConditioning], negative_prompt: str = ""
    ) -> Conditioning:
        """The negative prompt without the instruction; Sprint's pipeline has no such branch, and gets Sana's."""
        return _encode_prompts(checkpoint, [negative_prompt] * len(sizes), None)

    # ---------------------------------------------------------------- the network

    def call(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        config: Any = network.config
        if cond.second_time is not None:
            raise UserError(
                "the conditioning has a second time, which Sana's transformer has no input for: use a method with one time"
            )
        if config.guidance_embeds != (cond.guidance is not None):
            raise UserError(
                f"the conditioning has {'no' if cond.guidance is None else 'a'} guidance scale to embed, and the transformer's "
                f"guidance_embeds is {config.guidance_embeds}: use conditioning that was encoded for this checkpoint"
            )
        time, guidance = NUM_TRAIN_TIMESTEPS * config.timestep_scale * t, None
        if cond.guidance is not None:
            time, guidance = t, cond.guidance.to(cond.text) * config.guidance_embeds_scale
        out: Tensor = network(
            x_t,
            encoder_hidden_states=cond.text,
            timestep=time.float(),
            guidance=guidance,
            encoder_attention_mask=cond.mask,
            return_dict=False,
        )[0]
        # a learned variance comes after the velocity
        return out[:, : x_t.shape[1]]

    def tokens(self, output: Any) -> Tensor:
        """The block's whole output: text comes in by cross-attention only."""
        tokens: Tensor = output
        return tokens

    def stock_recipe(self, info: CheckpointInfo, recipe: Recipe) -> Recipe:
        """As given but without the pipeline's own choice of a size; Sprint's scheduler gets angles, and its network its w."""
        call: dict[str, Any] = {"use_resolution_binning": False}
        if not _is_sprint(info.network_config):
            return replace(recipe, call=call)
        if recipe.transition().kind is not TransitionKind.RENOISE:
            raise UserError(
                f"Sana-Sprint's pipeline re-noises after every step, and the student is to be sampled by {recipe.scheduler_class}: let "
                "it re-noise (method.transition: renoise, method.eta: 1 for tcd), or distil a Sana checkpoint"
            )
        times = recipe.native_timesteps(info.schedule)
        if times[0] < info.schedule.terminal_time:
            raise UserError(
                f"Sana-Sprint's pipeline starts from noise alone, and the student's ladder starts at {times[0]:g}: let it start at "
                f"{info.schedule.terminal_time:g}"
            )
        angles = info.schedule.angle(torch.tensor(times, dtype=torch.float64))
        even = torch.linspace(float(angles[0]), 0, len(angles) + 1, dtype=torch.float64)[:-1]
        # its call has no working argument for a ladder: timesteps reach the scheduler without their number
        if len(angles) != 2 and not torch.allclose(angles, even, atol=1e-3, rtol=0):
            ladder = [round(t, 4) for t in info.schedule.time_at_angle(even).tolist()]
            raise UserError(
                f"Sana-Sprint's pipeline walks {len(angles)} steps at even angles only, and the student's ladder has others: remove "
                f"method.timesteps or method.angles, or set the former to {ladder}"
            )
        walked = angles if len(angles) == 2 else even
        return replace(
            recipe,
            scheduler_class=TRIGFLOW_SCHEDULER,
            scheduler_config={},
            prediction_type="trigflow",
            sigmas=(),
            angles=tuple(walked.tolist()),
            guidance_scale=DEFAULT_GUIDANCE_SCALE,
            call={
                **call,
                "max_timesteps": float(walked[0]),
                "intermediate_timesteps": float(walked[1]) if len(walked) == 2 else None,
            },
        )

    # ---------------------------------------------------------------- the autoencoder

    def posterior(self, checkpoint: Checkpoint, images: Tensor) -> Posterior:
        """A point: the autoencoder is deterministic."""
        vae: AutoencoderDC = stock_pipeline(checkpoint).vae
        with torch.autocast(images.device.type, enabled=False):
            mean = vae.encode(images.to(vae.dtype)).latent * vae.config.scaling_factor
        return Posterior(mean, torch.zeros_like(mean))

    def decode(self, checkpoint: Checkpoint, latents: Tensor) -> Tensor:
        vae: AutoencoderDC = stock_pipeline(checkpoint).vae
        with torch.autocast(latents.device.type, enabled=False):
            images = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
        return (images / 2 + 0.5).clamp(0, 1)  # type: ignore[no-any-return]

    # ---------------------------------------------------------------- the test bed

    def write_tiny(self, folder: Path, variant: str = "default", seed: int = 0) -> None:
        """Images of 32 x 32 pixels, the least that the pipeline takes, to 8 x 8 latents."""
        sprint = variant == "sprint"
        tokenizer = tiny.gemma_tokenizer(" ".join(_default_argument("complex_human_instruction")))
        with tiny.seeded(seed):
            pipeline = (SanaSprintPipeline if sprint else SanaPipeline)(
                tokenizer=tokenizer,
                text_encoder=tiny.gemma(len(tokenizer), width=32),
                vae=tiny.dc_autoencoder(scaling_factor=0.41),
                transformer=tiny.sana_transformer(
                    caption_channels=32, guidance_embeds=sprint, qk_norm="rms_norm_across_heads" if sprint else None
                ),
                scheduler=SCMScheduler() if sprint else DPMSolverMultistepScheduler(**TINY_SCHEDULER),
            )
        pipeline.save_pretrained(folder, safe_serialization=True)


def _is_sprint(network_config: Mapping[str, Any]) -> bool:
    """Sana's pipeline has no guidance to tell the network, and Sprint's tells it always."""
    return bool(network_config.get("guidance_embeds", False))


@torch.no_grad()
def _encode_prompts(checkpoint: Checkpoint, prompts: Sequence[str], instruction: list[str] | None) -> Conditioning:
    pipeline = stock_pipeline(checkpoint)
    sprint = _is_sprint(checkpoint.info.network_config)
    text, mask, *_ = pipeline.encode_prompt(
        list(prompts),
        device=pipeline.text_encoder.device,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        complex_human_instruction=instruction,
        **({} if sprint else {"do_classifier_free_guidance": False}),
    )
    guidance = torch.full((len(prompts),), DEFAULT_GUIDANCE_SCALE, device=text.device) if sprint else None
    return Conditioning(text, mask=mask, guidance=guidance)
