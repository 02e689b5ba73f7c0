"""A run: started, resumed, opened again. What lies in its folder is listed in folder.py and checkpoint.py."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from stepdistill.config.paths import with_absolute_paths
from stepdistill.config.schema import ModelConfig, RunConfig, load_config
from stepdistill.errors import UserError
from stepdistill.files.locks import locked_folder
from stepdistill.files.outputs import check_folder_is_writable
from stepdistill.training.description import describe
from stepdistill.training.distributed import Processes, check_launcher
from stepdistill.training.evaluation_hook import EvaluationHook
from stepdistill.training.inputs.caching import warm
from stepdistill.training.options import check_training_options, products
from stepdistill.training.run_folder import checkpoints
from stepdistill.training.run_folder.environment import RECORDED
from stepdistill.training.run_folder.logs import CONFIG, write_config
from stepdistill.training.session import Session, device_of, open_session
from stepdistill.training.setup import prepare
from stepdistill.training.trainer import Trainer

logger = logging.getLogger(__name__)
HELD_BY_FINGERPRINT = ("path", "family", "config_dir")
"""Keys of `model` that say where the base lies; whether it is the same is told by the fingerprint of its weights."""
EXACT_ONLY = ("dtype", "attention", "compile", "channels_last")
"""Keys of `model` that a resume may change, at the price of exactness."""
HARMLESS = frozenset(
    f"training.{key}"
    for key in (
        "max_steps",
        "save_every",
        "keep",
        "log_every",
        "grid_every",
        "grid_prompts",
        "grid_seeds",
        "trackers",
        "device",
        "max_bad_steps",
    )
)
"""Keys that change nothing that a run computes from; nor does any below `training.alarms`."""
PATIENCE = timedelta(hours=12)
"""How long processes wait for one another: one of them fills a cache, or writes a large checkpoint."""


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended.

    Attributes:
        folder: the run's.
        finished: False where a signal stopped it early; it can be resumed.
        iteration: iterations done.
        leader: whether this process speaks for all of them.
    """

    folder: Path
    finished: bool
    iteration: int
    main_process: bool = True


def train(
    config: RunConfig,
    output: str | Path | None = None,
    resume: str | None = None,
    watcher: Callable[[Session, Path], EvaluationHook] | None = None,
) -> Outcome:
    """Run a config into a folder, or continue it.

    Args:
        config: as loaded by `load_config`.
        output: the run's folder; `config.output` by default.
        resume: "latest", or the path of a checkpoint of this run.
        watcher: makes what measures the student as training goes.

    Raises:
        UserError: anything that cannot work, before any weight is loaded.
    """
    folder = Path(output or config.output)
    # the other processes of a run share the lock of its first
    with locked_folder(folder, "training") if os.environ.get("RANK", "0") == "0" else nullcontext():
        return _train(config, folder, resume, watcher)


