"""Seconds per iteration and peak memory of every method and role layout, and against three whole networks (Linux).

    python tools/bench_step.py --model sd15-half --resolution 256 --json tools/results/bench_step.json
    python tools/bench_step.py --device cuda --dtype bfloat16 --model sd15 --resolution 512 --methods dmd2 --layouts lora/lora

rows    every registered method with both roles as LoRAs, with the fake score whole, with both whole, and the DMD2 of
        `plain_dmd2.py`: each in a process of its own, whose VmHWM over the timed iterations is its peak. The
        allocator gives freed blocks back at once there (MALLOC_MMAP_THRESHOLD_), so that no fragmentation is counted.
race    DMD2 with both roles as LoRAs on one base against `plain_dmd2.py`, in one process, turn and turn about, on the
        same prompt, image latents, noise, exits, ladder and ratio; the first turn of each is not counted. The ratio of
        seconds is from here, the ratio of memory from the rows.

On a GPU memory is what torch's allocator held at most, and the limit is the GPU's. In bfloat16 the base is held in it, and
the three networks are a bfloat16 teacher and two of float32 under autocast. Random weights of full size; gradient
checkpointing is on in both or, by default, in neither. A turn is `--ratio` iterations,
that is one update of DMD2's generator and `--ratio` of its fake score. The package's text embeddings are made once (its
runs read them from a cache); the plain iteration runs CLIP-L every time. What would pass `--limit` is left out and says so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from benchlib import GB, MODELS, forget_peak, network_size, resident
from contestants import LAYOUTS, PLAIN, Case, ours, plain

from stepdistill.config.registry import method_names

SHAPE = (
    "model",
    "resolution",
    "rank",
    "targets",
    "steps",
    "ratio",
    "turns",
    "threads",
    "checkpointing",
    "device",
    "dtype",
    "batch",
)
"""What all cases of a report have in common."""
BARS = {"seconds": 1.3, "memory": 0.45}
"""At least so many times the speed, at most so much of the memory."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One process.

    Attributes:
        seconds, cpu_seconds: per iteration, one number a turn, without the first.
        peak_gb: of 10^9 bytes, the interpreter and its libraries included (`baseline_gb`).
        first_losses: of the first iteration, by role.
        trained: whether the weights of each role moved.
        left_out: why there is nothing to say.
    """

    method: str
    layout: str
    seconds: Sequence[float] = ()
    cpu_seconds: Sequence[float] = ()
    peak_gb: float | None = None
    baseline_gb: float | None = None
    first_losses: Mapping[str, float] = field(default_factory=dict)
    trained: Mapping[str, bool] = field(default_factory=dict)
    left_out: str | None = None


def measure(case: Case) -> Row:
    """In this process: the first turn warms up, the others are timed and watched."""
    torch.set_num_threads(case.threads)
    gpu = case.device == "cuda"
    baseline = 0 if gpu else resident("VmRSS")
    contestant = plain(case) if case.method == PLAIN else ours(case)
    contestant.turn()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        forget_peak()
    turns = [contestant.turn() for _ in range(case.turns)]
    return Row(
        method=case.method,
        layout=case.layout,
        seconds=[turn.wall for turn in turns],
        cpu_seconds=[turn.cpu for turn in turns],
        peak_gb=round((torch.cuda.max_memory_allocated() if gpu else resident("VmHWM")) / GB, 4),
        baseline_gb=round(baseline / GB, 4),
        first_losses=contestant.first_losses,
        trained=contestant.trained(),
    )


def measured(case: Case, limit: float) -> Row:
    """In a process of its own; left out where the tensors alone would pass `limit` GB."""
    # base; weights, two moments each; the gradients of one
    networks = 1 + 3 * case.whole_networks + min(1, case.whole_networks)
    needed = networks * 4 * network_size(case.model) / GB
    if needed > limit:
        why = f"its networks, moments and gradients alone take {needed:.1f} GB, more than the {limit:g} GB of --limit"
        return Row(method=case.method, layout=case.layout, left_out=why)
    command = [sys.executable, __file__, "--measure-here", json.dumps(asdict(case))]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_ARENA_MAX": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        return Row(method=case.method, layout=case.layout, left_out=done.stderr.strip().splitlines()[-1])
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def race(mine: Case, theirs: Case) -> dict[str, Any]:
    """Both in this process, turn and turn about."""
    torch.set_num_threads(mine.threads)
    shared, whole = ours(mine), plain(theirs)
    turns = [(shared.turn(), whole.turn()) for _ in range(1 + mine.turns)][1:]
    ratios = [second.wall / first.wall for first, second in turns]
    busy = [second.cpu / first.cpu for first, second in turns]
    return {
        "shared": [first._asdict() for first, _ in turns],
        "three_networks": [second._asdict() for _, second in turns],
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "cpu_ratio": round(statistics.median(busy), 3),
        "first_losses": [shared.first_losses, whole.first_losses],
        "trained": [shared.trained(), whole.trained()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="sd15-half")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--methods", nargs="*", choices=method_names(), default=method_names())
    parser.add_argument("--layouts", nargs="*", choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, in both")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--targets", default="attention", help="LoRA targets: a preset of the family")
    parser.add_argument("--steps", type=int, default=4, help="network calls of DMD2's student")
    parser.add_argument("--ratio", type=int, default=5, help="iterations of a turn; DMD2's fake-score updates")
    parser.add_argument("--turns", type=int, default=3, help="turns that count")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--limit", type=float, default=17.0, help="GB beyond which a row is left out")
    parser.add_argument("--json", type=Path, help="where the report goes; printed in any case")
    parser.add_argument("--measure-here", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure_here:
        print(json.dumps(asdict(measure(Case(**json.loads(options.measure_here))))))
        return
    shape = {key: vars(options)[key] for key in SHAPE}
    cases = [Case(method=name, layout=layout, **shape) for name in options.methods for layout in options.layouts]
    three = Case(method=PLAIN, layout="full/full", **shape)
    rows = []
    for case in [*cases, *([three] if MODELS[options.model][0] == "sd" else [])]:
        rows.append(measured(case, options.limit))
        print(rows[-1], file=sys.stderr, flush=True)
    report: dict[str, Any] = {
        **shape,
        "gpu": torch.cuda.get_device_name() if options.device == "cuda" else None,
        "torch_version": torch.__version__,
        "rows": [asdict(row) for row in rows],
    }
    found = {(row.method, row.layout): row for row in rows}
    shared, whole = found.get(("dmd2", "lora/lora")), found.get((PLAIN, "full/full"))
    if shared and whole and shared.peak_gb and whole.peak_gb:
        report["race"] = race(Case(method="dmd2", layout="lora/lora", **shape), three)
        report["memory_ratio"] = round(shared.peak_gb / whole.peak_gb, 3)
        report["bars_met"] = {
            "seconds": report["race"]["ratio"] >= BARS["seconds"],
            "memory": report["memory_ratio"] <= BARS["memory"],
        }
    text = json.dumps(report, indent=2)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
