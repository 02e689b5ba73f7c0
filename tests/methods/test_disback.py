"""DisBack: the way from the teacher to the student is kept truly, walked back in order, and ends at the guided teacher."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.method_cases import CASES, Bench, Case, equal, saved
from support.toys import (
    SCHEDULES,
    analytic_triple,
    batch_of,
    disturb,
    draws,
    flow,
    four_modes,
    gaussian,
    noise,
    problem,
    prompts,
    unet_triple,
)
from support.whole_batch_draws import WholeBatchDraws
from torch import Tensor

from stepdistill.config.schema import RunConfig, load_config
from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.errors import UserError
from stepdistill.families.analytic import Mixture
from stepdistill.families.conditioning import Conditioning
from stepdistill.methods.base import Batch, Progress, Rollout, Terms
from stepdistill.methods.gan import GanConfig
from stepdistill.methods.matching.disback import TARGET, DisBack, DisBackConfig
from stepdistill.methods.matching.dmd2 import DMD2, DMD2Config
from stepdistill.planning.network_calls import count_network_calls
from stepdistill.planning.plan import plan
from stepdistill.roles.deltas import load_role_delta, role_delta
from stepdistill.roles.triple import FAKE_SCORE, GENERATOR, REAL_SCORE, Triple
from stepdistill.training.run import train
from stepdistill.training.run_folder.tensor_store import RunTensorStore
from stepdistill.training.setup import prepare

GRIDS = ["eps", "v", "flow", "flow-shift-3"]
CASE = CASES["disback"]
RECORDED = 3
"""Iterations of the case's record; then s'_2, s'_1 and the teacher, one update each."""
CLASSES = 4


@pytest.fixture
def bench(tiny: Callable[..., Path], tmp_path: Path) -> Bench:
    return Bench(tiny, tmp_path)


class MemoryShelf:
    """Keeps tensors in a dictionary."""

    def __init__(self) -> None:
        self.kept: dict[str, dict[str, Tensor]] = {}

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        self.kept[name] = {key: value.clone() for key, value in tensors.items()}
        return torch.full((32,), len(self.kept), dtype=torch.uint8)

    def get(self, name: str, digest: Tensor) -> dict[str, Tensor]:
        return self.kept[name]


def method_on(triple: Triple, dimension: int, shelf: MemoryShelf | None = None, **options: Any) -> DisBack:
    config = DisBackConfig.model_validate({"guidance": 3.0, "checkpoints": 4, "interval": 2, **options})
    method = DisBack(config, problem(triple.schedule, dimension))
    method.prepare(triple)
    if shelf is not None:
        method.attach_storage(shelf)
    return method


def backtracking(done: int) -> Progress:
    """After so many generator updates of the second stage."""
    return Progress(100 + done, {GENERATOR: done}, stage=1, stage_iteration=done)


def rolled(classes: int = CLASSES) -> Rollout:
    cond = Conditioning(torch.eye(classes, dtype=torch.float64)[:, None])
    x = noise(classes, 2, 1, 1, seed=3).requires_grad_()
    return Rollout(Batch(cond, prompts(classes, classes)), x, torch.full((classes,), 1.0, dtype=torch.float64), x)


def gradient(method: DisBack | DMD2, rollout: Rollout, triple: Triple, progress: Progress) -> Tensor:
    (found,) = torch.autograd.grad(
        method.loss(GENERATOR, rollout, triple, progress, draws()).total, rollout.x0, retain_graph=True
    )
    return found


def apart(schedule: NoiseSchedule, target: Mixture, **options: Any) -> tuple[Triple, DisBack]:
    """A teacher of four modes, a fake score and a target that know others."""
    triple = analytic_triple(four_modes(std=0.4), schedule, four_modes((0.4, 0.3, 0.2, 0.1), std=0.5))
    method = method_on(triple, 2, **options)
    triple.networks[TARGET].mixture = target  # type: ignore[assignment]
    return triple, method


# ---------------------------------------------------------------- the gradient


def test_the_record_is_denoising_alone() -> None:
    """With a GAN as well: its loss would move the recorded scores, and its head would learn a student at rest."""
    schedule = SCHEDULES["eps"]()
    triple = analytic_triple(four_modes(std=0.4), schedule, four_modes((0.4, 0.3, 0.2, 0.1), std=0.5))
    plain = method_on(triple, 2)
    adversarial = DisBack(
        plain.config.model_copy(update={"gan": GanConfig(weight=0.1, critic_weight=1.0)}), plain.problem
    )
    terms = [method.loss(FAKE_SCORE, rolled(), triple, Progress(stage=0), draws()) for method in (plain, adversarial)]
    assert torch.equal(terms[0].total, terms[1].total)
    assert set(terms[1].parts) == {"denoising"}


