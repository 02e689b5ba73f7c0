"""Reads images for measuring: files, value ranges, crops and sizes.

All functions that measure take uint8 (H, W, 3). Each step that changes a Fréchet distance by itself (JPEG, transparency,
rounding, cropping) must be asked for and is written to the protocol record.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from stepdistill.data.images.source import UNREADABLE, open_image
from stepdistill.errors import UserError

logger = logging.getLogger(__name__)
ImageArray = NDArray[np.uint8]
"""One image (H, W, 3)."""

LOSSLESS = (".png", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
LOSSY = (".jpg", ".jpeg", ".webp")
Quantize = Literal["round", "floor"]
ValueRange = tuple[float, float]
OVERVIEW = "grid.png"
"""File in which `stepdistill sample` and the quickstart show all images at once; it is not a sample."""


def list_images(folder: str | Path, *, recursive: bool = False, allow_lossy: bool = False) -> list[Path]:
    """Lists the image files of a folder, sorted by name, except the overview `grid.png` beside other images.

    Args:
        recursive: search sub-folders too.
        allow_lossy: take JPEG and WebP, whose compression changes the Fréchet distance.

    Raises:
        UserError: not a folder, no image in it, or lossy files that were not allowed.
    """
    path = Path(folder)
    if path.is_file():
        raise UserError(f"{str(path)!r} is a file and a folder of images is wanted: give the folder that holds it")
    if not path.is_dir():
        raise UserError(f"there is no folder {str(path)!r}: check the path")
    files = sorted(p for p in (path.rglob("*") if recursive else path.iterdir()) if p.is_file())
    lossless = [p for p in files if p.suffix.lower() in LOSSLESS]
    lossy = [p for p in files if p.suffix.lower() in LOSSY]
    if lossy and not allow_lossy:
        raise UserError(
            f"{len(lossy)} files in {str(path)!r} are JPEG or WebP (first: {lossy[0].name!r}), whose compression changes the "
            "Fréchet distance: give PNG files, or --allow-lossy"
        )
    chosen = sorted(lossless + lossy)
    samples = [file for file in chosen if file.name != OVERVIEW]
    if samples and len(samples) < len(chosen):
        logger.info("%s is an overview and is not measured", path / OVERVIEW)
        chosen = samples
    if not chosen:
        found = sorted({p.suffix.lower() or "(none)" for p in files})
        folders = (
            "" if recursive or not any(p.is_dir() for p in path.iterdir()) else "; its sub-folders were not searched"
        )
        raise UserError(
            f"no image in {str(path)!r} (suffixes found: {', '.join(found) or 'no file at all'}{folders}): give a folder of PNG files"
        )
    return chosen


def read_image(path: Path, background: tuple[int, int, int] = (255, 255, 255)) -> ImageArray:
    """Reads an image file as RGB: grey becomes three equal channels, transparency is composited on `background`.

    Raises:
        UserError: the file is corrupt, or holds more than 8 bits a channel.
    """
    image: Image.Image
    try:
        with open_image(path) as opened:
            opened.load()
            image = opened.copy()
    except (*UNREADABLE, MemoryError) as error:
        raise UserError(f"the image {str(path)!r} cannot be read ({error}): remove it or write it again") from None
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise UserError(
            f"the image {str(path)!r} has more than 8 bits a channel ({image.mode}): convert it to 8-bit RGB"
        )
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, (*background, 255)), layer)
    return np.asarray(image.convert("RGB"))


def as_uint8(
    images: torch.Tensor | NDArray[np.generic],
    value_range: ValueRange | None = None,
    quantize: Quantize = "round",
    tolerance: float = 1e-3,
) -> NDArray[np.uint8]:
    """Converts a batch to uint8 (N, H, W, 3); the value range is never guessed.

    Args:
        images: uint8, or floats in `value_range`; (N, 3, H, W) or (N, H, W, 3).
        value_range: (0, 1) or (-1, 1) for floats, None for uint8.
        quantize: round to the nearest level, or down as DMD2's and AGD's scripts do.
        tolerance: overshoot, as a share of the range, that is clamped; a larger one is an error.

    Raises:
        UserError: NaN or infinity.
        ValueError: another shape, type or range than stated.
    """
    array = images.detach().cpu().numpy() if isinstance(images, torch.Tensor) else np.asarray(images)
    if array.ndim != 4 or 3 not in (array.shape[1], array.shape[3]):
        raise ValueError(f"images have the shape {array.shape}; (N, 3, H, W) or (N, H, W, 3) is wanted")
    array = array if array.shape[3] == 3 else array.transpose(0, 2, 3, 1)
    if array.dtype == np.uint8:
        if value_range is not None:
            raise ValueError(f"images are uint8, yet a value range {value_range} was given: leave it out")
        return np.ascontiguousarray(array)
    if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
        raise UserError(
            "the images hold NaN or infinity: the model's weights have overflowed, or its data type is too small"
        )
    found = f"images are {array.dtype} in [{array.min():.4g}, {array.max():.4g}]"
    if not np.issubdtype(array.dtype, np.floating) or value_range is None:
        raise ValueError(f"{found}; give uint8, or floats with value_range=(0, 1) or (-1, 1)")
    low, high = value_range
    slack = tolerance * (high - low)
    if not (array.min() >= low - slack and array.max() <= high + slack):
        raise ValueError(f"{found}; the range was said to be [{low:g}, {high:g}]: clamp them or state the true range")
    levels = np.clip((array.astype(np.float64) - low) / (high - low), 0.0, 1.0) * 255.0
    return (np.floor(levels) if quantize == "floor" else np.round(levels)).astype(np.uint8)


@dataclass(frozen=True)
class PixelChain:
    """Crops and resizes an image before the network's own preprocessing.

    Attributes:
        crop: "square" crops to the short side, "patch" to `size` x `size` at full resolution (smaller images stay), "none".
        size: side after Lanczos resampling, or the side of the patch; None keeps the size.
    """

    crop: Literal["none", "square", "patch"] = "none"
    size: int | None = None

    def __call__(self, image: ImageArray) -> ImageArray:
        height, width = image.shape[:2]
        if self.crop == "none" and self.size is None:
            return image
        if self.crop == "patch":
            side = self.size or min(height, width)
            return image if min(height, width) < side else _center_crop(image, side, side)
        if self.crop == "square":
            image = _center_crop(image, min(height, width), min(height, width))
        if self.size is not None and image.shape[:2] != (self.size, self.size):
            picture = Image.fromarray(image).resize((self.size, self.size), Image.Resampling.LANCZOS)
            image = np.asarray(picture)
        return image


def _center_crop(image: ImageArray, height: int, width: int) -> ImageArray:
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return np.ascontiguousarray(image[top : top + height, left : left + width])


def indices_of_rank(count: int, rank: int, world: int) -> range:
    """Returns the global indices of a rank: rank, rank + world, ...; without padding, so that no image counts twice."""
    return range(rank, count, world)


def read_images(paths: Sequence[Path], chain: PixelChain | None = None) -> Iterator[ImageArray]:
    """Reads the images of `paths` one by one, cropped and resized by `chain`."""
    for path in paths:
        image = read_image(path)
        yield image if chain is None else chain(image)
