"""Small problems with known answers: schedules, the analytic teacher, a random U-Net that needs no checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.prediction import Prediction
from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.families.analytic import Analytic, Mixture, MixtureNetwork
from stepdistill.families.common.guidance_embedding import GuidanceEmbeddingTarget
from stepdistill.families.common.unet import UNetFamily
from stepdistill.families.conditioning import Conditioning
from stepdistill.methods.base import Batch, Problem
from stepdistill.roles.lora import LoraSettings
from stepdistill.roles.triple import FAKE_SCORE, GENERATOR, RoleLayout, Triple

SD = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}


def vp(prediction: Prediction = Prediction.EPSILON, **changes: Any) -> NoiseSchedule:
    """Stable Diffusion's schedule."""
    return NoiseSchedule.from_config({**SD, "prediction_type": prediction.value, **changes})


def flow(shift: float = 1.0) -> NoiseSchedule:
    return NoiseSchedule.flow(shift)


SCHEDULES: dict[str, Callable[[], NoiseSchedule]] = {
    "eps": vp,
    "v": partial(vp, Prediction.V),
    "flow": flow,
    "flow-shift-3": partial(flow, 3.0),
}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draws(batch: Sequence[int] = range(4), role: str = GENERATOR, step: int = 0) -> Draws:
    return Draws(0, step, role, batch, dtype=torch.float64)


# ---------------------------------------------------------------- the analytic teacher

DIMENSION = 3


def gaussian(mean: Sequence[float] | Tensor, std: float = 0.5) -> Mixture:
    """One Gaussian as a mixture."""
    means = torch.as_tensor(mean, dtype=torch.float64)[None]
    return Mixture(means, torch.ones(1, dtype=torch.float64), std)


def four_modes(weights: Sequence[float] = (0.1, 0.2, 0.3, 0.4), std: float = 0.25) -> Mixture:
    """Four modes on a circle of radius 2."""
    angles = torch.arange(4, dtype=torch.float64) * torch.pi / 2
    return Mixture(2 * torch.stack([angles.cos(), angles.sin()], 1), torch.tensor(weights, dtype=torch.float64), std)


def mixture_network(mixture: Mixture, schedule: NoiseSchedule, width: int = 16, seed: int = 0) -> MixtureNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MixtureNetwork(mixture, schedule, width).double()


def analytic_triple(
    mixture: Mixture, schedule: NoiseSchedule, fake: Mixture | None = None, mode: str = "full", **options: Any
) -> Triple:
    """Roles on a mixture; `fake` replaces the mixture that the fake score knows."""
    layout = layouts(mode, mode, ("fc_in", "fc_mid", "fc_out"))
    triple = Triple(mixture_network(mixture, schedule, **options), Analytic(), schedule, layout)
    if fake is not None:
        triple.networks[FAKE_SCORE].mixture = fake  # type: ignore[assignment]
    return triple


def prompts(count: int, classes: int = 1) -> Conditioning:
    """The empty prompt, `count` times: the whole mixture."""
    return Conditioning(torch.ones(count, 1, classes, dtype=torch.float64))


def batch_of(count: int, classes: int = 1) -> Batch:
    return Batch(prompts(count, classes), prompts(count, classes))


def problem(schedule: NoiseSchedule, dimension: int = DIMENSION, width: int = 16) -> Problem:
    return Problem(schedule, (dimension, 1, 1), width, (1, 1), (8, 8), "toy")


# ---------------------------------------------------------------- a random U-Net


class ToyUNet:
    """What a denoiser and a triple ask of a family, for a bare `UNet2DConditionModel`."""

    name = "toy"

    def call(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return network(x_t, t, cond.text).sample  # type: ignore[no-any-return]

    def feature_module(self, network: nn.Module) -> nn.Module:
        return network.get_submodule("mid_block")

    def feature_map(self, network: nn.Module, output: Tensor, x_t: Tensor) -> Tensor:
        return output

    def guidance_embedding_target(self, network: nn.Module) -> GuidanceEmbeddingTarget:
        return UNetFamily.guidance_embedding_target(self, network)  # type: ignore[arg-type]

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        return UNetFamily.blocks(self, network)  # type: ignore[arg-type]

    def enable_gradient_checkpointing(self, network: nn.Module, function: Callable[..., Tensor]) -> None:
        network.enable_gradient_checkpointing(function)  # type: ignore[operator]


CHANNELS, TEXT = (16, 32), 16


def unet(dtype: torch.dtype = torch.float64, seed: int = 0) -> UNet2DConditionModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=CHANNELS,
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=TEXT,
            attention_head_dim=8,
            norm_num_groups=8,
        )
    return network.to(dtype)


LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "ff.net.2")


def layouts(generator: str, fake: str, targets: tuple[str, ...] = LORA_TARGETS, **lora: Any) -> dict[str, RoleLayout]:
    """Role layouts for ("lora" or "full", "lora" or "full")."""
    settings = LoraSettings(4, 2.0, targets, **lora)
    return {
        role: RoleLayout(mode, settings if mode == "lora" else None)  # type: ignore[arg-type]
        for role, mode in ((GENERATOR, generator), (FAKE_SCORE, fake))
    }


def unet_triple(
    generator: str, fake: str, dtype: torch.dtype = torch.float64, compute: torch.dtype | None = None, **lora: Any
) -> Triple:
    return Triple(unet(dtype), ToyUNet(), vp(), layouts(generator, fake, **lora), compute_dtype=compute)  # type: ignore[arg-type]


def disturb(triple: Triple, scale: float = 0.05) -> None:
    """Move every trained role away from the base, as training would."""
    stream = torch.Generator().manual_seed(7)
    for role in triple.layouts:
        for parameter in triple.network_parameters(role).values():
            change = torch.randn(parameter.shape, generator=stream, dtype=torch.float64)
            parameter.data += scale * change.to(parameter)
