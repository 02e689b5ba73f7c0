"""Peak memory of one whole DMD2 iteration on a full-size random U-Net, on the CPU (Linux).

    python tools/bench_memory.py --model sd15 --resolution 512 --layout shared --json sd15-shared.json
    python tools/bench_memory.py --model sd15 --resolution 512 --layout three-copies --shared sd15-shared.json --json sd15-copies.json

The iteration is the package's own: DMD2 on a Triple, RoleOptimizer, the family's checkpointing, batch 1, a guided teacher, a
GAN head on the fake score's mid block, moments of both AdamWs in place from the start. The peak is VmHWM of a process
that does nothing else. `shared` holds generator and fake score as LoRAs on the frozen bf16 base; `three-copies` as full
networks beside it, in float32, as a straightforward port of the paper does. A case that would pass `--limit` is
computed: the sizes of its tensors, plus the activations that a shared run measured (too few, if anything: a full
network's autocast copies are left out). `--model tiny` is for tests.

Two things are arranged so that the number says what a run needs and not what this machine lacks: MALLOC_MMAP_THRESHOLD_
gives freed blocks back at once, so that no heap fragmentation is counted; and where the CPU has no bf16 instructions,
convolutions and matrix products go through float32 temporaries (the bf16 fallbacks are 10-80 times slower). The
temporaries are counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from stepdistill.config import OptimizerConfig
from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.methods.base import Batch, Progress, Setting
from stepdistill.methods.dmd2 import DMD2, DMD2Config
from stepdistill.models import families
from stepdistill.models.adapters import LoraSettings
from stepdistill.models.conditioning import Conditioning, ImageSize
from stepdistill.models.families.base import Family
from stepdistill.models.triple import FAKE_SCORE, GENERATOR, RoleLayout, Triple
from stepdistill.registry import load_family
from stepdistill.training.optimizers import RoleOptimizer

GB = 1e9
CONFIGS = Path(families.__file__).parent / "configs"
FAMILY = {"sd15": "sd", "sdxl": "sdxl", "tiny": "sd"}
TINY: dict[str, Any] = {
    "block_out_channels": [64, 128, 256, 256],
    "layers_per_block": 1,
    "cross_attention_dim": 64,
}
GUIDANCE = 7.0


@dataclass(frozen=True)
class Case:
    """What is measured. `rank` and `targets` (a preset of the family) speak of the shared layout."""

    model: str
    resolution: int
    layout: str = "shared"
    rank: int = 64
    targets: str = "attention"


@dataclass(frozen=True)
class Report:
    """What came out, in GB of 10^9 bytes; `parts` sum to `peak_gb`, `activations` being the rest.

    Attributes:
        peak_phase: when the peak was reached; `phases` has the peak of every phase.
        settled_gb: resident before the iteration, measured: baseline, weights and moments without gradients and activations.
        bf16: how products of bf16 tensors were computed.
        computed: not measured but summed up, since it does not fit.
    """

    model: str
    resolution: int
    layout: str
    targets: str | None
    rank: int | None
    peak_gb: float
    parts: Mapping[str, float]
    seconds: float
    computed: bool
    peak_phase: str = ""
    phases: Mapping[str, float] = field(default_factory=dict)
    settled_gb: float | None = None
    bf16: str = ""
    torch_version: str = torch.__version__


# ---------------------------------------------------------------- memory of this process


def resident(key: str = "VmRSS") -> int:
    """Bytes of a line of /proc/self/status: VmRSS now, or VmHWM at most since the last `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def forget_peak() -> None:
    """Start VmHWM again from the present."""
    Path("/proc/self/clear_refs").write_text("5")


def size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


# ---------------------------------------------------------------- what is measured


class ThroughFloat32(TorchDispatchMode):
    """Computes products of bf16 tensors in float32, one operation at a time; what autograd keeps stays bf16."""

    products = frozenset(
        getattr(torch.ops.aten, name).default
        for name in ("convolution", "convolution_backward", "addmm", "mm", "bmm", "baddbmm")
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [a for a in args if isinstance(a, Tensor)]
        if func not in self.products or not any(tensor.dtype == torch.bfloat16 for tensor in tensors):
            return func(*args, **kwargs)
        out = func(*tree_map_only(Tensor, Tensor.float, args), **kwargs)
        return tree_map_only(Tensor, Tensor.bfloat16, out)


def unet_config(model: str) -> dict[str, Any]:
    """The public config of a model's U-Net."""
    config = json.loads((CONFIGS / ("sd15" if model == "tiny" else model) / "unet" / "config.json").read_text())
    return config | TINY if model == "tiny" else config


def meta_unet(model: str) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(unet_config(model))


@torch.no_grad()
def random_unet(model: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> UNet2DConditionModel:
    """Weights N(0, 1 / fan_in), made in place in `dtype`: nothing else of the network's size is ever held."""
    network = meta_unet(model).to(dtype).to_empty(device="cpu")
    stream = torch.Generator().manual_seed(seed)
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


@dataclass
class Run:
    """Everything one iteration needs."""

    triple: Triple
    method: DMD2
    batch: Batch
    optimizers: dict[str, RoleOptimizer]
    draws: Draws


def build(case: Case) -> Run:
    """The triple with its head, both optimizers with their moments, and a batch with one image latent."""
    network, family = random_unet(case.model), load_family(FAMILY[case.model])
    scheduler = CONFIGS / ("sdxl" if case.model == "sdxl" else "sd15") / "scheduler" / "scheduler_config.json"
    schedule = NoiseSchedule.from_config(json.loads(scheduler.read_text()))
    latent = (network.config.in_channels, case.resolution // 8, case.resolution // 8)
    cond, null = (random_conditioning(network, case.resolution, seed) for seed in (1, 2))
    triple = Triple(network, family, schedule, layouts(case, family), compute_dtype=torch.bfloat16)
    triple.enable_gradient_checkpointing()
    channels, stride = network.config.block_out_channels[-1], 2 ** (len(network.config.block_out_channels) - 1)
    features = (latent[1] // stride, latent[2] // stride)
    setting = Setting(schedule, latent, channels, features, (case.resolution, case.resolution), case.model)
    method = DMD2(DMD2Config(guidance=GUIDANCE, gan={"weight": 5e-3}), setting)  # type: ignore[arg-type]
    method.prepare(triple)
    config = OptimizerConfig(lr=1e-5)
    optimizers = {role: RoleOptimizer(triple.parameters(role), config) for role in (GENERATOR, FAKE_SCORE)}
    for optimizer in optimizers.values():
        allocate_moments(optimizer)
    image = torch.randn(1, *latent, generator=torch.Generator().manual_seed(3))
    batch = Batch(cond, null, images=image, image_cond=random_conditioning(network, case.resolution, 4))
    # a rollout of two calls, the first without graph: further calls before it take time and no memory
    seeds = (Draws(seed, 0, GENERATOR, range(1)) for seed in count())
    draws = next(d for d in seeds if d.for_role("rollout").batch_integer("exit", len(method.ladder)) == 1)
    return Run(triple, method, batch, optimizers, draws)


def layouts(case: Case, family: Family) -> dict[str, RoleLayout]:
    if case.layout == "three-copies":
        return {role: RoleLayout("full") for role in (GENERATOR, FAKE_SCORE)}
    lora = LoraSettings(case.rank, float(case.rank), family.lora_targets(case.targets))
    return {role: RoleLayout("lora", lora) for role in (GENERATOR, FAKE_SCORE)}


def allocate_moments(optimizer: RoleOptimizer) -> None:
    """Moments as every iteration but the first finds them; zeros, one parameter at a time."""
    for name, parameter in optimizer.parameters.items():
        moments = {f"{name}|{key}": torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.load_state_dict({f"{name}|step": torch.zeros(()), **moments})


def iterate(run: Run, watch: Callable[[str], None]) -> None:
    """One iteration as the trainer does it; `watch(phase)` is called at the end of each phase."""
    progress, rollout = Progress(), None
    for role in run.method.updates(progress):
        draws, optimizer = replace(run.draws, role=role), run.optimizers[role]
        with run.triple.training(role):
            rollout = rollout or run.method.rollout(run.batch, run.triple, progress, draws)
            loss = run.method.loss(role, rollout, run.triple, progress, draws).total
            watch(f"{role} forward")
            loss.backward()
        rollout = rollout.detach()
        watch(f"{role} backward")
        optimizer.clip()
        optimizer.step(0)
        watch(f"{role} step")
        optimizer.zero_grad()


# ---------------------------------------------------------------- measured and computed


def measure(case: Case, baseline: int) -> Report:
    """Run the case in this process, whose memory after the imports was `baseline`."""
    started = time.monotonic()
    run = build(case)
    roles = (GENERATOR, FAKE_SCORE)
    heads = size({key: p for key, p in run.triple.parameters(FAKE_SCORE).items() if key.startswith("head.")})
    parts = {
        "baseline": baseline,
        "base": sum(size({key: p}) for key, p in run.triple.base.named_parameters() if ".lora_" not in key),
        "roles": sum(size(run.triple.network_parameters(role)) for role in roles),
        "heads": heads,
        "optimizers": sum(size(run.optimizers[role].state_dict()) for role in roles),
    }
    settled = resident()
    phases: dict[str, int] = {}
    gradients: dict[str, int] = {}

    def watch(phase: str) -> None:
        role = phase.split()[0]
        phases[phase] = resident("VmHWM")
        grads = {key: p.grad for key, p in run.triple.parameters(role).items() if p.grad is not None}
        gradients[phase] = size(grads)
        forget_peak()

    native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    forget_peak()
    with nullcontext() if native else ThroughFloat32():
        iterate(run, watch)
    peak_phase = max(phases, key=phases.__getitem__)
    parts["gradients"] = gradients[peak_phase]
    parts["activations"] = phases[peak_phase] - sum(parts.values())
    return report(
        case,
        parts,
        time.monotonic() - started,
        peak_phase=peak_phase,
        phases={key: round(value / GB, 3) for key, value in phases.items()},
        settled_gb=round(settled / GB, 3),
        bf16="native" if native else "through float32",
    )


def compute(case: Case, shared: Report) -> Report:
    """Three copies from the sizes of their tensors, all else as measured in the shared layout."""
    weights, head = 4 * network_size(case.model), GB * shared.parts["heads"]
    parts = {key: GB * shared.parts[key] for key in ("baseline", "base", "heads", "activations")}
    parts |= {"roles": 2 * weights, "optimizers": 2 * 2 * weights + 2 * head, "gradients": weights + head}
    return report(case, parts, 0.0, computed=True, peak_phase="fake_score backward", bf16=shared.bf16)


def report(case: Case, parts: Mapping[str, float], seconds: float, *, computed: bool = False, **facts: Any) -> Report:
    """A report of parts in bytes."""
    adapters = case.layout == "shared"
    return Report(
        model=case.model,
        resolution=case.resolution,
        layout=case.layout,
        targets=case.targets if adapters else None,
        rank=case.rank if adapters else None,
        peak_gb=sum(parts.values()) / GB,
        parts={key: value / GB for key, value in parts.items()},
        seconds=seconds,
        computed=computed,
        **facts,
    )


def network_size(model: str) -> int:
    """Parameters of the U-Net."""
    return sum(parameter.numel() for parameter in meta_unet(model).parameters())


def run_case(case: Case) -> Report:
    """Measure a case in a process of its own."""
    command = [sys.executable, __file__, "--measure-here", json.dumps(asdict(case))]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_ARENA_MAX": "2"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return Report(**json.loads(done.stdout.splitlines()[-1]))


def fits(case: Case, limit: float) -> bool:
    """Whether the tensors of three copies alone stay under `limit` GB; shared cases always run."""
    return case.layout == "shared" or network_size(case.model) * (2 + 2 * 4 + 2 * 8 + 4) < limit * GB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(FAMILY), default="sd15")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--layout", choices=("shared", "three-copies"), default="shared")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--targets", default="attention", help="LoRA targets: a preset of the family")
    parser.add_argument("--limit", type=float, default=16.0, help="GB from which three copies are computed instead")
    parser.add_argument("--shared", type=Path, help="report of the shared layout, for three copies that are computed")
    parser.add_argument("--json", type=Path, help="where the report goes; printed in any case")
    parser.add_argument("--measure-here", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure_here:
        print(json.dumps(asdict(measure(Case(**json.loads(options.measure_here)), resident()))))
        return
    case = Case(options.model, options.resolution, options.layout, options.rank, options.targets)
    if fits(case, options.limit):
        found = run_case(case)
    elif options.shared is not None:
        found = compute(case, Report(**json.loads(options.shared.read_text())))
    else:
        found = compute(case, run_case(replace(case, layout="shared")))
    text = json.dumps(asdict(found), indent=2)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
