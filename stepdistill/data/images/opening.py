"""Opens what `data.images` names: a folder, tar shards, or a data set of the `datasets` library."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from stepdistill.config.schema import DataConfig
from stepdistill.data.hub import HUB_PREFIX, open_dataset
from stepdistill.data.images.datasets_library import HubImages
from stepdistill.data.images.folder import ImageFolder
from stepdistill.data.images.source import CropTransform, ImageSource, warn_missing_captions
from stepdistill.data.images.stream import ImageStream
from stepdistill.data.images.webdataset import TarImages, is_tar_pattern
from stepdistill.diffusion.draws import derive_seed
from stepdistill.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


def open_images(data: DataConfig, size: tuple[int, int], seed: int) -> ImageSource:
    """Opens the images of a run.

    Args:
        data: the `data` section of the config; `images` must be set.
        size: (height, width) in pixels of the cropped images, for runs without buckets.
        seed: of the run; a stream's order depends on it.

    Raises:
        UserError: nothing there, or not images.
    """
    if data.images is None:
        raise UserError("data.images is not set: give a folder, tar shards or a data set")
    crop_transform = CropTransform(size, data.crop, data.flip)
    if data.images.startswith(HUB_PREFIX):
        dataset = open_dataset(data.images.removeprefix(HUB_PREFIX), data.split, streaming=data.streaming)
        if data.streaming:
            return ImageStream(
                cast("IterableDataset", dataset),
                data.images,
                crop_transform,
                derive_seed(seed, "images"),
                image_column=data.image_column,
                caption_column=data.caption_column,
                max_bad_share=data.max_bad_share,
            )
        return HubImages(
            cast("Dataset", dataset),
            data.images,
            crop_transform,
            image_column=data.image_column,
            caption_column=data.caption_column,
            max_bad_share=data.max_bad_share,
        )
    if data.streaming:
        raise UserError(
            f"data.streaming is set and data.images is {data.images!r}, which is not streamed: name a data set as "
            f"'{HUB_PREFIX}NAME', or set data.streaming to false"
        )
    if is_tar_pattern(data.images):
        return TarImages(
            data.images, crop_transform, max_bad_share=data.max_bad_share, caption_column=data.caption_column
        )
    folder = ImageFolder(
        data.images,
        size,
        crop=data.crop,
        flip=data.flip,
        max_bad_share=data.max_bad_share,
        caption_column=data.caption_column,
    )
    warn_missing_captions(sum(not caption for caption in folder.captions), len(folder), folder.source)
    return folder
