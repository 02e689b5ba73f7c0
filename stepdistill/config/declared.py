"""Finds a misspelt option of a method from the source code of its classes, without importing them.

The `Config` class of a method validates its options, but importing it imports PyTorch and takes seconds. For the commonest mistake,
an unknown key, the names of the options are enough. They are read here with `ast`, so they are written down only once.
Whatever this module does not understand is left to the complete validation.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from stepdistill.config.reading import unknown_key_message
from stepdistill.config.registry import METHODS
from stepdistill.errors import UserError

PACKAGE = Path(__file__).parents[1]


def check_option_names(method: str, options: Mapping[str, Any]) -> None:
    """Raises UserError for an option that the method does not have; does nothing for methods of other packages."""
    if method not in METHODS:
        return
    module, _, name = METHODS[method].partition(":")
    section = config_source(ClassSource(module, name))
    if section is not None:
        _check(section, options, ())


def _check(section: ClassSource, options: Mapping[str, Any], path: tuple[int | str, ...]) -> None:
    fields = section.fields()
    if fields is None:
        return
    for key, value in options.items():
        if key in fields:
            inside = fields[key]
            values = value if isinstance(value, list) else [value]
            for index, one in enumerate(values):
                if inside is not None and isinstance(one, dict):
                    _check(inside, one, (*path, key, *((index,) if isinstance(value, list) else ())))
        elif not section.mentions(key):  # a renamed option may be read by a validator or be an alias
            raise UserError(unknown_key_message("method", (*path, key), list(fields)))


@dataclass(frozen=True)
class ClassSource:
    """A class, by the module and the name under which it is defined."""

    module: str
    name: str

    @property
    def definition(self) -> ast.ClassDef | None:
        """Its syntax tree; None where it is not defined at the top level of its module."""
        found = _read(self.module)
        return None if found is None else found.classes.get(self.name)

    def bases(self) -> list[ClassSource]:
        """The base classes that are defined in this package."""
        definition = self.definition
        found = [] if definition is None else [_resolve(self.module, base) for base in definition.bases]
        return [base for base in found if base is not None and base.definition is not None]

    def family(self) -> Iterator[ClassSource]:
        """Itself and all its bases, bases first."""
        for base in self.bases():
            yield from base.family()
        yield self

    def fields(self) -> dict[str, ClassSource | None] | None:
        """Option name -> the class of its section, or None for a plain value; None where this is no settings class."""
        found: dict[str, ClassSource | None] = {}
        family = list(self.family())
        if not any(one.name == "Settings" for one in family):
            return None
        for one in family:
            for statement in one.definition.body if one.definition is not None else ():
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                    found[statement.target.id] = _cache_section(one.module, statement.annotation)
        return found

    def mentions(self, text: str) -> bool:
        """Whether the text occurs as a string in the module of the class or of one of its bases."""
        return any(text in module.strings for one in self.family() if (module := _read(one.module)) is not None)


@dataclass(frozen=True)
class _Module:
    classes: Mapping[str, ast.ClassDef]
    imports: Mapping[str, tuple[str, str]]
    """Local name -> (module, name there)."""
    strings: frozenset[str]


@lru_cache
def _read(module: str) -> _Module | None:
    file = PACKAGE.joinpath(*module.split(".")[1:])
    file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    if not module.startswith("stepdistill") or not file.is_file():
        return None
    tree = ast.parse(file.read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    imports = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module is not None
        for alias in node.names
    }
    constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return _Module(classes, imports, frozenset(value for value in constants if isinstance(value, str)))


def _resolve(module: str, expression: ast.expr) -> ClassSource | None:
    """Returns the class that an expression such as `GanConfig`, `parts.LevelConfig` or `Method[DMDConfig]` names."""
    found = _read(module)
    if isinstance(expression, ast.Subscript):
        return _resolve(module, expression.value)
    if found is None:
        return None
    if isinstance(expression, ast.Attribute) and isinstance(expression.value, ast.Name):
        package, name = found.imports.get(expression.value.id, ("", ""))
        return ClassSource(f"{package}.{name}", expression.attr) if package else None
    if isinstance(expression, ast.Name):
        if expression.id in found.classes:
            return ClassSource(module, expression.id)
        target = found.imports.get(expression.id)
        return None if target is None else ClassSource(*target)
    return None


def _cache_section(module: str, annotation: ast.expr) -> ClassSource | None:
    """Returns the settings class in an annotation such as `RewardConfig | None` or `list[Stage]`."""
    candidates: Sequence[ast.AST] = list(ast.walk(annotation))
    for node in candidates:
        if isinstance(node, ast.Name | ast.Attribute):
            found = _resolve(module, node)
            if found is not None and found.definition is not None and found.fields() is not None:
                return found
    return None


def config_source(method: ClassSource) -> ClassSource | None:
    """Returns the settings class that a method class, or its nearest base, assigns to `Config`."""
    for one in reversed(list(method.family())):
        for statement in one.definition.body if one.definition is not None else ():
            if isinstance(statement, ast.Assign) and any(
                isinstance(target, ast.Name) and target.id == "Config" for target in statement.targets
            ):
                return _resolve(one.module, statement.value)
    return None
