"""What every family of a diffusers pipeline has in common: how its parts are read, loaded, outlined, and identified."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stepdistill.config.registry import suggestion_for
from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.errors import UserError
from stepdistill.families.base import ALL_PARTS, Checkpoint, CheckpointInfo, CheckpointPart, Family, Posterior
from stepdistill.families.checkpoints.component_check import ModelClass, check_folder, empty_component
from stepdistill.families.checkpoints.files import components, licence, read_json, variant_of, weights
from stepdistill.families.checkpoints.schedulers import scheduler_class
from stepdistill.families.common.clip_tokenizer import tokenizer_of


class PipelineFamily(Family):
    """Shared body; a subclass names its pipeline and networks and says how prompts become conditioning."""

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    network_class: ClassVar[ModelClass]
    vae_class: ClassVar[ModelClass] = AutoencoderKL
    text_encoders: ClassVar[Mapping[str, ModelClass]]
    optional_encoders: ClassVar[frozenset[str]] = frozenset()
    """Text encoders that a checkpoint may be without: its `model_index.json` nulls or omits them."""
    tokenizers: ClassVar[tuple[str, ...]]
    """In the order of the text encoders, to which they belong."""
    lora_presets: ClassVar[Mapping[str, tuple[str, ...]]]

    # ---------------------------------------------------------------- checkpoints

    def inspect(self, source: str, folder: Path, single_file: Path | None) -> CheckpointInfo:
        network = read_json(folder / self.network_component / "config.json")
        vae = read_json(folder / "vae" / "config.json")
        scheduler = self._scheduler_config(folder, single_file)
        schedule = self._schedule(scheduler, single_file or folder / "scheduler" / "scheduler_config.json")
        channels, downsampling = self._latent_space(folder, network, vae)
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

    def _latent_space(self, folder: Path, network: Mapping[str, Any], vae: Mapping[str, Any]) -> tuple[int, int]:
        """(channels, image pixels per latent pixel) of two configs. Raises UserError where they do not fit together."""
        channels = network["in_channels"]
        if not channels == network["out_channels"] == vae["latent_channels"]:
            raise UserError(
                f"the {self.network_component} in {str(folder)!r} reads {channels} channels and writes "
                f"{network['out_channels']}, and the VAE's latents have {vae['latent_channels']}: give a text-to-image "
                "checkpoint, where the three are equal"
            )
        if vae.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
            raise UserError(
                f"the VAE in {str(folder)!r} is an {vae['_class_name']}: give a checkpoint with an AutoencoderKL"
            )
        return channels, 2 ** (len(vae["block_out_channels"]) - 1)

    def _pipeline_class_of(self, info: CheckpointInfo) -> type[DiffusionPipeline]:
        """The class of the checkpoint's pipeline."""
        return self.pipeline_class

    def _scheduler_config(self, folder: Path, single_file: Path | None) -> dict[str, Any]:
        return read_json(folder / "scheduler" / "scheduler_config.json")

    @abstractmethod
    def _schedule(self, config: Mapping[str, Any], origin: Path) -> NoiseSchedule:
        """The noise schedule of a scheduler config found at `origin`. Raises UserError where it is not the family's kind."""

    def load(
        self,
        info: CheckpointInfo,
        dtype: torch.dtype,
        device: torch.device | str,
        parts: frozenset[CheckpointPart] = ALL_PARTS,
    ) -> Checkpoint:
        absent = self._components_to_skip(parts)
        with warnings.catch_warnings():
            # diffusers 0.42 renames torch_dtype, which the versions before it know only
            warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
            pipeline = self._load(info, dtype, absent)
        if "images" not in parts and pipeline.vae is not None:
            pipeline.vae.encoder = pipeline.vae.quant_conv = None
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()
        pipeline.to(device)
        if self.network_component in absent:
            with torch.device("meta"):
                return Checkpoint(info, self.network_class.from_config(dict(info.network_config)), pipeline)
        return Checkpoint(info, pipeline.components[self.network_component], pipeline)

    def build_on_meta(self, info: CheckpointInfo, dtype: torch.dtype) -> Checkpoint:
        missing = self.omitted_components(info)
        modules: dict[str, Any] = {
            name: empty_component(info.folder, name, model_class)
            for name, model_class in self._component_classes(info.folder).items()
        }
        for name, module in modules.items():
            nn.Module.to(module, torch.float32 if name == "vae" else dtype).requires_grad_(False).eval()
            if dtype == torch.float16 and isinstance(module, PreTrainedModel):
                _restore_float32(module)
        index = read_json(info.folder / "model_index.json")
        absent = {name: None for name, entry in index.items() if isinstance(entry, list)}
        flags = {name: value for name, value in index.items() if name not in absent and not name.startswith("_")}
        scheduler = scheduler_class(info.scheduler_config["_class_name"]).from_config(dict(info.scheduler_config))
        tokenizers = {name: self._tokenizer(info.folder, name) for name in self.tokenizers if name not in missing}
        pipeline = self._pipeline_class_of(info)(**{**absent, **modules, **tokenizers, **flags, "scheduler": scheduler})
        return Checkpoint(info, modules[self.network_component], pipeline)

    def omitted_components(self, info: CheckpointInfo) -> tuple[str, ...]:
        lacking = self.optional_encoders - set(components(info.folder))
        pairs = zip(self.text_encoders, self.tokenizers, strict=True)
        return tuple(name for pair in pairs if pair[0] in lacking for name in pair)

    def _present_text_encoders(self, folder: Path) -> dict[str, ModelClass]:
        """The text encoders that the checkpoint has."""
        lacking = self.optional_encoders - set(components(folder))
        return {name: model_class for name, model_class in self.text_encoders.items() if name not in lacking}

    def _tokenizer(self, folder: Path, name: str) -> PreTrainedTokenizerBase:
        return tokenizer_of(folder / name)

    def _component_classes(self, folder: Path) -> dict[str, ModelClass]:
        """Component -> class, of every component with weights."""
        return {
            self.network_component: self.network_class,
            "vae": self.vae_class,
            **self._present_text_encoders(folder),
        }

    def _components_to_skip(self, parts: frozenset[CheckpointPart]) -> dict[str, None]:
        """Components that are not loaded, as diffusers wants to be told."""
        network = [] if "network" in parts else [self.network_component]
        text = [] if "text" in parts else list(self.text_encoders)
        return dict.fromkeys([*network, *text, *([] if parts & {"network", "images"} else ["vae"])])

    def _load(self, info: CheckpointInfo, dtype: torch.dtype, absent: Mapping[str, None]) -> DiffusionPipeline:
        classes = self._component_classes(info.folder)
        for component, model_class in classes.items():
            check_folder(info.folder, component, model_class)
        # diffusers takes the plain file of each component that lacks this variant
        variants = {variant_of(info.folder, component) for component in classes} - {""}
        return self._pipeline_class_of(info).from_pretrained(
            info.folder,
            torch_dtype={"default": dtype, "vae": vae_dtype(dtype)},
            variant=min(variants, default=None),
            use_safetensors=True,
            local_files_only=True,
            **{**absent, **dict.fromkeys(self.omitted_components(info))},
        )

    def encoder_files(self, info: CheckpointInfo, part: Literal["text", "images"]) -> dict[str, Path]:
        names = tuple(self._present_text_encoders(info.folder)) if part == "text" else ("vae",)
        paths = [info.folder / component / "config.json" for component in names]
        if info.single_file is None:
            paths += [path for name in names for path in weights(info.folder, name)[variant_of(info.folder, name)]]
        if part == "text":
            # the index says whether an empty prompt is zeros, and which encoders there are
            paths.append(info.folder / "model_index.json")
            paths += [path for name in self.tokenizers for path in sorted((info.folder / name).glob("*"))]
        found = {path.relative_to(info.folder).as_posix(): path for path in paths if path.is_file()}
        return found if info.single_file is None else {**found, "single file": info.single_file}

    # ---------------------------------------------------------------- the network

    def empty_like(self, network: nn.Module) -> nn.Module:
        return self.network_class.from_config(network.config)  # type: ignore[no-any-return]

    def lora_targets(self, preset: str) -> tuple[str, ...]:
        if preset not in self.lora_presets:
            raise UserError(
                f"there is no preset of LoRA targets named {preset!r}: {suggestion_for(preset, tuple(self.lora_presets))}"
            )
        return self.lora_presets[preset]

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
        return (images / 2 + 0.5).clamp(0, 1)  # type: ignore[no-any-return]


def stock_pipeline(checkpoint: Checkpoint) -> Any:
    """The checkpoint's diffusers pipeline, of the family's `pipeline_class`."""
    if checkpoint.pipeline is None:
        raise RuntimeError(f"the checkpoint {checkpoint.info.source!r} was loaded without its pipeline")
    return checkpoint.pipeline


def vae_dtype(dtype: torch.dtype) -> torch.dtype:
    """SDXL's autoencoder overflows in half precision; float64 is for tests that compare layouts of the same work."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def read_schedule(config: Mapping[str, Any], origin: Path) -> NoiseSchedule:
    """`NoiseSchedule.from_config`, with the file named in what it refuses."""
    try:
        return NoiseSchedule.from_config(config)
    except UserError as refusal:
        raise UserError(f"in {str(origin)!r} {refusal}") from None


def _restore_float32(encoder: PreTrainedModel) -> None:
    """What transformers keeps in float32 where the rest of a text encoder is in float16: T5's wide layers overflow."""
    kept = encoder._keep_in_fp32_modules or ()
    for path, module in encoder.named_modules():
        if path.rpartition(".")[2] in kept:
            module.float()


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
