"""What SD 1.x, SD 2.x and SDXL have in common: a UNet in a diffusers pipeline, a KL autoencoder, CLIP text encoders."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.errors import Refusal
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.families import single_file as files_of_one
from stepdistill.models.families.base import PARTS, Checkpoint, CheckpointInfo, Family, Part, Posterior
from stepdistill.models.families.clip import tokenizer_of
from stepdistill.models.families.weights import ModelClass, check_folder, empty_component
from stepdistill.models.files import licence, read_header, read_json, variant_of, weights
from stepdistill.registry import nearest

LORA_TARGETS: Mapping[str, tuple[str, ...]] = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    # the list of DMD2's SDXL LoRA (Yin et al. 2024, released code)
    "all": (
        "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
        "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
    ),
}  # fmt: skip


class UNetFamily(Family):
    """Shared body; a subclass names its pipeline and says how prompts become conditioning."""

    network_component: ClassVar[str] = "unet"
    pipeline_class: ClassVar[type[DiffusionPipeline]]
    text_encoders: ClassVar[Mapping[str, ModelClass]]
    tokenizers: ClassVar[tuple[str, ...]]

    # ---------------------------------------------------------------- checkpoints

    def inspect(self, source: str, folder: Path, single_file: Path | None) -> CheckpointInfo:
        network = read_json(folder / "unet" / "config.json")
        vae = read_json(folder / "vae" / "config.json")
        scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
        if single_file is not None:
            scheduler |= files_of_one.scheduler_facts(read_header(single_file))
        schedule = _schedule(scheduler, single_file or folder / "scheduler" / "scheduler_config.json")
        channels = network["in_channels"]
        if not channels == network["out_channels"] == vae["latent_channels"]:
            raise Refusal(
                f"the UNet in {str(folder)!r} reads {channels} channels and writes {network['out_channels']}, and the VAE's latents "
                f"have {vae['latent_channels']}: give a text-to-image checkpoint, where the three are equal"
            )
        if vae.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
            raise Refusal(
                f"the VAE in {str(folder)!r} is an {vae['_class_name']}: give a checkpoint with an AutoencoderKL"
            )
        downsampling = 2 ** (len(vae["block_out_channels"]) - 1)
        latent = network["sample_size"]
        height, width = latent if isinstance(latent, list) else (latent, latent)
        return CheckpointInfo(
            source=source,
            folder=folder,
            single_file=single_file,
            family=self.name,
            network_config=network,
            scheduler_config=scheduler,
            schedule=schedule,
            latent_channels=channels,
            downsampling=downsampling,
            default_size=(height * downsampling, width * downsampling),
            licence=licence(folder) if single_file is None else None,
        )

    def load(
        self, info: CheckpointInfo, dtype: torch.dtype, device: torch.device | str, parts: frozenset[Part] = PARTS
    ) -> Checkpoint:
        absent = self._absent(parts)
        with warnings.catch_warnings():
            # diffusers 0.42 renames torch_dtype, which the versions before it know only
            warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
            load = self._load_folder if info.single_file is None else self._load_file
            pipeline = load(info, dtype, absent)
        if "images" not in parts and pipeline.vae is not None:
            pipeline.vae.encoder = pipeline.vae.quant_conv = None
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()
        pipeline.to(device)
        if "unet" in absent:
            with torch.device("meta"):
                return Checkpoint(info, UNet2DConditionModel.from_config(dict(info.network_config)), pipeline)
        return Checkpoint(info, pipeline.unet, pipeline)

    def outline(self, info: CheckpointInfo, dtype: torch.dtype) -> Checkpoint:
        modules: dict[str, Any] = {
            name: empty_component(info.folder, name, model_class) for name, model_class in self._classes().items()
        }
        for name, module in modules.items():
            nn.Module.to(module, torch.float32 if name == "vae" else dtype).requires_grad_(False).eval()
        index = read_json(info.folder / "model_index.json")
        components = {name: None for name, entry in index.items() if isinstance(entry, list)}
        flags = {name: value for name, value in index.items() if name not in components and not name.startswith("_")}
        scheduler = vars(diffusers)[info.scheduler_config["_class_name"]].from_config(dict(info.scheduler_config))
        tokenizers = {name: tokenizer_of(info.folder / name) for name in self.tokenizers}
        pipeline = self.pipeline_class(**{**components, **modules, **tokenizers, **flags, "scheduler": scheduler})
        return Checkpoint(info, pipeline.unet, pipeline)

    def _classes(self) -> dict[str, ModelClass]:
        return {"unet": UNet2DConditionModel, "vae": AutoencoderKL, **self.text_encoders}

    def _absent(self, parts: frozenset[Part]) -> dict[str, None]:
        """Components that are not loaded, as diffusers wants to be told."""
        network = [] if "network" in parts else ["unet"]
        text = [] if "text" in parts else list(self.text_encoders)
        return dict.fromkeys([*network, *text, *([] if parts & {"network", "images"} else ["vae"])])

    def _load_folder(self, info: CheckpointInfo, dtype: torch.dtype, absent: Mapping[str, None]) -> DiffusionPipeline:
        for component, model_class in self._classes().items():
            check_folder(info.folder, component, model_class)
        # diffusers takes the plain file of each component that lacks this variant
        variants = {variant_of(info.folder, component) for component in self._classes()} - {""}
        return self.pipeline_class.from_pretrained(
            info.folder,
            torch_dtype={"default": dtype, "vae": _vae_dtype(dtype)},
            variant=min(variants, default=None),
            use_safetensors=True,
            local_files_only=True,
            **absent,
        )

    def _load_file(self, info: CheckpointInfo, dtype: torch.dtype, absent: Mapping[str, None]) -> DiffusionPipeline:
        path, folder = str(info.single_file), str(info.folder)
        files_of_one.check_file(Path(path), read_header(Path(path)), info.folder, self._classes())
        vae = None
        if "vae" not in absent:
            vae = AutoencoderKL.from_single_file(
                path, config=folder, subfolder="vae", torch_dtype=_vae_dtype(dtype), local_files_only=True
            )
        scheduler_class = vars(diffusers)[info.scheduler_config["_class_name"]]
        return self.pipeline_class.from_single_file(
            path,
            config=folder,
            torch_dtype=dtype,
            local_files_only=True,
            scheduler=scheduler_class.from_config(dict(info.scheduler_config)),
            **{name: tokenizer_of(info.folder / name) for name in self.tokenizers},
            **{**absent, "vae": vae},
        )

    def encoder_files(self, info: CheckpointInfo, part: Literal["text", "images"]) -> dict[str, Path]:
        components = tuple(self.text_encoders) if part == "text" else ("vae",)
        paths = [info.folder / component / "config.json" for component in components]
        if info.single_file is None:
            paths += [path for name in components for path in weights(info.folder, name)[variant_of(info.folder, name)]]
        if part == "text":
            # the index says whether an empty prompt is zeros
            paths.append(info.folder / "model_index.json")
            paths += [path for name in self.tokenizers for path in sorted((info.folder / name).glob("*"))]
        found = {path.relative_to(info.folder).as_posix(): path for path in paths if path.is_file()}
        return found if info.single_file is None else {**found, "single file": info.single_file}

    def encoding_bytes(self, info: CheckpointInfo, dtype: torch.dtype) -> int:
        configs = [read_json(info.folder / name / "config.json") for name in self.text_encoders]
        told = read_json(info.folder / self.tokenizers[0] / "tokenizer_config.json").get("model_max_length")
        longest = int(configs[0]["max_position_embeddings"])
        tokens = longest if told is None else min(longest, int(told))
        return tokens * sum(int(config["hidden_size"]) for config in configs) * dtype.itemsize

    # ---------------------------------------------------------------- the network

    def call(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        if cond.second_time is not None:
            raise Refusal(
                "the conditioning has a second time, which a UNet has no input for: use a method with one time"
            )
        guidance = None
        if cond.guidance is not None:
            width: int | None = network.config.time_cond_proj_dim  # type: ignore[union-attr, assignment]
            if width is None:
                raise Refusal(
                    "the conditioning has a guidance scale to embed, and the UNet's time_cond_proj_dim is null: use a network "
                    "with that input, or guidance by two calls"
                )
            guidance = guidance_embedding(cond.guidance, width).to(x_t)
        return network(  # type: ignore[no-any-return]
            x_t,
            t.float(),
            encoder_hidden_states=cond.text,
            timestep_cond=guidance,
            added_cond_kwargs=self.added_conditioning(cond),
            return_dict=False,
        )[0]

    def added_conditioning(self, cond: Conditioning) -> dict[str, Tensor] | None:
        """`added_cond_kwargs` of the UNet: what it is told beside the text."""
        return None

    def empty_like(self, network: nn.Module) -> nn.Module:
        return UNet2DConditionModel.from_config(network.config)  # type: ignore[no-any-return]

    def feature_module(self, network: nn.Module) -> nn.Module:
        module = network.mid_block
        if not isinstance(module, nn.Module):
            raise Refusal(
                "the UNet has no mid block, which a discriminator head reads: use a checkpoint with one, or no GAN term"
            )
        return module

    def feature_channels(self, info: CheckpointInfo) -> int:
        return int(info.network_config["block_out_channels"][-1])

    def feature_stride(self, info: CheckpointInfo) -> int:
        return int(2 ** (len(info.network_config["block_out_channels"]) - 1))

    def lora_targets(self, preset: str) -> tuple[str, ...]:
        if preset not in LORA_TARGETS:
            raise Refusal(
                f"there is no preset of LoRA targets named {preset!r}: {nearest(preset, tuple(LORA_TARGETS))}"
            )
        return LORA_TARGETS[preset]

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        middle = [network.mid_block] if isinstance(network.mid_block, nn.Module) else []
        return [*network.down_blocks, *middle, *network.up_blocks]  # type: ignore[misc]

    def enable_gradient_checkpointing(self, network: nn.Module, function: Callable[..., Tensor]) -> None:
        network.enable_gradient_checkpointing(function)  # type: ignore[operator]

    # ---------------------------------------------------------------- the autoencoder

    def posterior(self, checkpoint: Checkpoint, images: Tensor) -> Posterior:
        vae = _vae(checkpoint)
        with torch.autocast(images.device.type, enabled=False):
            raw = vae.encode(images.to(vae.dtype)).latent_dist
        shift, scale = _shift_and_scale(vae, raw.mean)
        return Posterior((raw.mean - shift) * scale, raw.std * scale)

    def decode(self, checkpoint: Checkpoint, latents: Tensor) -> Tensor:
        vae = _vae(checkpoint)
        latents = latents.to(vae.dtype)
        shift, scale = _shift_and_scale(vae, latents)
        with torch.autocast(latents.device.type, enabled=False):
            images = vae.decode(latents / scale + shift).sample
        return (images / 2 + 0.5).clamp(0, 1)


def guidance_embedding(w: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding (B, width) of 1000 (w - 1), as diffusers' LCM pipeline feeds it to `time_cond_proj_dim`.

    w: guidance scale, (B,), 1 = off (Meng et al. 2023, in whose convention it is w - 1).
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=w.device) * (-math.log(10000.0) / (half - 1)))
    angles = 1000 * (w.float()[:, None] - 1) * frequencies
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, width % 2))


def stock_pipeline(checkpoint: Checkpoint) -> Any:
    """The checkpoint's diffusers pipeline, of the family's `pipeline_class`."""
    if checkpoint.pipeline is None:
        raise RuntimeError(f"the checkpoint {checkpoint.info.source!r} was loaded without its pipeline")
    return checkpoint.pipeline


def _vae_dtype(dtype: torch.dtype) -> torch.dtype:
    """SDXL's autoencoder overflows in half precision; float64 is for tests that compare layouts of the same work."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _vae(checkpoint: Checkpoint) -> AutoencoderKL:
    vae: AutoencoderKL = stock_pipeline(checkpoint).vae
    return vae


def _shift_and_scale(vae: AutoencoderKL, like: Tensor) -> tuple[Tensor, Tensor]:
    """(shift, scale) of latents = (raw - shift) scale, broadcast over `like`; some SDXL fine-tunes have them per channel."""
    config = vae.config
    scale = torch.as_tensor(config.scaling_factor).to(like)
    if config.latents_mean is not None and config.latents_std is not None:
        mean, std = (
            torch.tensor(values).to(like).reshape(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std)
        )
        return mean, scale / std
    return torch.as_tensor(config.shift_factor or 0.0).to(like), scale


def _schedule(config: Mapping[str, Any], origin: Path) -> NoiseSchedule:
    try:
        schedule = NoiseSchedule.from_config(config)
    except Refusal as refusal:
        raise Refusal(f"in {str(origin)!r} {refusal}") from None
    if schedule.is_flow:
        raise Refusal(
            f"{str(origin)!r} describes flow matching, and the UNets of SD and SDXL are called with VP timesteps: "
            "restore the scheduler config of the original checkpoint"
        )
    return schedule
