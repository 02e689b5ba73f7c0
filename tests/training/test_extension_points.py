"""What the loop offers to methods with a memory: kept tensors, statistics over the global batch, staged copies, an early end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.method_cases import CASES, Bench, saved
from torch import Tensor

from stepdistill.config.schema import TrainingConfig
from stepdistill.errors import UserError
from stepdistill.methods.base import STUDENT, Batch, Progress, Rollout, Stage, Terms
from stepdistill.methods.matching.dmd2 import DMD2
from stepdistill.roles.triple import FAKE_SCORE, GENERATOR, Triple
from stepdistill.training.distributed import Processes
from stepdistill.training.evaluation_hook import EvaluationResult
from stepdistill.training.run import open_run, train
from stepdistill.training.run_folder import checkpoints
from stepdistill.training.run_folder.tensor_store import RunTensorStore


@pytest.fixture
def bench(tiny: Callable[..., Path], tmp_path: Path) -> Bench:
    folder = tmp_path / "data"
    folder.mkdir()
    return Bench(tiny, folder)


@pytest.fixture
def shelf(tmp_path: Path) -> RunTensorStore:
    from accelerate import Accelerator

    return RunTensorStore(tmp_path / "kept", Processes(Accelerator(cpu=True), TrainingConfig(max_steps=1)))


def test_what_is_put_is_got(shelf: RunTensorStore) -> None:
    tensors = {"a": torch.randn(3, 4, dtype=torch.float64), "b": torch.arange(5).bfloat16()}
    digest = shelf.put("path_1", tensors)
    got = shelf.get("path_1", digest)
    assert got.keys() == tensors.keys()
    assert all(torch.equal(got[key], tensors[key]) for key in got)
    assert torch.equal(shelf.put("path_2", tensors), digest)  # of the content alone
    assert digest.shape == (32,)
    assert digest.dtype == torch.uint8


def test_what_is_gone_or_changed_is_refused(shelf: RunTensorStore) -> None:
    digest = shelf.put("one", {"a": torch.zeros(3)})
    shelf.put("one", {"a": torch.ones(3)})
    with pytest.raises(UserError, match="not what the method kept"):
        shelf.get("one", digest)
    with pytest.raises(UserError, match="cannot be read"):
        shelf.get("two", digest)


def test_a_disk_that_refuses_is_told(shelf: RunTensorStore, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="could not be written"):
        shelf.put("one", {"a": torch.zeros(3)})


def test_a_watcher_that_has_seen_enough_ends_the_run_resumably(bench: Bench, tmp_path: Path) -> None:
    class Third:
        every = 1

        def __call__(self, iteration: int) -> EvaluationResult:
            return EvaluationResult({}, None, should_stop=iteration == 3)

    config = bench.config(CASES["dmd2"], 6)
    outcome = train(config, tmp_path / "run", None, lambda _session, _folder: Third())
    assert not outcome.finished
    assert outcome.iteration == 3
    assert checkpoints.latest(tmp_path / "run" / "checkpoints") == tmp_path / "run/checkpoints/step-00000003"
    assert train(config, tmp_path / "run", "latest").finished
    train(config, tmp_path / "whole")
    resumed, whole = saved(tmp_path / "run"), saved(tmp_path / "whole")
    assert all(torch.equal(resumed[group][key], whole[group][key]) for group in whole for key in whole[group])


def followed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Mapping[str, float], Mapping[str, int]]]:
    """What DMD2 is told after its updates, once its fake score's loss reports the mean of x0."""
    told: list[tuple[str, Mapping[str, float], Mapping[str, int]]] = []
    loss = DMD2.loss

    def reporting(self: DMD2, role: str, rollout: Rollout, *rest: Any) -> Terms:
        terms = loss(self, role, rollout, *rest)
        return Terms(terms.total, terms.parts, {"x0": rollout.x0.mean()} if role == FAKE_SCORE else {})

    def after(_self: DMD2, role: str, statistics: Mapping[str, float], _triple: Triple, progress: Progress) -> None:
        assert not torch.is_grad_enabled()
        told.append((role, statistics, progress.updates))

    monkeypatch.setattr(DMD2, "loss", reporting)
    monkeypatch.setattr(DMD2, "after_update", after)
    return told