@pytest.mark.parametrize("name", GRIDS)
def test_the_path_ends_at_the_guided_teacher(name: str) -> None:
    """The last target is the teacher with its w: DMD2's gradient to the bit; one update before it is not."""
    schedule = SCHEDULES[name]()
    triple, method = apart(schedule, four_modes((0.2, 0.2, 0.5, 0.1), std=0.6))
    dmd2 = gradient(DMD2(DMD2Config(guidance=3.0, steps=1), problem(schedule, 2)), rolled(), triple, Progress())
    assert torch.equal(gradient(method, rolled(), triple, backtracking(6)), dmd2)
    assert torch.equal(gradient(method, rolled(), triple, backtracking(600)), dmd2)
    assert float((gradient(method, rolled(), triple, backtracking(5)) - dmd2).abs().max()) > 1e-3


@pytest.mark.parametrize("name", GRIDS)
def test_a_recorded_target_takes_the_teachers_place_without_guidance(name: str) -> None:
    """(mu_F - mu_target) / mean|x - mu_target| by hand; with w, or with the teacher, it would be another."""
    schedule = SCHEDULES[name]()
    triple, method = apart(schedule, four_modes((0.2, 0.2, 0.5, 0.1), std=0.6))
    rollout = rolled()
    x, cond, null = rollout.x0.detach(), rollout.batch.cond, rollout.batch.null
    t = method.config.dm_levels.levels().times(schedule, draws().uniform("dm.t"))
    x_t = schedule.add_noise(x, draws().normal("dm.eps", (2, 1, 1)), t)
    found = gradient(method, rollout, triple, backtracking(0)) * x.numel()

    def expected(role: str, w: float) -> Tensor:
        real = triple.denoiser(role).guided(x_t, t, cond, null, w)
        gap = triple.fake_score.x0(x_t, t, cond) - real
        return (gap / (x - real).abs().mean((1, 2, 3), keepdim=True)).detach()

    torch.testing.assert_close(found, expected(TARGET, 1.0), rtol=0, atol=1e-10)
    assert float((found - expected(TARGET, 3.0)).abs().max()) > 1e-3
    assert float((found - expected(REAL_SCORE, 1.0)).abs().max()) > 1e-3


@pytest.mark.parametrize("name", GRIDS)
def test_no_force_where_the_target_is_reached(name: str) -> None:
    schedule = SCHEDULES[name]()
    triple, method = apart(schedule, four_modes((0.4, 0.3, 0.2, 0.1), std=0.5))
    assert float(gradient(method, rolled(), triple, backtracking(0)).abs().max()) < 1e-12
    assert float(gradient(method, rolled(), triple, backtracking(6)).abs().max()) > 1e-3


def test_targets_come_in_order_and_guidance_last() -> None:
    """s'_3, s'_2, s'_1 for two updates each; then the teacher, w growing over four."""
    triple, method = apart(flow(), four_modes(), ramp=4)
    seen = [method.loss(GENERATOR, rolled(), triple, backtracking(k), draws()).parts for k in range(11)]
    assert [float(parts["target"]) for parts in seen] == [3, 3, 2, 2, 1, 1, 0, 0, 0, 0, 0]
    assert [float(parts["guidance"]) for parts in seen] == [1, 1, 1, 1, 1, 1, 1.5, 2, 2.5, 3, 3]


@pytest.mark.parametrize("checkpoints", [0, 1])
def test_a_path_without_targets_needs_no_role(checkpoints: int) -> None:
    triple = analytic_triple(four_modes(), flow())
    method = method_on(triple, 2, checkpoints=checkpoints)
    assert TARGET not in triple.layouts
    assert method.state_dict() == {}
    assert [stage.name for stage in method.stages()] == ["record", "backtrack"][1 - checkpoints :]
    last = Progress(stage=checkpoints)
    assert float(method.loss(GENERATOR, rolled(), triple, last, draws()).parts["guidance"]) == 3


# ---------------------------------------------------------------- the record


