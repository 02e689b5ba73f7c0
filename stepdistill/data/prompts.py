"""Reads prompts from a file, a data set, or one of the lists in this package.

    read_prompts("builtin:general")
    read_prompts("captions.csv", column="caption")
    read_prompts("hf:photos", column="caption")

A list has the hash of its texts, by which caches and collected data identify it. This module imports no torch.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from stepdistill.data.hub import HUB_PREFIX, open_dataset
from stepdistill.errors import UserError

log = logging.getLogger(__name__)

BUILTIN_PREFIX = "builtin:"
PROMPT_COLUMNS = ("prompt", "text", "caption")
"""Columns that hold the prompt, in order of preference, where the config names none."""

Rows = list[tuple[int, object]]
"""(line or row number from 1, cell) for each row of a table."""


@dataclass(frozen=True)
class PromptList:
    """A list of prompts in the order of their source.

    Attributes:
        texts: the prompts, stripped, none of them empty.
        source: the path or `builtin:NAME` they were read from.
        sha256: hash of the texts only, so that the same prompts in another file format have the same hash.
    """

    texts: tuple[str, ...]
    source: str
    sha256: str

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> str:
        return self.texts[index]


def read_prompts(source: str | Path, column: str | None = None) -> PromptList:
    """Reads the prompts of a .txt, .jsonl, .csv or .parquet file, of `builtin:NAME`, or of `hf:NAME` or `hf:PATH`, split train.

    Every non-empty line of a .txt file is a prompt. Rows of a table with an empty prompt are left out, and counted in a
    warning. `column` is for tables only; by default it is the first of `prompt`, `text` and `caption` that exists.

    Raises:
        UserError: no such file or list, an unknown format, not UTF-8, a malformed row, no such column, no prompt at all.
    """
    name = str(source)
    check_prompt_source(source)
    if name.startswith(BUILTIN_PREFIX):
        cells: Sequence[object] = _lines(_builtin(name.removeprefix(BUILTIN_PREFIX)))
    elif name.startswith(HUB_PREFIX):
        cells = _data_set(name, column)
    else:
        cells = _read_file(Path(source), column)
    texts = tuple(text for cell in cells if (text := str(cell).strip()))
    if not texts:
        raise UserError(f"{name!r} holds no prompt: write at least one, or use '{BUILTIN_PREFIX}general'")
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    return PromptList(texts, name, digest)


def builtin_prompt_lists() -> tuple[str, ...]:
    """Returns the names of the lists in this package, sorted."""
    files = resources.files("stepdistill").joinpath("assets", "prompts").iterdir()
    return tuple(sorted(file.name.removesuffix(".txt") for file in files if file.name.endswith(".txt")))


def check_prompt_source(source: str | Path) -> None:
    """Checks that a prompt list exists and has a known format, without reading it. Data sets (`hf:`) are not looked up.

    Raises:
        UserError: no such file or list, or an unknown format.
    """
    name = str(source)
    if name.startswith(BUILTIN_PREFIX):
        known = builtin_prompt_lists()
        if name.removeprefix(BUILTIN_PREFIX) not in known:
            hint = ", ".join(repr(BUILTIN_PREFIX + near) for near in _nearest(name.removeprefix(BUILTIN_PREFIX), known))
            raise UserError(f"there is no shipped prompt list {name.removeprefix(BUILTIN_PREFIX)!r}: use {hint}")
    elif not name.startswith(HUB_PREFIX):
        _check_file(Path(source))


def _check_file(path: Path) -> None:
    if path.suffix.lower() not in (".txt", ".jsonl", ".csv", ".parquet"):
        raise UserError(
            f"{str(path)!r} is not a prompt file: use .txt, .jsonl, .csv or .parquet, or '{BUILTIN_PREFIX}general'"
        )
    if not path.is_file():
        near = [] if not path.parent.is_dir() else [file.name for file in path.parent.iterdir() if file.is_file()]
        close = difflib.get_close_matches(path.name, near, n=1)
        hint = f", or did you mean {close[0]!r}" if close else ""
        raise UserError(f"there is no prompt file {str(path)!r}: check the path{hint}")


def _builtin(name: str) -> str:
    return resources.files("stepdistill").joinpath("assets", "prompts", f"{name}.txt").read_text(encoding="utf-8")


def _read_file(path: Path, column: str | None) -> Sequence[object]:
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return _lines(_read_utf8(path))
    read = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}[suffix]
    return _prompts_of(read(path, column), path)


def _data_set(name: str, column: str | None) -> Sequence[object]:
    dataset = open_dataset(name.removeprefix(HUB_PREFIX), "train", streaming=False)
    key = _column(dataset.column_names, column, repr(name))
    return _prompts_of(list(enumerate(dataset.select_columns([key])[key])), name)


def _prompts_of(rows: Rows, path: str | Path) -> list[str]:
    texts = []
    for number, cell in rows:
        if cell is not None and not isinstance(cell, str):
            kind = type(cell).__name__
            raise UserError(f"row {number} of {str(path)!r} holds a prompt of type {kind}: make it a text")
        if cell is not None and cell.strip():
            texts.append(cell)
    if len(texts) < len(rows):
        log.warning("left out %d of %d rows of %s, whose prompt is empty", len(rows) - len(texts), len(rows), path)
    return texts


def _read_utf8(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{str(path)!r} is not UTF-8 (byte {error.start}): save it again in UTF-8") from None


def _lines(text: str) -> list[str]:
    # str.splitlines would also cut a prompt at form feeds and Unicode line separators
    return re.split(r"\r\n|\n|\r", text)


def _jsonl(path: Path, column: str | None) -> Rows:
    rows: Rows = []
    for number, row in read_jsonl(path):
        key = _column(list(row), column, f"line {number} of {str(path)!r}")
        rows.append((number, row[key]))
    return rows


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Yields (line number from 1, object) for every non-empty line.

    Raises:
        UserError: not UTF-8, or a line that is not a JSON object.
    """
    for number, line in enumerate(_lines(_read_utf8(path)), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise UserError(f"line {number} of {str(path)!r} is not a JSON object: write one object on each line")
        yield number, row


def _csv(path: Path, column: str | None) -> Rows:
    reader = csv.DictReader(io.StringIO(_read_utf8(path), newline=""), strict=True)
    rows: Rows = []
    try:
        names = list(reader.fieldnames or [])
        key = _column(names, column, repr(str(path))) if names else ""
        for row in reader:
            # otherwise an unquoted comma would silently shorten the prompt
            if None in row:
                raise UserError(
                    f"line {reader.line_num} of {str(path)!r} has more cells than its header has columns: "
                    "put prompts with a comma in double quotes"
                )
            rows.append((reader.line_num, row[key]))
    except csv.Error as error:
        line = reader.reader.line_num
        raise UserError(f"line {line} of {str(path)!r} is malformed CSV ({error}): correct its quotes") from None
    return rows


def _parquet(path: Path, column: str | None) -> Rows:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"reading {str(path)!r} needs pyarrow, which is missing: install it with pip install 'stepdistill[data]'"
        ) from None
    try:
        with parquet.ParquetFile(path) as table:
            key = _column(table.schema_arrow.names, column, repr(str(path)))
            cells = table.read(columns=[key]).column(key).to_pylist()
    except (arrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{str(path)!r} is not a readable parquet file ({reason}): write it again") from None
    return list(enumerate(cells, start=1))


def _column(names: Sequence[str], wanted: str | None, where: str) -> str:
    found = ", ".join(map(repr, names)) or "none"
    if wanted is None:
        for name in PROMPT_COLUMNS:
            if name in names:
                return name
        raise UserError(f"{where} has no column 'prompt', 'text' or 'caption': name one of its columns ({found})")
    if wanted in names:
        return wanted
    near = f"use {_nearest(wanted, names)[0]!r}, the nearest of its columns" if names else "add it to its columns"
    raise UserError(f"{where} has no column {wanted!r}: {near} ({found})")


def _nearest(name: str, known: Sequence[str]) -> list[str]:
    """Returns up to three of `known`, the most similar first."""
    ranked = sorted(known, key=lambda item: -difflib.SequenceMatcher(None, name.lower(), item.lower()).ratio())
    return ranked[:3]
