"""Images that are read by position, in any order: the base class for folders, tar shards and local data sets."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import BinaryIO, TypeVar

import torch
from PIL import Image
from tqdm import tqdm

from stepdistill.data.images.source import (
    UNREADABLE,
    CropTransform,
    ImageItem,
    UnreadableImages,
    decode,
    draw_transform_numbers,
    read_image_size,
)
from stepdistill.diffusion.draws import generator
from stepdistill.errors import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")


class IndexedImages(ABC):
    """An image source of known length. A subclass reads the bytes and captions of its images.

    No file stays open between two reads, so that threads share nothing and an instance can be pickled.

    Args:
        source: its name, for messages.
        crop_transform: resizes and crops the images.
        max_bad_share: largest accepted share of unreadable images; above it, reading raises an error.
    """

    def __init__(self, source: str, crop_transform: CropTransform, max_bad_share: float) -> None:
        self.source, self.crop_transform = source, crop_transform
        self._unreadable = UnreadableImages(source, max_bad_share)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name_of(self, index: int) -> str:
        """Name of an image within the source."""

    @abstractmethod
    def open(self, index: int) -> BinaryIO:
        """Opens the file of an image. Raises one of UNREADABLE, as does `caption_of`."""

    @abstractmethod
    def caption_of(self, index: int) -> str:
        """Returns the caption of an image, "" where it has none."""

    @property
    def count(self) -> int:
        """Number of images, readable or not."""
        return len(self)

    @property
    def unreadable_names(self) -> tuple[str, ...]:
        """Names of the unreadable images found so far, in the order of the source."""
        return self._unreadable.names

    def __getitem__(self, index: int) -> ImageItem:
        """Returns the item at a position. Its random numbers depend on the position only, so the crop is the same each time."""
        return self.read(index, generator("image folder", index))

    def read(self, index: int, draws: torch.Generator) -> ImageItem:
        """Returns the item at a position, cropped and flipped by `draws`, from which three numbers are always taken.

        Raises:
            IndexError: no such position.
            UserError: more images than `max_bad_share` allows have turned out unreadable, or none is readable.
        """
        return self.read_selected(range(len(self)), index, draws, self.crop_transform)

    def read_selected(
        self, order: Sequence[int], place: int, draws: torch.Generator, crop_transform: CropTransform
    ) -> ImageItem:
        """As `read`, for the image at `order[place]`; an unreadable one is replaced by the next in `order`."""
        if not 0 <= place < len(order):
            raise IndexError(f"image {place} of {len(order)} in {self.source}")
        numbers = draw_transform_numbers(draws)
        for step in range(len(order)):
            item = self.item(order[(place + step) % len(order)], numbers, crop_transform)
            if item is not None:
                return item
        raise UserError(f"none of the {len(order)} images in {self.source!r} can be read: replace them")

    def item(self, index: int, numbers: Sequence[float], crop_transform: CropTransform) -> ImageItem | None:
        """Returns the image at exactly this position, cropped by three numbers (see `CropTransform.apply`); None if unreadable.

        Raises:
            UserError: more images than `max_bad_share` allows have turned out unreadable.
        """

        def load(position: int) -> tuple[str, Image.Image]:
            caption, picture = self._load(position)
            crop_transform.check_enlargement(picture)
            return caption, picture

        loaded = self._attempt(index, load)
        self._unreadable.raise_if_too_many(len(self))
        if loaded is None:
            return None
        caption, picture = loaded
        image, crop = crop_transform.apply(picture, numbers)
        return ImageItem(image, caption, crop, self.name_of(index), index)

    def verify(self, workers: int = 1) -> tuple[str, ...]:
        """Decodes every image once, in `workers` threads, and returns the names of the unreadable ones.

        Raises:
            UserError: more images are unreadable than `max_bad_share` allows.
        """
        readable = sum(size is not None for size in self._each(lambda index: self._load(index)[1].size, workers))
        log.info("%d of %d images in %s are readable", readable, len(self), self.source)
        self._unreadable.raise_if_too_many(len(self))
        return self.unreadable_names

    def iterate_captions(self) -> Iterator[str]:
        """Yields the captions of all images, also of those whose pixels are unreadable."""
        for index in range(len(self)):
            try:
                yield self.caption_of(index)
            except UNREADABLE:
                continue

    def image_sizes(self, workers: int = 1) -> list[tuple[int, int] | None]:
        """Returns (height, width) in pixels of every image from its header, EXIF orientation applied; None if unreadable.

        Raises:
            UserError: more headers are unreadable than `max_bad_share` allows.
        """
        sizes = self._each(lambda index: read_image_size(self.open(index)), workers)
        found = list(tqdm(sizes, "image sizes", len(self), unit="image", dynamic_ncols=True, disable=None))
        self._unreadable.raise_if_too_many(len(self))
        return found

    def _load(self, index: int) -> tuple[str, Image.Image]:
        return self.caption_of(index), decode(self.open(index))

    def _each(self, function: Callable[[int], T], workers: int) -> Iterator[T | None]:
        """Yields `function(index)` for all positions in order; None where it raised."""
        chunk = 1024  # a future for each of millions of images would not fit into memory
        with ThreadPoolExecutor(max(1, workers)) as pool:
            for start in range(0, len(self), chunk):
                rows = range(start, min(start + chunk, len(self)))
                yield from pool.map(partial(self._attempt, function=function), rows)

    def _attempt(self, index: int, function: Callable[[int], T]) -> T | None:
        """Returns `function(index)`, or None for an image that is unreadable or whose call raises one of UNREADABLE."""
        if (index,) in self._unreadable:
            return None
        try:
            return function(index)
        except UNREADABLE as error:
            self._unreadable.add((index,), self.name_of(index), error)
            return None
