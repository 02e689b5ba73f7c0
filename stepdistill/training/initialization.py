"""What a run starts from instead of its teacher: an earlier run, or a LoRA file."""

from __future__ import annotations

import logging
from pathlib import Path

from stepdistill.errors import UserError
from stepdistill.roles.lora_file import load_lora_file
from stepdistill.roles.triple import GENERATOR, Triple
from stepdistill.training.run_folder import checkpoints

logger = logging.getLogger(__name__)
LORA_SUFFIX = ".safetensors"


def find_initial_checkpoint(run: Path) -> Path:
    """What `init` names: a LoRA file, or an earlier run's newest checkpoint. Raises UserError where there is none."""
    if run.suffix == LORA_SUFFIX and run.is_file():
        return run
    path = checkpoints.latest(run / "checkpoints")
    if path is None:
        raise UserError(
            f"init names {str(run)!r}, which holds no complete checkpoint: give the output folder of an earlier run, or a "
            "LoRA as .safetensors"
        )
    return path


def load_initial_roles(triple: Triple, run: Path, roles: tuple[str, ...], ema: str) -> None:
    """Start from the roles of an earlier run's newest checkpoint: its student becomes this generator (staged training).

    A LoRA file is the generator alone.

    ema: the role that is the earlier run's student, where it has one of that name.

    Raises:
        UserError: no checkpoint there, or one that does not fit.
    """
    found = find_initial_checkpoint(run)
    if found.suffix == LORA_SUFFIX:
        load_lora_file(triple, GENERATOR, found)
    else:
        _load_roles(triple, found, roles, ema)
    for copy, source in triple.copies.items():
        triple.copy_role(source, copy)


def _load_roles(triple: Triple, checkpoint: Path, roles: tuple[str, ...], ema: str) -> None:
    saved = checkpoints.read(checkpoint).tensors
    for role in roles:
        source = ema if role == GENERATOR and ema in saved else role
        own = {key: value for key, value in saved.get(source, {}).items() if not key.startswith("head.")}
        if role != GENERATOR and own.keys() != triple.network_parameters(role).keys():
            logger.info("%s is laid out differently in %s: it starts from the teacher", role, checkpoint)
            continue
        kept = {key: value for key, value in triple.state(role).items() if key.startswith("head.")}
        triple.load_state(role, {**own, **kept})
