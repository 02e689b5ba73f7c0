"""A run's folder beside its checkpoints: the config, lines of logs, and cutting both back to where a run goes on.

RUN/config.yaml       the resolved config
    stats.jsonl       what was computed, one line per `log_every`
    speed.jsonl       what the machine took for it
    evaluation.jsonl  where the config has an `evaluation` section
    grids/            teacher above student
    checkpoints/      see checkpoint.py
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import yaml

from stepdistill.config import RunConfig
from stepdistill.data.tensors import write_atomically

logger = logging.getLogger(__name__)
CONFIG, STATS, SPEED, EVALUATION = "config.yaml", "stats.jsonl", "speed.jsonl", "evaluation.jsonl"
GRIDS, GRID_PREFIX = "grids", "step-"


def write_config(folder: Path, config: RunConfig) -> None:
    """Write the resolved config, making the folder where it is missing. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / CONFIG, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode())


def append_line(path: Path, iteration: int, values: Mapping[str, float]) -> None:
    """Append one line of JSON; a disk that refuses it is named in a warning, since a run is worth more than its log."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps({"iteration": iteration, **values}) + "\n")
    except OSError as error:
        logger.warning(
            "the line of iteration %d in %s could not be written (%s); training goes on", iteration, path, error
        )


def grid_path(folder: Path, iteration: int) -> Path:
    """Where the grid of an iteration lies."""
    return folder / GRIDS / f"{GRID_PREFIX}{iteration:08d}.png"


def cut_back(folder: Path, iteration: int) -> None:
    """Drop lines and grids beyond `iteration`, so that a resumed run leaves what an unbroken one would."""
    for name in (STATS, SPEED, EVALUATION):
        _cut(folder / name, iteration)
    for grid in folder.glob(f"{GRIDS}/{GRID_PREFIX}*.png"):
        number = grid.stem.removeprefix(GRID_PREFIX)
        if number.isdigit() and int(number) > iteration:
            grid.unlink()


def _cut(path: Path, iteration: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["iteration"] <= iteration:
                kept.append(line)
        except (ValueError, KeyError):  # a line cut short by a crash
            continue
    write_atomically(path, "".join(line + "\n" for line in kept).encode())
