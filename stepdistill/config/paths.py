"""Local paths of a config, made independent of the folder that a command was started in."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from stepdistill.config.reading import Settings
from stepdistill.config.schema import RunConfig

SettingsT = TypeVar("SettingsT", bound=Settings)
PATTERN_CHARACTERS = frozenset("{*?[")


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Returns the config with every local file and folder by its full path; hub ids and packaged names stay as they are."""
    changes: dict[str, object] = {
        "model": _absolute(config.model, "path", "config_dir", "guidance_adapter"),
        "data": _absolute(config.data, "prompts", "images", "losers", "pairs", "trajectories"),
    }
    if config.init is not None:
        changes["init"] = absolute_if_local(config.init)
    if config.cache is not None:
        changes["cache"] = config.cache.model_copy(update={"folder": str(Path(config.cache.folder).absolute())})
    if config.evaluation is not None:
        changes["evaluation"] = _absolute(config.evaluation, "prompts", "reference")
    return config.model_copy(update=changes)


def absolute_if_local(value: str) -> str:
    """A path that exists here, or a pattern of files in a folder that does, in full; anything else unchanged."""
    path = Path(value).expanduser()
    is_pattern = not PATTERN_CHARACTERS.isdisjoint(value) and path.parent.is_dir()
    return str(path.absolute()) if path.exists() or is_pattern else value


def _absolute(section: SettingsT, *keys: str) -> SettingsT:
    values = {key: vars(section)[key] for key in keys}
    return section.model_copy(
        update={key: absolute_if_local(value) for key, value in values.items() if value is not None}
    )
