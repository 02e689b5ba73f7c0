"""Data sets of the `datasets` library: from the hub, from its cache, or from a folder on this disk.

    dataset = open_dataset("photos", split="train", streaming=False)
    images = HubImages(dataset, "hf:photos", Framing((1024, 1024)))

Images are decoded by this package, not by `datasets`, so that a broken one is counted and replaced as in a folder.
`data/stream.py` reads data sets that are streamed.
"""

from __future__ import annotations

import io
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from stepdistill.config.registry import suggestion_for
from stepdistill.data.images.indexed import IndexedImages
from stepdistill.data.images.source import CAPTION_KEYS, CropTransform, pick_caption
from stepdistill.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

log = logging.getLogger(__name__)

HUB_PREFIX = "hf:"
D = TypeVar("D", "Dataset", "IterableDataset")


def open_dataset(name: str, split: str, *, streaming: bool) -> Dataset | IterableDataset:
    """A data set by its name on the hub, or by its path: made by `save_to_disk`, or a folder of parquet or image files.

    Args:
        name: without the prefix `hf:`.
        split: such as `train`; a folder made by `save_to_disk` may have none.
        streaming: an `IterableDataset`, which reads its files as it goes; otherwise a `Dataset`, all of it on this disk.

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
        # a refusal is one sentence, whatever the library made of it
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


SAVED_SHARDS = 8
"""Parts that a data set made by `save_to_disk` is streamed in; it has no file shards of its own to speak of."""


def _is_saved(folder: Path) -> bool:
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def select_undecoded_columns(
    dataset: D, source: str, image_column: str = "image", caption_column: str | None = None
) -> tuple[D, str | None]:
    """The image and caption columns alone, images as bytes; and the caption column, None where there is none.

    Raises:
        UserError: no such column, or one that holds no images.
    """
    import datasets

    features = dataset.features
    if features is None:  # made by a generator: its rows tell, one by one
        return dataset, caption_column
    for column in (image_column, caption_column):
        if column is not None and column not in features:
            raise UserError(
                f"the data set {source!r} has no column {column!r}: {suggestion_for(column, tuple(features))}"
            )
    held = features[image_column]
    if isinstance(held, datasets.Image):
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    elif not (isinstance(held, datasets.Value) and "binary" in held.dtype):
        raise UserError(
            f"the column {image_column!r} of {source!r} holds {held} and no images: name another as data.image_column"
        )
    caption = caption_column or next((key for key in CAPTION_KEYS if key in features), None)
    if caption is None:
        log.warning("%s has no column 'text', 'caption' or 'prompt': its images are taken for the empty prompt", source)
    return dataset.select_columns([image_column] + ([] if caption is None else [caption])), caption


def open_image_cell(cell: object) -> BinaryIO:
    """The image file in a cell: bytes, or what `Image(decode=False)` yields. Raises TypeError or OSError."""
    if isinstance(cell, dict):
        path = cell.get("path")
        cell = cell.get("bytes")
        if cell is None and isinstance(path, str):
            return _open(path)
    if not isinstance(cell, bytes):
        raise TypeError(f"a cell of type {type(cell).__name__} instead of an image")
    return io.BytesIO(cell)


def _open(path: str) -> BinaryIO:
    if "://" not in path:
        return Path(path).open("rb")
    import fsspec

    file: BinaryIO = fsspec.open(path, "rb").open()
    return file


class HubImages(IndexedImages):
    """The rows of a data set on this disk, in its order.

    Rows are read from memory-mapped, immutable tables, which threads may share.

    Args:
        dataset: with its images still encoded or not.
        source: its name, for messages.
        framing, max_bad_share: see `IndexedImages`.
        image_column: column of the images.
        caption_column: column of the captions; `text`, `caption` or `prompt` by default, no captions where it has none.

    Raises:
        UserError: no such column, or no row.
    """

    def __init__(
        self,
        dataset: Dataset,
        source: str,
        crop_transform: CropTransform,
        *,
        image_column: str = "image",
        caption_column: str | None = None,
        max_bad_share: float = 0.05,
    ) -> None:
        super().__init__(source, crop_transform, max_bad_share)
        dataset, self._caption = select_undecoded_columns(dataset, source, image_column, caption_column)
        if not len(dataset):
            raise UserError(f"the data set {source!r} has no rows: name one that holds images, or another split")
        self._image = image_column
        self._images = dataset.select_columns([image_column])
        # apart from the images, whose bytes a look at a caption need not read
        self._captions = dataset.select_columns([self._caption]) if self._caption is not None else None

    def __len__(self) -> int:
        return len(self._images)

    def name_of(self, index: int) -> str:
        return f"row {index}"

    def open(self, index: int) -> BinaryIO:
        return open_image_cell(self._images[index][self._image])

    def caption_of(self, index: int) -> str:
        if self._captions is None or self._caption is None:
            return ""
        return pick_caption(self._captions[index], (self._caption,))
