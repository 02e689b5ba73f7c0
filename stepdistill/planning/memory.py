"""From the sizes of a run's parts and the phases of its iterations to one GPU's memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from stepdistill.config.schema import OptimizerConfig, RunConfig
from stepdistill.planning.hardware import RUNTIME_BYTES
from stepdistill.planning.report import Memory, MemoryItem, Parameters
from stepdistill.planning.trace import ENCODE_IMAGES, ENCODE_TEXT, SAMPLE_GRID, Phase, auxiliary_modules, tensor_bytes
from stepdistill.roles.triple import REAL_SCORE
from stepdistill.training.optimizers import is_matrix
from stepdistill.training.session import EMA, Session

NF4_BLOCK = 64
"""Weights that share one scale of a byte in int4."""
MOMENT_BLOCK, MOMENT_MIN_NUMEL = 256, 4096
"""bitsandbytes: numbers that share one float32 scale, and the size of the smallest tensor whose moments are in 8 bit."""
VAE = "vae"


@dataclass(frozen=True)
class Sizes:
    """Bytes of all that lives from one iteration to the next, and the numbers of parameters, nothing divided yet.

    Attributes:
        base: frozen network, as configured: quantised or not.
        unpacked: its largest linear layer in the base's dtype, which a quantised product needs; 0 without quantisation.
        roles: parameters of each role without heads: those that are trained, and frozen ones that the method added.
        heads: of all discriminator heads.
        ema: the averaged copy.
        optimizers: what each role's optimizer keeps.
        encoders: text encoders together.
        vae: autoencoder.
        models: that losses ask: vision encoders, rewards.
        parameters: of all these.
    """

    base: int
    dequantized_layer: int
    roles: dict[str, int]
    heads: int
    ema: int
    optimizers: dict[str, int]
    encoders: int
    vae: int
    models: int
    parameters: tuple[Parameters, ...]


def sizes_of(session: Session, config: RunConfig) -> Sizes:
    """Sizes of an outlined session, held as the config says."""
    triple, setup = session.triple, session.setup
    base = {key: value for key, value in triple.base.named_parameters() if ".lora_" not in key}
    linear = linear_weights(triple.base)
    kind = config.model.quantization
    saved = sum(tensor_bytes([weight]) - quantized_size(weight, kind) for weight in linear)
    others = auxiliary_modules(session.checkpoint)
    roles = {role: triple.network_parameters(role) for role in triple.layouts if role != EMA}
    heads = [head for named in triple.heads.values() for head in named.values()]
    ema = triple.network_parameters(EMA) if EMA in triple.layouts else {}
    configured = {"generator": config.optimizers.generator, "fake_score": config.optimizers.fake_score}
    optimizers = {
        role: optimizer_size(triple.parameters(role).values(), configured[section])
        for role, section in setup.roles.items()
    }
    words = {"lora": "LoRA", "full": "full", "adapter": "guidance adapters"}
    held = {role: words[triple.layouts[role].mode] for role in roles}
    parameters = [
        Parameters(name=f"{REAL_SCORE} (the base)", count=_count(base.values()), trained=False),
        *(
            Parameters(name=f"{role} ({held[role]})", count=_count(own.values()), trained=role in setup.roles)
            for role, own in roles.items()
        ),
        Parameters(name="heads", count=sum(_count(head.parameters()) for head in heads), trained=True),
        Parameters(name="ema", count=_count(ema.values()), trained=False),
        *(Parameters(name=name, count=_count(part.parameters()), trained=False) for name, part in others.items()),
    ]
    parameters += [
        Parameters(name=name, count=_count(model.parameters()), trained=False) for name, model in triple.frozen.items()
    ]
    buffers = tensor_bytes(buffer for buffer in triple.base.buffers())
    return Sizes(
        base=tensor_bytes(base.values()) + buffers - saved,
        dequantized_layer=0 if kind == "none" else max(map(_bytes, linear), default=0),
        roles={role: tensor_bytes(own.values()) for role, own in roles.items()},
        heads=sum(tensor_bytes(head.parameters()) for head in heads),
        ema=tensor_bytes(ema.values()),
        optimizers=optimizers,
        encoders=sum(tensor_bytes(part.parameters()) for name, part in others.items() if name != VAE),
        models=sum(tensor_bytes(model.parameters()) for model in triple.frozen.values()),
        vae=sum(tensor_bytes(part.parameters()) for name, part in others.items() if name == VAE),
        parameters=tuple(item for item in parameters if item.count),
    )


def memory_of(sizes: Sizes, phases: Iterable[Phase], config: RunConfig, processes: int, capacity: int) -> Memory:
    """The peak of one GPU and its parts; what a process holds of each network is its share where the run is sharded."""
    share = processes if config.training.sharding == "full" else 1
    offload, cache = config.training.offload, config.cache
    constant = {
        "base": (sizes.base + share - 1) // share + sizes.dequantized_layer,
        **{f"{role} weights": -(-held // share) for role, held in sizes.roles.items()},
        "heads": sizes.heads,
        "ema": 0 if "ema" in offload else -(-sizes.ema // share),
        "text encoders": 0 if cache is not None and cache.text else sizes.encoders,
        "autoencoder": sizes.vae,
        "vision and reward models": sizes.models,
        "runtime (assumed)": RUNTIME_BYTES if config.training.device != "cpu" else 0,
    }
    moments = {f"{role} optimizer": -(-held // share) for role, held in sizes.optimizers.items()}
    resident = {name: 0 if "optimizer" in offload else held for name, held in moments.items()}
    skipped = {ENCODE_TEXT} if cache is not None and cache.text else set()
    skipped |= {ENCODE_IMAGES} if cache is not None and cache.latents else set()
    largest_phases: dict[str, Phase] = {}
    for phase in phases:
        if phase.name not in largest_phases or phase.transient > largest_phases[phase.name].transient:
            largest_phases[phase.name] = phase
    found: dict[str, dict[str, int]] = {}
    for phase in largest_phases.values():
        if phase.name in skipped:
            continue
        # a forward holds gradients where micro-batches came before it; what is no gradient is activation
        gradients = min(phase.gradients, phase.transient) if _has_gradients(phase, config) else 0
        extra = {"gradients": -(-gradients // share), "activations": phase.transient - gradients}
        found[phase.name] = {**constant, **resident, **extra}
        if phase.name == SAMPLE_GRID:  # the student is drawn there, wherever it lives otherwise
            found[phase.name]["ema"] = -(-sizes.ema // share)
        if phase.role and phase.name.endswith("backward"):
            own = f"{phase.role} optimizer"
            stepping = {**resident, own: moments[own]}
            found[f"{phase.role} step"] = {**constant, **stepping, "gradients": -(-phase.gradients // share)}
    peaks = {name: sum(parts.values()) for name, parts in found.items()}
    highest = max(peaks, key=peaks.__getitem__)
    return Memory(
        parts=tuple(MemoryItem(name=name, bytes=held) for name, held in found[highest].items() if held),
        phases=tuple(MemoryItem(name=name, bytes=peak) for name, peak in peaks.items()),
        peak=peaks[highest],
        peak_phase=highest,
        capacity=capacity,
    )


def linear_weights(network: nn.Module) -> list[Tensor]:
    """Weights of the frozen linear layers: what quantisation packs."""
    return [
        module.weight
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
    ]


def quantized_size(weight: Tensor, kind: str) -> int:
    """Bytes of a linear layer's weight under `model.quantization`: packed values and their scales."""
    numbers = weight.numel()
    if kind == "int8":
        return numbers + weight.shape[0] * weight.element_size()
    if kind == "int4" and numbers % NF4_BLOCK == 0:
        return numbers // 2 + numbers // NF4_BLOCK
    return tensor_bytes([weight])


def optimizer_size(parameters: Iterable[Tensor], config: OptimizerConfig) -> int:
    """Bytes that an optimizer keeps from its first step on: AdamW two moments and a float32 count for each tensor, Muon one."""
    if config.kind != "adamw8bit":
        muon = config.kind == "muon"
        return sum(_bytes(p) if muon and is_matrix(p) else 2 * _bytes(p) + 4 for p in parameters)
    return sum(
        2 * (p.numel() + 4 * -(-p.numel() // MOMENT_BLOCK)) if p.numel() >= MOMENT_MIN_NUMEL else 8 * p.numel()
        for p in parameters
    )


def _has_gradients(phase: Phase, config: RunConfig) -> bool:
    return phase.name.endswith("backward") or config.training.accumulation > 1


def _bytes(tensor: Tensor) -> int:
    return tensor_bytes([tensor])


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)
