"""What the benches share: random networks of full size, and one iteration of a method as the trainer does it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from stepdistill.assets import FOLDER
from stepdistill.config.registry import load_family, load_method
from stepdistill.config.schema import OptimizerConfig
from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.families.base import Family
from stepdistill.families.conditioning import Conditioning, MicroConditioning
from stepdistill.methods.base import Batch, Method, Problem, Progress
from stepdistill.roles.lora import LoraSettings
from stepdistill.roles.triple import FAKE_SCORE, GENERATOR, RoleLayout, Triple
from stepdistill.training.optimizers import RoleOptimizer

GB = 1e9
CONFIGS = FOLDER / "public_configs"
ROLES = (GENERATOR, FAKE_SCORE)
GAN_WEIGHT = 5e-3
"""Of DMD2's published runs."""
MODELS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "sd15": ("sd", "sd15", {}),
    "sdxl": ("sdxl", "sdxl", {}),
    "sd15-half": ("sd", "sd15", {"block_out_channels": [160, 320, 640, 640]}),
    "tiny": ("sd", "sd15", {"block_out_channels": [64, 128, 256, 256], "layers_per_block": 1}),
}
"""Name -> family, folder of its public configs, and what differs from them."""


def resident(key: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS now, or VmHWM at most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def forget_peak() -> None:
    """Let VmHWM start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def meta_unet(model: str) -> UNet2DConditionModel:
    """The U-Net without memory."""
    _, folder, changes = MODELS[model]
    config = json.loads((CONFIGS / folder / "unet" / "config.json").read_text())
    with torch.device("meta"):
        return UNet2DConditionModel.from_config({**config, **changes})


@torch.no_grad()
def random_unet(model: str, dtype: torch.dtype) -> UNet2DConditionModel:
    """Weights N(0, 1 / fan_in), made in place: nothing else of the network's size is ever held."""
    network = nn.Module.to(meta_unet(model), dtype).to_empty(device="cpu")
    stream = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=stream)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return network


def network_size(model: str) -> int:
    """Parameters of the U-Net."""
    return sum(parameter.numel() for parameter in meta_unet(model).parameters())


def random_conditioning(network: UNet2DConditionModel, resolution: int, seed: int) -> Conditioning:
    """One row of text embeddings, and what SDXL wants besides."""
    stream = torch.Generator().manual_seed(seed)
    text = torch.randn(1, 77, network.config.cross_attention_dim, generator=stream)
    if network.config.addition_embed_type is None:
        return Conditioning(text)
    ids = torch.tensor([MicroConditioning.plain(resolution, resolution).time_ids()], dtype=torch.float32)
    width = network.config.projection_class_embeddings_input_dim - ids.numel() * network.config.addition_time_embed_dim
    return Conditioning(text, pooled=torch.randn(1, width, generator=stream), time_ids=ids)


def scheduler_config(model: str) -> dict[str, Any]:
    """The teacher's scheduler config."""
    folder = MODELS[model][1]
    loaded: dict[str, Any] = json.loads((CONFIGS / folder / "scheduler" / "scheduler_config.json").read_text())
    return loaded


def lora(family: Family, rank: int, targets: str) -> RoleLayout:
    """A LoRA with alpha = rank on a preset of the family's targets."""
    return RoleLayout("lora", LoraSettings(rank, float(rank), family.lora_targets(targets)))


@dataclass
class Run:
    """Everything an iteration needs but its random draws."""

    triple: Triple
    method: Method[Any]
    batch: Batch
    optimizers: dict[str, RoleOptimizer]


def assemble(
    model: str,
    resolution: int,
    network: UNet2DConditionModel,
    method: str,
    options: Mapping[str, Any],
    layouts: Mapping[str, RoleLayout],
    *,
    prompt: tuple[Conditioning, Conditioning] | None = None,
    copies: torch.dtype | None = None,
    checkpointing: bool = True,
    rows: int = 1,
) -> Run:
    """A triple on `network`, where it is, with its method, optimizers that hold their moments, and a batch of `rows` samples.

    Args:
        options: of the method, as in a config.
        layouts: of the roles that may be trained; those that the method does not train are left out.
        prompt: conditional and unconditional branch; random where None.
        copies: dtype of full networks; float32 by default.

    Raises:
        UserError: the method does not take these options.
    """
    family, schedule = load_family(MODELS[model][0]), NoiseSchedule.from_config(scheduler_config(model))
    latent = (network.config.in_channels, resolution // 8, resolution // 8)
    channels = network.config.block_out_channels
    side = latent[1] // 2 ** (len(channels) - 1)
    problem = Problem(schedule, latent, channels[-1], (side, side), (resolution, resolution), model)
    method_class = load_method(method)
    config = method_class.Config.model_validate(dict(options))
    made = method_class(config, problem)
    roles = method_class.roles(config)
    triple = Triple(
        network,
        family,
        schedule,
        {role: layouts[kind] for role, kind in roles.items()},
        compute_dtype=next(network.parameters()).dtype,
    )
    if checkpointing:
        triple.enable_gradient_checkpointing()
    if copies is not None:
        for copy in triple.networks.values():
            copy.to(copies)
    made.prepare(triple)
    device = next(network.parameters()).device
    for named in triple.heads.values():
        for head in named.values():
            head.to(device)
    optimizers = {role: RoleOptimizer(triple.parameters(role), OptimizerConfig(lr=1e-5)) for role in roles}
    for optimizer in optimizers.values():  # moments as every iteration but the first finds them
        for key, parameter in optimizer.parameters.items():
            moments = {f"{key}|{moment}": torch.zeros_like(parameter) for moment in ("exp_avg", "exp_avg_sq")}
            optimizer.load_state_dict({f"{key}|step": torch.zeros(()), **moments})
    cond, null = (
        one.to(device)[[0] * rows]
        for one in prompt or tuple(random_conditioning(network, resolution, seed) for seed in (0, 1))
    )
    image = torch.zeros(rows, *latent, device=device)
    stream = torch.Generator().manual_seed(2)
    noise = torch.randn(rows, *latent, generator=stream).to(device)
    batch = Batch(
        cond,
        null,
        images=image,
        image_cond=cond,
        pair_noise=noise,
        pair_latents=torch.zeros_like(noise),
        pair_cond=cond,
    )
    return Run(triple, made, batch, optimizers)


def iterate(
    run: Run,
    draws: Draws,
    progress: Progress,
    watch: Callable[[str, str], None] = lambda _phase, _role: None,
) -> dict[str, Tensor]:
    """One iteration as the trainer does it: the loss of every role that was due.

    watch: called with (phase, role) at the end of each phase.
    """
    rollout, losses = None, {}
    for role in run.method.updates(progress):
        mine, optimizer = Draws(draws.seed, draws.step, role, draws.samples), run.optimizers[role]
        with run.triple.training(role):
            rollout = rollout or run.method.rollout(run.batch, run.triple, progress, mine)
            loss = run.method.loss(role, rollout, run.triple, progress, mine).total
            watch(f"{role} forward", role)
            loss.backward()
        rollout, losses[role] = rollout.detach(), loss.detach()
        watch(f"{role} backward", role)
        optimizer.clip()
        optimizer.step(0)
        watch(f"{role} step", role)
        optimizer.zero_grad()
    return losses
