"""What a run survives: faults of the disk, of trackers, of one process of two; and what it says when it cannot go on."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.method_cases import CASES, Bench, equal, saved

from stepdistill.config import registry
from stepdistill.config.schema import TrainingConfig
from stepdistill.diffusion.draws import Draws
from stepdistill.errors import UserError
from stepdistill.methods.base import Batch, Progress, Rollout, Stage, Terms
from stepdistill.methods.matching.dmd2 import DMD2
from stepdistill.roles.triple import Triple
from stepdistill.training import stopping as signals
from stepdistill.training.distributed import check_launcher
from stepdistill.training.run import train
from stepdistill.training.run_folder import checkpoints
from stepdistill.training.trainer import Trainer

DMD2_CASE = CASES["dmd2"]


@pytest.fixture
def bench(tiny: Callable[..., Path], tmp_path: Path) -> Bench:
    return Bench(tiny, tmp_path)


def at_iteration(monkeypatch: pytest.MonkeyPatch, when: int, act: Callable[[], None]) -> None:
    """Do something to the world as iteration number `when` begins."""
    step = Trainer.iteration

    def disturbed(self: Trainer, batches: Sequence[tuple[Sequence[int], Batch]]) -> dict[str, torch.Tensor]:
        if self.counters.iteration == when:
            act()
        return step(self, batches)

    monkeypatch.setattr(Trainer, "iteration", disturbed)


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


# ---------------------------------------------------------------- the disk


def test_a_full_disk_stops_nothing_until_the_end(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Iteration 2 is saved; then the disk is full; the run ends with a sentence and the checkpoint of 2."""
    train(bench.config(DMD2_CASE, 6), tmp_path / "whole")
    run = tmp_path / "run"
    at_iteration(monkeypatch, 3, lambda: monkeypatch.setattr(checkpoints, "save_file", full_disk))
    with pytest.raises(UserError, match=r"iteration 6, could not be written .* iteration 2: make room"):
        train(bench.config(DMD2_CASE, 6, save_every=2), run)
    assert "No space left" in caplog.text
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.undo()
    train(bench.config(DMD2_CASE, 6, save_every=2), run, resume="latest")
    assert equal(saved(run), saved(tmp_path / "whole"))


