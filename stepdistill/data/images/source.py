"""Images with captions, for methods that train on real images: what all sources of them share.

    images: ImageSource = open_images(config.data, size=(1024, 1024), seed=0)     # data/images/opening.py
    item = images.read(7, generator(seed, "data", sample))

An image is resized (Lanczos) until it just covers the wanted size and then cropped. One that cannot be read is named in
a warning, counted, and replaced by the next readable one. The item at a position depends on the data only.
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
MAX_RESIZED_AREA = 16
"""Up to this many times the area of the crop, a picture is resized as a whole and then cropped."""
MAX_ENLARGEMENT = 64
"""A picture that would be enlarged more than this many times counts as unreadable."""
UNREADABLE = (
    OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow's decoders raise for files that are cut short, forged or no images at all."""


@dataclass(frozen=True)
class Crop:
    """Original size, offset and size of a crop, in pixels: the values of SDXL's micro-conditioning."""

    original: tuple[int, int]
    """(height, width) of the picture in the file, EXIF orientation applied."""
    offset: tuple[int, int]
    """(top, left) of the crop after resizing and flipping."""
    target: tuple[int, int]
    """(height, width) of the crop."""


@dataclass(frozen=True)
class ImageItem:
    """One image.

    Attributes:
        image: (3, H, W), float32 in [-1, 1].
        caption: "" where there is none.
        crop: sizes and offset for micro-conditioning.
        name: name of the image within its source.
        index: position in the source; differs from the requested one where an unreadable image was replaced.
        loser: the image of the same shape that this one was preferred to; None outside of preference data.
    """

    image: Tensor
    caption: str
    crop: Crop
    name: str
    index: int
    loser: Tensor | None = None


@dataclass(frozen=True)
class ImageBatch:
    """A batch of B items: images (B, 3, H, W); the other attributes are tuples of length B."""

    images: Tensor
    captions: tuple[str, ...]
    crops: tuple[Crop, ...]
    indices: tuple[int, ...]

    @classmethod
    def of(cls, items: Sequence[ImageItem]) -> ImageBatch:
        """Stacks items of one size."""
        images = torch.stack([item.image for item in items])
        captions, crops, indices = zip(*((item.caption, item.crop, item.index) for item in items), strict=True)
        return cls(images, captions, crops, indices)


class ImageSource(Protocol):
    """A source of training images. Several threads may read from it at once, and it can be pickled for a spawned process."""

    @property
    def count(self) -> int | None:
        """Number of images; None for a stream, whose positions never end."""

    @property
    def unreadable_names(self) -> tuple[str, ...]:
        """Names of the unreadable images found so far, in the order of the source."""

    def read(self, index: int, draws: torch.Generator) -> ImageItem:
        """Returns the item at a position, cropped and flipped by `draws`. Raises UserError for too many unreadable images."""


