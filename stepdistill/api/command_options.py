"""Generates the options of a command from the fields of settings, so that they are written once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from stepdistill.api.evaluation_options import flag_of
from stepdistill.config.reading import Settings

Command = Callable[..., None]


def with_options(*sections: type[Settings]) -> Callable[[Command], Command]:
    """Decorates a command that takes `**options`: adds one option for each field of the sections.

    An option that was not typed arrives as None. The fields check the values, so that each error is one sentence.
    """

    def decorate(command: Command) -> Command:
        own = inspect.signature(command, eval_str=True)
        parameters = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        fields = {name: field for section in sections for name, field in section.model_fields.items()}
        parameters += [_parameter(name, field) for name, field in fields.items() if name not in own.parameters]
        command.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    kind, choices = _type_of(field.annotation)
    option = typer.Option(
        *((f"{flag_of(name)}/--no-{flag_of(name)[2:]}",) if kind is bool else (flag_of(name),)),
        help=_help(field),
        metavar="|".join(choices) or None,
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _type_of(annotation: Any) -> tuple[type, list[str]]:
    """Returns the type of the typed text, and its choices; lists are typed with commas."""
    members = [item for item in get_args(annotation) or (annotation,) if item is not type(None)]
    if get_origin(annotation) is tuple:
        return str, []
    first = members[0]
    if get_origin(first) is Literal:
        return str, [str(choice) for choice in get_args(first)]
    return (first if first in (int, float, bool) else str), []


def _help(field: FieldInfo) -> str:
    text = field.description or ""
    if field.default in (None, ()):
        return text
    shown = ",".join(field.default) if isinstance(field.default, tuple) else field.default
    shown = {True: "yes", False: "no"}[shown] if isinstance(shown, bool) else shown
    return f"{text} [default: {shown}]"
