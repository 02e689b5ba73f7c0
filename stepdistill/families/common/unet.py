"""What SD 1.x, SD 2.x and SDXL have in common: a UNet, a KL autoencoder, CLIP text encoders, checkpoints of one file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.errors import UserError
from stepdistill.families.base import CheckpointInfo
from stepdistill.families.checkpoints import single_file as single_file_format
from stepdistill.families.checkpoints.files import read_header, read_json
from stepdistill.families.checkpoints.schedulers import scheduler_class
from stepdistill.families.checkpoints.weights import ModelClass
from stepdistill.families.common.guidance_embedding import GuidanceEmbeddingTarget, guidance_embedding
from stepdistill.families.common.pipeline import PipelineFamily, read_schedule, vae_dtype
from stepdistill.families.conditioning import Conditioning


class UNetFamily(PipelineFamily):
    """Shared body; a subclass names its pipeline and says how prompts become conditioning."""

    network_component: ClassVar[str] = "unet"
    network_class: ClassVar[ModelClass] = UNet2DConditionModel
    lora_presets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": ("to_q", "to_k", "to_v", "to_out.0"),
        # the list of DMD2's SDXL LoRA (Yin et al. 2024, released code)
        "all": (
            "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
            "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
        ),
    }  # fmt: skip

    # ---------------------------------------------------------------- checkpoints

    def _scheduler_config(self, folder: Path, single_file: Path | None) -> dict[str, Any]:
        config = super()._scheduler_config(folder, single_file)
        return (
            config
            if single_file is None
            else {**config, **single_file_format.scheduler_overrides(read_header(single_file))}
        )

    def _schedule(self, config: Mapping[str, Any], origin: Path) -> NoiseSchedule:
        schedule = read_schedule(config, origin)
        if schedule.is_flow:
            raise UserError(
                f"{str(origin)!r} describes flow matching, and the UNets of SD and SDXL are called with VP timesteps: "
                "restore the scheduler config of the original checkpoint"
            )
        return schedule

    def _load(self, info: CheckpointInfo, dtype: torch.dtype, absent: Mapping[str, None]) -> DiffusionPipeline:
        if info.single_file is None:
            return super()._load(info, dtype, absent)
        path, folder = str(info.single_file), str(info.folder)
        single_file_format.check_single_file(
            Path(path), read_header(Path(path)), info.folder, self._component_classes(info.folder)
        )
        vae = None
        if "vae" not in absent:
            vae = AutoencoderKL.from_single_file(
                path, config=folder, subfolder="vae", torch_dtype=vae_dtype(dtype), local_files_only=True
            )
        return self.pipeline_class.from_single_file(
            path,
            config=folder,
            torch_dtype=dtype,
            local_files_only=True,
            scheduler=scheduler_class(info.scheduler_config["_class_name"]).from_config(dict(info.scheduler_config)),
            **{name: self._tokenizer(info.folder, name) for name in self.tokenizers},
            **{**absent, "vae": vae},
        )

    def encoding_bytes(self, info: CheckpointInfo, dtype: torch.dtype) -> int:
        configs = [read_json(info.folder / name / "config.json") for name in self.text_encoders]
        told = read_json(info.folder / self.tokenizers[0] / "tokenizer_config.json").get("model_max_length")
        longest = int(configs[0]["max_position_embeddings"])
        tokens = longest if told is None else min(longest, int(told))
        return tokens * sum(int(config["hidden_size"]) for config in configs) * dtype.itemsize

    # ---------------------------------------------------------------- the network

    def call(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        if cond.second_time is not None:
            raise UserError(
                "the conditioning has a second time, which a UNet has no input for: use a method with one time"
            )
        guidance = None
        if cond.guidance is not None:
            width: int | None = network.config.time_cond_proj_dim  # type: ignore[union-attr, assignment]
            if width is None:
                raise UserError(
                    "the conditioning has a guidance scale to embed, and the UNet's time_cond_proj_dim is null: use a network "
                    "with that input, or guidance by two calls"
                )
            guidance = guidance_embedding(cond.guidance, width).to(x_t)
        return network(  # type: ignore[no-any-return]
            x_t,
            t.float(),
            encoder_hidden_states=cond.text,
            timestep_cond=guidance,
            added_cond_kwargs=self.added_cond_kwargs(cond),
            return_dict=False,
        )[0]

    def added_cond_kwargs(self, cond: Conditioning) -> dict[str, Tensor] | None:
        """`added_cond_kwargs` of the UNet: what it is told beside the text."""
        return None

    def feature_module(self, network: nn.Module) -> nn.Module:
        module = network.mid_block
        if not isinstance(module, nn.Module):
            raise UserError(
                "the UNet has no mid block, which a discriminator head reads: use a checkpoint with one, or no GAN term"
            )
        return module

    def feature_channels(self, info: CheckpointInfo) -> int:
        return int(info.network_config["block_out_channels"][-1])

    def feature_stride(self, info: CheckpointInfo) -> int:
        return int(2 ** (len(info.network_config["block_out_channels"]) - 1))

    def guidance_embedding_target(self, network: nn.Module) -> GuidanceEmbeddingTarget:
        if network.config.time_cond_proj_dim is not None:  # type: ignore[union-attr]
            raise UserError(
                "the UNet is told a guidance scale already (its time_cond_proj_dim is set), and one can be embedded once: give the "
                "checkpoint that it was distilled from"
            )
        module = network.get_submodule("time_embedding")
        return GuidanceEmbeddingTarget(module, module.linear_1.in_features)  # type: ignore[union-attr, arg-type]

    def with_guidance_embedding(self, network: nn.Module, weight: Tensor) -> nn.Module:
        # (the names of what was left at its default are in there too, and would be set back to it)
        config = {key: value for key, value in network.config.items() if not key.startswith("_")}  # type: ignore[union-attr, operator]
        embedded = self.network_class.from_config({**config, "time_cond_proj_dim": weight.shape[1]})
        state = {**network.state_dict(), "time_embedding.cond_proj.weight": weight}
        embedded.load_state_dict(state)
        return embedded.to(weight).eval().requires_grad_(False)  # type: ignore[no-any-return]

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        middle = [network.mid_block] if isinstance(network.mid_block, nn.Module) else []
        return [*network.down_blocks, *middle, *network.up_blocks]  # type: ignore[misc]
