"""Peak memory of one whole DMD2 iteration on a full-size random U-Net, on the CPU (Linux).

    python tools/bench_memory.py --model sd15 --resolution 512 --layout shared --json shared.json
    python tools/bench_memory.py --model sd15 --resolution 512 --layout three-copies --shared shared.json --json copies.json

The iteration is the package's own: DMD2 on a Triple, RoleOptimizer, the family's checkpointing, batch 1, a guided
teacher, a GAN head on the fake score's mid block, the moments of both AdamWs in place from the start. The peak is VmHWM
of a process that does nothing else. `shared` holds generator and fake score as LoRAs on the frozen bf16 base;
`three-copies` as full networks beside it, in float32 or, with `--copies bfloat16`, with weights, moments and gradients
in bf16 (less than a careful run takes: the comparison least kind to the shared layout). Three copies that would pass
`--limit` are computed: the sizes of their tensors, plus the activations of a shared run (too few, if anything).
`--model sd15-half` has half the channels, so that three copies can be measured and the sum checked; `tiny` is for tests.

Two things are arranged so that the number says what a run needs and not what this machine lacks: MALLOC_MMAP_THRESHOLD_
gives freed blocks back at once, so that no heap fragmentation is counted; and where the CPU has no bf16 instructions,
convolutions and matrix products go through float32 temporaries, which are counted (the bf16 fallbacks are 10-80 times
slower).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from stepdistill.config import OptimizerConfig
from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.methods.base import Batch, Progress, Setting
from stepdistill.methods.dmd2 import DMD2, DMD2Config
from stepdistill.methods.parts import HEAD
from stepdistill.models import families
from stepdistill.models.adapters import LoraSettings
from stepdistill.models.conditioning import Conditioning, ImageSize
from stepdistill.models.triple import FAKE_SCORE, GENERATOR, RoleLayout, Triple
from stepdistill.registry import load_family
from stepdistill.training.optimizers import RoleOptimizer

GB = 1e9
CONFIGS = Path(families.__file__).parent / "configs"
ROLES = (GENERATOR, FAKE_SCORE)
COPIES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Dtype of the full networks of three copies."""
MODELS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "sd15": ("sd", "sd15", {}),
    "sdxl": ("sdxl", "sdxl", {}),
    "sd15-half": ("sd", "sd15", {"block_out_channels": [160, 320, 640, 640]}),
    "tiny": ("sd", "sd15", {"block_out_channels": [64, 128, 256, 256], "layers_per_block": 1}),
}
"""Name -> family, folder of its public configs, and what differs from them."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured; `rank` and `targets` (a preset of the family) are None in three copies, `copies` in the shared layout."""

    model: str
    resolution: int
    layout: str
    rank: int | None
    targets: str | None
    copies: str | None = None


@dataclass(frozen=True, kw_only=True)
class Report(Case):
    """What came out, in GB of 10^9 bytes.

    Attributes:
        parts: sum to `peak_gb`; `gradients` are those there at the peak, `activations` the rest.
        phases, peak_phase: the peak of every phase, and when the highest was reached.
        settled_gb: measured before the iteration, when there are neither gradients nor activations.
        bf16: how products of bf16 tensors were computed.
        computed: summed up, not measured.
    """

    peak_gb: float
    parts: Mapping[str, float]
    phases: Mapping[str, float] = field(default_factory=dict)
    peak_phase: str = ""
    settled_gb: float | None = None
    seconds: float = 0.0
    bf16: str
    torch_version: str = torch.__version__
    computed: bool = False


