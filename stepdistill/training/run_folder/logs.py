"""A run's folder beside its checkpoints: the config, lines of logs, and cutting both back to where a run goes on.

RUN/config.yaml       the resolved config
    stats.jsonl       what was computed, one line per `log_every` and `grid_every`
    speed.jsonl       what the machine took for it
    evaluation.jsonl  where the config has an `evaluation` section
    grids/            step-N.png, teacher above student; scores-N.png, what the scores say of the student: see grids.py
    kept/             what a method keeps; see shelf.py
    checkpoints/      see checkpoint.py
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from stepdistill.config.schema import RunConfig
from stepdistill.files.atomic import write_atomically

logger = logging.getLogger(__name__)
CONFIG, STATS, SPEED, EVALUATION = "config.yaml", "stats.jsonl", "speed.jsonl", "evaluation.jsonl"
GRIDS, GRID, SCORES = "grids", "step", "scores"


def write_config(folder: Path, config: RunConfig) -> None:
    """Write the resolved config, making the folder where it is missing. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / CONFIG, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode())


class JsonLinesFile:
    """A file of one JSON object a line, for a run that is worth more than its log: lines that the disk refuses are named in
    a warning and wait in memory for the next one, and no line stays there by half."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pending = b""

    def append(self, iteration: int, values: Mapping[str, float]) -> None:
        """Write the lines that wait, then this one; what is no number is `null`, since JSON has no word for it."""
        said = {key: value if math.isfinite(value) else None for key, value in values.items()}
        self._pending += json.dumps({"iteration": iteration, **said}).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write()
        except OSError as error:
            logger.warning(
                "the line of iteration %d in %s could not be written (%s); it waits, and training goes on",
                iteration,
                self.path,
                error,
            )
            return
        self._pending = b""

    def _write(self) -> None:
        # unbuffered: a buffer that could not be emptied would be written again when the file is closed
        with self.path.open("ab", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            try:
                if file.write(self._pending) != len(self._pending):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(before)
                raise


def read_records(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """(iteration, values) of the lines of a `LineFile`, what is no number left out; of no file, none."""
    if not path.is_file():
        return
    for line in path.read_text().splitlines():
        said = json.loads(line)
        iteration = said.pop("iteration")
        yield iteration, {key: float(value) for key, value in said.items() if value is not None}


def grid_path(folder: Path, iteration: int, kind: str = GRID) -> Path:
    """Where a picture of an iteration lies; kind: `GRID` or `SCORES`."""
    return folder / GRIDS / f"{kind}-{iteration:08d}.png"


def discard_records_after(folder: Path, iteration: int) -> None:
    """Drop lines and grids beyond `iteration`, so that a resumed run leaves what an unbroken one would."""
    for name in (STATS, SPEED, EVALUATION):
        _truncate_log(folder / name, iteration)
    for picture in folder.glob(f"{GRIDS}/*.png"):
        kind, _, number = picture.stem.rpartition("-")
        if kind in (GRID, SCORES) and number.isdigit() and int(number) > iteration:
            picture.unlink()


def _truncate_log(path: Path, iteration: int) -> None:
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
