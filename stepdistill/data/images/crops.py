"""What a run may ask for of its images where none is cropped at random: every one at its size, as it is and mirrored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from stepdistill.data.images.buckets import Buckets
from stepdistill.data.images.folder import ImageFolder
from stepdistill.data.images.indexed import IndexedImages
from stepdistill.data.images.source import UNREADABLE, CropTransform, ImageItem
from stepdistill.data.latents.encoding_cache import FileHashes


@dataclass(frozen=True)
class CropVariant:
    """One image at its position in a source, cropped at its centre to (height, width) pixels, mirrored or not."""

    position: int
    size: tuple[int, int]
    flipped: bool

    def item(self, images: IndexedImages) -> ImageItem | None:
        """Its pixels; None where they cannot be read. Raises UserError as `IndexedImages.item`."""
        crop_transform = CropTransform(self.size, "center", flip=True)
        numbers = (0.0 if self.flipped else 1.0, 0.0, 0.0)
        return images.item(self.position, numbers, crop_transform)


def crop_variants(images: IndexedImages, buckets: Buckets | None) -> Iterator[CropVariant]:
    """All of them, readable or not."""
    chosen = buckets or Buckets((images.crop_transform.size,), (tuple(range(len(images))),))
    for size, positions in zip(chosen.sizes, chosen.members, strict=True):
        for position in positions:
            for flipped in (False, True) if images.crop_transform.flip else (False,):
                yield CropVariant(position, size, flipped)


def content_hashes(images: IndexedImages, hashes: FileHashes) -> tuple[str | None, ...]:
    """Hash of every image's file, by position; None where it cannot be read.

    Those of a folder are remembered. Tar shards and data sets are read through each time, though nothing is decoded.
    """
    folder = images.folder if isinstance(images, ImageFolder) else None

    def content(index: int) -> str | None:
        try:
            if folder is not None:
                return hashes.hash_of(folder / images.name_of(index))
            with images.open(index) as file:
                return hashlib.sha256(file.read()).hexdigest()
        except UNREADABLE:
            return None

    return tuple(map(content, range(len(images))))