def test_the_record_leads_from_the_teacher_to_the_student() -> None:
    """The untrained one-step student of a Gaussian answers with its mean: a point, whose exact x0 estimate is that point.

    Each recorded score, as it is loaded, is nearer to it than the one before, and farther from the teacher.
    """
    schedule, mean, size = flow(), (1.0, -2.0, 0.5), 128
    triple, shelf = analytic_triple(gaussian(mean, std=1.5), schedule, width=64), MemoryShelf()
    method = method_on(triple, 3, shelf, ratio=1, record_every=90, interval=1)
    optimizer = torch.optim.Adam(triple.parameters(FAKE_SCORE).values(), lr=5e-4)
    batch, length = batch_of(size), method.stages()[0].iterations
    assert length == 360
    for iteration in range(length):
        progress = Progress(iteration, {FAKE_SCORE: iteration}, stage_iteration=iteration)
        stream = WholeBatchDraws(0, iteration, FAKE_SCORE, range(size), dtype=torch.float64)
        assert method.updates(progress) == (FAKE_SCORE,)
        with triple.training(FAKE_SCORE):
            rollout = method.rollout(batch, triple, progress, stream)
            assert not rollout.x0.requires_grad
            optimizer.zero_grad()
            method.loss(FAKE_SCORE, rollout, triple, progress, stream).total.backward()
        optimizer.step()
        method.after_update(FAKE_SCORE, {}, triple, progress)
    assert list(shelf.kept) == ["path-001", "path-002", "path-003"]

    point = torch.tensor(mean, dtype=torch.float64).reshape(1, 3, 1, 1)
    t = torch.linspace(0.2, 0.98, 512, dtype=torch.float64)
    x_t, cond = schedule.add_noise(point.expand(512, 3, 1, 1), noise(512, 3, 1, 1, seed=1), t), prompts(512)

    @torch.no_grad()
    def distances(role: str) -> tuple[float, float]:
        estimate, teacher = (triple.denoiser(name).x0(x_t, t, cond) for name in (role, REAL_SCORE))
        return float((estimate - point).square().mean()), float((estimate - teacher).square().mean())

    found = [distances(REAL_SCORE)]
    for done in (2, 1, 0):  # s'_1, s'_2, s'_3; the fake score itself is s'_4
        method.rollout(batch_of(4), triple, backtracking(done), draws())
        found.append(distances(TARGET))
    found.append(distances(FAKE_SCORE))
    student, teacher = zip(*found, strict=True)
    assert sorted(student, reverse=True) == list(student)
    assert len(set(student)) == 5
    assert sorted(teacher) == list(teacher)
    assert student[-1] < 0.5 * student[0]


def test_a_skipped_step_puts_a_recording_off() -> None:
    """Iteration 2 should have been followed by one; its step was skipped, so iteration 3 is."""
    triple, shelf = analytic_triple(four_modes(), flow()), MemoryShelf()
    method = method_on(triple, 2, shelf, record_every=2)
    for iteration in (0, 2, 3, 4, 6, 7):
        method.after_update(FAKE_SCORE, {}, triple, Progress(stage_iteration=iteration))
    assert list(shelf.kept) == ["path-001", "path-002", "path-003"]
    method.after_update(FAKE_SCORE, {}, triple, backtracking(0))
    assert len(shelf.kept) == 3


def test_the_generator_stands_still_while_the_way_is_recorded(bench: Bench, tmp_path: Path) -> None:
    train(bench.config(CASE, RECORDED), tmp_path / "run")
    found = saved(tmp_path / "run")
    for role in (GENERATOR, "generator_ema", TARGET):
        assert all(not value.any() for key, value in found[role].items() if ".lora_B." in key)
    assert any(value.any() for key, value in found[FAKE_SCORE].items() if ".lora_B." in key)
    assert not any(key.endswith("|exp_avg") for key in found[f"optimizer.{GENERATOR}"])
    assert sorted(path.name for path in (tmp_path / "run/kept").iterdir()) == [
        "path-001.safetensors",
        "path-002.safetensors",
    ]


