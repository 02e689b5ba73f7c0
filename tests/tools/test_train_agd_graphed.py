"""The tool that trains guidance adapters by graphs: the run of `train`, from states to checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from support.method_cases import saved

from stepdistill.config.reading import read_settings
from stepdistill.config.schema import load_config
from stepdistill.data.latents.trajectories import TrajectoryFolder
from stepdistill.errors import UserError
from stepdistill.training.collect import CollectConfig, collect
from stepdistill.training.run import open_run, train

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import train_agd_graphed as tool  # noqa: E402

pytestmark = pytest.mark.ci

CONFIG = ROOT / "configs/fashion_agd_collected.yaml"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def walks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("walks")
    few = ["count=6", "steps=4", "keep=3", "batch_size=3", "shard_size=4", "device=cpu"]
    collect(
        "trajectories", read_settings(CollectConfig, ROOT / "configs/fashion_trajectories.yaml", few), folder / "walks"
    )
    return folder / "walks"


def overrides(walks: Path, device: str) -> list[str]:
    return [
        f"data.trajectories={walks}", f"training.device={device}", "training.max_steps=4", "training.batch_size=5",
        "training.grid_prompts=1", "method.steps=4", "training.tf32=false", "training.ema=0.5",
    ]  # fmt: skip


def test_all_states_at_once_are_those_one_by_one(walks: Path) -> None:
    folder = TrajectoryFolder(walks)
    whole = folder.whole()
    assert len(folder) == len(whole.t) == 18
    for index in range(len(folder)):
        state = folder[index]
        assert torch.equal(whole.x_t[index], state.x_t)
        assert torch.equal(whole.target[index], state.target)
        found = tuple(float(column[index]) for column in (whole.t, whole.w, whole.plain, whole.prompt))
        assert found == (state.t, state.w, state.plain, state.prompt)


@pytest.mark.parametrize("device", DEVICES)
def test_it_is_the_run_of_train(walks: Path, tmp_path: Path, device: str) -> None:
    """Parameters, moments and counters after a few updates; what it leaves is a run that goes on."""
    asked = overrides(walks, device)
    train(load_config(CONFIG, asked), tmp_path / "plain")
    tool.main([str(CONFIG), *(f"--set={change}" for change in asked), "--output", str(tmp_path / "graphed")])
    plain, graphed = saved(tmp_path / "plain"), saved(tmp_path / "graphed")
    for group in ("generator", "generator_ema", "optimizer.generator"):
        assert plain[group].keys() == graphed[group].keys()
        for key, value in plain[group].items():
            assert torch.allclose(graphed[group][key], value, rtol=1e-3, atol=2e-5), (group, key)
    assert float(sum(value.abs().sum() for key, value in plain["generator"].items() if key.endswith("out.weight"))) > 0
    assert open_run(tmp_path / "graphed", "cpu")[1] == 4
    more = load_config(CONFIG, [*asked, "training.max_steps=5"])
    assert train(more, tmp_path / "graphed", resume="latest").iteration == 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("training.accumulation=2", "training.accumulation is 2"),
        ("method.source=rollout", "method.source is 'rollout' and a graphed run has 'trajectories'"),
    ],
)
def test_what_a_graph_does_not_do_is_refused(walks: Path, tmp_path: Path, change: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        tool.train(load_config(CONFIG, [*overrides(walks, "cpu"), change]), tmp_path / "run")
    assert not (tmp_path / "run").exists()
