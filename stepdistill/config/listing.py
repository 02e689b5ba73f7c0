"""What a config may say, as YAML that can be copied: every option with its default, range and meaning, from the class that checks it."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from stepdistill.config.reading import Settings, nested_section


def option_lines(section: type[Settings], defaults: BaseModel | None = None, indent: str = "") -> Iterator[str]:
    """A line for each option of a section, those of sections within it below it; commented out where it is off by default, or a list.

    defaults: values to show in place of the class's own.
    """
    for name, field in section.model_fields.items():
        value = field.get_default(call_default_factory=True) if defaults is None else dict(defaults)[name]
        within, said = nested_section(field.annotation), f"; {field.description}" if field.description else ""
        if within is None or isinstance(value, list):
            yield f"{indent}{name}: {_value(field, value, defaults)}  # {_meaning(field)}"
            if within is not None:
                yield from option_lines(within, None, indent + "#   ")
        elif isinstance(value, BaseModel):
            yield f"{indent}{name}:" + said.replace("; ", "  # ", 1)
            yield from option_lines(within, value, indent + "  ")
        elif field.is_required() and defaults is None:
            yield f"{indent}{name}:  # required{said}"
            yield from option_lines(within, None, indent + "  ")
        else:
            yield f"{indent}{name}: null  # or a section{said}"
            yield from option_lines(within, None, indent + "#   ")


def _value(field: FieldInfo, value: Any, defaults: BaseModel | None) -> str:
    if field.is_required() and defaults is None:
        return ""
    if isinstance(value, list):
        value = [v.model_dump(mode="json", exclude_defaults=True) if isinstance(v, BaseModel) else v for v in value]
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


def _meaning(field: FieldInfo) -> str:
    said = " ".join([annotation_text(field.annotation), *_bounds(field.metadata)]) + (
        ", required" if field.is_required() else ""
    )
    return f"{said}; {field.description}" if field.description else said


def _bounds(constraints: Iterable[object]) -> Iterator[str]:
    for constraint in constraints:
        match constraint:
            case Ge(ge=low):
                yield f">= {low}"
            case Gt(gt=low):
                yield f"> {low}"
            case Le(le=high):
                yield f"<= {high}"
            case Lt(lt=high):
                yield f"< {high}"
            case MinLen(min_length=count):
                yield f"of {count} at least"


def annotation_text(annotation: Any) -> str:
    """An annotation in a reader's words."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return annotation_text(inner[0])
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin in (Union, types.UnionType):
        return " | ".join(annotation_text(one) for one in inner)
    if annotation in (None, type(None)):
        return "null"
    if origin is not None:
        return f"{origin.__name__}[{', '.join(annotation_text(one) for one in inner if one is not Ellipsis)}]"
    return str(annotation.__name__) if isinstance(annotation, type) else str(annotation)
