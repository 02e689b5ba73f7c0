"""Trajectories of the guided teacher on disk: what is stored, read, resumed, and refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.method_cases import CASES, Bench

from stepdistill.config.registry import load_family
from stepdistill.data.latents.latent_shards import TensorFolder
from stepdistill.data.latents.trajectories import TrajectoryFolder
from stepdistill.diffusion.timesteps import trailing_timesteps
from stepdistill.errors import UserError
from stepdistill.families.checkpoints.loading import inspect_checkpoint, load_checkpoint
from stepdistill.families.conditioning import MicroConditioning
from stepdistill.roles.denoiser import Denoiser
from stepdistill.roles.sampler import relative_error
from stepdistill.training.collect import CollectConfig, collect
from stepdistill.training.run import train


@pytest.fixture
def wanted(tiny: Callable[..., Path], tmp_path: Path) -> Callable[..., CollectConfig]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("mode 0\nmode 1\nmode 2")

    def make(**changes: Any) -> CollectConfig:
        config = {
            "model": {"path": str(tiny("analytic")), "dtype": "float64"}, "prompts": str(prompts), "count": 5, "steps": 6,
            "keep": 3, "guidance_range": (1.0, 5.0), "device": "cpu", "batch_size": 2, "shard_size": 2, "dtype": "float32",
        }  # fmt: skip
        return CollectConfig.model_validate({**config, **changes})

    return make


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors"}


def test_states_are_what_the_guided_teacher_says(wanted: Callable[..., CollectConfig], tmp_path: Path) -> None:
    """Each target is recomputed from its x_t, t, w and prompt by two calls; the states of a walk are a subset of the ladder."""
    config = wanted()
    assert collect("trajectories", config, tmp_path / "t") == 5
    folder = TrajectoryFolder(tmp_path / "t")
    assert len(folder) == 15
    assert (folder.shape, folder.keep) == ((2, 1, 1), 3)
    assert folder.fingerprint.guidance_range == (1.0, 5.0)
    assert config.model is not None
    info = inspect_checkpoint(config.model.path, None, None)
    checkpoint, family = load_checkpoint(info, torch.float64, torch.device("cpu")), load_family(info.family)
    denoiser, size = Denoiser(checkpoint.network, family, info.schedule), [MicroConditioning.plain(1, 1)]
    null, timesteps = family.null(checkpoint, size), trailing_timesteps(info.schedule, 6)
    walks: dict[int, list[float]] = {}
    for index in range(len(folder)):
        state = folder[index]
        cond = family.encode(checkpoint, [f"mode {state.prompt}"], size)
        x_t = state.x_t.double()[None]
        uncond, conditional = (denoiser.estimate(x_t, state.t, c).raw for c in (null, cond))
        target = uncond + state.w * (conditional - uncond)
        assert torch.allclose(state.target.double()[None], target, atol=2e-4)
        assert state.plain == pytest.approx(float(relative_error(conditional, target)), rel=1e-2, abs=1e-6)
        assert 1 <= state.w <= 5
        walks.setdefault(index // 3, []).append(state.t)
    assert {folder[3 * k].prompt for k in range(5)} == {0, 1, 2}
    assert len({folder[3 * k].w for k in range(5)}) == 5
    for times in walks.values():
        assert times == sorted(set(times) & set(timesteps), reverse=True)
    assert len({tuple(times) for times in walks.values()}) > 1
    with pytest.raises(IndexError):
        folder[15]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_dtype_is_said_and_read(wanted: Callable[..., CollectConfig], tmp_path: Path, dtype: str) -> None:
    collect("trajectories", wanted(count=2), tmp_path / "exact")
    collect("trajectories", wanted(count=2, dtype=dtype), tmp_path / "t")
    assert json.loads((tmp_path / "t/index.json").read_text())["dtype"] == dtype
    exact, stored = TrajectoryFolder(tmp_path / "exact")[4], TrajectoryFolder(tmp_path / "t")[4]
    assert stored.x_t.dtype == torch.float32
    assert torch.equal(stored.x_t, exact.x_t.to(vars(torch)[dtype]).float())
    assert (stored.t, stored.w) == (exact.t, exact.w)


def test_what_is_done_to_a_state_stays_with_it(wanted: Callable[..., CollectConfig], tmp_path: Path) -> None:
    """Shards stay mapped, and the next reader wants what was written."""
    collect("trajectories", wanted(count=2, dtype="float32"), tmp_path / "t")
    folder = TrajectoryFolder(tmp_path / "t")
    before = folder[4]
    for tensor in (folder[4].x_t, folder[4].target):
        tensor.zero_()
    assert torch.equal(folder[4].x_t, before.x_t)
    assert torch.equal(folder[4].target, before.target)
    assert float(before.x_t.abs().sum()) > 0


def test_a_broken_collection_goes_on_bit_for_bit(wanted: Callable[..., CollectConfig], tmp_path: Path) -> None:
    """After some walks, with another batch size, over a damaged shard; a walk depends on its own seed alone."""
    collect("trajectories", wanted(), tmp_path / "whole")
    collect("trajectories", wanted(count=2), tmp_path / "broken")
    with pytest.raises(UserError, match="is not empty"):
        collect("trajectories", wanted(), tmp_path / "broken")
    collect("trajectories", wanted(batch_size=1), tmp_path / "broken", resume=True)
    assert content(tmp_path / "broken").keys() == content(tmp_path / "whole").keys()
    whole, broken = (TrajectoryFolder(tmp_path / name) for name in ("whole", "broken"))
    for index in range(len(whole)):
        assert torch.allclose(whole[index].target, broken[index].target, atol=1e-6)
        assert whole[index].w == broken[index].w
    (tmp_path / "broken/shard-00001.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="is damaged"):
        TrajectoryFolder(tmp_path / "broken")
    collect("trajectories", wanted(), tmp_path / "broken", resume=True)
    assert content(tmp_path / "broken").keys() == content(tmp_path / "whole").keys()


@pytest.mark.ci
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_a_collection(wanted: Callable[..., CollectConfig], tmp_path: Path, processes: int) -> None:
    """Each draws its own walks, in the order of one process, shard by shard; and they go on with what one has left."""
    config = wanted(count=11)
    collect("trajectories", config, tmp_path / "one")
    collect("trajectories", wanted(count=2), tmp_path / "many")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)))
    script = tmp_path / "counted.py"
    script.write_text(
        """
