"""Turns YAML into typed, validated settings. An unknown key is an error that names the nearest valid one."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from stepdistill.config.yaml_text import parse_yaml, read_yaml
from stepdistill.errors import UserError

S = TypeVar("S", bound="Settings")
MAX_QUOTED = 200
"""Characters of a wrong value that an error message quotes at most."""


def _check_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"it is not a regular expression ({error})") from None
    return pattern


RegularExpression = Annotated[str, AfterValidator(_check_pattern)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""A seed that PyTorch's generators take."""


class Settings(BaseModel):
    """Base class of every section of a config: it is frozen, takes no unknown key and no infinite or NaN number."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class WeightedTermConfig(Settings):
    """Base class of a loss term that its `weight` turns on.

    Setting options of a term without its `weight` is an error, because the term would silently stay off.
    """

    weight: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _has_weight(self) -> WeightedTermConfig:
        if self.model_fields_set and "weight" not in self.model_fields_set:
            raise ValueError(
                "it has no weight, which leaves it off whatever its other options are; give it a weight, or 0 to turn it off"
            )
        return self


def read_settings(section: type[S], path: str | Path, overrides: list[str] | None = None) -> S:
    """Reads a YAML file into settings of any kind.

    Raises:
        UserError: missing file, not YAML, unknown key, wrong type or range.
    """
    return parse(section, read_mapping(path, overrides), where=Path(path).name)


def read_mapping(path: str | Path, overrides: list[str] | None) -> dict[str, Any]:
    """Returns the mapping in a YAML file, with `a.b=value` overrides applied.

    Raises:
        UserError: as `read_yaml`, and for a file without a mapping or a malformed override.
    """
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise UserError(
            f"{str(path)!r} is not valid as a config, because its top level is not a mapping of keys to values: start from one of "
            "the files in configs/"
        )
    for override in overrides or []:
        _apply_override(data, override)
    return data


def parse(section: type[S], data: Any, where: str) -> S:
    """Validates settings, and turns pydantic's report into one sentence about the first error. Raises UserError."""
    try:
        return section.model_validate(data)
    except ValidationError as error:
        raise UserError(_error_message(section, error, where)) from None


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not all(key.split(".")):
        raise UserError(
            f"the override {override!r} is not of the form section.key=value: write, say, training.max_steps=100"
        )
    *parents, last = key.split(".")
    node = data
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"the override {override!r} goes through {parent!r}, which is not a section: check the key")
    node[last] = parse_yaml(value, f"the value in the override {override!r}")


def unknown_key_message(where: str, path: Sequence[int | str], known: Sequence[str]) -> str:
    """Returns the sentence about an unknown key, with the nearest of the `known` keys of its section."""
    near = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}" if near else f"valid keys there are {', '.join(map(repr, known))}"
    return f"{where} has the unknown key {'.'.join(map(str, path))!r}: {hint}"


def _error_message(section: type[Settings], error: ValidationError, where: str) -> str:
    # an unknown key comes first: a misspelt key also makes pydantic report the required one as missing
    first = next((item for item in error.errors() if item["type"] == "extra_forbidden"), error.errors()[0])
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return unknown_key_message(where, first["loc"], _keys_at(section, first["loc"][:-1]))
    if first["type"] == "missing":
        return f"{where} lacks the key {path!r}: add it"
    if not path:  # a check of several keys together
        return f"{where} contradicts itself: {first['msg'].removeprefix('Value error, ')}, so change one of the two"
    said = first["msg"].removeprefix("Value error, ")
    value = json.dumps(first["input"], default=str)
    if len(value) > MAX_QUOTED:
        value = value[:MAX_QUOTED] + " ..."
    return f"{where} has {path!r} = {value}, but {said[0].lower()}{said[1:]}: change it"


def _keys_at(section: type[Settings], loc: Sequence[int | str]) -> list[str]:
    for part in loc:
        if isinstance(part, int):  # an element of a list
            continue
        inner = nested_section(section.model_fields[part].annotation) if part in section.model_fields else None
        if inner is None:
            return []
        section = inner
    return list(section.model_fields)


def nested_section(annotation: Any) -> type[Settings] | None:
    """Returns the section class of an option: its type, or the one in its union or list; None for plain values."""
    for kind in (annotation, *get_args(annotation)):
        if get_origin(kind) is None and isinstance(kind, type) and issubclass(kind, Settings):
            return kind
    return None
