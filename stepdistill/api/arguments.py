"""Checks of a command's arguments that import no heavy library, so that a typo is answered at once.

The complete checks follow in `training/setup.py`, which needs PyTorch; each check here calls the code that they call too.
"""

from __future__ import annotations

from pathlib import Path

from stepdistill.assets import resolve
from stepdistill.config.collection import CollectConfig
from stepdistill.config.declared import check_option_names
from stepdistill.config.reading import read_settings
from stepdistill.config.registry import check_method_name
from stepdistill.config.schema import RunConfig, load_config
from stepdistill.data.prompts import check_prompt_source
from stepdistill.errors import UserError
from stepdistill.files.outputs import check_folder_is_writable
from stepdistill.files.sources import check_source_exists


def read_run_config(path: Path, overrides: list[str] | None, output: Path | None = None) -> RunConfig:
    """Reads a training config and checks its names and paths.

    Args:
        path: the YAML file.
        overrides: `section.key=value` texts.
        output: the folder that the command writes; that of the config where None.

    Raises:
        UserError: unknown key, method or option, wrong value, or a file or folder that does not exist.
    """
    config = load_config(path, overrides)
    check_method_name(config.method_name)
    check_option_names(config.method_name, config.method_options)
    check_source_exists(resolve(config.model.path))
    if config.data.prompts is not None:
        check_prompt_source(config.data.prompts)
    check_folder_is_writable(Path(output or config.output))
    return config


def read_collect_config(path: Path, overrides: list[str] | None, output: Path) -> CollectConfig:
    """Reads a config of `stepdistill collect` and checks its paths. Raises UserError as `read_run_config`."""
    config = read_settings(CollectConfig, path, overrides)
    if config.model is not None:
        check_source_exists(resolve(config.model.path))
    check_prompt_source(config.prompts)
    check_folder_is_writable(output)
    return config


def check_sample_arguments(prompt: str | None, prompts: str | None, width: int | None, height: int | None) -> None:
    """Checks which arguments of `sample` go together.

    Raises:
        UserError: no prompt or two sources of prompts, or one side of the size without the other.
    """
    if (prompt is None) == (prompts is None):
        raise UserError("exactly one of --prompt and --prompts is needed: give a text, or a file of prompts")
    if (width is None) != (height is None):
        raise UserError("--width and --height go together: give both or neither")