import os
from pathlib import Path
from stepdistill.cli import main
from stepdistill.training import collect
seeds, walks = [], collect._TeacherSource.draw_trajectories
collect._TeacherSource.draw_trajectories = lambda self, texts, own, keep: seeds.extend(own) or walks(self, texts, own, keep)
try:
    main()
finally:
    Path(__file__).with_name(f"rank{os.environ['RANK']}").write_text(" ".join(map(str, seeds)))
"""
    )
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", str(script),
        "collect", "trajectories", str(path), "--output", str(tmp_path / "many"), "--resume",
    ]  # fmt: skip
    here = str(Path(__file__).parents[2])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": here}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert content(tmp_path / "many") == content(tmp_path / "one")
    seeds = [(tmp_path / f"rank{rank}").read_text().split() for rank in range(processes)]
    assert len(set().union(*seeds)) == sum(map(len, seeds)) == 9
    assert all(seeds)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"guidance_range": (1.0, 4.0)}, "guidance_range is"),
        ({"keep": 2}, "keep is 2 here and 3 there"),
        ({"steps": 7}, "steps is 7 here and 6 there"),
        ({"dtype": "float16"}, "dtype is 'float16' here and 'float32' there"),
        ({"keep": 9}, "keep no more states than steps"),
        ({"guidance_range": (5.0, 1.0)}, "give a rising range"),
    ],
)
def test_another_collection_is_not_gone_on_with(
    wanted: Callable[..., CollectConfig], tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    collect("trajectories", wanted(count=2), tmp_path / "t")
    with pytest.raises(UserError, match=words):
        collect("trajectories", wanted(**change), tmp_path / "t", resume=True)


def test_pairs_are_no_trajectories_and_students_make_none(wanted: Callable[..., CollectConfig], tmp_path: Path) -> None:
    collect("pairs", wanted(count=2), tmp_path / "pairs")
    assert TensorFolder(tmp_path / "pairs").kind == "pairs"
    with pytest.raises(UserError, match="holds pairs, not trajectories"):
        TrajectoryFolder(tmp_path / "pairs")
    with pytest.raises(UserError, match="made by a deterministic teacher"):
        collect("trajectories", wanted(model=None, run="runs/x"), tmp_path / "t")


@pytest.mark.parametrize("fault", ["range", "prompts", "teacher", "kind", "negative"])
def test_a_run_takes_its_own_teacher_s_trajectories_alone(
    tiny: Callable[..., Path], tmp_path: Path, fault: str
) -> None:
    config = Bench(tiny, tmp_path).config(CASES["agd-trajectories"], 1)
    data, method, model = config.data, dict(config.method), config.model
    if fault == "range":
        method["guidance_range"] = (1.0, 4.0)
    if fault == "prompts":
        (tmp_path / "others.txt").write_text("a dog")
        data = data.model_copy(update={"prompts": str(tmp_path / "others.txt")})
    if fault == "teacher":
        model = model.model_copy(update={"path": str(tiny("sd", "v"))})
    if fault == "negative":
        model = model.model_copy(update={"negative_prompt": "blurry"})
    if fault == "kind":
        made = {"model": {"path": model.path}, "prompts": data.prompts, "count": 1, "steps": 2, "device": "cpu"}
        collect("pairs", CollectConfig.model_validate(made), tmp_path / "pairs")
        data = data.model_copy(update={"trajectories": str(tmp_path / "pairs")})
    words = {
        "range": "must agree, so change one or collect again", "prompts": "another prompt list",
        "negative": "made with the negative prompt '' and",
        "teacher": "collect them with that teacher", "kind": "holds pairs, not trajectories",
    }[fault]  # fmt: skip
    with pytest.raises(UserError, match=words):
        train(config.model_copy(update={"data": data, "method": method, "model": model}), tmp_path / "run")
