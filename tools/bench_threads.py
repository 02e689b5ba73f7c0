"""Time of a training step on two CPU threads for several OpenMP spin counts, alone and beside a busy process.

    python tools/bench_threads.py --json tools/results/bench_threads.json

A step is one forward and backward pass of the embedded teacher's network on 64 latents. "busy" means that one other process keeps a
core occupied. The settings are measured in turn, round by round, so that a change of the machine's speed affects all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    **{f"spin {count}": {"GOMP_SPINCOUNT": str(count)} for count in (1_000, 10_000, 30_000, 100_000)},
}
STEP = """
import sys, time
import torch
from diffusers import UNet2DConditionModel
from stepdistill.assets import TEACHER, resolve

torch.set_num_threads(2)
network = UNet2DConditionModel.from_pretrained(resolve(TEACHER), subfolder="unet")
x = torch.randn(64, network.config.in_channels, network.config.sample_size, network.config.sample_size)
text = torch.randn(64, 8, network.config.cross_attention_dim)
seconds = []
for _ in range(int(sys.argv[1]) + 1):
    start = time.perf_counter()
    network(x, 500, text).sample.square().mean().backward()
    seconds.append(time.perf_counter() - start)
print(sorted(seconds[1:])[len(seconds[1:]) // 2])
"""
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def measure(settings: dict[str, str], steps: int, busy: bool) -> float:
    """Median seconds of a step under these environment variables."""
    environment = {key: value for key, value in os.environ.items() if key not in VARIABLES} | settings
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        done = subprocess.run(
            [sys.executable, "-c", STEP, str(steps)], env=environment, capture_output=True, text=True, check=True
        )
    finally:
        if neighbour is not None:
            neighbour.kill()
            neighbour.wait()
    return float(done.stdout)


def openmp_libraries() -> list[str]:
    """Names of the OpenMP libraries that torch loads here; only GNU's (`libgomp`) reads the variables above."""
    script = (
        "import torch; print('\\n'.join({line.split('/')[-1] for line in open('/proc/self/maps') if 'omp' in line}))"
    )
    if not Path("/proc/self/maps").exists():
        return []
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="steps in each measurement; their median counts")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    seconds: dict[str, dict[str, list[float]]] = {name: {"idle": [], "busy": []} for name in SETTINGS}
    for _ in range(arguments.rounds):
        for name, settings in SETTINGS.items():
            for condition, busy in (("idle", False), ("busy", True)):
                seconds[name][condition].append(measure(settings, arguments.steps, busy))
    rows = {
        name: {condition: round(statistics.median(values), 3) for condition, values in both.items()}
        for name, both in seconds.items()
    }
    libraries = openmp_libraries()
    print(f"OpenMP libraries: {', '.join(libraries) or 'unknown'}")
    print(f"{'setting':12} {'idle':>8} {'busy':>8}   seconds a step")
    for name, row in rows.items():
        print(f"{name:12} {row['idle']:8.3f} {row['busy']:8.3f}")
    if arguments.json is not None:
        record = {"openmp": libraries, "threads": 2, "rounds": arguments.rounds, "seconds_per_step": rows}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
