"""Two processes, replicated and sharded, equal one process with the joint batch, for every method. One launch runs all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from support.method_cases import CASES, FULLEST, Bench, difference, equal, saved

from stepdistill.config.schema import EvaluationConfig, RunConfig
from stepdistill.training.run import train
from stepdistill.training.run_folder import checkpoints
from stepdistill.training.run_folder.logs import write_config

pytestmark = pytest.mark.ci

WORKER = Path(__file__).with_name("worker.py")
KINDS = ("replicated", "full")
LAYOUT = {"replicated": "lora", "full": "mixed"}
WHOLE = [(name, kind) for name in FULLEST.values() for kind in KINDS]
"""Of every method its case with the most parts, in both kinds, and resumed in both."""
FURTHER = [(name, KINDS[k % 2]) for k, name in enumerate(sorted(set(CASES) - set(FULLEST.values())))]
"""The other cases, in one kind each."""


@dataclass
class Launch:
    """Jobs for two processes."""

    folder: Path
    jobs: list[dict[str, str | None]] = field(default_factory=list)

    def add(self, config: RunConfig, name: str, resume: str | None = None, fault: str | None = None) -> None:
        place = self.folder / "configs" / f"{len(self.jobs)}"
        write_config(place, config)
        output = str(self.folder / name)
        self.jobs.append({"config": str(place / "config.yaml"), "output": output, "resume": resume, "fault": fault})

    def run(self) -> None:
        file = self.folder / "jobs.json"
        file.write_text(json.dumps(self.jobs))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(WORKER)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, str(file)], env=environment, capture_output=True, text=True, timeout=2400)
        # the launcher's own lines come last: those of the processes are further up, of the one that failed first
        assert done.returncode == 0, done.stderr[-12000:]


@pytest.fixture(scope="module")
def together(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Bench, Path]:
    """Folder with a run of two processes of every case and kind, whole and broken."""
    folder = tmp_path_factory.mktemp("two")
    bench, launch = Bench(tiny, folder), Launch(folder)
    for name, kind in (*WHOLE, *FURTHER):
        case = CASES[name]
        last = case.period + 3
        make = lambda steps, c=case, k=kind: bench.config(  # noqa: E731
            c, steps, batch_size=2, sharding=k, layout=LAYOUT[k]
        )
        launch.add(make(last), f"{name}-{kind}")
        if (name, kind) in WHOLE:
            launch.add(make(case.period + 1), f"{name}-{kind}-broken")
            launch.add(make(last), f"{name}-{kind}-broken", "latest")
    for kind in KINDS:
        plain = bench.config(CASES["dmd2"], 5, batch_size=2, sharding=kind, layout=LAYOUT[kind])
        for fault in ("nan", "stop", "record"):
            launch.add(plain, f"{fault}-{kind}", fault=fault)
        launch.add(plain, f"stop-{kind}", "latest")
        launch.add(plain, f"late-{kind}", fault="late")
        launch.add(plain, f"late-{kind}", "latest", fault="late")
        launch.add(drawn(bench, batch_size=2, sharding=kind), f"drawn-{kind}")
    launch.add(half(bench), "half")
    launch.add(tokens(bench, batch_size=2), "tokens")
    launch.add(watched(bench), "watched")
    launch.add(muon(bench, batch_size=2), "muon")
    launch.run()
    return bench, folder


def drawn(bench: Bench, **training: Any) -> RunConfig:
    """Grids and their signals as it trains, on a family with pictures and real images."""
    return bench.config(CASES["dmd2-gan"], 4, grid_every=2, grid_prompts=2, **training)


def half(bench: Bench) -> RunConfig:
    """A frozen bfloat16 base under float32 adapters and a head, checkpointed, sharded: dtypes mix in every block."""
    return bench.config(
        CASES["dmd2-gan"], 1, batch_size=1, sharding="full", dtype="bfloat16", gradient_checkpointing=True, ema=0.0
    )


def tokens(bench: Bench, **training: Any) -> RunConfig:
    """A transformer whose checkpointed, sharded blocks are left early for their features."""
    shared = {"family": "sd3", "variant": "sd35", "layout": "mixed", "gradient_checkpointing": True}
    return bench.config(CASES["dmd2-gan"], 4, **shared, **{"sharding": "full", **training})


def muon(bench: Bench, **training: Any) -> RunConfig:
    config = bench.config(CASES["dmd2"], 4, **training)
    kinds = {
        role: own.model_copy(update={"kind": "muon"})
        for role, own in (("generator", config.optimizers.generator), ("fake_score", config.optimizers.fake_score))
    }
    return config.model_copy(update={"optimizers": config.optimizers.model_copy(update=kinds)})


def watched(bench: Bench) -> RunConfig:
    """Sharded and measured as it trains: three images over two processes, so that one has a call without an image."""
    config = bench.config(CASES["dmd2"], 2, family="sd", dtype="float32", batch_size=1, sharding="full")
    prompts, reference = bench.folder / "three.txt", bench._images()
    prompts.write_text("a cat\na dog\na hat")
    section = EvaluationConfig(every=2, prompts=str(prompts), reference=str(reference), images=3, features="random")
    return config.model_copy(update={"evaluation": section})


@pytest.mark.parametrize(("name", "kind"), [*WHOLE, *FURTHER])
def test_two_processes_equal_one(together: tuple[Bench, Path], tmp_path: Path, name: str, kind: str) -> None:
    """Both roles after several phases, optimizers and EMA included; learning rates and logs too."""
    bench, folder = together
    case = CASES[name]
    train(bench.config(case, case.period + 3, batch_size=4, layout=LAYOUT[kind]), tmp_path / "one")
    assert difference(saved(folder / f"{name}-{kind}"), saved(tmp_path / "one")) < 1e-10
    check_lines(folder / f"{name}-{kind}", tmp_path / "one")


def check_lines(*runs: Path) -> None:
    """The same names and values in the same lines."""
    ours, theirs = ([json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()] for run in runs)
    for mine, its in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(its, rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_what_two_processes_draw_is_what_one_draws(together: tuple[Bench, Path], tmp_path: Path, kind: str) -> None:
    bench, folder = together
    train(drawn(bench, batch_size=4), tmp_path / "one")
    assert (tmp_path / "one/stats.jsonl").read_text().count("signals/saturation_drift") == 2
    check_lines(folder / f"drawn-{kind}", tmp_path / "one")
    assert (folder / f"drawn-{kind}/grids/scores-00000004.png").is_file()


@pytest.mark.parametrize(("name", "kind"), WHOLE)
def test_resume_is_bit_identical(together: tuple[Bench, Path], name: str, kind: str) -> None:
    _, folder = together
    assert equal(saved(folder / f"{name}-{kind}"), saved(folder / f"{name}-{kind}-broken"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_is_no_number_on_one_process_skips_on_both(together: tuple[Bench, Path], kind: str) -> None:
    """Iteration 2 updates both roles; both steps are skipped by both processes, and the run goes on."""
    _, folder = together
    path = checkpoints.latest(folder / f"nan-{kind}/checkpoints")
    assert path is not None
    found = checkpoints.read(path)
    assert (found.metadata.counters.skipped, found.metadata.counters.bad_in_row) == (2, 0)
    assert found.metadata.counters.updates == {"generator": 2, "fake_score": 4}
    assert all(bool(tensor.isfinite().all()) for group in found.tensors.values() for tensor in group.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_to_one_process_stops_both_at_one_iteration(together: tuple[Bench, Path], kind: str) -> None:
    _, folder = together
    assert equal(saved(folder / f"stop-{kind}"), saved(folder / f"record-{kind}"))
    lines = [json.loads(line) for line in (folder / f"stop-{kind}/stats.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_that_comes_late_finds_the_folder_as_the_first_one_found_it(
    together: tuple[Bench, Path], kind: str
) -> None:
    """Begun and resumed; resuming at the end changes nothing."""
    _, folder = together
    assert equal(saved(folder / f"late-{kind}"), saved(folder / f"record-{kind}"))


@pytest.mark.parametrize("kind", KINDS)
def test_noise_differs_and_rollouts_are_equally_long(together: tuple[Bench, Path], kind: str) -> None:
    _, folder = together
    first, second = (
        [json.loads(line) for line in (folder / f"record-{kind}-{rank}.jsonl").read_text().splitlines()]
        for rank in (0, 1)
    )
    assert [line["t"] for line in first] == [line["t"] for line in second]
    assert len({t for line in first for t in line["t"]}) == 2  # both exits of a ladder of two were drawn
    drawn = [x for line in first + second for x in line["x"]]
    assert len(set(drawn)) == len(drawn)


def test_dtypes_mix_in_a_sharded_block(together: tuple[Bench, Path], tmp_path: Path) -> None:
    """bfloat16 sums in another order, so close is all that gradients can be; what is trained stays float32."""
    bench, folder = together
    joint = half(bench).training.model_copy(update={"batch_size": 2, "sharding": "auto"})
    train(half(bench).model_copy(update={"training": joint}), tmp_path / "one")
    ours, theirs = saved(folder / "half"), saved(tmp_path / "one")
    for role in ("generator", "fake_score"):
        assert all(tensor.dtype == torch.float32 for tensor in ours[role].values())
        mine, its = (
            torch.cat([t.flatten() for key, t in group[f"optimizer.{role}"].items() if key.endswith("|exp_avg")])
            for group in (ours, theirs)
        )
        assert float((mine - its).norm() / its.norm()) < 0.1


def test_a_transformer_s_blocks_are_shared_out_and_left(together: tuple[Bench, Path], tmp_path: Path) -> None:
    bench, folder = together
    train(tokens(bench, batch_size=4, sharding="auto"), tmp_path / "one")
    assert difference(saved(folder / "tokens"), saved(tmp_path / "one")) < 1e-10


def test_muon_takes_the_mean_of_both_processes_gradients(together: tuple[Bench, Path], tmp_path: Path) -> None:
    """It orthogonalises in bfloat16, whose last bit follows that of a sum: a thousandth of what four updates of 1e-3 move."""
    bench, folder = together
    train(muon(bench, batch_size=4), tmp_path / "one")
    assert difference(saved(folder / "muon"), saved(tmp_path / "one")) < 4e-6
    train(muon(bench, batch_size=2), tmp_path / "half")
    assert difference(saved(folder / "muon"), saved(tmp_path / "half")) > 1e-4


def test_a_sharded_student_is_measured_and_drawn(together: tuple[Bench, Path]) -> None:
    _, folder = together
    line = json.loads((folder / "watched/evaluation.jsonl").read_text())
    assert line["iteration"] == 2
    assert sum(key.startswith("evaluation/generator_ema/fid") for key in line) == 1
    assert (folder / "watched/checkpoints/best/best.json").is_file()
    assert (folder / "watched/grids/step-00000002.png").is_file()
