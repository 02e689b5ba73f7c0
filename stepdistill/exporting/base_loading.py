"""Code that loads an export's base with stock diffusers, for the model card and for `reproduce.py`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from stepdistill.assets import resolve
from stepdistill.families.base import Checkpoint

BASE_CONFIGS = "base_configs"
"""Folder of an export with the configs and tokenizers of a single-file base, which that file does not hold."""


def base_location(base: str) -> str:
    """The base as code anywhere on this machine must name it: a hub id as it is, a local folder or file by its full path."""
    place = Path(resolve(base)).expanduser()
    return str(place.resolve()) if place.exists() else base


def write_base_configs(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes the configs and tokenizers of a single-file base below `folder`; nothing for any other base."""
    info = checkpoint.info
    if info.single_file is None or checkpoint.pipeline is None:
        return
    for path in sorted(info.folder.glob("*/config.json")):
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / path.parent.name / path.name)
    shutil.copyfile(info.folder / "model_index.json", folder / "model_index.json")
    (folder / "scheduler").mkdir(exist_ok=True)
    scheduler = {key: value for key, value in info.scheduler_config.items() if key != "_use_default_values"}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")
    for name, component in checkpoint.pipeline.components.items():
        if isinstance(component, PreTrainedTokenizerBase):
            component.save_pretrained(folder / name)


def loading_code(
    pipeline: str, base: str, configs: str | None, *, omitted: Sequence[str] = (), dtype: str | None = None
) -> str:
    """An expression that loads a base.

    Args:
        pipeline: the pipeline class, as the code names it.
        base: an expression for the hub id, folder or file.
        configs: an expression for the folder of a single file's configs; None where the base is no single file.
        omitted: components that the base lacks, and that diffusers must not look for.
        dtype: an expression for `torch_dtype`.
    """
    arguments = [base, *([f"torch_dtype={dtype}"] if dtype else []), *(f"{name}=None" for name in omitted)]
    if configs is None:
        return f"{pipeline}.from_pretrained({', '.join(arguments)})"
    return f"{pipeline}.from_single_file({', '.join([*arguments, f'config={configs}'])})"
