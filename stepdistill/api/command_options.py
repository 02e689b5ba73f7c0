"""Generates the options of a command from the fields of dataclasses, so that they are written once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import Field, fields
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from stepdistill.api.evaluation_options import MeasuringOptions, flag_of

Command = Callable[..., None]


def with_options(*sections: type[MeasuringOptions]) -> Callable[[Command], Command]:
    """Decorates a command that takes `**options`: adds one option for each field of the sections.

    An option that was not typed arrives as None. `parse_options` checks the values, so that each error is one sentence.
    """

    def decorate(command: Command) -> Command:
        own = inspect.signature(command, eval_str=True)
        parameters = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        named = {
            item.name: _parameter(item, get_type_hints(section)[item.name])
            for section in sections
            for item in fields(section)
        }
        parameters += named.values()
        command.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def _parameter(item: Field[Any], annotation: Any) -> inspect.Parameter:
    kind, choices = _type_of(annotation)
    flag = flag_of(item.name)
    made = typer.Option(
        f"{flag}/--no-{flag[2:]}" if kind is bool else flag, help=_help(item), metavar="|".join(choices) or None
    )
    return inspect.Parameter(
        item.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, made]
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


def _help(item: Field[Any]) -> str:
    text = str(item.metadata["help"])
    if item.default in (None, ()):
        return text
    shown = ",".join(item.default) if isinstance(item.default, tuple) else item.default
    shown = {True: "yes", False: "no"}[shown] if isinstance(shown, bool) else shown
    return f"{text} [default: {shown}]"
