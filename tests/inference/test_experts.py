"""A student of several experts, from its training to stock diffusers: frozen after their phase, each drawing its own steps."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from PIL import Image
from support.method_cases import Bench, Case, saved
from support.proofs import reproduced

import stepdistill
from stepdistill.config.reading import parse
from stepdistill.config.schema import RunConfig
from stepdistill.diffusion.draws import Draws
from stepdistill.errors import UserError
from stepdistill.families.conditioning import MicroConditioning
from stepdistill.families.recipe import Recipe
from stepdistill.inference.artifact import Artifact, draw, load_artifact
from stepdistill.inference.experts import Experts, load_experts
from stepdistill.methods.base import Batch
from stepdistill.planning.memory import sizes_of
from stepdistill.planning.network_calls import count_network_calls
from stepdistill.planning.trace import build_on_meta, trace
from stepdistill.training.monitoring.grids import student_latents
from stepdistill.training.run import open_run, train
from stepdistill.training.setup import prepare
from stepdistill.training.trainer import Trainer

CASE = Case("phased", {"guidance": 2.0, "ratio": 1, "steps": 4, "phases": 3, "phase_iterations": 2}, period=2)


@pytest.fixture(scope="module")
def runs(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Three phases of two iterations with a high rate; alpha and ranks of their own for some modules."""
    root, made = tmp_path_factory.mktemp("runs"), {}

    def make(mode: str = "lora", steps: int = 6, family: str = "sd") -> Path:
        name = f"{family}-{mode}-{steps}"
        if name not in made:
            role = {"mode": mode, "rank": 8, "alpha": 4, "rank_pattern": {"to_q": 4}, "alpha_pattern": {"to_q": 16}}
            data: dict[str, Any] = {
                "model": {"path": str(tiny(family, "default"))},
                "method": {"name": "phased", **CASE.options},
                "roles": {"generator": role, "fake_score": {"mode": mode, "rank": 4}},
                "optimizers": {"generator": {"lr": 2e-2 if mode == "lora" else 2e-3}, "fake_score": {"lr": 1e-3}},
                "data": {"prompts": "builtin:general"},
                "training": {"max_steps": steps, "batch_size": 2, "grid_prompts": 1, "device": "cpu", "ema": 0.5},
            }
            train(parse(RunConfig, data, "test"), root / name)
            made[name] = root / name
        return made[name]

    return make


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("layout", ["lora", "full", "mixed"])
def test_experts_are_frozen_and_roles_start_again(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """At each phase's first iteration: the EMA of the last phase is an expert, bit for bit and for good; generator, EMA and
    fake score say what the teacher says."""
    bench, states = Bench(tiny, tmp_path), []
    step = Trainer.iteration

    def watched(self: Trainer, batches: Sequence[tuple[Sequence[int], Batch]]) -> dict[str, torch.Tensor]:
        triple = self.triple
        x, t = torch.ones(1, *self.session.setup.problem.latent_shape, dtype=torch.float64), 499.0
        cond = batches[0][1].cond[[0]]
        with torch.no_grad():
            said = {role: triple.denoiser(role).x0(x, t, cond) for role in ("real_score", *triple.layouts)}
        states.append(({role: {k: v.clone() for k, v in triple.state(role).items()} for role in triple.layouts}, said))
        return step(self, batches)

    monkeypatch.setattr(Trainer, "iteration", watched)
    train(bench.config(CASE, 6, layout=layout), tmp_path / "run")
    roles = [tensors for tensors, _ in states]

    def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(a[key], b[key]) for key in a)

    final = saved(tmp_path / "run")
    for phase, first in ((1, 2), (2, 4)):
        expert = f"expert_{phase}"
        assert not equal(roles[first - 1][expert], roles[first][expert])
        for later in roles[first:]:
            assert equal(later[expert], roles[first][expert])
        assert equal(final[expert], roles[first][expert])
        said = states[first][1]
        for role in ("generator", "generator_ema", "fake_score"):
            assert torch.equal(said[role], said["real_score"]), role
        assert not torch.equal(said[expert], said["real_score"])
    assert not equal(final["expert_1"], final["expert_2"])