def _train(
    config: RunConfig,
    folder: Path,
    resume: str | None,
    watcher: Callable[[Session, Path], EvaluationHook] | None,
) -> Outcome:
    config = config.model_copy(update={"output": str(folder)})  # what is written there must say where it belongs
    check_launcher(config.training)
    device_of(config.training.device)
    checkpoint = find_start(config, folder, resume)
    plan = prepare(config)
    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    accelerator = Accelerator(
        cpu=config.training.device == "cpu",
        log_with=list(config.training.trackers) or None,
        project_dir=str(folder),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    processes = Processes(accelerator, config.training)
    processes.wait()  # the folder has been looked at by all before one writes to it
    check_training_options(config, plan.roles, plan.needs, processes.device, sharded=processes.sharded)
    session = open_session(plan, processes.device, warm(plan, processes.device))
    trainer = Trainer(session, folder, processes, watcher(session, folder) if watcher is not None else None)
    if checkpoint is not None:
        trainer.load(checkpoint)
        logger.info("resumed at iteration %d from %s", trainer.counters.iteration, checkpoint)
    if checkpoint is not None and trainer.counters.iteration >= config.training.max_steps:
        reached, wanted = trainer.counters.iteration, config.training.max_steps
        logger.info("nothing to do: the run is at iteration %d, and training.max_steps is %d", reached, wanted)
        return Outcome(folder, True, trainer.counters.iteration, processes.main)
    if processes.main:
        try:
            write_config(folder, with_absolute_paths(config))
        except OSError as error:
            raise UserError(
                f"the output folder {str(folder)!r} cannot be written ({error}): choose another --output"
            ) from None
        for line in describe(plan, session, processes.count):
            logger.info("%s", line)
    if config.training.trackers:
        accelerator.init_trackers("stepdistill", config=_flat(config.model_dump(mode="json")))
    with products(config.training.tf32):
        finished = trainer.run()
    if plan.images is not None and (unreadable := plan.images.unreadable_names):
        logger.warning("%d unreadable images were replaced: %s", len(unreadable), ", ".join(unreadable[:10]))
    return Outcome(folder, finished, trainer.counters.iteration, processes.main)


def open_run(
    folder: str | Path, device: str | None = None, *, full_precision: bool = False, checkpoint: str = "latest"
) -> tuple[Session, int]:
    """A finished or interrupted run with the weights of a checkpoint, and that checkpoint's iteration.

    full_precision: load a half-precision or quantised base in float32, and compile nothing.
    checkpoint: "latest", or "best" where the run was evaluated.

    Raises:
        UserError: not a run, or no complete checkpoint in it.
    """
    path = Path(folder)
    config = run_config(path)
    best = path / "checkpoints" / checkpoints.BEST
    newest = checkpoints.latest(path / "checkpoints") if checkpoint == "latest" else best
    if newest is None:
        raise UserError(f"the run {str(path)!r} has no complete checkpoint yet: let it reach training.save_every")
    if not newest.is_dir():
        raise UserError(
            f"the run {str(path)!r} has no best checkpoint: set evaluation.every in its config, or take the latest"
        )
    if full_precision:
        config = config.model_copy(update={"model": _in_full_precision(config.model)})
    # results are the same under every kernel, and the device may be another
    config = config.model_copy(update={"model": config.model.model_copy(update={"attention": "sdpa"})})
    session = open_session(prepare(config, images=False), device)
    saved = checkpoints.read(newest)
    for role in session.triple.layouts:
        session.triple.load_state(role, saved.tensors[role])
    session.stage = saved.facts.counters.stage
    return session, saved.facts.counters.iteration


def run_config(folder: str | Path) -> RunConfig:
    """The config that a run was trained by. Raises UserError where the folder is no run."""
    file = Path(folder) / CONFIG
    if not file.is_file():
        raise UserError(
            f"{str(folder)!r} is not a run (it has no {CONFIG}): give the output folder of 'stepdistill train'"
        )
    return load_config(file)


def _in_full_precision(model: ModelConfig) -> ModelConfig:
    exact: dict[str, object] = {"quantization": "none", "compile": False}
    if model.dtype in ("bfloat16", "float16"):
        exact["dtype"] = "float32"
    return model.model_copy(update=exact)


def find_start(config: RunConfig, folder: Path, resume: str | None) -> Path | None:
    """The checkpoint that a run in this folder goes on from; None where it starts afresh.

    Raises:
        UserError: a folder that holds something else, or that cannot be made; a checkpoint that is not there or not of this run.
    """
    _check_folder(folder, config, resume)
    return _checkpoint(folder, resume)


def _checkpoint(folder: Path, resume: str | None) -> Path | None:
    if resume is None:
        return None
    if resume != "latest":
        path = Path(resume)
        if not (path / "state.json").is_file():
            raise UserError(f"there is no checkpoint at {resume!r}: give a folder checkpoints/step-N, or 'latest'")
        if folder.resolve() not in path.resolve().parents:
            raise UserError(
                f"the checkpoint {resume!r} is of another run than {str(folder)!r}: give --output that run's folder, or start "
                "from its student with init"
            )
        return path
    newest = checkpoints.latest(folder / "checkpoints")
    if newest is None and checkpoints.steps(folder / "checkpoints"):
        raise UserError(
            f"none of the checkpoints in {str(folder / 'checkpoints')!r} is whole (see above), and starting afresh would lose the "
            "run's logs: mend the disk, or choose another --output"
        )
    if newest is None:
        logger.info("no checkpoint in %s yet: starting afresh", folder)
    return newest


def _check_folder(folder: Path, config: RunConfig, resume: str | None) -> None:
    """Refuse to mix two runs in one folder."""
    check_folder_is_writable(folder)
    if not folder.exists() or not any(folder.iterdir()):
        return
    if resume is None:
        raise UserError(
            f"the output folder {str(folder)!r} is not empty: resume it with --resume latest, or choose another --output"
        )
    if not (folder / CONFIG).is_file():
        raise UserError(f"the output folder {str(folder)!r} holds no run to resume: choose the folder of one")
    before, config = with_absolute_paths(load_config(folder / CONFIG)), with_absolute_paths(config)
    old, new = (_flat(run.model_dump(mode="json", include={"model", "method", "roles"})) for run in (before, config))
    for key in sorted({*old, *new} - {f"model.{name}" for name in (*EXACT_ONLY, *HELD_BY_FINGERPRINT)}):
        if old.get(key) != new.get(key):
            raise UserError(
                f"the run in {str(folder)!r} has {key} = {old.get(key)!r} and the config says {new.get(key)!r}: "
                "resume with the run's own config.yaml, or choose another --output"
            )
    others = {"data", "optimizers", "training", "cache"}
    old, new = (_flat(run.model_dump(mode="json", include=others)) for run in (before, config))
    changed = [
        key
        for key in sorted({*old, *new} - HARMLESS - RECORDED)
        if old.get(key) != new.get(key) and not key.startswith("training.alarms.")
    ]
    if changed:
        told = ", ".join(f"{key} was {old.get(key)!r} and is {new.get(key)!r}" for key in changed)
        logger.warning("this resume is not bit for bit what an unbroken run gives: %s", told)


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
