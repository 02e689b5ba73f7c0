"""What tests of image sources share: noise pictures, and reading them in order or in a process that is spawned.

Nothing heavy is imported, since spawned processes import this file too.
"""

from __future__ import annotations

import io
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from stepdistill.config.reading import parse
from stepdistill.config.schema import DataConfig
from stepdistill.data.images.opening import open_images
from stepdistill.data.images.source import ImageItem, ImageSource
from stepdistill.data.loader import EpochOrder, Prefetcher, SampledDataset, SequentialOrder
from stepdistill.diffusion.draws import generator


def picture(seed: int, height: int = 20, width: int = 30) -> Image.Image:
    """Noise: large enough as a file that cutting it takes pixels away."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(seed: int, height: int = 20, width: int = 30, *, broken: bool = False) -> bytes:
    """A picture as a PNG file; a broken one breaks off in the middle of its pixels."""
    buffer = io.BytesIO()
    picture(seed, height, width).save(buffer, "PNG")
    return buffer.getvalue()[: buffer.tell() // 2] if broken else buffer.getvalue()


def pixels(image: Image.Image) -> torch.Tensor:
    """What an item of the picture's own size must hold."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def data(images: str | Path, **options: Any) -> DataConfig:
    return parse(DataConfig, {"prompts": "builtin:general", "images": str(images), **options}, "test")


def same(one: ImageItem, other: ImageItem) -> bool:
    mine, theirs = ({**vars(item), "image": item.image.tolist()} for item in (one, other))
    return mine == theirs


def by_sample(source: ImageSource, numbers: range, workers: int = 0, batch: int = 2) -> list[ImageItem]:
    """The items of global sample numbers, as a run of seed 0 reads them."""
    order = SequentialOrder() if source.count is None else EpochOrder(source.count, seed=0)
    batches = [numbers[start : start + batch] for start in range(0, len(numbers), batch)]
    return [item for items in Prefetcher(SampledDataset(source, order, 0), batches, workers) for item in items]


def read_item(config: DataConfig, index: int) -> ImageItem:
    return open_images(config, (16, 16), seed=0).read(index, generator(7))


def read_again(source: ImageSource, index: int) -> ImageItem:
    return source.read(index, generator(7))


def spawned(config: DataConfig, source: ImageSource, index: int) -> tuple[ImageItem, ImageItem]:
    """An item as two spawned processes read it: one opens the source, the other is given it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        opened, given = pool.submit(read_item, config, index), pool.submit(read_again, source, index)
        return opened.result(120), given.result(120)
