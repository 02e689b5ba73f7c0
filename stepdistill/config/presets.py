"""Presets: defaults for a card of some memory, as YAML files in assets/presets, beneath what a config writes out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from stepdistill.assets import FOLDER

PRESETS = FOLDER / "presets"


def preset_names() -> tuple[str, ...]:
    return tuple(sorted((path.stem for path in PRESETS.glob("*.yaml")), key=lambda name: int(name.removesuffix("gb"))))


def with_preset(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config, as read, with the keys of the preset that it names beneath its own, section by section.

    A key that is written out always wins, null included. Without a preset, or with an unknown one (validation names it),
    the config as it is.
    """
    name = config.get("preset")
    if name not in preset_names():
        return dict(config)
    return _merge_defaults(yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8")), config)


def _merge_defaults(defaults: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**defaults, **own}
    for key in defaults.keys() & own.keys():
        if isinstance(defaults[key], Mapping) and isinstance(own[key], Mapping):
            merged[key] = _merge_defaults(defaults[key], own[key])
    return merged
