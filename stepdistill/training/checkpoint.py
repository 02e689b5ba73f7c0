"""Checkpoints: safetensors and JSON, written aside, synced, renamed; nothing in them runs code when read.

checkpoints/step-00000500/generator.safetensors            roles, heads included
                          optimizer.generator.safetensors  moments by parameter name
                          rng.safetensors, method.safetensors
                          state.json                       counters, and size and hash of every other file
            best/                                          a copy of the one that evaluation liked best, with best.json
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill.data.tensors import file_hash
from stepdistill.errors import Refusal

logger = logging.getLogger(__name__)
PREFIX = "step-"
BEST = "best"


@dataclass(frozen=True)
class Saved:
    """Contents of a checkpoint: counters as JSON, tensors by file stem and name."""

    counters: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


def write(
    folder: Path, step: int, counters: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]], keep: int
) -> Path:
    """Write `step-N` whole or not at all, then prune to the newest `keep`.

    Raises:
        OSError: disk full and the like; earlier checkpoints are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{PREFIX}{step:08d}"
    aside = folder / f".{target.name}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        files = {}
        for stem, group in tensors.items():
            path = aside / f"{stem}.safetensors"
            save_file({key: value.detach().contiguous().cpu() for key, value in group.items()}, path)
            _sync(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": file_hash(path)}
        state = aside / "state.json"
        state.write_text(json.dumps({"counters": dict(counters), "files": files}, indent=2, sort_keys=True))
        _sync(state)
        if target.exists():  # the same step saved twice (a resumed run that stopped at once)
            shutil.rmtree(target)
        os.replace(aside, target)
        _sync(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    for old in steps(folder)[:-keep]:
        shutil.rmtree(folder / f"{PREFIX}{old:08d}", ignore_errors=True)
    return target


def read(path: Path) -> Saved:
    """Read and verify one checkpoint.

    Raises:
        Refusal: it is incomplete or corrupt.
    """
    try:
        state = json.loads((path / "state.json").read_text())
        for name, facts in state["files"].items():
            file = path / name
            if file.stat().st_size != facts["bytes"] or file_hash(file) != facts["sha256"]:
                raise Refusal(
                    f"the checkpoint {path} is corrupt ({name} is not what was written): resume from an earlier one"
                )
        tensors = {name.removesuffix(".safetensors"): load_file(path / name) for name in state["files"]}
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, Refusal):
            raise
        raise Refusal(f"the checkpoint {path} is incomplete ({error}): resume from an earlier one") from None
    return Saved(state["counters"], tensors)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint; incomplete or corrupt ones are skipped and named. None where there is none."""
    for step in reversed(steps(folder)):
        path = folder / f"{PREFIX}{step:08d}"
        try:
            read(path)
        except Refusal as refusal:
            logger.warning("skipped: %s", refusal)
            continue
        return path
    return None


def keep_best(folder: Path, step: int, facts: Mapping[str, str | int | float]) -> Path:
    """Make `best` the checkpoint of that step, as hard links where the disk has them: pruning leaves it alone.

    facts: what made it the best, kept beside it as best.json, so that neither can be there without the other.
    """
    target, aside = folder / BEST, folder / f".{BEST}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        shutil.copytree(folder / f"{PREFIX}{step:08d}", aside, copy_function=os.link)
    except (OSError, shutil.Error):
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(folder / f"{PREFIX}{step:08d}", aside)
    (aside / "best.json").write_text(json.dumps(dict(facts)))
    shutil.rmtree(target, ignore_errors=True)
    os.replace(aside, target)
    return target


def best_facts(folder: Path) -> dict[str, str | int | float] | None:
    """What made the kept best checkpoint the best; None where there is none."""
    file = folder / BEST / "best.json"
    return dict(json.loads(file.read_text())) if file.is_file() else None


def steps(folder: Path) -> list[int]:
    """Steps that have a checkpoint folder, ascending."""
    found = [path.name.removeprefix(PREFIX) for path in folder.glob(f"{PREFIX}*")] if folder.is_dir() else []
    return sorted(int(step) for step in found if step.isdigit())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
