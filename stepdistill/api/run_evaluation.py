"""Defaults of `stepdistill evaluate RUN`, and models that must be on this machine already."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from stepdistill.api.evaluation_options import ModelOptions
from stepdistill.assets import TEACHERS, resolve
from stepdistill.config.schema import load_config
from stepdistill.data.prompts import read_prompts
from stepdistill.errors import UserError
from stepdistill.evaluation.networks.features import cache_folder
from stepdistill.evaluation.networks.inception import find_inception
from stepdistill.evaluation.protocols import load_protocol

logger = logging.getLogger(__name__)
MAX_IMAGES, LEAST_IMAGES_OF_FID, TEACHER_STEPS = 256, 20, 50
APPEARANCE = ("saturation", "brightness", "sharpness")


def as_run_evaluation(model: str, options: ModelOptions) -> ModelOptions:
    """Fills in what `evaluate RUN` needs if no protocol is named: the run's own prompts, and its teacher as the reference.

    Distances need the Inception's weights, or the judge for the embedded teacher. If there are none on this machine, the
    student's and the teacher's saturation, brightness and sharpness are compared, and a warning says how to get more.

    Args:
        model: what is evaluated; only the folder of a run is changed.
        options: the user's; what they set stays.

    Raises:
        UserError: the run has no prompts.
    """
    run = Path(model)
    if options.protocol is not None or not (run / "config.yaml").is_file():
        return options
    config = load_config(run / "config.yaml")
    changes: dict[str, Any] = {"protocol": "prompts"}
    prompts = options.prompts or config.data.prompts
    if prompts is None:
        raise UserError(f"the run {model!r} was trained without a prompt list: give --prompts FILE")
    changes["prompts"] = str(prompts)
    available = len(read_prompts(prompts).texts) * options.seeds_per_prompt
    count = options.num_images or min(available, MAX_IMAGES)
    changes["num_images"] = count
    if options.reference is None and options.teacher_steps is None:
        changes["teacher_steps"] = TEACHER_STEPS
    if options.features is None and config.model.path in TEACHERS:
        changes["features"] = "judge"
    elif options.features is None and options.metrics is None and not _has_inception(options.download):
        changes["metrics"] = APPEARANCE
        logger.warning(
            "the Inception weights are not on this machine, so that only saturation, brightness and sharpness are compared with the "
            "teacher's: --download fetches them, --features inception:FILE names them"
        )
    if options.metrics is None and "metrics" not in changes:
        wanted = load_protocol("prompts").metrics
        changes["metrics"] = wanted if count >= LEAST_IMAGES_OF_FID else APPEARANCE
    return replace(options, **changes)


def local_base(model: str, *, download: bool) -> str:
    """Returns the folder or file of a model; a hub id stays one if downloading is allowed.

    Args:
        model: folder, file, `builtin:NAME` or hub id.
        download: allow fetching the model from the hub.

    Raises:
        UserError: a hub id that is not in the local cache, and downloading is not allowed.
    """
    source = resolve(model)
    if download or Path(source).expanduser().exists():
        return source
    try:
        return str(snapshot_download(source, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        raise UserError(
            f"the model {model!r} is neither a folder here nor in the hub's cache, and downloading is off: check the path, or "
            "give --download"
        ) from None


def _has_inception(download: bool) -> bool:
    try:
        find_inception(cache_folder(), download=False)
    except UserError:
        return download
    return True
