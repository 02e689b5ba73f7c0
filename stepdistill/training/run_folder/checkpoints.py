"""Checkpoints: safetensors and JSON, written aside, synced, renamed; nothing in them runs code when read.

checkpoints/step-00000500/generator.safetensors            roles, heads included
                          optimizer.generator.safetensors  moments by parameter name
                          rng.safetensors, method.safetensors
                          state.json                       facts, and size and hash of every other file
            best/                                          a copy of the one that evaluation liked best, with best.json
            abandoned/                                     those beyond the one from which a run was resumed
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.files.atomic import file_hash
from stepdistill.training.run_folder.environment import Environment

logger = logging.getLogger(__name__)
STEP_PREFIX = "step-"
BEST, ABANDONED = "best", "abandoned"
LOG = "log"
"""File stem of the values that wait for the next log record."""


class NonFiniteError(ValueError):
    """A checkpoint was not written, because a tensor of it holds a NaN or an infinite value; the message names it."""


@dataclass
class Counters:
    """Where a run stands.

    Attributes:
        iteration: iterations done.
        stage: index of the method's stage.
        updates: optimizer steps of each role in this stage.
        skipped: steps that were skipped for non-finite gradients, of all roles and stages.
        bad_in_row: non-finite steps since the last good one of any role.
        skipped_of: skipped steps of each role in this stage.
        bad_in_row_of: non-finite steps of each role since its own last good one.
    """

    iteration: int = 0
    stage: int = 0
    updates: dict[str, int] = field(default_factory=dict)
    skipped: int = 0
    bad_in_row: int = 0
    skipped_of: dict[str, int] = field(default_factory=dict)
    bad_in_row_of: dict[str, int] = field(default_factory=dict)

    def step(self, role: str) -> None:
        """Counts a step of a role."""
        self.updates[role] += 1
        self.bad_in_row = self.bad_in_row_of[role] = 0

    def skip(self, role: str) -> None:
        """Counts a step of a role that was skipped."""
        self.skipped += 1
        self.bad_in_row += 1
        self.skipped_of[role] = self.skipped_of.get(role, 0) + 1
        self.bad_in_row_of[role] = self.bad_in_row_of.get(role, 0) + 1

    def begin_stage(self) -> None:
        """Counts a stage's steps from zero."""
        self.updates = dict.fromkeys(self.updates, 0)
        self.skipped_of = {}


@dataclass(frozen=True)
class CheckpointMetadata:
    """What a checkpoint says of itself: the method's name, the fingerprint of the base, where it stands, and on what."""

    method: str
    base: str
    counters: Counters
    environment: Environment

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> CheckpointMetadata:
        """Inverse of `dataclasses.asdict`. Raises TypeError, KeyError: of another version."""
        counters, environment = Counters(**content["counters"]), Environment(**content["environment"])
        return cls(content["method"], content["base"], counters, environment)


@dataclass(frozen=True)
class CheckpointContents:
    """Contents of a checkpoint: its facts, and tensors by file stem and name."""

    metadata: CheckpointMetadata
    tensors: dict[str, dict[str, Tensor]]


