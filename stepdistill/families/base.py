"""What the rest of the house may ask of a family. Nothing outside a family file knows a network's conventions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.errors import UserError
from stepdistill.families.common.guidance_embedding import GuidanceEmbeddingTarget
from stepdistill.families.conditioning import Conditioning, MicroConditioning
from stepdistill.families.recipe import Recipe

CheckpointPart: TypeAlias = Literal["network", "text", "images"]
"""What can be left out of memory: the denoising network, the text encoders, the encoder half of the autoencoder."""
ALL_PARTS: frozenset[CheckpointPart] = frozenset(("network", "text", "images"))


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says of itself; read from JSON alone, before any weight is loaded.

    Attributes:
        source: the folder, hub id or file as the user wrote it.
        folder: the local diffusers folder whose configs are used.
        single_file: the `.safetensors` file in the original key format, where the weights come from one.
        family: registered name.
        network_config: `config.json` of the denoising network.
        scheduler_config: `scheduler_config.json`.
        schedule: the noise schedule of that config.
        latent_channels: channels of x_t.
        downsampling: image pixels per latent pixel, along each side.
        default_size: (height, width) in pixels that the checkpoint draws by default.
        licence: SPDX-like id of the model card, None where the folder has none.
        latent_multiple: what the sides of x_t must be multiples of.
    """

    source: str
    folder: Path
    single_file: Path | None
    family: str
    network_config: Mapping[str, Any]
    scheduler_config: Mapping[str, Any]
    schedule: NoiseSchedule
    latent_channels: int
    downsampling: int
    default_size: tuple[int, int]
    licence: str | None = None
    latent_multiple: int = 2

    def latent_shape(self, size: tuple[int, int] | None = None) -> tuple[int, int, int]:
        """(C, h, w) of x_t for an image of (height, width) pixels."""
        height, width = size or self.default_size
        return self.latent_channels, height // self.downsampling, width // self.downsampling


@dataclass
class Checkpoint:
    """A loaded checkpoint. `pipeline` holds the stock diffusers pipeline (its network included); None for `analytic`.

    A network that was left out is on the meta device: its config and shapes are there, its weights are not.
    """

    info: CheckpointInfo
    network: nn.Module
    pipeline: DiffusionPipeline | None


@dataclass(frozen=True)
class Posterior:
    """Gaussian over the scaled latents of B images, as the autoencoder gives it: mean and std, (B, C, h, w), in its dtype."""

    mean: Tensor
    std: Tensor

    def draw(self, noise: Tensor | None) -> Tensor:
        """The latents that standard normal noise of the mean's shape leads to; the mean where there is none."""
        return self.mean if noise is None else self.mean + self.std * noise.to(self.mean)


