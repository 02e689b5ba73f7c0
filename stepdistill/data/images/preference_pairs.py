"""Pairs of a preferred and a rejected image: two folders with the same file names, or two columns of a data set.

data: {images: photos/best, losers: photos/worst}
data: {images: 'hf:pickapic', image_column: jpg_0, losers: jpg_1, preferred_column: label_0}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, BinaryIO, cast

from PIL import Image

from stepdistill.config.schema import DataConfig
from stepdistill.data.hub import HUB_PREFIX, open_dataset
from stepdistill.data.images.datasets_library import HubImages
from stepdistill.data.images.folder import ImageFolder
from stepdistill.data.images.indexed import IndexedImages
from stepdistill.data.images.source import CropTransform, ImageItem, decode
from stepdistill.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset


class PreferencePairs(IndexedImages):
    """Pairs of images with one caption. An item is the preferred image, with the other as `loser`, cropped by the same numbers.

    A pair is skipped if one of its images is unreadable.

    Args:
        winners, losers: the sources of both images; captions and crop are those of the first.
        pairs: positions of the two images in their sources.
        swapped: for each pair, whether the image of `losers` was preferred.
    """

    def __init__(
        self,
        winners: IndexedImages,
        losers: IndexedImages,
        pairs: Sequence[tuple[int, int]],
        swapped: Sequence[bool],
        max_bad_share: float,
    ) -> None:
        super().__init__(winners.source, winners.crop_transform, max_bad_share)
        self.sides, self.pairs, self.swapped = (winners, losers), pairs, swapped

    def __len__(self) -> int:
        return len(self.pairs)

    def name_of(self, index: int) -> str:
        return self.sides[0].name_of(self.pairs[index][0])

    def open(self, index: int) -> BinaryIO:
        return self._open(index, int(self.swapped[index]))

    def caption_of(self, index: int) -> str:
        return self.sides[0].caption_of(self.pairs[index][0])

    def item(self, index: int, numbers: Sequence[float], crop_transform: CropTransform) -> ImageItem | None:
        def decode_loser(position: int) -> Image.Image:
            picture = decode(self._open(position, 1 - int(self.swapped[position])))
            crop_transform.check_enlargement(picture)
            return picture

        winner = super().item(index, numbers, crop_transform)
        loser = None if winner is None else self._attempt(index, decode_loser)
        self._unreadable.raise_if_too_many(len(self))
        if winner is None or loser is None:
            return None
        return replace(winner, loser=crop_transform.apply(loser, numbers)[0])

    def _open(self, index: int, side: int) -> BinaryIO:
        return self.sides[side].open(self.pairs[index][side])


def open_preference_pairs(data: DataConfig, images: object) -> PreferencePairs:
    """Combines the images of a run, opened by `open_images`, with those that `data.losers` names.

    Raises:
        UserError: images that are streamed or in tar shards, missing losers, or only ties.
    """
    if data.losers is None:
        raise UserError("preference pairs were asked for and data.losers is not set: give a folder or a column")
    if isinstance(images, ImageFolder):
        return _pair_by_name(data, images)
    if not isinstance(images, HubImages):
        raise UserError(
            f"data.losers is set and data.images is {data.images!r}, which cannot hold them: give two folders, or a data set "
            "with data.streaming false"
        )
    name = str(data.images).removeprefix(HUB_PREFIX)
    losers = HubImages(
        cast("Dataset", open_dataset(name, data.split, streaming=False)),
        str(data.images),
        images.crop_transform,
        image_column=data.losers,
        caption_column=data.caption_column,
        max_bad_share=data.max_bad_share,
    )
    shares = _preference_shares(data, len(images))
    rows = [row for row, share in enumerate(shares) if share != 0.5]
    if not rows:
        raise UserError(
            f"every row of {data.images!r} is a tie by its column {data.preferred_column!r}: name another column"
        )
    return PreferencePairs(
        images, losers, [(row, row) for row in rows], [shares[row] < 0.5 for row in rows], data.max_bad_share
    )


def _pair_by_name(data: DataConfig, images: ImageFolder) -> PreferencePairs:
    crop_transform = images.crop_transform
    losers = ImageFolder(str(data.losers), crop_transform.size, crop=crop_transform.crop, flip=crop_transform.flip)
    places = {PurePosixPath(name).with_suffix(""): index for index, name in enumerate(losers.names)}
    stems = [PurePosixPath(name).with_suffix("") for name in images.names]
    if lone := [name for name, stem in zip(images.names, stems, strict=True) if stem not in places]:
        raise UserError(
            f"{len(lone)} of {len(stems)} images in {images.source!r} have no loser in {str(data.losers)!r}, such as {lone[0]!r}: "
            "put one there under the same name"
        )
    pairs = [(index, places[stem]) for index, stem in enumerate(stems)]
    return PreferencePairs(images, losers, pairs, [False] * len(pairs), data.max_bad_share)


def _preference_shares(data: DataConfig, count: int) -> list[float]:
    """Returns, for each row, the share of votes for its first image."""
    if data.preferred_column is None:
        return [1.0] * count
    dataset = cast("Dataset", open_dataset(str(data.images).removeprefix(HUB_PREFIX), data.split, streaming=False))
    if data.preferred_column not in dataset.column_names:
        raise UserError(
            f"the data set {data.images!r} has no column {data.preferred_column!r}: name one of its own as data.preferred_column"
        )
    found = list(dataset[data.preferred_column])
    if not all(isinstance(share, int | float) and 0 <= share <= 1 for share in found):
        raise UserError(
            f"the column {data.preferred_column!r} of {data.images!r} holds values outside of [0, 1]: name another as "
            "data.preferred_column"
        )
    return [float(share) for share in found]
