"""YAML -> typed, validated settings. An unknown key is an error that names the nearest valid one."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from stepdistill.errors import UserError

S = TypeVar("S", bound="Settings")


def _validate_regex(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"it is not a regular expression ({error})") from None
    return pattern


RegularExpression = Annotated[str, AfterValidator(_validate_regex)]


class Settings(BaseModel):
    """Base of every configuration section: frozen, and no key that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class WeightedTermConfig(Settings):
    """Base of a term that a weight turns on: options without one are of a term that stays off, and nobody means that."""

    weight: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _require_weight(self) -> WeightedTermConfig:
        if self.model_fields_set and "weight" not in self.model_fields_set:
            raise ValueError(
                "it has no weight, which leaves it off whatever else it says; give it a weight, or 0 on purpose"
            )
        return self


def read_settings(section: type[S], path: str | Path, overrides: list[str] | None = None) -> S:
    """Read a YAML file into any kind of settings.

    Raises:
        UserError: missing file, not YAML, unknown key, wrong type or range.
    """
    return parse(section, read_mapping(path, overrides), where=Path(path).name)


def read_mapping(path: str | Path, overrides: list[str] | None) -> dict[str, Any]:
    """What a YAML file says, with `a.b=value` overrides. Raises UserError: missing, not YAML, no mapping, malformed override."""
    file = Path(path)
    if not file.is_file():
        raise UserError(
            f"there is no config file {str(file)!r}: give the path of a YAML file, such as configs/quickstart.yaml"
        )
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{str(file)!r} is not valid YAML ({' '.join(str(error).split())}): mend it") from None
    if not isinstance(data, dict):
        raise UserError(f"{str(file)!r} holds no mapping at its top level: start from one of the files in configs/")
    for override in overrides or []:
        _apply_override(data, override)
    return data


def parse(section: type[S], data: Any, where: str) -> S:
    """Validate; turns pydantic's report into one sentence about the first error."""
    try:
        return section.model_validate(data)
    except ValidationError as error:
        raise UserError(_error_message(section, error, where)) from None


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise UserError(
            f"the override {override!r} is not of the form section.key=value: write, say, training.max_steps=100"
        )
    *parents, last = key.split(".")
    node = data
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"the override {override!r} goes through {parent!r}, which is not a section: check the key")
    try:
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(
            f"the value in the override {override!r} is not valid YAML: close its brackets and quotes, as in "
            "'method.exit_odds=[4, 3, 2, 1]'"
        ) from None


def _error_message(section: type[Settings], error: ValidationError, where: str) -> str:
    # an unknown key is the likelier mistake, and explains a missing one
    first = next((item for item in error.errors() if item["type"] == "extra_forbidden"), error.errors()[0])
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _keys_at(section, first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}" if near else f"valid keys there are {', '.join(map(repr, known))}"
        return f"{where} has the unknown key {path!r}: {hint}"
    if first["type"] == "missing":
        return f"{where} lacks the key {path!r}: add it"
    if not path:  # a check of several keys together
        return f"{where} contradicts itself: {first['msg'].removeprefix('Value error, ')}, so change one of the two"
    said = first["msg"].removeprefix("Value error, ")
    return (
        f"{where} has {path!r} = {json.dumps(first['input'], default=str)}, but {said[0].lower()}{said[1:]}: change it"
    )


def _keys_at(section: type[Settings], loc: tuple[int | str, ...]) -> list[str]:
    for part in loc:
        if isinstance(part, int):  # an element of a list
            continue
        inner = nested_section(section.model_fields[part].annotation) if part in section.model_fields else None
        if inner is None:
            return []
        section = inner
    return list(section.model_fields)


def nested_section(annotation: Any) -> type[Settings] | None:
    """The section that an option holds, by itself, or null, or in a list; None for plain values."""
    for kind in (annotation, *get_args(annotation)):
        if get_origin(kind) is None and isinstance(kind, type) and issubclass(kind, Settings):
            return kind
    return None
