"""The loop: exact resume, accumulation, signals, checkpoints, refusals. On the analytic family, in float64."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.method_cases import difference, saved

from stepdistill.config.reading import parse
from stepdistill.config.schema import OptimizerConfig, RunConfig
from stepdistill.errors import UserError
from stepdistill.files.locks import locked_folder
from stepdistill.methods.base import Terms
from stepdistill.roles.triple import FAKE_SCORE, GENERATOR
from stepdistill.training.optimizers import RoleOptimizer, learning_rate_at
from stepdistill.training.run import open_run, run_config, train
from stepdistill.training.run_folder import checkpoints
from stepdistill.training.run_folder.environment import Environment
from stepdistill.training.trainer import RoleUpdates, Trainer


@pytest.fixture
def config(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunConfig]:
    prompts = tmp_path_factory.mktemp("data") / "prompts.txt"
    prompts.write_text("mode 0\nmode 1\nmode 2\nmode 3\nmode 1\n")
    model = tiny("analytic", "default")

    def make(steps: int = 6, batch: int = 4, accumulation: int = 1, mode: str = "lora", **changes: Any) -> RunConfig:
        role = {"mode": mode, "rank": 8, "alpha": 4}
        data: dict[str, Any] = {
            "model": {"path": str(model), "dtype": "float64"},
            "method": {"name": "dmd2", "guidance": 1.5, "ratio": 3},
            "roles": {"generator": role, "fake_score": role},
            "optimizers": {"generator": {"lr": 1e-3, "warmup": 3}, "fake_score": {"lr": 1e-3}},
            "data": {"prompts": str(prompts)},
            "training": {
                "max_steps": steps, "batch_size": batch, "accumulation": accumulation, "ema": 0.9, "save_every": 100,
                "log_every": 1, "device": "cpu",
            },
        }  # fmt: skip
        for key, value in changes.items():
            section, _, name = key.partition("__")
            data[section][name] = value
        return parse(RunConfig, data, "test")

    return make


def metadata(iteration: int) -> checkpoints.CheckpointMetadata:
    here = Environment("cpu", 1, 1, False, "float32", "sdpa", False, False, "none", 1, 1, "2")
    return checkpoints.CheckpointMetadata("dmd2", "base", checkpoints.Counters(iteration), here)


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("cut", [2, 3, 4])
def test_resume_is_bit_identical(config: Callable[..., RunConfig], tmp_path: Path, mode: str, cut: int) -> None:
    """Around a generator update (ratio 3) and in mid-epoch (5 prompts, batches of 4)."""
    train(config(6, mode=mode), tmp_path / "whole")
    train(config(cut, mode=mode), tmp_path / "broken")
    train(config(6, mode=mode), tmp_path / "broken", resume="latest")
    whole, broken = saved(tmp_path / "whole"), saved(tmp_path / "broken")
    assert all(torch.equal(whole[f][k], broken[f][k]) for f in whole for k in whole[f])
    assert (tmp_path / "whole/stats.jsonl").read_text() == (tmp_path / "broken/stats.jsonl").read_text()


def test_log_lines_beyond_the_checkpoint_are_cut(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    train(config(3), tmp_path)
    with (tmp_path / "stats.jsonl").open("a") as file:
        file.write(json.dumps({"iteration": 4, "left": "over"}) + "\n" + '{"iteration": 5, "torn')
    train(config(6), tmp_path, resume="latest")
    lines = [json.loads(line) for line in (tmp_path / "stats.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert "left" not in lines[3]


@pytest.mark.parametrize(("batch", "accumulation"), [(1, 4), (2, 2)])
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_accumulation_changes_nothing(
    config: Callable[..., RunConfig], tmp_path: Path, batch: int, accumulation: int, mode: str
) -> None:
    train(config(7, mode=mode), tmp_path / "a")
    train(config(7, batch, accumulation, mode), tmp_path / "b")
    assert difference(saved(tmp_path / "a"), saved(tmp_path / "b")) < 1e-10


def test_update_counts_and_rates(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Ratio 3 over 7 iterations: the generator at 0, 3, 6, the fake score at all; warm-up counts the role's updates."""
    train(config(7), tmp_path)
    path = checkpoints.latest(tmp_path / "checkpoints")
    assert path is not None
    assert checkpoints.read(path).metadata.counters.updates == {"generator": 3, "fake_score": 7}
    lines = [json.loads(line) for line in (tmp_path / "stats.jsonl").read_text().splitlines()]
    rates = [line["generator/lr"] for line in lines if "generator/lr" in line]
    assert rates == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3])


