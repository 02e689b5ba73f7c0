"""Presets: defaults for a GPU of a given memory, in assets/presets. The keys that a config sets itself take precedence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepdistill.assets import FOLDER
from stepdistill.config.yaml_text import parse_yaml

PRESETS = FOLDER / "presets"


def preset_names() -> tuple[str, ...]:
    """Returns the names of all presets, smallest GPU first."""
    return tuple(sorted((path.stem for path in PRESETS.glob("*.yaml")), key=lambda name: int(name.removesuffix("gb"))))


def with_preset(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config, as read from YAML, with the missing keys filled in from the preset that it names.

    Sections are merged key by key. A key that the config sets is kept, null included. Without a preset, or with an unknown
    one, which validation reports later, the config is returned as it is.
    """
    name = config.get("preset")
    if name not in preset_names():
        return dict(config)
    return _fill_in(parse_yaml((PRESETS / f"{name}.yaml").read_text(encoding="utf-8"), f"the preset {name}"), config)


def _fill_in(defaults: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**defaults, **own}
    for key in defaults.keys() & own.keys():
        if isinstance(defaults[key], Mapping) and isinstance(own[key], Mapping):
            merged[key] = _fill_in(defaults[key], own[key])
    return merged
