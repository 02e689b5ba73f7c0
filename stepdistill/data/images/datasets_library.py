"""Images in data sets of the `datasets` library that are completely on this machine.

    images = HubImages(open_dataset("photos", split="train", streaming=False), "hf:photos", CropTransform((1024, 1024)))

Images are decoded by this package and not by `datasets`, so that a broken one is counted and replaced as in a folder.
`data/images/stream.py` reads data sets that are streamed.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from stepdistill.config.registry import suggestion_for
from stepdistill.data.hub import open_image_cell
from stepdistill.data.images.indexed import IndexedImages
from stepdistill.data.images.source import CAPTION_KEYS, CropTransform, pick_caption
from stepdistill.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

log = logging.getLogger(__name__)
D = TypeVar("D", "Dataset", "IterableDataset")


def select_undecoded_columns(
    dataset: D, source: str, image_column: str = "image", caption_column: str | None = None
) -> tuple[D, str | None]:
    """Returns the data set with its image and caption columns only, images not decoded, and the name of the caption column or None.

    Raises:
        UserError: no such column, or one that holds no images.
    """
    import datasets

    features = dataset.features
    if features is None:  # a data set made by a generator: its columns are known only once its rows are read
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
        log.warning("%s has no column 'text', 'caption' or 'prompt': its images are used with the empty prompt", source)
    return dataset.select_columns([image_column] + ([] if caption is None else [caption])), caption


class HubImages(IndexedImages):
    """The images in the rows of a local data set, in its order.

    Rows are read from memory-mapped, immutable tables, which threads may share.

    Args:
        dataset: the data set, with its images decoded or not.
        source: its name, for messages.
        crop_transform, max_bad_share: see `IndexedImages`.
        image_column: column of the images.
        caption_column: column of the captions; by default the first of `text`, `caption` and `prompt` that exists, or none.

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
        # kept apart, so that reading a caption does not read the bytes of its image
        self._captions = dataset.select_columns([self._caption]) if self._caption is not None else None

    def __len__(self) -> int:
        return len(self._images)

    def name_of(self, index: int) -> str:
        return f"row {index}"

    def open(self, index: int) -> BinaryIO:
        return open_image_cell(self._images[index][self._image], self.source)

    def caption_of(self, index: int) -> str:
        if self._captions is None or self._caption is None:
            return ""
        return pick_caption(self._captions[index], (self._caption,))