def resident(key: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS now, or VmHWM at most since a 5 went to clear_refs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class ThroughFloat32(TorchDispatchMode):
    """Computes products of bf16 tensors in float32, one operation at a time; what autograd keeps stays bf16."""

    products = frozenset(
        getattr(torch.ops.aten, name).default
        for name in ("convolution", "convolution_backward", "addmm", "mm", "bmm", "baddbmm")
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self.products or all(a.dtype != torch.bfloat16 for a in args if isinstance(a, Tensor)):
            return func(*args, **(kwargs or {}))
        out = func(*tree_map_only(Tensor, Tensor.float, args), **(kwargs or {}))
        return tree_map_only(Tensor, Tensor.bfloat16, out)


def meta_unet(model: str) -> UNet2DConditionModel:
    """The U-Net without memory."""
    _, folder, changes = MODELS[model]
    config = json.loads((CONFIGS / folder / "unet" / "config.json").read_text())
    with torch.device("meta"):
        return UNet2DConditionModel.from_config({**config, **changes})


@torch.no_grad()
def random_unet(model: str) -> UNet2DConditionModel:
    """Weights N(0, 1 / fan_in), made in place in bf16: nothing else of the network's size is ever held."""
    network = nn.Module.to(meta_unet(model), torch.bfloat16).to_empty(device="cpu")
    stream = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=stream)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return network


def random_conditioning(network: UNet2DConditionModel, resolution: int, seed: int) -> Conditioning:
    """One row of text embeddings, and what SDXL wants besides."""
    stream = torch.Generator().manual_seed(seed)
    text = torch.randn(1, 77, network.config.cross_attention_dim, generator=stream)
    if network.config.addition_embed_type is None:
        return Conditioning(text)
    ids = torch.tensor([ImageSize.plain(resolution, resolution).time_ids()], dtype=torch.float32)
    width = network.config.projection_class_embeddings_input_dim - ids.numel() * network.config.addition_time_embed_dim
    return Conditioning(text, pooled=torch.randn(1, width, generator=stream), time_ids=ids)


class Run(NamedTuple):
    """Everything one iteration needs."""

    triple: Triple
    method: DMD2
    batch: Batch
    optimizers: dict[str, RoleOptimizer]
    draws: Draws


def build(case: Case) -> Run:
    """The triple with its head, both optimizers with their moments, and a batch with one image latent."""
    name, folder, _ = MODELS[case.model]
    network, family = random_unet(case.model), load_family(name)
    schedule = NoiseSchedule.from_config(json.loads((CONFIGS / folder / "scheduler/scheduler_config.json").read_text()))
    latent = (network.config.in_channels, case.resolution // 8, case.resolution // 8)
    cond, null = (random_conditioning(network, case.resolution, seed) for seed in (0, 1))
    layout = RoleLayout("full")
    if case.rank is not None and case.targets is not None:
        layout = RoleLayout("lora", LoraSettings(case.rank, float(case.rank), family.lora_targets(case.targets)))
    triple = Triple(network, family, schedule, {role: layout for role in ROLES}, compute_dtype=torch.bfloat16)
    triple.enable_gradient_checkpointing()
    channels = network.config.block_out_channels
    side = latent[1] // 2 ** (len(channels) - 1)
    setting = Setting(schedule, latent, channels[-1], (side, side), (case.resolution, case.resolution), case.model)
    method = DMD2(DMD2Config(guidance=7.0, gan={"weight": 5e-3}), setting)  # type: ignore[arg-type]
    if case.copies is not None:
        for copy in triple.networks.values():
            copy.to(COPIES[case.copies])
    method.prepare(triple)
    config = OptimizerConfig(lr=1e-5)
    optimizers = {role: RoleOptimizer(triple.parameters(role), config) for role in ROLES}
    for optimizer in optimizers.values():  # moments as every iteration but the first finds them
        for key, parameter in optimizer.parameters.items():
            moments = {f"{key}|{moment}": torch.zeros_like(parameter) for moment in ("exp_avg", "exp_avg_sq")}
            optimizer.load_state_dict({f"{key}|step": torch.zeros(()), **moments})
    batch = Batch(cond, null, images=torch.zeros(1, *latent), image_cond=cond)
    # a rollout of two calls, the first without graph: further calls before it take time and no memory
    seeds = (Draws(seed, 0, GENERATOR, range(1)) for seed in count())
    draws = next(d for d in seeds if d.for_role("rollout").batch_integer("exit", len(method.ladder)) == 1)
    return Run(triple, method, batch, optimizers, draws)


def iterate(run: Run, watch: Callable[[str, str], None]) -> None:
    """One iteration as the trainer does it; `watch(phase, role)` is called at the end of each phase."""
    progress, rollout = Progress(), None
    for role in run.method.updates(progress):
        draws, optimizer = replace(run.draws, role=role), run.optimizers[role]
        with run.triple.training(role):
            rollout = rollout or run.method.rollout(run.batch, run.triple, progress, draws)
            loss = run.method.loss(role, rollout, run.triple, progress, draws).total
            watch(f"{role} forward", role)
            loss.backward()
        rollout = rollout.detach()
        watch(f"{role} backward", role)
        optimizer.clip()
        optimizer.step(0)
        watch(f"{role} step", role)
        optimizer.zero_grad()


def measure(case: Case, baseline: int) -> Report:
    """Run the case in this process, whose memory after the imports was `baseline`."""
    started, run = time.monotonic(), build(case)
    parts = {
        "baseline": baseline,
        "base": size(p for key, p in run.triple.base.named_parameters() if ".lora_" not in key),
        "roles": sum(size(run.triple.network_parameters(role).values()) for role in ROLES),
        "heads": size(run.triple.head(FAKE_SCORE, HEAD).parameters()),
        "optimizers": sum(size(run.optimizers[role].state_dict().values()) for role in ROLES),
    }
    settled, phases, gradients = resident("VmRSS"), {"build": resident("VmHWM")}, {"build": 0}

    def watch(phase: str, role: str) -> None:
        phases[phase] = resident("VmHWM")
        gradients[phase] = size(p.grad for p in run.triple.parameters(role).values() if p.grad is not None)
        Path("/proc/self/clear_refs").write_text("5")

    native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    Path("/proc/self/clear_refs").write_text("5")
    with nullcontext() if native else ThroughFloat32():
        iterate(run, watch)
    peak = max(phases, key=phases.__getitem__)
    parts["gradients"] = gradients[peak]
    parts["activations"] = phases[peak] - sum(parts.values())
    return Report(
        **asdict(case),
        peak_gb=round(phases[peak] / GB, 4),
        parts={key: round(value / GB, 4) for key, value in parts.items()},
        phases={key: round(value / GB, 4) for key, value in phases.items()},
        peak_phase=peak,
        settled_gb=round(settled / GB, 4),
        seconds=round(time.monotonic() - started, 1),
        bf16="native" if native else "through float32",
    )


def compute(case: Case, shared: Report) -> Report:
    """Three copies from the sizes of their tensors; baseline, head and activations as measured in the shared layout."""
    if (case.model, case.resolution) != (shared.model, shared.resolution):
        raise SystemExit(f"the shared report is of {shared.model} at {shared.resolution}: give one of the same case")
    weights, head = network_size(case.model) * COPIES[case.copies or "float32"].itemsize / GB, shared.parts["heads"]
    parts = {key: shared.parts[key] for key in ("baseline", "base", "heads", "activations")}
    parts |= {"roles": 2 * weights, "optimizers": 2 * 2 * weights + 2 * head, "gradients": weights + head}
    parts = {key: round(value, 4) for key, value in parts.items()}
    return Report(**asdict(case), peak_gb=round(sum(parts.values()), 4), parts=parts, bf16=shared.bf16, computed=True)


def bytes_of_copies(copies: str) -> int:
    """Per parameter: the bf16 base, two full networks, two moments of each, the gradients of one."""
    return 2 + (2 + 4 + 1) * COPIES[copies].itemsize


def network_size(model: str) -> int:
    """Parameters of the U-Net."""
    return sum(parameter.numel() for parameter in meta_unet(model).parameters())


def measured(case: Case) -> Report:
    """Measure a case in a process of its own."""
    command = [sys.executable, __file__, "--measure-here", json.dumps(asdict(case))]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_ARENA_MAX": "2"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return Report(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="sd15")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--layout", choices=("shared", "three-copies"), default="shared")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--targets", default="attention", help="LoRA targets: a preset of the family")
    parser.add_argument(
        "--copies", choices=sorted(COPIES), default="float32", help="dtype of the three copies' networks"
    )
    parser.add_argument("--limit", type=float, default=16.0, help="GB from which three copies are computed instead")
    parser.add_argument("--shared", type=Path, help="report of the shared layout, for three copies that are computed")
    parser.add_argument("--json", type=Path, help="where the report goes; printed in any case")
    parser.add_argument("--measure-here", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure_here:
        print(json.dumps(asdict(measure(Case(**json.loads(options.measure_here)), resident("VmRSS")))))
        return
    shared = Case(
        model=options.model, resolution=options.resolution, layout="shared", rank=options.rank, targets=options.targets
    )
    copies = replace(shared, layout="three-copies", rank=None, targets=None, copies=options.copies)
    if options.layout == "shared":
        report = measured(shared)
    elif network_size(options.model) * bytes_of_copies(options.copies) < options.limit * GB:
        report = measured(copies)
    else:
        known = Report(**json.loads(options.shared.read_text())) if options.shared is not None else measured(shared)
        report = compute(copies, known)
    text = json.dumps(asdict(report), indent=2)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
