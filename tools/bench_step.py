"""Seconds per iteration and peak memory of every method and role layout, and against three whole networks (Linux, CPU).

    python tools/bench_step.py --model sd15-half --resolution 256 --json tools/results/bench_step.json

rows    every registered method with both roles as LoRAs, with the fake score whole, with both whole, and the DMD2 of
        `plain_dmd2.py`: each in a process of its own, whose VmHWM over the timed iterations is its peak. The
        allocator gives freed blocks back at once there (MALLOC_MMAP_THRESHOLD_), so that no fragmentation is counted.
race    DMD2 with both roles as LoRAs on one base against `plain_dmd2.py`, in one process, turn and turn about, on the
        same prompt, image latents, noise, exits, ladder and ratio; the first turn of each is not counted. The ratio of
        seconds is from here, the ratio of memory from the rows.

Everything is float32, batch 1, random weights of full size; gradient checkpointing is on in both or, by default, in
neither. A turn is `--ratio` iterations,
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
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchlib import (
    CONFIGS,
    GAN_WEIGHT,
    GB,
    MODELS,
    ROLES,
    assemble,
    forget_peak,
    iterate,
    lora,
    network_size,
    random_unet,
    resident,
)
from diffusers import DDPMScheduler
from plain_dmd2 import PlainDMD2
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from stepdistill.diffusion.draws import Draws, derive_seed
from stepdistill.methods.base import Progress
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.families.clip import tokenizer_of
from stepdistill.models.families.tiny import seeded
from stepdistill.models.heads import seeded_head
from stepdistill.models.triple import FAKE_SCORE, GENERATOR, RoleLayout
from stepdistill.registry import load_family, method_names

PLAIN = "three networks"
LAYOUTS = ("lora/lora", "lora/full", "full/full")
"""Generator / fake score."""
GUIDANCE = 7.0
PROMPT = "a photograph of a red house by the sea"
SHAPE = ("model", "resolution", "rank", "targets", "steps", "ratio", "turns", "threads", "checkpointing")
"""What all cases of a report have in common."""
BARS = {"seconds": 1.3, "memory": 0.45}
"""At least so many times the speed, at most so much of the memory."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured: `method` is a registered one with a layout of `LAYOUTS`, or PLAIN."""

    method: str
    layout: str
    model: str
    resolution: int
    rank: int
    targets: str
    steps: int
    ratio: int
    turns: int
    threads: int
    checkpointing: bool

    @property
    def whole_networks(self) -> int:
        """Trained networks that are held whole."""
        return 2 if self.method == PLAIN else self.layout.split("/").count("full")


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


class Seconds(NamedTuple):
    """By the clock, and of processor time, which other work on the machine hardly changes."""

    wall: float
    cpu: float


class Contestant:
    """An iteration that can be run, timed and looked at.

    Args:
        run: number of the iteration -> losses by role.
        weights: what each role trains.
    """

    def __init__(
        self, case: Case, run: Callable[[int], Mapping[str, Tensor]], weights: Mapping[str, Sequence[Tensor]]
    ) -> None:
        self.case, self.run, self.weights = case, run, weights
        self.done = 0
        self.first_losses: dict[str, float] = {}
        self.before = self.norms()

    def turn(self) -> Seconds:
        """Of an iteration, as the mean over `ratio` of them."""
        began, busy = time.perf_counter(), time.process_time()
        for _ in range(self.case.ratio):
            losses = self.run(self.done)
            if self.done == 0:
                self.first_losses = {role: float(loss) for role, loss in losses.items()}
            self.done += 1
        wall, cpu = time.perf_counter() - began, time.process_time() - busy
        return Seconds(round(wall / self.case.ratio, 4), round(cpu / self.case.ratio, 4))

    def norms(self) -> dict[str, float]:
        return {
            role: sum(float(w.detach().double().square().sum()) for w in owned) for role, owned in self.weights.items()
        }

    def trained(self) -> dict[str, bool]:
        return {role: norm != self.before[role] for role, norm in self.norms().items()}


def text_encoder(model: str) -> CLIPTextModel:
    """CLIP-L with random weights; two layers of it for the tiny model."""
    config = json.loads((CONFIGS / MODELS[model][1] / "text_encoder" / "config.json").read_text())
    with seeded(0):
        return CLIPTextModel(CLIPTextConfig(**config | ({"num_hidden_layers": 2} if model == "tiny" else {})))


def draws_of(iteration: int) -> Draws:
    return Draws(0, iteration, GENERATOR, range(iteration, iteration + 1))


def plain(case: Case) -> Contestant:
    """Three whole networks and text encoders."""
    teacher = random_unet(case.model, torch.float32)
    channels, folder = teacher.config.block_out_channels, CONFIGS / MODELS[case.model][1]
    side = case.resolution // 8 // 2 ** (len(channels) - 1)
    iteration = PlainDMD2(
        teacher,
        tokenizer_of(folder / "tokenizer"),
        text_encoder(case.model),
        seeded_head(channels[-1], (side, side), derive_seed(0, "head")),
        DDPMScheduler.from_pretrained(folder / "scheduler"),
        steps=case.steps,
        ratio=case.ratio,
        guidance=GUIDANCE,
        gan_weight=GAN_WEIGHT,
        checkpointing=case.checkpointing,
    )
    images = torch.zeros(1, 4, case.resolution // 8, case.resolution // 8)
    weights = {GENERATOR: [*iteration.generator.parameters()], FAKE_SCORE: iteration.critic_parameters}
    return Contestant(case, lambda number: iteration.iteration(number, [PROMPT], images, draws_of(number)), weights)


def ours(case: Case) -> Contestant:
    """A registered method on a Triple, with text embeddings that are there already."""
    family_name, folder, _ = MODELS[case.model]
    layouts = {}
    for role, mode in zip(ROLES, case.layout.split("/"), strict=True):
        layouts[role] = (
            RoleLayout("full") if mode == "full" else lora(load_family(family_name), case.rank, case.targets)
        )
    options: dict[str, Any] = {"guidance": GUIDANCE}
    if case.method == "dmd2":
        options |= {"steps": case.steps, "ratio": case.ratio, "gan": {"weight": GAN_WEIGHT}}
    prompt = None
    if family_name == "sd":
        encode = text_encoder(case.model)
        tokens = tokenizer_of(CONFIGS / folder / "tokenizer")(
            [PROMPT, ""], padding="max_length", truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            cond, null = encode(tokens.input_ids)[0].split(1)
        prompt = Conditioning(cond), Conditioning(null)
    network = random_unet(case.model, torch.float32)
    run = assemble(
        case.model, case.resolution, network, case.method, options, layouts, prompt=prompt,
        checkpointing=case.checkpointing,
    )  # fmt: skip

    def iteration(number: int) -> Mapping[str, Tensor]:
        progress = Progress(number, {role: number for role in run.optimizers}, 0, number)
        return iterate(run, draws_of(number), progress)

    return Contestant(case, iteration, {role: [*run.triple.parameters(role).values()] for role in run.optimizers})


def measure(case: Case) -> Row:
    """In this process: the first turn warms up, the others are timed and watched."""
    torch.set_num_threads(case.threads)
    baseline = resident("VmRSS")
    contestant = plain(case) if case.method == PLAIN else ours(case)
    contestant.turn()
    forget_peak()
    turns = [contestant.turn() for _ in range(case.turns)]
    return Row(
        method=case.method,
        layout=case.layout,
        seconds=[turn.wall for turn in turns],
        cpu_seconds=[turn.cpu for turn in turns],
        peak_gb=round(resident("VmHWM") / GB, 4),
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
        "dtype": "float32",
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