def test_the_record_begins_with_the_teacher_whatever_the_student_comes_from(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fake score of an earlier run knows its student's samples, and would leave no way to record."""
    dmd2 = Case("dmd2", {"guidance": 2.0, "ratio": 1, "steps": 2})
    train(bench.config(dmd2, 3), tmp_path / "earlier")
    before, seen, rollout = saved(tmp_path / "earlier"), [], DisBack.rollout

    def watched(self: DisBack, batch: Batch, triple: Triple, progress: Progress, draws: Draws) -> Rollout:
        if progress.iteration == 0:
            seen.append({role: {k: v.clone() for k, v in triple.state(role).items()} for role in triple.layouts})
        return rollout(self, batch, triple, progress, draws)

    monkeypatch.setattr(DisBack, "rollout", watched)
    config = bench.config(CASE, 1).model_copy(update={"init": str(tmp_path / "earlier")})
    train(config, tmp_path / "run")
    assert all(torch.equal(value, before["generator_ema"][key]) for key, value in seen[0][GENERATOR].items())
    assert any(value.any() for key, value in before[FAKE_SCORE].items() if ".lora_B." in key)
    assert all(not value.any() for key, value in seen[0][FAKE_SCORE].items() if ".lora_B." in key)


# ---------------------------------------------------------------- what is kept


@pytest.mark.parametrize("layout", ["lora", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changes_come_back(layout: str, dtype: torch.dtype) -> None:
    """A LoRA to the bit; a full network to half a percent of its change, on a base of either precision."""
    triple = unet_triple("lora", layout, dtype)
    triple.add_role(TARGET, triple.layouts[FAKE_SCORE], trainable=False)
    disturb(triple, 0.01)
    kept = role_delta(triple, FAKE_SCORE)
    assert {value.dtype for value in kept.values()} == {torch.float32 if layout == "lora" else torch.bfloat16}
    assert load_role_delta(triple, TARGET, kept)
    base, fake = triple.base_state(), triple.state(FAKE_SCORE)
    for key, value in triple.state(TARGET).items():
        start = 0 if layout == "lora" else base[key].float()
        assert torch.equal(value, start + kept[key].float()), key
        error = (value - fake[key]).abs() - (fake[key] - start).abs() * 2**-8
        assert float(error.max()) < 1e-6, key
    assert not load_role_delta(triple, TARGET, kept)


@pytest.mark.parametrize("layout", ["lora", "full"])
@pytest.mark.parametrize("fault", ["missing", "unexpected", "differently shaped"])
def test_what_does_not_fit_is_refused_and_changes_nothing(layout: str, fault: str) -> None:
    triple = unet_triple("lora", layout)
    triple.add_role(TARGET, triple.layouts[FAKE_SCORE], trainable=False)
    before = {key: value.clone() for key, value in triple.state(TARGET).items()}
    disturb(triple)
    for key, value in triple.network_parameters(TARGET).items():
        value.copy_(before[key])
    kept = dict(role_delta(triple, FAKE_SCORE))
    first = next(iter(kept))
    if fault == "missing":
        del kept[first]
    elif fault == "unexpected":
        kept[f"unet.{first}"] = kept[first]
    else:
        kept[first] = kept[first][:1]
    with pytest.raises(UserError, match=f"the saved target does not fit this one, with tensors 1 {fault}"):
        load_role_delta(triple, TARGET, kept)
    assert all(torch.equal(value, before[key]) for key, value in triple.state(TARGET).items())


def test_a_path_that_stands_still_is_refused() -> None:
    triple, shelf = analytic_triple(four_modes(), flow()), MemoryShelf()
    method = method_on(triple, 2, shelf, record_every=1)
    for iteration in range(3):
        method.after_update(FAKE_SCORE, {}, triple, Progress(stage_iteration=iteration))
    with pytest.raises(UserError, match="'path-003' equals the target before it"):
        method.rollout(batch_of(4, CLASSES), triple, backtracking(0), draws())


@pytest.mark.parametrize("layout", ["lora", "full", "mixed"])
def test_every_target_is_what_was_recorded(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """In a run: each target's every tensor is that of the fake score when it was put, and differs from the one before."""
    recorded: list[dict[str, Tensor]] = []
    held: dict[int, dict[str, Tensor]] = {}
    put, loss = RunTensorStore.put, DisBack.generator_loss

    def kept(self: RunTensorStore, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        recorded.append({key: value.clone() for key, value in tensors.items()})
        return put(self, name, tensors)

    def watched(self: DisBack, rollout: Rollout, triple: Triple, progress: Progress, draws: Draws) -> Terms:
        held[self.target(progress)] = {k: v.detach().clone() for k, v in triple.network_parameters(TARGET).items()}
        held[-1] = {k: v.clone() for k, v in triple.base_state().items()}
        return loss(self, rollout, triple, progress, draws)

    monkeypatch.setattr(RunTensorStore, "put", kept)
    monkeypatch.setattr(DisBack, "generator_loss", watched)
    train(bench.config(CASE, RECORDED + 3, layout=layout), tmp_path / "run")
    base = held.pop(-1)
    assert (list(held), len(recorded)) == ([2, 1, 0], 2)
    for index in (2, 1):
        for key, value in held[index].items():
            start = 0 if layout == "lora" else base[key]
            assert torch.equal(value, start + recorded[index - 1][key].to(value.dtype)), key
    assert any(not torch.equal(held[2][key], held[1][key]) for key in held[1])


# ---------------------------------------------------------------- runs


def test_without_a_path_it_is_dmd2_to_the_bit(bench: Bench, tmp_path: Path) -> None:
    options = {"guidance": 2.0, "ratio": 2, "steps": 2}
    train(bench.config(Case("dmd2", options), 5), tmp_path / "dmd2")
    train(bench.config(Case("disback", {**options, "checkpoints": 0}), 5), tmp_path / "disback")
    assert equal(saved(tmp_path / "dmd2"), saved(tmp_path / "disback"))


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5])
def test_a_full_path_resumes_to_the_bit(bench: Bench, tmp_path: Path, cut: int) -> None:
    """Of full networks, in the record, at its end, and at each turn of the way back; kept files are the same too."""
    train(bench.config(CASE, 7, layout="full"), tmp_path / "whole")
    train(bench.config(CASE, cut, layout="full"), tmp_path / "broken")
    train(bench.config(CASE, 7, layout="full"), tmp_path / "broken", resume="latest")
    assert equal(saved(tmp_path / "whole"), saved(tmp_path / "broken"))
    for name in ("path-001", "path-002"):
        ours, theirs = (tmp_path / run / f"kept/{name}.safetensors" for run in ("whole", "broken"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_path_that_was_touched_is_refused(bench: Bench, tmp_path: Path) -> None:
    """Broken off while s'_2 is the target, which the checkpoint holds: s'_1 is read from the disk."""
    run, config = tmp_path / "run", bench.config(CASE, RECORDED + 3)
    train(bench.config(CASE, RECORDED + 1), run)
    (run / "kept/path-002.safetensors").unlink()
    file = run / "kept/path-001.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"path-001\.safetensors' is not what the method kept there: put it back"):
        train(config, run, resume="latest")
    shutil.move(file, tmp_path / "away")
    with pytest.raises(UserError, match=r"path-001\.safetensors', which the method kept, cannot be read"):
        train(config, run, resume="latest")
    file.write_bytes(content)
    assert train(config, run, resume="latest").finished


# ---------------------------------------------------------------- plans


def test_a_plan_sees_the_whole_way_and_needs_no_file() -> None:
    """Calls in closed form: 40 iterations of record, 60 updates on the path, 240 towards the guided teacher."""
    config = load_config(Path(__file__).parents[2] / "configs/fashion_disback.yaml")
    call_statistics, rows = count_network_calls(prepare(config)), config.training.batch_size
    assert call_statistics.update_pattern_shares == pytest.approx(
        {(FAKE_SCORE,): 40 / 340, (GENERATOR, FAKE_SCORE): 300 / 340}
    )
    calls = {(call.phase, call.network): counted for call, counted in call_statistics.calls.items()}
    assert calls[GENERATOR, TARGET].rows == pytest.approx(rows * 60 / 340)
    assert calls[GENERATOR, REAL_SCORE].rows == pytest.approx(2 * rows * 240 / 340)
    assert calls[GENERATOR, FAKE_SCORE].calls == pytest.approx(300 / 340)


@pytest.mark.parametrize("layout", ["lora", "full"])
def test_a_plan_counts_the_target(bench: Bench, layout: str) -> None:
    run: RunConfig = bench.config(CASE, 8, family="sd", layout=layout, dtype="float32", batch_size=1)
    found = plan(run)
    sizes = {item.name.split(" ")[0]: item for item in found.parameters}
    assert sizes[TARGET].count == sizes[FAKE_SCORE].count
    assert not sizes[TARGET].trained
    assert {call.network for call in found.calls} == {GENERATOR, FAKE_SCORE, REAL_SCORE, TARGET}
    held = {part.name: part.bytes for part in found.memory.parts}
    assert held["target weights"] == held["fake_score weights"]
