"""Reads YAML that may come from somebody else: duplicate keys are errors, and the size after expanding aliases is bounded."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from stepdistill.errors import UserError

MAX_BYTES = 4_000_000
"""Largest YAML file that is read. Configs of this package have about 2,000 bytes."""
MAX_VALUES = 100_000
"""Most values that a file may hold, where each use of an alias counts as a copy of what it names."""
OTHER_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".npz", ".png", ".jpg", ".zip")


def read_yaml(path: str | Path) -> Any:
    """Returns the value in a YAML file.

    Raises:
        UserError: no such file, a file of another kind, not UTF-8, not YAML, a duplicate key, or too many values.
    """
    file = Path(path)
    if file.suffix.lower() in OTHER_FILES:
        raise UserError(
            f"{str(file)!r} is not a YAML file, and a config is wanted here: give a config such as configs/quickstart.yaml, and "
            f"name a model in it as model.path (or with --set model.path={file})"
        )
    if file.is_dir():
        raise UserError(
            f"{str(file)!r} is a folder, and a config file is wanted: give a YAML file, such as {file / 'config.yaml'}"
        )
    if not file.is_file():
        raise UserError(
            f"there is no config file {str(file)!r}: give the path of a YAML file, such as configs/quickstart.yaml"
        )
    try:
        if file.stat().st_size > MAX_BYTES:
            raise UserError(f"{str(file)!r} has more than {MAX_BYTES:,} bytes, which no config needs: give a YAML file")
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{str(file)!r} is not valid YAML (byte {error.start} is not UTF-8): give a text file"
        ) from None
    except OSError as error:
        raise UserError(f"{str(file)!r} cannot be read ({error.strerror}): check its permissions") from None
    return parse_yaml(text, repr(str(file)))


def parse_yaml(text: str, where: str) -> Any:
    """Returns the value of a YAML text.

    Args:
        text: the YAML.
        where: what the text is, as the subject of an error message.

    Raises:
        UserError: not YAML, a duplicate key, an alias that contains itself, or more than `MAX_VALUES` values.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        # dates such as 2024-13-45 and integers of thousands of digits are ValueErrors
        raise UserError(
            f"{where} is not valid YAML ({' '.join(str(error).split())}): correct that line, or quote the value"
        ) from None
    except RecursionError:
        raise UserError(f"{where} is nested too deeply: write a config with fewer levels") from None


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with the two checks of this module."""

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _count_values(node, {})
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            # merge keys (<<) may repeat what the mapping overrides, but no key may be written twice
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.YAMLError(f"the key {key.value!r} is written twice, line {key.start_mark.line + 1}")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _count_values(node: yaml.Node, counts: dict[int, int]) -> int:
    """Returns the number of values below a node, with aliases expanded. Raises yaml.YAMLError over `MAX_VALUES`."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in counts:
        if counts[id(node)] == 0:  # still being counted, so it lies within itself
            raise yaml.YAMLError(f"an alias contains itself, line {node.start_mark.line + 1}")
        return counts[id(node)]
    counts[id(node)] = 0
    children = (
        [child for pair in node.value for child in pair] if isinstance(node, yaml.MappingNode) else list(node.value)
    )
    total = 1 + sum(_count_values(child, counts) for child in children)
    if total > MAX_VALUES:
        raise yaml.YAMLError(f"its aliases expand to more than {MAX_VALUES:,} values")
    counts[id(node)] = total
    return total