def test_the_expert_is_the_average_where_there_is_one(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """A run that ends with its first phase holds the EMA that the next phase keeps."""
    bench = Bench(tiny, tmp_path)
    train(bench.config(CASE, 2), tmp_path / "run")
    before = saved(tmp_path / "run")
    train(bench.config(CASE, 3), tmp_path / "run", resume="latest")
    after = saved(tmp_path / "run")
    for key, value in after["expert_1"].items():
        assert torch.equal(value, before["generator_ema"][key])
    assert any(not torch.equal(value, before["generator"][key]) for key, value in after["expert_1"].items())


def test_a_plan_counts_experts(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Their weights, and their calls in the stages that have them."""
    config = Bench(tiny, tmp_path).config(CASE, 6, family="sd", dtype="float32")
    ready = prepare(config)
    session, call_statistics = build_on_meta(ready), count_network_calls(ready)
    sizes = sizes_of(session, config)
    assert sizes.roles["expert_1"] == sizes.roles["expert_2"] == sizes.roles["generator"] > 0
    rows = {
        role: sum(n.rows for call, n in call_statistics.calls.items() if call.network == role)
        for role in ("expert_1", "expert_2")
    }
    assert rows == pytest.approx({"expert_1": 4 * 4 / 6, "expert_2": 4 * 2 / 6})
    assert trace(session, call_statistics).per_row.keys() >= {("expert_1", False), ("expert_2", False)}


# ---------------------------------------------------------------- drawing in training


@pytest.mark.parametrize(("steps", "turns"), [(2, "grrr"), (4, "1grr"), (6, "12gg")])
def test_a_run_draws_with_the_experts_that_it_has(runs: Callable[..., Path], steps: int, turns: str) -> None:
    """After each phase: finished experts, the student in training, and the teacher where later phases will be."""
    session, _ = open_run(runs(steps=steps), "cpu")
    roles = {"g": "generator_ema", "r": "real_score", "1": "expert_1", "2": "expert_2"}
    cond = session.encoder.text(["a", "b"], [MicroConditioning.plain(*session.setup.problem.size)] * 2)
    draws = Draws(0, 0, "test", range(2))
    noise = draws.normal("noise", session.setup.problem.latent_shape)
    found = student_latents(session, session.student, cond, noise, draws)
    method, x = session.method, noise
    timesteps = [*method.timesteps, -1.0]
    with torch.no_grad():
        for index, turn in enumerate(turns):
            x0 = session.triple.denoiser(roles[turn]).x0(x, timesteps[index], cond)
            x = method.transition(method.schedule, x, x0, timesteps[index], timesteps[index + 1]).mean
    torch.testing.assert_close(found, x, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- export


@pytest.mark.ci
@pytest.mark.parametrize(
    ("mode", "form"), [("lora", "diffusers-lora"), ("lora", "kohya-lora"), ("lora", "pipeline"), ("full", "pipeline")]
)
def test_plain_diffusers_takes_experts_by_turns(
    runs: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, form: str
) -> None:
    """With nothing of ours but `experts.py`; not so where two experts change places."""
    folder = stepdistill.export(runs(mode), form, tmp_path / "export")
    assert reproduced(folder) if form == "diffusers-lora" else agrees(folder, monkeypatch)
    recipe = json.loads((folder / "recipe.json").read_text())
    assert recipe["experts"] == [1, 1, 2]
    card = (folder / "README.md").read_text()
    assert "callback_on_step_end=experts" in card
    assert "3 experts, which make 1 + 1 + 2 of the calls" in card
    if form == "pipeline":
        assert {path.name for path in folder.iterdir()} > {"unet", "unet_2", "unet_3", "experts.py"}
        places = [folder / "unet", folder / "unet_2"]
    else:
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        assert len([name for name in files if "_expert_" in name]) == 3
        places = [folder / name for name in files if "_expert_" in name][:2]
    swap(*places)
    assert not agrees(folder, monkeypatch)


def agrees(folder: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """What `reproduced` says, without a process of its own."""
    monkeypatch.setattr(sys, "argv", ["reproduce.py"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(folder / "reproduce.py"), run_name="__main__")
    sys.modules.pop("experts")
    return not left.value.code


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


@pytest.mark.ci
def test_sdxl(runs: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert agrees(stepdistill.export(runs(family="sdxl"), "diffusers-lora", tmp_path / "export"), monkeypatch)


def test_unfinished_students_are_not_exported(runs: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only 2 of the student's 3 experts have been in training: resume"):
        stepdistill.export(runs(steps=4), "diffusers-lora", tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def exported(runs: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stepdistill.export(runs(), "diffusers-lora", tmp_path_factory.mktemp("lora") / "export")


def test_sampling_an_exported_folder(exported: Path, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """`sample --lora FOLDER`; every batch begins with the first expert, also after a call that broke off."""
    base = str(tiny("sd", "default"))
    paths = stepdistill.sample(base, tmp_path / "out", lora=exported, prompt="a", num_images=3, batch_size=2)
    artifact = load_artifact(base, exported, torch.float32, "cpu")
    assert artifact.recipe is not None
    whole = drawn(artifact, [0, 1, 2])
    pixels = [np.asarray(Image.open(path)).astype(int) for path in paths]
    assert max(int(abs(a - b).max()) for a, b in zip(pixels, whole.astype(int), strict=True)) <= 1
    assert artifact.experts is not None
    artifact.experts.select(2)
    assert (drawn(artifact, [0, 1, 2]) == whole).all()
    with pytest.raises(ValueError, match="several experts"):
        next(draw(artifact.pipeline, ["a"], [0], recipe=artifact.recipe))


def drawn(artifact: Artifact, seeds: list[int]) -> np.ndarray:
    images = draw(artifact.pipeline, ["a"] * len(seeds), seeds, recipe=artifact.recipe, experts=artifact.experts)
    return np.concatenate(list(images))


def test_a_part_of_a_student_is_refused(exported: Path, tiny: Callable[..., Path], tmp_path: Path) -> None:
    base, name = str(tiny("sd", "default")), "pytorch_lora_weights_expert_{}.safetensors"
    with pytest.raises(UserError, match="is one of 3 experts, which draw together: give the folder"):
        load_artifact(base, exported / name.format(2), torch.float32, "cpu")
    for k in (1, 3):
        (tmp_path / name.format(k)).write_bytes((exported / name.format(k)).read_bytes())
    with pytest.raises(UserError, match=r"expert_2.safetensors' is missing: export"):
        load_artifact(base, tmp_path, torch.float32, "cpu")


def test_whose_turn_it_is(exported: Path, tiny: Callable[..., Path]) -> None:
    """Each call is made under its expert's adapter, for the student's own number of steps and for others; a LoRA beside
    stays on throughout."""
    pipe = DiffusionPipeline.from_pretrained(tiny("sd", "default"), safety_checker=None)
    pipe.scheduler = EulerDiscreteScheduler.from_config(
        pipe.scheduler.config
    )  # a call for each step, unlike the tiny one's
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(exported, weight_name="pytorch_lora_weights_expert_3.safetensors", adapter_name="style")
    experts = load_experts(pipe, exported, {"style": 0.5})
    seen: list[list[str]] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(pipe.get_active_adapters()))
    for steps, turns in ((4, "1233"), (8, "11223333"), (2, "13")):
        seen.clear()
        pipe("a", num_inference_steps=steps, guidance_scale=1.0, output_type="latent", callback_on_step_end=experts)
        assert seen == [[f"expert_{turn}", "style"] for turn in turns]
        assert pipe.get_active_adapters() == ["expert_1", "style"]


def test_turns_are_counted_from_the_recipe() -> None:
    class Pipe:
        num_timesteps = 4

    chosen: list[int] = []
    experts = Experts([3, 1], chosen.append)
    assert chosen == [0]
    assert all(experts(Pipe(), step, 0, {"latents": step}) == {"latents": step} for step in range(4))  # type: ignore[arg-type]
    assert chosen == [0, 0, 0, 1, 0]


def test_recipes_of_one_student_say_nothing_of_experts() -> None:
    one = Recipe("LCMScheduler", 4, "epsilon")
    assert "experts" not in json.loads(one.to_json())
    several = Recipe("EulerDiscreteScheduler", 4, "epsilon", experts=(3, 1))
    assert Recipe.from_json(several.to_json()) == several
    assert several.expert_of_step(["a", "b"]) == ("a", "a", "a", "b")
    assert one.expert_of_step(["a"]) == ("a",) * 4
    with pytest.raises(ValueError, match="longer than argument"):
        several.expert_of_step(["a"])
