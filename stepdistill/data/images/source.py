"""Images with captions, for the methods that look at real data: what every source of them shares.

    images: ImageSource = open_images(config.data, size=(1024, 1024), seed=0)     # data/sources.py
    item = images.read(7, generator(seed, "data", sample))

An image is resized (Lanczos) until it just covers the wanted size and then cropped. One that cannot be read is named in
a warning, counted, and replaced by the next readable one: what a position yields depends on the data only.
"""

from __future__ import annotations

import logging
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from stepdistill.errors import UserError

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".avif", ".bmp", ".gif", ".jfif", ".tif", ".tiff")
"""File names with these endings, in lower or upper case, are images."""
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "BMP", "GIF", "TIFF")
"""Formats that Pillow may decode here, whatever a file is named. Others, such as EPS, would start further programs."""
CAPTION_KEYS = ("text", "caption", "prompt")
UNREADABLE = (
    OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow's decoders raise for files that are cut short, forged or no images at all."""


@dataclass(frozen=True)
class Crop:
    """Where a training image comes from, in pixels: what SDXL's micro-conditioning is made of."""

    original: tuple[int, int]
    """(height, width) of the file, as it is meant to be seen (EXIF orientation applied)."""
    offset: tuple[int, int]
    """(top, left) of the crop after resizing and flipping."""
    target: tuple[int, int]
    """(height, width) of the crop."""


@dataclass(frozen=True)
class ImageItem:
    """One image.

    Attributes:
        image: (3, H, W), float32 in [-1, 1].
        caption: "" where its source has none for it.
        crop: sizes and offset for micro-conditioning.
        name: of the image within its source.
        index: position in the source; not the one asked for where an unreadable image was replaced.
        loser: of the same shape, the image that lost against this one; None where there is none.
    """

    image: Tensor
    caption: str
    crop: Crop
    name: str
    index: int
    loser: Tensor | None = None


@dataclass(frozen=True)
class ImageBatch:
    """B items side by side: images (B, 3, H, W), everything else a tuple of length B."""

    images: Tensor
    captions: tuple[str, ...]
    crops: tuple[Crop, ...]
    indices: tuple[int, ...]

    @classmethod
    def of(cls, items: Sequence[ImageItem]) -> ImageBatch:
        images = torch.stack([item.image for item in items])
        captions, crops, indices = zip(*((item.caption, item.crop, item.index) for item in items), strict=True)
        return cls(images, captions, crops, indices)


class ImageSource(Protocol):
    """Where training images come from. Read from several threads at once; may be pickled, for a process that is spawned."""

    @property
    def count(self) -> int | None:
        """Images; None of a stream, whose positions never end."""

    @property
    def unreadable_names(self) -> tuple[str, ...]:
        """Names of the unreadable images found so far, in the order of the source."""

    def read(self, index: int, draws: torch.Generator) -> ImageItem:
        """Item at a position, cropped and flipped by `draws`; raises UserError when too many images are unreadable."""


@dataclass(frozen=True)
class CropTransform:
    """How an image is cut to size.

    Attributes:
        size: (height, width) of the items, pixels.
        crop: at the centre or anywhere.
        flip: mirror every other image, at random; captions that speak of left and right become wrong.

    Raises:
        UserError: an option out of range.
    """

    size: tuple[int, int]
    crop: Literal["center", "random"] = "center"
    flip: bool = False

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise UserError(f"the image size is {tuple(self.size)}: give (height, width) in pixels, each at least 1")
        if self.crop not in ("center", "random"):
            raise UserError(f"crop is {self.crop!r}: use 'center' or 'random'")

    def flips(self, draws: Sequence[float]) -> bool:
        """Whether these draws of `cut` mirror an image."""
        return self.flip and draws[0] < 0.5

    def apply(self, picture: Image.Image, draws: Sequence[float]) -> tuple[Tensor, Crop]:
        """Pixels (3, H, W), float32 in [-1, 1], and their crop; the three `draws` in [0, 1) are for flip, top and left."""
        height, width = self.size
        scale = max(height / picture.height, width / picture.width)
        # rounding may fall short of the target by a pixel
        resized = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
        whole = picture.resize(resized, Image.Resampling.LANCZOS)
        if self.flips(draws):
            whole = ImageOps.mirror(whole)
        spare = (whole.height - height, whole.width - width)
        if self.crop == "random":
            top, left = (math.floor(number * (room + 1)) for number, room in zip(draws[1:], spare, strict=True))
        else:
            top, left = spare[0] // 2, spare[1] // 2
        pixels = np.array(whole.crop((left, top, left + width, top + height)))
        image = torch.from_numpy(pixels).permute(2, 0, 1).to(torch.float32).div(127.5).sub(1).contiguous()
        return image, Crop((picture.height, picture.width), (top, left), (height, width))


def draw_transform_numbers(draws: torch.Generator) -> list[float]:
    """The three numbers of `Framing.cut`: always as many, whatever is read, so that draws belong to the sample."""
    numbers: list[float] = torch.rand(3, generator=draws, dtype=torch.float64).tolist()
    return numbers


class UnreadableImages:
    """Unreadable images of one source: each named and counted once, whichever thread meets it first.

    Raises:
        UserError: `max_share` is no share.
    """

    def __init__(self, source: str, max_share: float) -> None:
        if not 0 <= max_share <= 1:
            raise UserError(f"max_bad_share is {max_share}: give a share between 0 and 1")
        self.source, self.max_share = source, max_share
        self._found: dict[tuple[int, ...], tuple[str, str]] = {}

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, key: tuple[int, ...]) -> bool:
        return key in self._found

    @property
    def names(self) -> tuple[str, ...]:
        """In the order of their keys."""
        return tuple(name for _, (name, _) in sorted(self._found.copy().items()))

    def add(self, key: tuple[int, ...], name: str, error: Exception) -> None:
        """Count the image at `key`, where it lies in its source."""
        fact = (name, " ".join(str(error).split()) or type(error).__name__)
        # of several threads that meet the same image, setdefault lets one report it
        if self._found.setdefault(key, fact) is fact:
            log.warning("skipping unreadable image %s of %s (%s)", name, self.source, fact[1])

    def raise_if_too_many(self, total: int) -> None:
        """Raises UserError where the images found are more than `max_share` of `total`."""
        found = [fact for _, fact in sorted(self._found.copy().items())]
        if len(found) <= self.max_share * total:
            return
        first = ", ".join(f"{name!r} ({reason})" for name, reason in found[:3])
        raise UserError(
            f"{len(found)} of {total} images ({len(found) / total:.1%}) in {self.source!r} are unreadable, "
            f"such as {first}, but max_bad_share allows {self.max_share:.1%}: repair or remove them, or raise it"
        )


