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
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from benchlib import (
    GAN_WEIGHT,
    GB,
    MODELS,
    ROLES,
    Run,
    assemble,
    forget_peak,
    iterate,
    lora,
    network_size,
    random_unet,
    resident,
    size,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from stepdistill.config.registry import load_family
from stepdistill.diffusion.draws import Draws
from stepdistill.methods.base import Progress
from stepdistill.methods.gan import DISCRIMINATOR_HEAD
from stepdistill.roles.triple import FAKE_SCORE, GENERATOR, RoleLayout

COPIES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Dtype of the full networks of three copies."""


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


def build(case: Case) -> tuple[Run, Draws]:
    """The triple with its head, both optimizers with their moments, a batch with one image latent, and the draws of an
    iteration with a rollout of two calls, the first without graph: further calls before it take time and no memory."""
    layout = RoleLayout("full")
    if case.rank is not None and case.targets is not None:
        layout = lora(load_family(MODELS[case.model][0]), case.rank, case.targets)
    run = assemble(
        case.model,
        case.resolution,
        random_unet(case.model, torch.bfloat16),
        "dmd2",
        {"guidance": 7.0, "gan": {"weight": GAN_WEIGHT}},
        {role: layout for role in ROLES},
        copies=COPIES[case.copies] if case.copies is not None else None,
    )
    seeds = (Draws(seed, 0, GENERATOR, range(1)) for seed in count())
    return run, next(d for d in seeds if int(4 * d.for_role("rollout").batch_uniform("exit")) == 1)


def measure(case: Case, baseline: int) -> Report:
    """Run the case in this process, whose memory after the imports was `baseline`."""
    started = time.monotonic()
    run, draws = build(case)
    parts = {
        "baseline": baseline,
        "base": size(p for key, p in run.triple.base.named_parameters() if ".lora_" not in key),
        "roles": sum(size(run.triple.network_parameters(role).values()) for role in ROLES),
        "heads": size(run.triple.head(FAKE_SCORE, DISCRIMINATOR_HEAD).parameters()),
        "optimizers": sum(size(run.optimizers[role].state_dict().values()) for role in ROLES),
    }
    settled, phases, gradients = resident("VmRSS"), {"build": resident("VmHWM")}, {"build": 0}

    def watch(phase: str, role: str) -> None:
        phases[phase] = resident("VmHWM")
        gradients[phase] = size(p.grad for p in run.triple.parameters(role).values() if p.grad is not None)
        forget_peak()

    native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    forget_peak()
    with nullcontext() if native else ThroughFloat32():
        iterate(run, draws, Progress(), watch)
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
