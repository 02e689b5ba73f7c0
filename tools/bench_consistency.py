"""Seconds and peak memory of an update by sCM, on images, and by TBCM, on walks: 64 states each, on the embedded teacher.

    python tools/bench_consistency.py --json tools/results/bench_consistency.json

Every run is a process of its own, turn about; memory is the highest resident size of the process above that with all networks
loaded, time that of the iterations after the first. Needs data/fashion_images (see configs/fashion_scm.yaml).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from stepdistill.config.schema import load_config
from stepdistill.training.evaluation_hook import EvaluationResult
from stepdistill.training.run import train
from stepdistill.training.session import Session

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("scm", "tbcm")
JVP = "method.tangent.kind=jvp"


@dataclass(frozen=True)
class Cost:
    """Of one update: processor and wall seconds, bytes above the loaded networks."""

    processor: float
    wall: float
    memory: int


class Meter:
    """A watcher that reads clocks and the highest memory after every iteration."""

    every = 1

    def __init__(self, _session: Session, _folder: Path) -> None:
        self.loaded = _highest()
        self.times: list[tuple[float, float]] = []

    def __call__(self, iteration: int) -> EvaluationResult:
        self.times.append((time.process_time(), time.perf_counter()))
        return EvaluationResult({}, None)

    def cost(self) -> Cost:
        (used, begun), (using, ended) = self.times[0], self.times[-1]
        count = len(self.times) - 1
        return Cost((using - used) / count, (ended - begun) / count, _highest() - self.loaded)


def _highest() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(method: str, tangent: list[str], iterations: int) -> Cost:
    """In this process."""
    never = ["grid_every=0", "save_every=1000000", "log_every=1000000", f"max_steps={iterations}"]
    config = load_config(ROOT / "configs" / f"fashion_{method}.yaml", [*tangent, *(f"training.{key}" for key in never)])
    meters: list[Meter] = []

    def watcher(session: Session, folder: Path) -> Meter:
        meters.append(Meter(session, folder))
        return meters[0]

    with tempfile.TemporaryDirectory() as folder:
        train(config, Path(folder) / "run", None, watcher)
    return meters[0].cost()


def apart(method: str, tangent: list[str], iterations: int) -> Cost:
    """In a process of its own."""
    command = [sys.executable, __file__, "--one", method, "--iterations", str(iterations), "--set", *tangent]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--one", choices=METHODS, default=None, help="measure one method in this process")
    parser.add_argument("--set", nargs="*", default=[])
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(asdict(measure(options.one, options.set, options.iterations))))
        return
    found: dict[str, dict[str, float]] = {}
    for tangent, changes in (("semi_discrete", []), ("jvp", [JVP])):
        turns: dict[str, list[Cost]] = {method: [] for method in METHODS}
        for _ in range(options.turns):
            for method in METHODS:
                turns[method].append(apart(method, changes, options.iterations))
        for method in METHODS:
            medians = {
                key: statistics.median(asdict(cost)[key] for cost in turns[method])
                for key in ("processor", "wall", "memory")
            }
            found[f"{method}, {tangent}"] = medians
            print(f"{method}, {tangent}: {medians['processor']:.2f} s, {medians['memory'] / 1e6:.0f} MB", flush=True)
        ours, theirs = (found[f"{method}, {tangent}"] for method in ("tbcm", "scm"))
        ratios = {key: ours[key] / theirs[key] for key in ours}
        found[f"tbcm / scm, {tangent}"] = ratios
        print(
            f"tbcm / scm, {tangent}: {ratios['processor']:.2f}x the time, {ratios['memory']:.2f}x the memory",
            flush=True,
        )
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