class Family(ABC):
    """A family of checkpoints. Instances hold no state."""

    name: ClassVar[str]
    pipeline_name: ClassVar[str]
    """Class name in `model_index.json` (the text-to-image pipeline that exports are loaded with)."""
    other_pipelines: ClassVar[tuple[str, ...]] = ()
    """Further class names there that the family reads."""
    network_component: ClassVar[str]
    """Attribute of the pipeline that holds the network: `unet` or `transformer`; also the prefix of LoRA keys."""

    @abstractmethod
    def inspect(self, source: str, folder: Path, single_file: Path | None) -> CheckpointInfo:
        """Read and check the configs of a checkpoint; loads no weight. Raises UserError."""

    @abstractmethod
    def load(
        self,
        info: CheckpointInfo,
        dtype: torch.dtype,
        device: torch.device | str,
        parts: frozenset[CheckpointPart] = ALL_PARTS,
    ) -> Checkpoint:
        """Load network and pipeline components; the network frozen, in eval mode; the VAE in float32 or better.

        Of a part that is not in `parts` no weight stays in memory. Decoding comes with the network.
        """

    @abstractmethod
    def build_on_meta(self, info: CheckpointInfo, dtype: torch.dtype) -> Checkpoint:
        """What `load` gives, in the same dtypes, with every weight on the meta device; no weight file is looked for."""

    def pipeline_class_name(self, info: CheckpointInfo) -> str:
        """Class name of the checkpoint's own pipeline, which its exports are loaded with."""
        return self.pipeline_name

    def omitted_components(self, info: CheckpointInfo) -> tuple[str, ...]:
        """Components that the checkpoint is without and the pipeline's loader must be told `None` for."""
        return ()

    @abstractmethod
    def call(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The network's raw output in the schedule's prediction type (sign and extra channels mended), shape of x_t.

        t has shape (B,), native times of the schedule; the family converts it to what its network wants. The network is given
        x_t by position, first: so its calls are counted.
        """

    @abstractmethod
    def encode(
        self, checkpoint: Checkpoint, prompts: Sequence[str], sizes: Sequence[MicroConditioning]
    ) -> Conditioning:
        """Conditioning of prompts, B rows, equal to what the stock pipeline passes to its network."""

    @abstractmethod
    def null(
        self, checkpoint: Checkpoint, sizes: Sequence[MicroConditioning], negative_prompt: str = ""
    ) -> Conditioning:
        """The unconditional branch as the stock pipeline builds it for this negative prompt, one row per size."""

    def time_ids(self, sizes: Sequence[MicroConditioning]) -> Tensor | None:
        """What `encode` makes of the sizes alone, (B, 6), on the CPU; None where sizes condition nothing."""
        return None

    @abstractmethod
    def encoder_files(self, info: CheckpointInfo, part: Literal["text", "images"]) -> dict[str, Path]:
        """Name in the checkpoint -> file, of all that decides what `encode` and `null`, or `posterior`, say.

        Raises:
            UserError: the weights are not there.
        """

    @abstractmethod
    def encoding_bytes(self, info: CheckpointInfo, dtype: torch.dtype) -> int:
        """Bytes of one prompt's conditioning where the text encoders run in `dtype`, its time ids left out."""

    @abstractmethod
    def posterior(self, checkpoint: Checkpoint, images: Tensor) -> Posterior:
        """What the autoencoder says of images (B, 3, H, W) in [-1, 1]."""

    def encode_images(self, checkpoint: Checkpoint, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled (and shifted) latents of images (B, 3, H, W) in [-1, 1]; posterior mean, or a sample if noise is given."""
        return self.posterior(checkpoint, images).draw(noise)

    @abstractmethod
    def decode(self, checkpoint: Checkpoint, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of scaled latents."""

    @abstractmethod
    def feature_module(self, network: nn.Module) -> nn.Module:
        """The module whose output a discriminator head reads (UNets: the mid block)."""

    def feature_map(self, network: nn.Module, output: Any, x_t: Tensor) -> Tensor:
        """(B, C, h, w) of what that module returned for x_t: a map already, or flat features, where h = w = 1."""
        features: Tensor = output
        return features[..., None, None] if features.ndim == 2 else features

    @abstractmethod
    def feature_channels(self, info: CheckpointInfo) -> int:
        """Channels of that output."""

    @abstractmethod
    def feature_stride(self, info: CheckpointInfo) -> int:
        """Latent pixels per feature pixel, along each side."""

    @abstractmethod
    def lora_targets(self, preset: str) -> tuple[str, ...]:
        """Module-name suffixes for peft of a preset: `attention`, or `all` (DMD2's list of linears and convolutions)."""

    def stock_recipe(self, info: CheckpointInfo, recipe: Recipe) -> Recipe:
        """A method's recipe in the words of the checkpoint's own pipeline.

        Raises:
            UserError: the pipeline cannot sample so.
        """
        return recipe

    def guidance_embedding_target(self, network: nn.Module) -> GuidanceEmbeddingTarget:
        """Where an embedded guidance scale is added, in a network that was made without one.

        Raises:
            UserError: stock pipelines of the family have no such networks.
        """
        raise self._no_guidance_embedding_error()

    def with_guidance_embedding(self, network: nn.Module, weight: Tensor) -> nn.Module:
        """A copy of a network with the embedding inside; `weight` is cond_proj's, (channels, width). Raises as above."""
        raise self._no_guidance_embedding_error()

    def _no_guidance_embedding_error(self) -> UserError:
        return UserError(
            f"the networks of {self.name!r} have no embedding of a guidance scale that stock pipelines feed: set "
            "method.guidance_range to null (of a consistency method method.tell_guidance to false), or use method agd"
        )

    @abstractmethod
    def blocks(self, network: nn.Module) -> list[nn.Module]:
        """The network's blocks in the order in which they run: what a sharded network gathers one at a time.

        The feature module is one of them or outside all: a block that is left in its midst would lose its gradients.
        """

    @abstractmethod
    def enable_gradient_checkpointing(self, network: nn.Module, function: Callable[..., Tensor]) -> None:
        """Checkpoint the network's blocks through `function(module, *args)`; a family without blocks does nothing."""

    @abstractmethod
    def empty_like(self, network: nn.Module) -> nn.Module:
        """A network of the same architecture without adapters, its weights still to be loaded."""

    @abstractmethod
    def write_tiny(self, folder: Path, variant: str = "default", seed: int = 0) -> None:
        """Write a tiny random checkpoint in diffusers format; every variant in `tiny_variants` joins the test matrix."""

    tiny_variants: ClassVar[tuple[str, ...]] = ("default",)
    has_kohya_layout: ClassVar[bool] = True
    """Loaders of kohya's LoRA layout, diffusers' among them, know the network's modules by `lora_COMPONENT_PATH`."""
    is_diffusers_model: ClassVar[bool] = True
    """The network is a model of diffusers, which can be quantised, compiled and given another attention."""