def test_ema_follows_the_generator(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    train(config(1), tmp_path)
    state = saved(tmp_path)
    key = next(key for key in state["generator"] if "lora_B" in key)
    assert torch.allclose(state["generator_ema"][key], 0.1 * state["generator"][key])


def test_a_signal_finishes_the_step_and_saves(
    config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.iteration

    def interrupted(self: Trainer, batches: Any) -> Any:
        if self.counters.iteration == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batches)

    monkeypatch.setattr(Trainer, "iteration", interrupted)
    outcome = train(config(6), tmp_path / "run")
    assert (outcome.finished, outcome.iteration) == (False, 3)
    monkeypatch.undo()
    train(config(6), tmp_path / "whole")
    assert train(config(6), tmp_path / "run", resume="latest").finished
    assert difference(saved(tmp_path / "run"), saved(tmp_path / "whole")) == 0


def test_non_finite_steps_are_skipped_counted_and_stop_the_run(
    config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = RoleOptimizer.clip

    def poisoned(self: RoleOptimizer) -> torch.Tensor:
        next(iter(self.parameters.values())).grad.fill_(torch.nan)  # type: ignore[union-attr]
        return real(self)

    monkeypatch.setattr(RoleOptimizer, "clip", poisoned)
    with pytest.raises(UserError, match="5 steps in a row"):
        train(config(6, training__max_bad_steps=5), tmp_path)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("role", [GENERATOR, FAKE_SCORE])
def test_a_role_that_was_never_updated_is_an_error(
    config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    """The other role's good steps must not hide it."""
    real = RoleUpdates.on_terms

    def poisoned(self: RoleUpdates, due: str, piece: int, terms: Terms) -> None:
        real(self, due, piece, terms * float("nan") if due == role else terms)

    monkeypatch.setattr(RoleUpdates, "on_terms", poisoned)
    with pytest.raises(UserError, match=f"the {role} was never updated: all \\d+ of its steps in this stage"):
        train(config(4, training__max_bad_steps=50), tmp_path)


def test_weights_that_are_not_finite_are_not_saved(
    config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config(2), tmp_path / "run")
    before = checkpoints.latest(tmp_path / "run/checkpoints")
    real = RoleOptimizer.step

    def diverging(self: RoleOptimizer, update: int) -> float:
        learning_rate_at = real(self, update)
        with torch.no_grad():
            next(iter(self.parameters.values())).fill_(torch.nan)
        return learning_rate_at

    monkeypatch.setattr(RoleOptimizer, "step", diverging)
    with pytest.raises(UserError, match=r"the weights of iteration 3 are not finite \(.*\), so they were not saved"):
        train(config(3), tmp_path / "run", resume="latest")
    assert checkpoints.latest(tmp_path / "run/checkpoints") == before


def test_one_bad_step_leaves_the_parameters_alone(
    config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config(2), tmp_path / "before")
    real = RoleOptimizer.clip
    calls = []

    def poisoned(self: RoleOptimizer) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:  # iteration 0 clips twice, iterations 1 and 2 once: this is iteration 2
            next(iter(self.parameters.values())).grad.fill_(torch.inf)  # type: ignore[union-attr]
        return real(self)

    monkeypatch.setattr(RoleOptimizer, "clip", poisoned)
    train(config(3), tmp_path / "after")
    before, after = saved(tmp_path / "before"), saved(tmp_path / "after")
    assert all(torch.equal(before["fake_score"][k], after["fake_score"][k]) for k in before["fake_score"])
    path = checkpoints.latest(tmp_path / "after/checkpoints")
    assert path is not None
    assert checkpoints.read(path).metadata.counters.skipped == 1


def test_corrupt_checkpoints_are_skipped_by_name(
    config: Callable[..., RunConfig], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(config(4, training__save_every=2), tmp_path)
    newest = tmp_path / "checkpoints/step-00000004"
    file = newest / "generator.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with caplog.at_level(logging.WARNING):
        assert checkpoints.latest(tmp_path / "checkpoints") == tmp_path / "checkpoints/step-00000002"
    assert "step-00000004" in caplog.text
    with pytest.raises(UserError, match="corrupt"):
        checkpoints.read(newest)


def test_a_failed_write_keeps_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = [("generator", {"w": torch.ones(3)})]
    for step in (1, 2):
        checkpoints.write(tmp_path, metadata(step), group, keep=2)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        checkpoints.write(tmp_path, metadata(3), group, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    for step in range(1, 6):
        checkpoints.write(tmp_path, metadata(step), [("generator", {"w": torch.ones(1)})], keep=2)
    assert checkpoints.steps(tmp_path) == [4, 5]


def test_a_folder_holds_one_run(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    train(config(2), tmp_path)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(UserError, match="not empty"):
        train(config(2), tmp_path)
    with pytest.raises(UserError, match=r"roles\.fake_score\.mode = 'lora' and the config says 'full'"):
        train(config(4, mode="full"), tmp_path, resume="latest")
    with pytest.raises(UserError, match=r"method\.guidance = 1\.5"):
        train(config(4, method__guidance=2.0), tmp_path, resume="latest")
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_staged_runs_start_from_an_earlier_result(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    train(config(4), tmp_path / "first")
    first = saved(tmp_path / "first")
    later = config(1, optimizers__generator={"lr": 1e-12}).model_copy(update={"init": str(tmp_path / "first")})
    train(later, tmp_path / "second")
    second = saved(tmp_path / "second")
    key = next(key for key in first["generator"] if "lora_B" in key)
    # the student of an EMA run is its EMA
    assert torch.allclose(second["generator"][key], first["generator_ema"][key], atol=1e-9)


def test_open_run_and_refusals(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    train(config(2), tmp_path / "run")
    session, iteration = open_run(tmp_path / "run")
    assert iteration == 2
    key = next(key for key in session.triple.state("generator") if "lora_B" in key)
    assert torch.equal(session.triple.state("generator")[key], saved(tmp_path / "run")["generator"][key])
    with pytest.raises(UserError, match="not a run"):
        open_run(tmp_path)


def test_rates() -> None:
    cosine = OptimizerConfig(lr=1.0, warmup=4, schedule="cosine", decay_updates=10)
    assert [learning_rate_at(cosine, u) for u in (0, 3, 4, 9, 14, 99)] == pytest.approx([0.25, 1, 1, 0.5, 0, 0])
    held = cosine.model_copy(update={"schedule": "linear", "hold": 100})
    assert [learning_rate_at(held, u) for u in (0, 3, 4, 104, 109, 114, 999)] == pytest.approx(
        [0.25, 1, 1, 1, 0.5, 0, 0]
    )
    assert learning_rate_at(OptimizerConfig(lr=2.0, schedule="linear", decay_updates=4), 1) == pytest.approx(1.5)
    assert learning_rate_at(OptimizerConfig(lr=2.0), 10**6) == 2.0


@pytest.mark.parametrize("name", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(config: Callable[..., RunConfig], tmp_path: Path, name: str) -> None:
    """And not replaced by the CPU without a word; nothing is written."""
    with pytest.raises(UserError, match=f"the device '{name}' cannot be used"):
        train(config(2, training__device=name), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_two_trainings_do_not_share_a_folder(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    with locked_folder(tmp_path / "run", "training"):
        script = (
            "from pathlib import Path; from stepdistill.files.locks import locked_folder\n"
            f"with locked_folder(Path({str(tmp_path / 'run')!r}), 'export'): print('locked')"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert f"is in use by process {os.getpid()} on " in done.stderr
        assert done.stdout == ""
    assert train(config(1), tmp_path / "run").finished
    assert not list(tmp_path.glob(".run*"))


def test_the_lock_of_a_dead_process_is_free(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    script = (
        "import os, signal; from pathlib import Path; from stepdistill.files.locks import locked_folder\n"
        f"with locked_folder(Path({str(tmp_path / 'run')!r}), 'training'): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    assert train(config(1), tmp_path / "run").finished


def test_a_run_resumes_from_a_base_that_was_moved(
    config: Callable[..., RunConfig], tmp_path: Path, copied: Callable[..., Path]
) -> None:
    """Which base it is, is told by its weights and not by its path."""
    base = copied("analytic")
    make = lambda steps, path: config(steps).model_copy(  # noqa: E731
        update={"model": config(steps).model.model_copy(update={"path": str(path)})}
    )
    train(make(2, base), tmp_path / "run")
    moved = base.rename(tmp_path / "moved")
    assert train(make(4, moved), tmp_path / "run", resume="latest").finished


def test_the_config_of_a_run_does_not_depend_on_the_folder_it_was_started_in(
    config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = config(2)
    base, prompts = Path(whole.model.path), Path(str(whole.data.prompts))
    monkeypatch.chdir(base.parent)
    relative = whole.model_copy(
        update={
            "model": whole.model.model_copy(update={"path": base.name}),
            "data": whole.data.model_copy(update={"prompts": os.path.relpath(prompts)}),
        }
    )
    train(relative, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    written = run_config(tmp_path / "run")
    assert (Path(written.model.path), Path(str(written.data.prompts)).resolve()) == (base, prompts.resolve())


def test_a_run_is_not_opened_on_a_base_that_has_changed(
    config: Callable[..., RunConfig], tmp_path: Path, copied: Callable[..., Path]
) -> None:
    """Export, evaluate and collect open runs; what they draw would be of another model."""
    base = copied("sd")
    run = parse(
        RunConfig,
        {
            "model": {"path": str(base)},
            "method": {"name": "dmd2", "guidance": 2.0, "ratio": 1},
            "roles": {"generator": {"rank": 2}, "fake_score": {"rank": 2}},
            "data": {"prompts": "builtin:general"},
            "training": {"max_steps": 1, "batch_size": 1, "grid_prompts": 1, "device": "cpu"},
        },
        "test",
    )
    train(run, tmp_path / "run")
    open_run(tmp_path / "run")
    file = base / "unet/diffusion_pytorch_model.safetensors"
    save_file({key: value + 0.05 for key, value in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(UserError, match="was trained on other weights than"):
        open_run(tmp_path / "run")