def test_logs_that_cannot_be_written_are_named(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder stands where the log should; once it is gone, the lines that waited are written."""
    stats = tmp_path / "run/stats.jsonl"
    steps = {1: lambda: (stats.unlink(), stats.mkdir()), 3: stats.rmdir}
    step = Trainer.iteration

    def disturbed(self: Trainer, batches: Sequence[tuple[Sequence[int], Batch]]) -> dict[str, torch.Tensor]:
        steps.get(self.counters.iteration, lambda: None)()
        return step(self, batches)

    monkeypatch.setattr(Trainer, "iteration", disturbed)
    assert train(bench.config(DMD2_CASE, 4), tmp_path / "run").finished
    assert "the line of iteration 2" in caplog.text
    assert [json.loads(line)["iteration"] for line in stats.read_text().splitlines()] == [2, 3, 4]


def test_a_deleted_folder_becomes_a_run_again(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    at_iteration(monkeypatch, 3, lambda: shutil.rmtree(run))
    assert train(bench.config(DMD2_CASE, 4), run).finished
    monkeypatch.undo()
    lines = [json.loads(line)["iteration"] for line in (run / "stats.jsonl").read_text().splitlines()]
    assert lines == [4]
    assert train(bench.config(DMD2_CASE, 6), run, resume="latest").iteration == 6


def test_a_tracker_that_throws_stops_nothing(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from accelerate import Accelerator

    def broken(*_: Any, **__: Any) -> None:
        raise ConnectionError("the service is down")

    monkeypatch.setattr(Accelerator, "log", broken)
    assert train(bench.config(DMD2_CASE, 2), tmp_path / "run").finished
    assert "the service is down" in caplog.text
    assert len((tmp_path / "run/stats.jsonl").read_text().splitlines()) == 2


# ---------------------------------------------------------------- going back


def test_going_on_from_an_earlier_checkpoint_sets_later_ones_aside(bench: Bench, tmp_path: Path) -> None:
    """With `keep` 1 the later ones would count as the newest, and the new ones be pruned in their place."""
    run = tmp_path / "run"
    train(bench.config(DMD2_CASE, 6, save_every=2, keep=3), run)
    reference = saved(run)
    train(bench.config(DMD2_CASE, 3, keep=1), run, resume=str(run / "checkpoints/step-00000002"))
    assert checkpoints.steps(run / "checkpoints") == [3]
    assert sorted(path.name for path in (run / "checkpoints/abandoned").iterdir()) == ["step-00000004", "step-00000006"]
    assert [json.loads(line)["iteration"] for line in (run / "stats.jsonl").read_text().splitlines()] == [1, 2, 3]
    train(bench.config(DMD2_CASE, 6), run, resume="latest")
    assert equal(saved(run), reference)


@pytest.mark.parametrize("place", ["elsewhere", "abandoned/step-00000004"])
def test_a_checkpoint_from_elsewhere_becomes_one_of_the_run(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """At once: the run may be killed before it saves again, and later checkpoints have been set aside."""
    run = tmp_path / "run"
    train(bench.config(DMD2_CASE, 6, save_every=2, keep=3), run)
    reference, source = saved(run), run / "checkpoints" / place
    shutil.copytree(run / "checkpoints/step-00000004", source)
    shutil.rmtree(run / "checkpoints/step-00000004")

    def kill() -> None:
        raise KeyboardInterrupt

    at_iteration(monkeypatch, 4, kill)
    with pytest.raises(KeyboardInterrupt):
        train(bench.config(DMD2_CASE, 6, keep=1), run, resume=str(source))
    monkeypatch.undo()
    assert checkpoints.steps(run / "checkpoints") == [4]
    train(bench.config(DMD2_CASE, 6), run, resume="latest")
    assert equal(saved(run), reference)


def test_what_a_resume_must_not_do(bench: Bench, tmp_path: Path) -> None:
    """Take over another run's checkpoint, or rewrite the config of a run that has nothing left to do."""
    train(bench.config(DMD2_CASE, 2), tmp_path / "one")
    train(bench.config(DMD2_CASE, 2), tmp_path / "two")
    with pytest.raises(UserError, match="of another run than"):
        train(bench.config(DMD2_CASE, 4), tmp_path / "one", resume=str(tmp_path / "two/checkpoints/step-00000002"))
    before = (tmp_path / "one/config.yaml").read_text()
    assert f"output: {tmp_path / 'one'}" in before
    assert train(bench.config(DMD2_CASE, 1, batch_size=2), tmp_path / "one", resume="latest").iteration == 2
    assert (tmp_path / "one/config.yaml").read_text() == before


def test_a_best_checkpoint_of_an_abandoned_branch_is_set_aside(tmp_path: Path, bench: Bench) -> None:
    run = tmp_path / "run"
    train(bench.config(DMD2_CASE, 4, save_every=2), run)
    places = run / "checkpoints"
    checkpoints.keep_best(places, 4, {"iteration": 4, "metric": "fid", "value": 1.0})
    checkpoints.move_later_checkpoints(places, 2)
    assert checkpoints.read_best_metadata(places) is None
    assert (places / "abandoned/best/best.json").is_file()


def test_the_best_checkpoint_outlives_a_kill_while_it_is_replaced(
    tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    train(bench.config(DMD2_CASE, 4, save_every=2), run)
    places, replace_file, calls = run / "checkpoints", os.replace, []
    checkpoints.keep_best(places, 2, {"iteration": 2, "metric": "fid", "value": 2.0})

    def killed(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.keep_best(places, 4, {"iteration": 4, "metric": "fid", "value": 1.0})
    monkeypatch.undo()
    assert checkpoints.read_best_metadata(places) == {"iteration": 2, "metric": "fid", "value": 2.0}


def test_a_run_whose_every_checkpoint_is_broken_is_not_started_afresh(bench: Bench, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(bench.config(DMD2_CASE, 2), run)
    (run / "checkpoints/step-00000002/generator.safetensors").write_bytes(b"")
    before = (run / "stats.jsonl").read_text()
    with pytest.raises(UserError, match=r"none of the checkpoints .* is whole"):
        train(bench.config(DMD2_CASE, 4), run, resume="latest")
    assert (run / "stats.jsonl").read_text() == before


def test_grids_beyond_the_checkpoint_go(bench: Bench, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = bench.config(DMD2_CASE, 3, family="sd", dtype="float32", grid_every=1, save_every=1, batch_size=1, keep=3)
    train(config, run)
    for kind in ("step", "scores"):
        (run / f"grids/{kind}-00000009.png").write_bytes(b"from a future that will not come")
    train(config, run, resume=str(run / "checkpoints/step-00000001"))
    pictures = [f"{kind}-{k:08d}.png" for kind in ("scores", "step") for k in (1, 2, 3)]
    assert sorted(path.name for path in (run / "grids").iterdir()) == pictures


def test_a_checkpoint_is_not_written_twice(bench: Bench, tmp_path: Path) -> None:
    """Resuming a finished run leaves its checkpoint as it is: there is no moment at which it is missing."""
    run = tmp_path / "run"
    train(bench.config(DMD2_CASE, 2), run)
    before = (run / "checkpoints/step-00000002").stat().st_ino
    train(bench.config(DMD2_CASE, 2), run, resume="latest")
    assert (run / "checkpoints/step-00000002").stat().st_ino == before


def test_leftovers_of_a_killed_write_are_swept(bench: Bench, tmp_path: Path) -> None:
    left = tmp_path / "run/checkpoints/.step-00000001.partial"
    train(bench.config(DMD2_CASE, 1), tmp_path / "run")
    left.mkdir()
    train(bench.config(DMD2_CASE, 2), tmp_path / "run", resume="latest")
    assert not left.exists()


# ---------------------------------------------------------------- what changed since


def test_a_changed_environment_is_said(bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(bench.config(DMD2_CASE, 2), tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        train(bench.config(DMD2_CASE, 3, batch_size=2, accumulation=2), tmp_path / "run", resume="latest")
    assert "not bit for bit" in caplog.text
    assert "batch was 4 and is 2, accumulation was 1 and is 2" in caplog.text


def test_changed_settings_are_said(bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(bench.config(DMD2_CASE, 2), tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        train(bench.config(DMD2_CASE, 3, save_every=50), tmp_path / "run", resume="latest")
        assert "not bit for bit" not in caplog.text
        train(bench.config(DMD2_CASE, 4, seed=7), tmp_path / "run", resume="latest")
    assert "training.seed was 0 and is 7" in caplog.text


def test_another_base_is_refused(bench: Bench, tmp_path: Path) -> None:
    """The same path with other weights in it."""
    config = bench.config(DMD2_CASE, 2)
    model = Path(shutil.copytree(config.model.path, tmp_path / "model"))
    moved = config.model_copy(update={"model": config.model.model_copy(update={"path": str(model)})})
    train(moved, tmp_path / "run")
    file = model / "network/weights.safetensors"
    from safetensors.torch import load_file

    weights = load_file(file)
    save_file({key: value + 0.25 for key, value in weights.items()}, file)
    with pytest.raises(
        UserError, match=r"trained on a base with fingerprint \w+, and the weights .* put the weights back"
    ):
        train(moved, tmp_path / "run", resume="latest")


@pytest.mark.parametrize(
    ("environment", "sharding", "words"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "auto", "asks for DeepSpeed"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1", "WORLD_SIZE": "2"}, "auto", "set fsdp_version: 2"),
        ({"WORLD_SIZE": "1"}, "full", "there is one process"),
        ({}, "full", "there is one process"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "auto", "there is one process"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
            "auto",
            "leaves the text encoders empty",
        ),
    ],
)
def test_launchers_that_are_refused(environment: dict[str, str], sharding: str, words: str) -> None:
    config = TrainingConfig.model_validate({"max_steps": 1, "sharding": sharding})
    with pytest.raises(UserError, match=words):
        check_launcher(config, environment)


def test_launchers_that_are_not() -> None:
    config = TrainingConfig(max_steps=1)
    check_launcher(config, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "8"})
    check_launcher(config, {})


# ---------------------------------------------------------------- stages


class Staged(DMD2):
    """DMD2 in two stages, the second of which starts with a fresh fake score: what phased methods do."""

    def stages(self) -> Sequence[Stage]:
        return Stage("first", 3), Stage("second", None, reset=("fake_score",))

    def rollout(self, batch: Batch, triple: Triple, progress: Progress, draws: Draws) -> Rollout:
        return super().rollout(batch, triple, progress, draws)

    def loss(self, role: str, rollout: Rollout, triple: Triple, progress: Progress, draws: Draws) -> Terms:
        terms = super().loss(role, rollout, triple, progress, draws)
        return replace(terms, parts={**terms.parts, "stage": torch.tensor(float(progress.stage))})


@pytest.mark.parametrize("cut", [2, 3, 4])
def test_resume_around_a_stage_boundary(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    monkeypatch.setattr(registry, "METHODS", {**registry.METHODS, "staged": f"{__name__}:Staged"})
    case = replace(DMD2_CASE, method="staged")
    train(bench.config(case, 6), tmp_path / "whole")
    train(bench.config(case, cut), tmp_path / "broken")
    train(bench.config(case, 6), tmp_path / "broken", resume="latest")
    assert equal(saved(tmp_path / "whole"), saved(tmp_path / "broken"))
    lines = [json.loads(line) for line in (tmp_path / "whole/stats.jsonl").read_text().splitlines()]
    assert [line["fake_score/stage"] for line in lines] == [0, 0, 0, 1, 1, 1]
    # warm-up counts the stage's own updates: 2 of them, then the full rate
    assert [line["generator/lr"] for line in lines if "generator/lr" in line] == [0.5e-3, 1e-3, 0.5e-3, 1e-3]
    path = checkpoints.latest(tmp_path / "whole/checkpoints")
    assert path is not None
    assert checkpoints.read(path).metadata.counters.updates == {"generator": 2, "fake_score": 3}


def test_a_later_signal_stops_at_once(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest checkpoint is then the one before."""
    monkeypatch.setattr(signals, "SAME_SIGNAL_SECONDS", 0.05)

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    at_iteration(monkeypatch, 3, twice)
    with pytest.raises(KeyboardInterrupt):
        train(bench.config(DMD2_CASE, 5, save_every=2), tmp_path / "run")
    assert checkpoints.steps(tmp_path / "run/checkpoints") == [2]
    monkeypatch.undo()  # or the resumed run, which comes by iteration 3 again, takes the test session down
    assert train(bench.config(DMD2_CASE, 5), tmp_path / "run", resume="latest").finished


def test_one_signal_that_comes_twice_is_one(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun hands on what a terminal or a cluster sent to all processes: its workers get it a second time."""

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    at_iteration(monkeypatch, 3, twice)
    assert not train(bench.config(DMD2_CASE, 5), tmp_path / "run").finished
    assert checkpoints.steps(tmp_path / "run/checkpoints") == [4]
