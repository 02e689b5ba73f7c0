"""Opens data sets of the `datasets` library: from the hub, from its cache, or from a folder on this machine.

    dataset = open_dataset("photos", split="train", streaming=False)

This module imports no torch, so that prompts can be read from a data set without it.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from stepdistill.config.registry import suggestion_for
from stepdistill.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

HUB_PREFIX = "hf:"
SAVED_SHARDS = 8
"""Number of parts in which a data set made by `save_to_disk` is streamed, because it has no file shards of its own."""


def open_dataset(name: str, split: str, *, streaming: bool) -> Dataset | IterableDataset:
    """Opens a data set of the hub by its name, or a local one by its path: made by `save_to_disk`, or a folder of files.

    Args:
        name: without the prefix `hf:`.
        split: such as `train`; a folder made by `save_to_disk` may have none.
        streaming: whether to return an `IterableDataset`, which reads its files on demand, instead of a `Dataset`, which is
            downloaded as a whole.

    Raises:
        UserError: `datasets` is missing, or finds no such data set, split or file.
    """
    try:
        import datasets
        from pyarrow import ArrowException
    except ImportError:
        raise UserError(
            f"reading {HUB_PREFIX + name!r} needs the package datasets, which is missing: install it with "
            "pip install 'stepdistill[data]'"
        ) from None
    try:
        if not _is_saved(Path(name)):
            return datasets.load_dataset(name, split=split, streaming=streaming)
        found = datasets.load_from_disk(name)
    except (OSError, ValueError, LookupError, RuntimeError, datasets.exceptions.DatasetsError, ArrowException) as error:
        # the library's messages may have several sentences; an error of this package has one
        reason = re.sub(r"[.!?] +(?=[A-Z])", ", ", " ".join(str(error).split())).rstrip(".")
        raise UserError(
            f"the data set {HUB_PREFIX + name!r} cannot be opened ({reason}): check its name and split"
        ) from None
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise UserError(
                f"the data set {HUB_PREFIX + name!r} has no split {split!r}: {suggestion_for(split, tuple(found))}"
            )
        found = found[split]
    return found.to_iterable_dataset(num_shards=max(1, min(SAVED_SHARDS, len(found)))) if streaming else found


def _is_saved(folder: Path) -> bool:
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def open_image_cell(cell: object, source: str) -> BinaryIO:
    """Opens the image file in a cell of a data set.

    A cell holds bytes, or what `datasets.Image(decode=False)` yields: bytes or a path. The rows of a data set may come from
    anybody, so a path is opened only where it is a regular file below the data set's own folder, in the download cache, or in the
    data set's repository on the hub.

    Args:
        cell: the value in the image column.
        source: the data set, as `hf:NAME` or `hf:PATH`.

    Raises:
        TypeError: the cell holds no image.
        OSError: the file is missing, or lies elsewhere.
    """
    if isinstance(cell, dict):
        path = cell.get("path")
        cell = cell.get("bytes")
        if cell is None and isinstance(path, str):
            return _open(path, source.removeprefix(HUB_PREFIX))
    if not isinstance(cell, bytes):
        raise TypeError(f"a cell of type {type(cell).__name__} instead of an image")
    return io.BytesIO(cell)


def _open(path: str, name: str) -> BinaryIO:
    # "zip://a.png::/data/photos.zip" is a file in an archive, as streamed archives of images have it
    *members, base = path.split("::")
    of_hub = base.startswith(f"hf://datasets/{name}@") or base.startswith(f"hf://datasets/{name}/")
    inside = all(member.startswith(("zip://", "tar://")) for member in members)
    if not inside or not (of_hub or _is_below(Path(base), _folders(name))):
        raise OSError(f"its path {path!r} lies outside of the data set, so it is not opened")
    if not members and not of_hub:
        return Path(base).open("rb")
    import fsspec

    # read as a whole: an archive closes with the object that opened it
    with fsspec.open(path, "rb") as file:
        return io.BytesIO(file.read())


def _folders(name: str) -> list[Path]:
    """Returns the folders whose files a data set may name: its own, and those that `datasets` downloads to."""
    import datasets
    from huggingface_hub import constants

    config = datasets.config
    caches = [config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, config.EXTRACTED_DATASETS_PATH]
    return [Path(name), *map(Path, caches), Path(constants.HF_HUB_CACHE)]


def _is_below(path: Path, folders: list[Path]) -> bool:
    # a FIFO or a device would block the reader, so it must be a regular file
    whole = path.resolve()
    return whole.is_file() and any(whole.is_relative_to(folder.resolve()) for folder in folders)