@dataclass(frozen=True)
class CropTransform:
    """Resizes and crops images to one size.

    Attributes:
        size: (height, width) of the items, pixels.
        crop: whether the crop is at the centre or at a random place.
        flip: mirror an image with probability 1/2; captions that mention left or right become wrong then.

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
        """Whether `apply` mirrors an image with these draws."""
        return self.flip and draws[0] < 0.5

    def apply(self, picture: Image.Image, draws: Sequence[float]) -> tuple[Tensor, Crop]:
        """Returns pixels (3, H, W), float32 in [-1, 1], and their crop. The three `draws` in [0, 1) decide flip, top and left."""
        height, width = self.size
        scale = max(height / picture.height, width / picture.width)
        # rounding may fall short of the target by a pixel
        resized = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
        spare = (resized[1] - height, resized[0] - width)
        if self.crop == "random":
            top, left = (math.floor(number * (room + 1)) for number, room in zip(draws[1:], spare, strict=True))
        else:
            top, left = spare[0] // 2, spare[1] // 2
        crop = _resize_and_crop if resized[0] * resized[1] <= MAX_RESIZED_AREA * height * width else _resize_crop_only
        pixels = np.array(crop(picture, resized, (left, top, left + width, top + height), self.flips(draws)))
        image = torch.from_numpy(pixels).permute(2, 0, 1).to(torch.float32).div(127.5).sub(1).contiguous()
        return image, Crop((picture.height, picture.width), (top, left), (height, width))

    def check_enlargement(self, picture: Image.Image) -> None:
        """Raises ValueError where the picture is so small that it would be enlarged more than `MAX_ENLARGEMENT` times."""
        scale = max(self.size[0] / picture.height, self.size[1] / picture.width)
        if scale > MAX_ENLARGEMENT:
            raise ValueError(
                f"it has {picture.width} x {picture.height} pixels and would be enlarged {scale:.0f} times; at most "
                f"{MAX_ENLARGEMENT} times is accepted"
            )


def _resize_and_crop(
    picture: Image.Image, resized: tuple[int, int], box: tuple[int, int, int, int], mirror: bool
) -> Image.Image:
    """Resizes to (width, height), mirrors, then crops to a box (left, top, right, bottom)."""
    whole = picture.resize(resized, Image.Resampling.LANCZOS)
    return (ImageOps.mirror(whole) if mirror else whole).crop(box)


def _resize_crop_only(
    picture: Image.Image, resized: tuple[int, int], box: tuple[int, int, int, int], mirror: bool
) -> Image.Image:
    """As `_resize_and_crop`, but computes the pixels of the crop only: a long, thin picture would need gigabytes otherwise."""
    left, top, right, bottom = box
    if mirror:
        left, right = resized[0] - right, resized[0] - left
    across, down = picture.width / resized[0], picture.height / resized[1]
    part = (left * across, top * down, min(right * across, picture.width), min(bottom * down, picture.height))
    crop = picture.resize((right - left, bottom - top), Image.Resampling.LANCZOS, box=part)
    return ImageOps.mirror(crop) if mirror else crop


def draw_transform_numbers(draws: torch.Generator) -> list[float]:
    """Returns the three numbers for `CropTransform.apply`: always three, so that they depend on the sample alone."""
    numbers: list[float] = torch.rand(3, generator=draws, dtype=torch.float64).tolist()
    return numbers


class UnreadableImages:
    """Records the unreadable images of one source: each is named in a warning and counted once, also with several threads.

    Raises:
        UserError: `max_share` is not between 0 and 1.
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
        """Names of the unreadable images, in the order of their keys."""
        return tuple(name for _, (name, _) in sorted(self._found.copy().items()))

    def add(self, key: tuple[int, ...], name: str, error: Exception) -> None:
        """Counts an unreadable image; `key` is its position in the source."""
        fact = (name, " ".join(str(error).split()) or type(error).__name__)
        # setdefault is atomic, so only one of several threads reports the image
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
    """Decodes an image file to 8-bit RGB, EXIF orientation applied, and closes it. Raises one of UNREADABLE."""
    with file, open_image(file) as picture:
        return to_rgb(ImageOps.exif_transpose(picture))


def read_image_size(file: BinaryIO) -> tuple[int, int]:
    """Returns (height, width) of an image file, EXIF orientation applied, and closes it. Raises one of UNREADABLE."""
    with file, open_image(file) as picture:
        # reading the EXIF of a PNG that has none would decode all of its pixels
        has_exif = picture.format != "PNG" or "exif" in picture.info
        turned = has_exif and picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return (picture.width, picture.height) if turned else (picture.height, picture.width)


def to_rgb(picture: Image.Image) -> Image.Image:
    """Converts to 8-bit RGB: transparency over white, 16-bit grey scaled to 8 bits, other modes as Pillow does."""
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
    """Returns the value of the first of `keys` that a row has, in one line, or "". Raises TypeError where it is not text."""
    text = next((row[key] for key in keys if row.get(key) is not None), "")
    if not isinstance(text, str):
        raise TypeError(f"a caption of type {type(text).__name__}")
    return one_line(text)


def warn_missing_captions(count: int, total: int, source: str) -> None:
    """Warns of images without a caption, because a misnamed caption file would go unnoticed otherwise."""
    if count:
        log.warning("%d of %d images in %s have no caption and are used with the empty prompt", count, total, source)


def one_line(text: str) -> str:
    """Returns the text without line breaks and repeated spaces."""
    return " ".join(text.split())
