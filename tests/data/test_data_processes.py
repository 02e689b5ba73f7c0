"""Two processes that share an iteration end in the weights of one process with two micro-batches."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from support.image_runs import run_config, weights
from support.image_sources import encoded, picture


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["buckets", "stream"])
def test_two_processes_equal_one(kind: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "parquet").mkdir()
    for row in range(12):
        picture(row, 20, 20 + 12 * (row % 2)).save(tmp_path / f"photos/{row}.png")
    features = datasets.Features({"image": datasets.Image()})
    for file in range(4):
        cells = {"image": [{"bytes": encoded(3 * file + row), "path": None} for row in range(3)]}
        datasets.Dataset.from_dict(cells, features=features).to_parquet(tmp_path / f"parquet/{file}.parquet")
    sections: dict[str, dict[str, Any]] = {
        "buckets": {"images": str(tmp_path / "photos"), "buckets": [[16, 16], [16, 24]]},
        "stream": {"images": f"hf:{tmp_path / 'parquet'}", "streaming": True},
    }
    ended = []
    for processes in (1, 2):
        config = run_config(tiny("sd"), 3, 2, 2 // processes, crop="random", **sections[kind])
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
        run = tmp_path / f"run{processes}"
        command = ["torch.distributed.run", f"--nproc_per_node={processes}", "--standalone", "-m", "stepdistill.cli"]
        subprocess.run(
            [sys.executable, "-m", *command, "train", str(tmp_path / "config.yaml"), "--output", str(run)],
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            check=True,
            timeout=1800,
        )
        ended.append(weights(run))
    one, two = ended
    for key in one.keys() - {"rng/cpu"}:
        torch.testing.assert_close(one[key], two[key], atol=1e-5, rtol=1e-4)
