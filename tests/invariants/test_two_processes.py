"""Two processes, replicated and sharded, equal one process with the joint batch, for every method. One launch runs all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from methods import CASES, Bench, difference, equal, saved

from stepdistill.config import RunConfig
from stepdistill.training.folder import write_config
from stepdistill.training.run import train

WORKER = Path(__file__).with_name("worker.py")
KINDS = ("replicated", "full")
LAYOUT = {"replicated": "lora", "full": "mixed"}


@dataclass
class Launch:
    """Jobs for two processes."""

    folder: Path
    jobs: list[dict[str, str | None]] = field(default_factory=list)

    def add(self, config: RunConfig, name: str, resume: str | None = None) -> None:
        place = self.folder / "configs" / f"{len(self.jobs)}"
        write_config(place, config)
        self.jobs.append({"config": str(place / "config.yaml"), "output": str(self.folder / name), "resume": resume})

    def run(self) -> None:
        file = self.folder / "jobs.json"
        file.write_text(json.dumps(self.jobs))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(WORKER)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, str(file)], env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def together(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Bench, Path]:
    """Folder with a run of two processes of every case and kind, whole and broken."""
    folder = tmp_path_factory.mktemp("two")
    bench, launch = Bench(tiny, folder), Launch(folder)
    for name, case in CASES.items():
        last = case.period + 3
        for kind in KINDS:
            make = lambda steps, c=case, k=kind: bench.config(  # noqa: E731
                c, steps, batch_size=2, sharding=k, layout=LAYOUT[k]
            )
            launch.add(make(last), f"{name}-{kind}")
            launch.add(make(case.period + 1), f"{name}-{kind}-broken")
            launch.add(make(last), f"{name}-{kind}-broken", "latest")
    launch.run()
    return bench, folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(together: tuple[Bench, Path], tmp_path: Path, name: str, kind: str) -> None:
    """Both roles after several phases, optimizers and EMA included; learning rates and logs too."""
    bench, folder = together
    case = CASES[name]
    train(bench.config(case, case.period + 3, batch_size=4, layout=LAYOUT[kind]), tmp_path / "one")
    assert difference(saved(folder / f"{name}-{kind}"), saved(tmp_path / "one")) < 1e-10
    ours, theirs = (
        [json.loads(line) for line in (place / "stats.jsonl").read_text().splitlines()]
        for place in (folder / f"{name}-{kind}", tmp_path / "one")
    )
    for mine, its in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(its, rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_resume_is_bit_identical(together: tuple[Bench, Path], name: str, kind: str) -> None:
    _, folder = together
    assert equal(saved(folder / f"{name}-{kind}"), saved(folder / f"{name}-{kind}-broken"))
