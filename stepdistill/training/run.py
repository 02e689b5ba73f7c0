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
from stepdistill.training.description import describe_run
from stepdistill.training.distributed import Processes, check_launcher
from stepdistill.training.evaluation_hook import EvaluationHook
from stepdistill.training.inputs.caching import open_caches
from stepdistill.training.option_checks import check_training_options, float32_precision
from stepdistill.training.run_folder import checkpoints
from stepdistill.training.run_folder.environment import RECORDED_CONFIG_KEYS
from stepdistill.training.run_folder.logs import CONFIG, write_config
from stepdistill.training.session import Session, open_session, resolve_device
from stepdistill.training.setup import prepare
from stepdistill.training.trainer import Trainer

logger = logging.getLogger(__name__)
HELD_BY_FINGERPRINT = ("path", "family", "config_dir")
"""Keys of `model` that say where the base lies; whether it is the same is told by the fingerprint of its weights."""
RESUMABLE_MODEL_KEYS = ("dtype", "attention", "compile", "channels_last")
"""Keys of `model` that a resume may change, at the price of exactness."""
KEYS_WITHOUT_EFFECT = frozenset(
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
PROCESS_GROUP_TIMEOUT = timedelta(hours=12)
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
    make_evaluation_hook: Callable[[Session, Path], EvaluationHook] | None = None,
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
        return _train(config, folder, resume, make_evaluation_hook)


def _train(
    config: RunConfig,
    folder: Path,
    resume: str | None,
    make_evaluation_hook: Callable[[Session, Path], EvaluationHook] | None,
) -> Outcome:
    config = config.model_copy(update={"output": str(folder)})  # what is written there must say where it belongs
    check_launcher(config.training)
    resolve_device(config.training.device)
    checkpoint = find_resume_checkpoint(config, folder, resume)
    setup = prepare(config)
    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    accelerator = Accelerator(
        cpu=config.training.device == "cpu",
        log_with=list(config.training.trackers) or None,
        project_dir=str(folder),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PROCESS_GROUP_TIMEOUT)],
    )
    processes = Processes(accelerator, config.training)
    processes.wait_for_everyone()  # the folder has been looked at by all before one writes to it
    check_training_options(config, setup.roles, setup.needs, processes.device, sharded=processes.sharded)
    session = open_session(setup, processes.device, open_caches(setup, processes.device))
    trainer = Trainer(
        session, folder, processes, make_evaluation_hook(session, folder) if make_evaluation_hook is not None else None
    )
    if checkpoint is not None:
        trainer.load(checkpoint)
        logger.info("resumed at iteration %d from %s", trainer.counters.iteration, checkpoint)
    if checkpoint is not None and trainer.counters.iteration >= config.training.max_steps:
        reached, wanted = trainer.counters.iteration, config.training.max_steps
        logger.info("nothing to do: the run is at iteration %d, and training.max_steps is %d", reached, wanted)
        return Outcome(folder, True, trainer.counters.iteration, processes.is_main_process)
    if processes.is_main_process:
        try:
            write_config(folder, with_absolute_paths(config))
        except OSError as error:
            raise UserError(
                f"the output folder {str(folder)!r} cannot be written ({error}): choose another --output"
            ) from None
        for line in describe_run(setup, session, processes.count):
            logger.info("%s", line)
    if config.training.trackers:
        accelerator.init_trackers("stepdistill", config=_flatten(config.model_dump(mode="json")))
    with float32_precision(config.training.tf32):
        finished = trainer.run()
    if setup.images is not None and (unreadable := setup.images.unreadable_names):
        logger.warning("%d unreadable images were replaced: %s", len(unreadable), ", ".join(unreadable[:10]))
    return Outcome(folder, finished, trainer.counters.iteration, processes.is_main_process)


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
    # rounding to float16 or to integers is not undone by loading the same file in float32
    is_comparable = config.model.dtype != "float16" and config.model.quantization == "none"
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
    if is_comparable and saved.metadata.base != session.triple.fingerprint():
        raise UserError(
            f"the run {str(path)!r} was trained on other weights than {config.model.path!r} has now (fingerprint "
            f"{saved.metadata.base}, now {session.triple.fingerprint()}): put the base back that the run was started with"
        )
    for role in session.triple.layouts:
        session.triple.load_state(role, saved.tensors[role])
    session.stage = saved.metadata.counters.stage
    return session, saved.metadata.counters.iteration


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


def find_resume_checkpoint(config: RunConfig, folder: Path, resume: str | None) -> Path | None:
    """The checkpoint that a run in this folder goes on from; None where it starts afresh.

    Raises:
        UserError: a folder that holds something else, or that cannot be made; a checkpoint that is not there or not of this run.
    """
    _check_folder(folder, config, resume)
    return _resume_checkpoint(folder, resume)


def _resume_checkpoint(folder: Path, resume: str | None) -> Path | None:
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
    old, new = (_flatten(run.model_dump(mode="json", include={"model", "method", "roles"})) for run in (before, config))
    for key in sorted({*old, *new} - {f"model.{name}" for name in (*RESUMABLE_MODEL_KEYS, *HELD_BY_FINGERPRINT)}):
        if old.get(key) != new.get(key):
            raise UserError(
                f"the run in {str(folder)!r} has {key} = {old.get(key)!r} and the config says {new.get(key)!r}: "
                "resume with the run's own config.yaml, or choose another --output"
            )
    others = {"data", "optimizers", "training", "cache"}
    old, new = (_flatten(run.model_dump(mode="json", include=others)) for run in (before, config))
    changed = [
        key
        for key in sorted({*old, *new} - KEYS_WITHOUT_EFFECT - RECORDED_CONFIG_KEYS)
        if old.get(key) != new.get(key) and not key.startswith("training.alarms.")
    ]
    if changed:
        changes_text = ", ".join(f"{key} was {old.get(key)!r} and is {new.get(key)!r}" for key in changed)
        logger.warning("this resume is not bit for bit what an unbroken run gives: %s", changes_text)


def _flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