def write(
    folder: Path, metadata: CheckpointMetadata, groups: Iterable[tuple[str, Mapping[str, Tensor]]], keep: int
) -> Path:
    """Write `step-N` whole or not at all, then prune to the newest `keep`.

    groups: (file stem, CPU tensors by name), taken one at a time, so that they need not be held together.

    Raises:
        OSError: disk full and the like; earlier checkpoints are untouched.
        NonFiniteError: a tensor is not finite; earlier checkpoints are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = checkpoint_path(folder, metadata.counters.iteration)
    if is_complete(target):  # a resumed run that stopped at once: what is there is what would be written
        return target
    for left in folder.glob(f".{STEP_PREFIX}*.partial"):  # of a process that was killed as it wrote
        shutil.rmtree(left, ignore_errors=True)
    aside = folder / f".{target.name}.partial"
    aside.mkdir()
    try:
        files = {}
        for stem, group in groups:
            path = aside / f"{stem}.safetensors"
            # logged values may well be infinite: the norm of a gradient whose step was skipped
            if stem != LOG and (bad := _first_non_finite(group)) is not None:
                raise NonFiniteError(f"{stem}: {bad}")
            try:
                save_file({key: value.contiguous() for key, value in group.items()}, path)
            except SafetensorError as error:  # what a full disk makes of it; it is no OSError
                raise OSError(f"{path.name}: {error}") from error
            _fsync(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": file_hash(path)}
        state = aside / "state.json"
        state.write_text(json.dumps({"facts": asdict(metadata), "files": files}, indent=2, sort_keys=True))
        _fsync(state)
        _fsync(aside)
        if target.exists():
            shutil.rmtree(target)
        os.replace(aside, target)
        _fsync(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    for old in steps(folder)[:-keep]:
        shutil.rmtree(checkpoint_path(folder, old), ignore_errors=True)
    return target


def is_complete(path: Path) -> bool:
    """Whether a checkpoint is there and is what was written."""
    try:
        _read_verified_state(path)
    except UserError:
        return False
    return True


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"{STEP_PREFIX}{step:08d}"


def move_later_checkpoints(folder: Path, step: int, *, itself: bool = False) -> None:
    """Move checkpoints beyond `step`, from which a run goes on, to `abandoned/`: pruning must not count them as newer
    ones, nor `latest` go back to them, and nothing is deleted that somebody may still want. So goes a best one from there.

    itself: move the folder's own checkpoint of that step too, since the run goes on from another one of that number.
    """
    going = [checkpoint_path(folder, later) for later in steps(folder) if later > step or (itself and later == step)]
    best = read_best_metadata(folder)
    if best is not None and int(best["iteration"]) > step:
        going.append(folder / BEST)
    for source in going:
        target = folder / ABANDONED / source.name
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(exist_ok=True)
        os.replace(source, target)
        logger.warning("going on from iteration %d: %s was moved to %s", step, source, target)


def read(path: Path) -> CheckpointContents:
    """Read and verify one checkpoint.

    Raises:
        UserError: it is incomplete or corrupt.
    """
    state = _read_verified_state(path)
    try:
        metadata = CheckpointMetadata.of(state["facts"])
    except (TypeError, KeyError) as error:
        raise UserError(
            f"the checkpoint {path} was written by another version ({error}): resume with the version that wrote it"
        ) from None
    return CheckpointContents(
        metadata, {name.removesuffix(".safetensors"): load_file(path / name) for name in state["files"]}
    )


def _read_verified_state(path: Path) -> dict[str, Any]:
    """The content of state.json, whose every file is what was written."""
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
        for name, metadata in state["files"].items():
            file = path / name
            if file.stat().st_size != metadata["bytes"] or file_hash(file) != metadata["sha256"]:
                raise UserError(
                    f"the checkpoint {path} is corrupt ({name} is not what was written): resume from an earlier one"
                )
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the checkpoint {path} is incomplete ({error}): resume from an earlier one") from None
    return state


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint; incomplete or corrupt ones are skipped and named. None where there is none."""
    for step in reversed(steps(folder)):
        path = checkpoint_path(folder, step)
        try:
            _read_verified_state(path)
        except UserError as refusal:
            logger.warning("skipped: %s", refusal)
            continue
        return path
    return None


def keep_best(folder: Path, step: int, metadata: Mapping[str, str | int | float]) -> Path:
    """Make `best` the checkpoint of that step, as hard links where the disk has them: pruning leaves it alone.

    facts: what made it the best, kept beside it as best.json, so that neither can be there without the other.
    """
    target, aside = folder / BEST, folder / f".{BEST}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        shutil.copytree(checkpoint_path(folder, step), aside, copy_function=os.link)
    except (OSError, shutil.Error):
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(checkpoint_path(folder, step), aside)
    (aside / "best.json").write_text(json.dumps(dict(metadata)))
    before = _former_best(folder)
    shutil.rmtree(before, ignore_errors=True)
    if target.exists():
        os.replace(target, before)
    os.replace(aside, target)
    _fsync(folder)
    shutil.rmtree(before, ignore_errors=True)
    return target


def read_best_metadata(folder: Path) -> dict[str, str | int | float] | None:
    """What made the kept best checkpoint the best; None where there is none."""
    if not (folder / BEST).exists() and _former_best(folder).exists():  # killed between two renames
        os.replace(_former_best(folder), folder / BEST)
    file = folder / BEST / "best.json"
    return dict(json.loads(file.read_text())) if file.is_file() else None


def _former_best(folder: Path) -> Path:
    return folder / f".{BEST}.former"


def steps(folder: Path) -> list[int]:
    """Steps that have a checkpoint folder, ascending."""
    found = [path.name.removeprefix(STEP_PREFIX) for path in folder.glob(f"{STEP_PREFIX}*")] if folder.is_dir() else []
    return sorted(int(step) for step in found if step.isdigit())


def _first_non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor with a NaN or an infinite value."""
    return next((key for key, value in tensors.items() if not bool(torch.isfinite(value).all())), None)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
