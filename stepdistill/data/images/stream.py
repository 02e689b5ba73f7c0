"""Data sets of the `datasets` library that are read as they come, without having all of them on this disk.

A stream is divided into lanes, each with file shards of its own. Global sample number g is position g // lanes of lane
g % lanes, whatever the processes and threads, and a process opens only the lanes that its numbers touch. Lanes are 8, or
4, 2, 1 where the data set has fewer file shards than that: then 1, 2, 4 or 8 processes with batches of a power of two
share them without reading a file twice, and any other layout reads the same samples at the cost of reading files twice.
A lane that comes to its end begins anew, so that files of about the same length show every image equally often.

Each lane passes over its files in an order drawn for every epoch and shuffles rows within blocks of 32, so that what is
read is a function of (seed, sample number) and no shuffle buffer has to be saved. A data set that is sorted by content
should be written shuffled.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from stepdistill.data.hub import open_image_cell
from stepdistill.data.images.datasets_library import select_undecoded_columns
from stepdistill.data.images.source import (
    UNREADABLE,
    CropTransform,
    ImageItem,
    UnreadableImages,
    decode,
    draw_transform_numbers,
    pick_caption,
)
from stepdistill.diffusion.draws import generator
from stepdistill.errors import UserError

if TYPE_CHECKING:
    from datasets import IterableDataset

SHARD_GROUP_COUNTS = (8, 4, 2, 1)
SHUFFLE_BLOCK = 32
"""Rows that are shuffled among themselves; two such blocks of encoded images are kept in memory for each lane."""
MIN_IMAGES_FOR_SHARE = 100
"""Images that the share of unreadable ones is at least reckoned of: one broken file at the start is no verdict."""


@dataclass(frozen=True)
class StreamRow:
    """A row of a stream: the file shard it came from, its number in there, and its cells."""

    file: int
    number: int
    cells: dict[str, Any]


class ImageStream:
    """The images of a streamed data set; positions are global sample numbers and never end.

    An unreadable image is replaced by the next readable one of its lane. The share of unreadable images is that of those
    asked for so far, of which there are taken to be 100 at least.

    Resuming reads what its lanes have consumed of the current epoch once more, without decoding it.

    Args:
        dataset: a stream with one file shard or more.
        source: its name, for messages.
        framing: how images are cut to size.
        seed: of the order.
        image_column, caption_column, max_bad_share: as for `HubImages`.

    Raises:
        UserError: no such column; when reading, too many unreadable images, a lane without rows.
    """

    def __init__(
        self,
        dataset: IterableDataset,
        source: str,
        crop_transform: CropTransform,
        seed: int,
        *,
        image_column: str = "image",
        caption_column: str | None = None,
        max_bad_share: float = 0.05,
    ) -> None:
        self.source, self.crop_transform = source, crop_transform
        dataset, self._caption = select_undecoded_columns(dataset, source, image_column, caption_column)
        self._image = image_column
        shard_groups = next(number for number in SHARD_GROUP_COUNTS if number <= max(1, dataset.num_shards))
        self.shard_groups = tuple(
            ShardGroup(dataset, shard_group, shard_groups, seed) for shard_group in range(shard_groups)
        )
        self._unreadable = UnreadableImages(source, max_bad_share)
        self._requested = 0

    @property
    def count(self) -> None:
        """Unknown: streams say nothing of their length."""
        return None

    @property
    def unreadable_names(self) -> tuple[str, ...]:
        """Names of the unreadable images found so far."""
        return self._unreadable.names

    def read(self, index: int, draws: torch.Generator) -> ImageItem:
        """Item of a global sample number, cropped and flipped by `draws`, of which always three numbers are taken.

        Raises:
            UserError: more images than `max_bad_share` allows have turned out unreadable, or a lane has no readable one.
        """
        place, number = divmod(index, len(self.shard_groups))
        shard_group = self.shard_groups[number]
        numbers = draw_transform_numbers(draws)
        self._requested += 1
        for step in count():
            if shard_group.length is not None and step >= shard_group.length:
                break
            row = shard_group.row(place + step)
            loaded = self._load(number, row)
            self._unreadable.raise_if_too_many(max(MIN_IMAGES_FOR_SHARE, self._requested))
            if loaded is not None:
                caption, picture = loaded
                image, crop = self.crop_transform.apply(picture, numbers)
                return ImageItem(image, caption, crop, _name(row), index + step * len(self.shard_groups))
        raise UserError(f"lane {number} of {self.source!r} holds no readable image: replace its files")

    def _load(self, shard_group: int, row: StreamRow) -> tuple[str, Image.Image] | None:
        key = (shard_group, row.file, row.number)
        if key in self._unreadable:
            return None
        try:
            caption = "" if self._caption is None else pick_caption(row.cells, (self._caption,))
            picture = decode(open_image_cell(row.cells[self._image], self.source))
            self.crop_transform.check_enlargement(picture)
            return caption, picture
        except UNREADABLE as error:
            self._unreadable.add(key, _name(row), error)
            return None


class ShardGroup:
    """Every `lanes`-th file shard of a stream from number `lane` on, as an endless list of rows.

    Asking for positions in order, or nearly so, reads on; any other position is found by reading up to it, where files
    whose length is known by then are passed over. Threads take turns.
    """

    def __init__(self, dataset: IterableDataset, shard_group: int, shard_groups: int, seed: int) -> None:
        self.dataset, self.shard_group, self.shard_groups, self.seed = dataset, shard_group, shard_groups, seed
        self.files = range(shard_group, max(1, dataset.num_shards), shard_groups)
        self._lengths: dict[int, int] = {}
        # (epoch, block) -> its rows, shuffled; the newest two, since threads and replacements look a little around
        self._blocks: dict[tuple[int, int], list[StreamRow]] = {}
        self._reader: tuple[tuple[int, int], Iterator[StreamRow]] | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[object, ...]:
        # readers and locks stay in their process: what a lane yields does not depend on them
        return ShardGroup, (self.dataset, self.shard_group, self.shard_groups, self.seed)

    @property
    def length(self) -> int | None:
        """Rows of an epoch; None before the first one was read to its end."""
        return sum(self._lengths.values()) if len(self._lengths) == len(self.files) else None

    def row(self, position: int) -> StreamRow:
        """The row at a position of the lane, counted over all epochs.

        Raises:
            UserError: the lane has no rows, or a file of it changed.
        """
        with self._lock:
            while True:
                length = self.length
                if length == 0:
                    raise UserError(
                        f"file shard {self.shard_group} of the stream and every {self.shard_groups}th after it hold no rows: "
                        "leave empty files out, or write fewer and larger ones"
                    )
                # as long as the length is unknown, no row beyond the first epoch has been read
                epoch, offset = (0, position) if length is None else divmod(position, length)
                block = self._block(epoch, offset // SHUFFLE_BLOCK)
                if offset % SHUFFLE_BLOCK < len(block):
                    return block[offset % SHUFFLE_BLOCK]
                # the position lies beyond the first epoch, whose length is known from here on

    def _block(self, epoch: int, number: int) -> list[StreamRow]:
        key = (epoch, number)
        if key not in self._blocks:
            if self._reader is None or self._reader[0] != key:
                self._reader = (key, self._rows(epoch, number * SHUFFLE_BLOCK))
            reader, self._reader = self._reader[1], None
            # an error of the stream leaves no reader behind: the next call starts anew instead of taking it for the end
            rows = list(islice(reader, SHUFFLE_BLOCK))
            self._reader = ((epoch, number + 1), reader)
            order = torch.randperm(len(rows), generator=generator(self.seed, "rows", self.shard_group, epoch, number))
            self._blocks = dict([*self._blocks.items()][-1:])
            self._blocks[key] = [rows[index] for index in order]
        return self._blocks[key]

    def _rows(self, epoch: int, start: int) -> Iterator[StreamRow]:
        """The rows of an epoch from number `start` on; learns the length of every file that it reads to the end."""
        order = torch.randperm(len(self.files), generator=generator(self.seed, "files", self.shard_group, epoch))
        for file in (self.files[index] for index in order):
            known = self._lengths.get(file)
            if known is not None and start >= known:
                start -= known
                continue
            number = 0
            for number, cells in enumerate(self._file(file), start=1):
                if number > start:
                    yield StreamRow(file, number - 1, cells)
            if known is not None and number != known:
                raise UserError(
                    f"file shard {file} of the stream had {known} rows and now has {number}: leave its files as they are during a run"
                )
            self._lengths[file] = number
            start = max(0, start - number)

    def _file(self, file: int) -> IterableDataset:
        return self.dataset.shard(max(1, self.dataset.num_shards), file)


def _name(row: StreamRow) -> str:
    return f"row {row.number} of file shard {row.file}"
