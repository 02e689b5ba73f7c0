"""The peak that `stepdistill plan` foretells beside the one that tools/bench_memory.py measures, on the same U-Net.

    python tools/bench_plan.py --model sd15 --resolution 512 --json plan.json
    python tools/bench_plan.py --model sd15 --resolution 512 --measured shared.json

The bench holds no text encoders and no autoencoder, so both are taken off the plan, and the process's own memory before it
held a tensor is added. `--measured` reads a report of the bench's shared layout instead of measuring, which takes minutes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchlib import CONFIGS, MODELS

from stepdistill.config.reading import parse
from stepdistill.config.schema import RunConfig
from stepdistill.planning.plan import plan


@dataclass(frozen=True)
class Comparison:
    """GB of 10^9 bytes; `error` is planned over measured less one."""

    model: str
    resolution: int
    measured_gb: float
    planned_gb: float
    error: float


def planned(model: str, resolution: int, rank: int, targets: str, baseline_gb: float) -> float:
    """The highest phase of training, as the bench would have it, in GB."""
    _, folder, changes = MODELS[model]
    with tempfile.TemporaryDirectory() as scratch:
        configs = Path(shutil.copytree(CONFIGS / folder, Path(scratch) / "configs"))
        network = configs / "unet" / "config.json"
        network.write_text(json.dumps({**json.loads(network.read_text()), **changes}))
        role = {"rank": rank, "alpha": rank, "targets": targets}
        data: dict[str, Any] = {
            "model": {
                "path": "bench/random",
                "config_dir": str(configs),
                "dtype": "bfloat16",
                "size": [resolution, resolution],
            },
            "method": {"name": "dmd2", "guidance": 7.0, "gan": {"weight": 5e-3}},
            "roles": {"generator": role, "fake_score": role},
            "data": {"prompts": "builtin:general", "images": "images"},
            "training": {"max_steps": 5, "gradient_checkpointing": True, "device": "cpu"},
        }
        forecast = plan(parse(RunConfig, data, "bench"))
    beside = sum(p.bytes for p in forecast.memory.parts if p.name in ("text encoders", "autoencoder"))
    training = [p.bytes for p in forecast.memory.phases if p.name.startswith(("generator", "fake_score"))]
    return (max(training) - beside) / 1e9 + baseline_gb


def measured(model: str, resolution: int, rank: int, targets: str) -> dict[str, Any]:
    """A report of the bench's shared layout, measured now."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "shared.json"
        bench = Path(__file__).with_name("bench_memory.py")
        case = ["--model", model, "--resolution", str(resolution), "--rank", str(rank), "--targets", targets]
        command = [sys.executable, str(bench), *case, "--layout", "shared", "--json", str(report)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return dict(json.loads(report.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="sd15")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--targets", default="attention", help="LoRA targets: a preset of the family")
    parser.add_argument("--measured", type=Path, help="report of bench_memory's shared layout of the same case")
    parser.add_argument("--json", type=Path, help="where the comparison goes; printed in any case")
    options = parser.parse_args()
    case = (options.model, options.resolution, options.rank, options.targets)
    report = json.loads(options.measured.read_text()) if options.measured is not None else measured(*case)
    if tuple(report[key] for key in ("model", "resolution", "rank", "targets")) != case:
        raise SystemExit(
            "the measured report is of another case: give one of the same model, resolution, rank and targets"
        )
    peak = planned(*case, report["parts"]["baseline"])
    error = peak / report["peak_gb"] - 1
    text = json.dumps(asdict(Comparison(*case[:2], report["peak_gb"], round(peak, 4), round(error, 4))), indent=2)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