@pytest.mark.parametrize(("batch", "accumulation"), [(1, 4), (2, 2)])
def test_statistics_are_of_the_global_batch(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int, accumulation: int
) -> None:
    told = followed(monkeypatch)
    train(bench.config(CASES["dmd2"], 2), tmp_path / "one")
    whole, told[:] = list(told), []
    train(bench.config(CASES["dmd2"], 2, batch_size=batch, accumulation=accumulation), tmp_path / "parts")
    # ratio 2: the generator is due at the first iteration, the fake score at both
    assert [role for role, *_ in told] == [GENERATOR, FAKE_SCORE, FAKE_SCORE] == [role for role, *_ in whole]
    assert [dict(updates)[FAKE_SCORE] for *_, updates in told] == [0, 0, 1]
    for (_, joint, _), (_, parts, _) in zip(whole, told, strict=True):
        assert joint.keys() == parts.keys()
        assert all(joint[key] == pytest.approx(parts[key], abs=1e-10) for key in joint)
    assert set(whole[0][1]) == set()
    assert set(whole[1][1]) == {"x0"}
    # and they are logged nowhere
    assert "x0" not in (tmp_path / "one/stats.jsonl").read_text()


def test_no_word_of_a_skipped_update(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = followed(monkeypatch)
    loss = DMD2.loss

    def broken(self: DMD2, role: str, rollout: Rollout, *rest: Any) -> Terms:
        terms = loss(self, role, rollout, *rest)
        return Terms(terms.total * float("nan"), terms.parts, terms.statistics) if role == FAKE_SCORE else terms

    monkeypatch.setattr(DMD2, "loss", broken)
    with pytest.raises(UserError, match="the fake_score was never updated"):
        train(bench.config(CASES["dmd2"], 2), tmp_path / "run")
    assert [role for role, *_ in told] == [GENERATOR]


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_a_stage_copies_the_student_before_it_resets(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema: float
) -> None:
    """The generator of the first stage becomes `first`; generator and EMA start the second from the base."""

    def prepare(_self: DMD2, triple: Triple, _decode: object = None) -> None:
        triple.add_copy("first", GENERATOR)

    def stages(_self: DMD2) -> Sequence[Stage]:
        return Stage("one", 2), Stage("two", copies=((STUDENT, "first"),), reset=(GENERATOR,))

    monkeypatch.setattr(DMD2, "prepare", prepare)
    monkeypatch.setattr(DMD2, "stages", stages)
    train(bench.config(CASES["dmd2"], 2, ema=ema), tmp_path / "run")
    one = saved(tmp_path / "run")
    train(bench.config(CASES["dmd2"], 3, ema=ema), tmp_path / "run", "latest")
    session, _ = open_run(tmp_path / "run")
    student = one[session.student]
    first = session.triple.state("first")
    assert any(float(value.abs().max()) > 0 for key, value in student.items() if "lora_B" in key)
    assert all(torch.equal(first[key], student[key]) for key in student)

    def moved(role: str) -> float:
        return max(float(v.abs().max()) for k, v in session.triple.state(role).items() if "lora_B" in k)

    # one update of learning rate 1e-3 / 2 since the reset, against two before it
    assert 0 < moved(GENERATOR) <= 5e-4 + 1e-9
    if ema:
        assert moved("generator_ema") == pytest.approx(ema * moved(GENERATOR))


def test_a_batch_says_its_prompts(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, ...]] = []
    rollout = DMD2.rollout

    def looking(self: DMD2, batch: Batch, *rest: Any) -> Rollout:
        seen.append(batch.prompts)
        return rollout(self, batch, *rest)

    monkeypatch.setattr(DMD2, "rollout", looking)
    train(bench.config(CASES["dmd2"], 1), tmp_path / "run")
    assert len(seen[0]) == 4
    assert set(seen[0]) <= {f"mode {k}" for k in range(4)}


def test_decoding_is_differentiable(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from stepdistill.training.session import open_session
    from stepdistill.training.setup import prepare

    got: list[Callable[[Tensor], Tensor]] = []
    monkeypatch.setattr(DMD2, "prepare", lambda _self, _triple, decode=None: got.append(decode))
    open_session(prepare(bench.config(CASES["dmd2"], 1, family="sd", dtype="float32")))
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)).mul(0.1).requires_grad_()
    images = got[0](latents)
    assert images.shape[:2] == (2, 3)
    assert float(images.min()) >= 0
    assert float(images.max()) <= 1
    images.mean().backward()
    assert latents.grad is not None
    assert float(latents.grad.abs().sum()) > 0