def open_image(file: BinaryIO | Path) -> Image.Image:
    """Opens an image of one of `FORMATS`, found by its content, without decoding it yet. Raises one of UNREADABLE."""
    Image.init()
    return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])


def decode(file: BinaryIO) -> Image.Image:
    """The picture in an image file, upright and in 8-bit RGB; closes the file. Raises one of UNREADABLE."""
    with file, open_image(file) as picture:
        return to_rgb(ImageOps.exif_transpose(picture))


def read_image_size(file: BinaryIO) -> tuple[int, int]:
    """(height, width) of the picture in an image file, upright; closes the file. Raises one of UNREADABLE."""
    with file, open_image(file) as picture:
        # asking a PNG without EXIF for it would decode all of its pixels
        told = picture.format != "PNG" or "exif" in picture.info
        turned = told and picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return (picture.width, picture.height) if turned else (picture.height, picture.width)


def to_rgb(picture: Image.Image) -> Image.Image:
    """8-bit RGB: transparency over white, 16-bit grey by its high byte, everything else by Pillow's conversion."""
    picture.load()
    if picture.mode.startswith("I"):
        # Pillow clips these at 255 instead of scaling them
        values = np.asarray(picture, dtype=np.int64).clip(0, 65535)
        return Image.fromarray((values // 257).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return picture.convert("RGB")


def pick_caption(row: Mapping[str, object], keys: Sequence[str] = CAPTION_KEYS) -> str:
    """The first of `keys` that a row has a value for, in one line; "" where there is none. Raises TypeError for no text."""
    text = next((row[key] for key in keys if row.get(key) is not None), "")
    if not isinstance(text, str):
        raise TypeError(f"a caption of type {type(text).__name__}")
    return one_line(text)


def warn_missing_captions(count: int, total: int, source: str) -> None:
    """Say that images have no caption, where some have none: nothing else would show that a caption was misnamed."""
    if count:
        log.warning("%d of %d images in %s have no caption and are taken for the empty prompt", count, total, source)


def one_line(text: str) -> str:
    """Without line breaks and doubled spaces."""
    return " ".join(text.split())
