"""A folder of images with captions, for the methods that look at real data.

    folder = ImageFolder("photos", size=(1024, 1024), crop="random")
    item = folder.read(7, generator(seed, "data", sample))

Captions are sidecars (`cat.jpg`, `cat.txt`) or `metadata.jsonl` with `file_name` and `text`, `caption` or `prompt`.
"""

from __future__ import annotations

import logging
import math
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from stepdistill.data.prompts import read_jsonl
from stepdistill.diffusion.draws import generator
from stepdistill.errors import Refusal

log = logging.getLogger(__name__)

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
CAPTION_KEYS = ("text", "caption", "prompt")
# what Pillow's decoders raise for files that are cut short, forged or no images at all
_UNREADABLE = (
    OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip


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
        caption: "" where the folder has none for it.
        crop: sizes and offset for micro-conditioning.
        path: the file that was read.
        index: position of that file in the folder; not the one asked for where an unreadable file was replaced.
    """

    image: Tensor
    caption: str
    crop: Crop
    path: Path
    index: int


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


class ImageFolder:
    """The PNG, JPEG and WebP files below a folder, in the order of their names, cropped to one size.

    An image is resized (Lanczos) until it just covers `size` and then cropped. A file that cannot be read is named in a
    warning, kept in `bad`, and replaced by the next readable one: what a position yields depends on the files only.

    Args:
        folder: searched with its subfolders; hidden files are passed over.
        size: (height, width) of the items, pixels.
        crop: at the centre or anywhere.
        flip: mirror every other image, at random; captions that speak of left and right become wrong.
        max_bad_share: share of unreadable files, of all files, above which reading is refused.
        require_captions: refuse a folder in which an image has no caption.

    Raises:
        Refusal: missing or empty folder, malformed captions, an option out of range; when reading, too many bad files.
    """

    def __init__(
        self,
        folder: str | Path,
        size: tuple[int, int],
        *,
        crop: Literal["center", "random"] = "center",
        flip: bool = False,
        max_bad_share: float = 0.05,
        require_captions: bool = False,
    ) -> None:
        if min(size) < 1:
            raise Refusal(f"the image size is {tuple(size)}: give (height, width) in pixels, each at least 1")
        if crop not in ("center", "random"):
            raise Refusal(f"crop is {crop!r}: use 'center' or 'random'")
        if not 0 <= max_bad_share <= 1:
            raise Refusal(f"max_bad_share is {max_bad_share}: give a share between 0 and 1")
        self.folder = Path(folder)
        self.size = (size[0], size[1])
        self.crop = crop
        self.flip = flip
        self.max_bad_share = max_bad_share
        captions = _captions(self.folder)
        self.paths = tuple(self.folder / name for name in captions)
        self.captions = tuple(captions.values())
        if require_captions and (bare := [name for name, text in captions.items() if not text]):
            raise Refusal(
                f"{len(bare)} of {len(captions)} images in {str(self.folder)!r} have no caption, such as {bare[0]!r}: "
                "write a .txt file beside each, or list them in metadata.jsonl"
            )
        self._bad: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> ImageItem:
        """Item at a position, its random draws a function of the position: the same crop each time."""
        return self.read(index, generator("image folder", index))

    def read(self, index: int, draws: torch.Generator) -> ImageItem:
        """Item at a position, cropped and flipped by `draws`, of which always three numbers are taken.

        Raises:
            IndexError: no such position.
            Refusal: more files than `max_bad_share` allows have turned out unreadable, or none is readable.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of a folder of {len(self)}")
        numbers = placement(draws)
        for step in range(len(self)):
            position = (index + step) % len(self)
            picture = self._decode(position)
            self._refuse_too_many_bad()
            if picture is not None:
                spread = numbers[1:] if self.crop == "random" else None
                image, crop = self._cropped(picture, self.mirrors(numbers), spread)
                return ImageItem(image, self.captions[position], crop, self.paths[position], position)
        raise Refusal(f"none of the {len(self)} images in {str(self.folder)!r} can be read: replace them")

    def centred(self, index: int, mirrored: bool) -> ImageItem | None:
        """The very file at a position, cropped at the centre, as it is or mirrored; None where it cannot be read.

        Raises:
            Refusal: as `read`.
        """
        picture = self._decode(index)
        self._refuse_too_many_bad()
        if picture is None:
            return None
        image, crop = self._cropped(picture, mirrored, None)
        return ImageItem(image, self.captions[index], crop, self.paths[index], index)

    def mirrors(self, numbers: Sequence[float]) -> bool:
        """Whether an item with this `placement` is mirrored."""
        return self.flip and numbers[0] < 0.5

    @property
    def bad(self) -> tuple[Path, ...]:
        """Unreadable files found so far, in the order of the folder."""
        return tuple(self.paths[index] for index in sorted(self._bad))

    def verify(self, workers: int = 1) -> tuple[Path, ...]:
        """Decode every file once, in `workers` threads; the unreadable ones.

        Raises:
            Refusal: they are more than `max_bad_share` allows.
        """
        with ThreadPoolExecutor(workers) as pool:
            readable = sum(pool.map(lambda index: self._decode(index) is not None, range(len(self))))
        log.info("%d of %d images in %s are readable", readable, len(self), self.folder)
        self._refuse_too_many_bad()
        return self.bad

    def _decode(self, index: int) -> Image.Image | None:
        if index in self._bad:
            return None
        try:
            with Image.open(self.paths[index]) as file:
                return to_rgb(ImageOps.exif_transpose(file))
        except _UNREADABLE as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            # of several threads that meet the same file, setdefault lets one report it
            if self._bad.setdefault(index, reason) is reason:
                log.warning("skipping unreadable image %s (%s)", self.paths[index], reason)
            return None

    def _cropped(self, picture: Image.Image, mirrored: bool, spread: Sequence[float] | None) -> tuple[Tensor, Crop]:
        """The item's pixels, and its crop: top and left by `spread` in [0, 1), at the centre where that is None."""
        height, width = self.size
        scale = max(height / picture.height, width / picture.width)
        # rounding may fall short of the target by a pixel
        resized = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
        whole = picture.resize(resized, Image.Resampling.LANCZOS)
        if mirrored:
            whole = ImageOps.mirror(whole)
        spare = (whole.height - height, whole.width - width)
        if spread is not None:
            top, left = (math.floor(number * (room + 1)) for number, room in zip(spread, spare, strict=True))
        else:
            top, left = spare[0] // 2, spare[1] // 2
        pixels = np.array(whole.crop((left, top, left + width, top + height)))
        image = torch.from_numpy(pixels).permute(2, 0, 1).to(torch.float32).div(127.5).sub(1).contiguous()
        return image, Crop((picture.height, picture.width), (top, left), self.size)

    def _refuse_too_many_bad(self) -> None:
        found = sorted(self._bad.copy().items())
        if len(found) <= self.max_bad_share * len(self):
            return
        first = ", ".join(f"{self.paths[index].name!r} ({reason})" for index, reason in found[:3])
        raise Refusal(
            f"{len(found)} of {len(self)} images ({len(found) / len(self):.1%}) in {str(self.folder)!r} are unreadable, "
            f"such as {first}, but max_bad_share allows {self.max_bad_share:.1%}: repair or remove them, or raise it"
        )


def placement(draws: torch.Generator) -> list[float]:
    """Three numbers in [0, 1) that place an item: for flip, top and left."""
    numbers: list[float] = torch.rand(3, generator=draws, dtype=torch.float64).tolist()
    return numbers


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


def _captions(folder: Path) -> dict[str, str]:
    """Relative name (with /) -> caption ("" where there is none) of every image, sorted by name."""
    if not folder.is_dir():
        raise Refusal(f"there is no image folder {str(folder)!r}: check the path")
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    listed = _metadata(folder / "metadata.jsonl") if "metadata.jsonl" in names else {}
    visible = {name for name in names if not any(part.startswith(".") for part in name.split("/"))}
    # a file that is listed but missing is an image that cannot be read, and is counted as one
    images = sorted({name for name in visible if name.lower().endswith(SUFFIXES)} | listed.keys())
    if not images:
        raise Refusal(f"{str(folder)!r} holds no image: put .png, .jpg or .webp files there")
    return {name: listed.get(name) or _sidecar(folder, name, names) for name in images}


def _sidecar(folder: Path, name: str, names: set[str]) -> str:
    note = PurePosixPath(name).with_suffix(".txt").as_posix()
    if note not in names:
        return ""
    try:
        return " ".join((folder / note).read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError:
        raise Refusal(f"the caption {str(folder / note)!r} is not UTF-8: save it again in UTF-8") from None


def _metadata(path: Path) -> dict[str, str]:
    captions: dict[str, str] = {}
    for number, row in read_jsonl(path):
        name = row.get("file_name")
        if not isinstance(name, str) or not name or PurePosixPath(name).is_absolute() or ".." in name.split("/"):
            raise Refusal(
                f"line {number} of {str(path)!r} has file_name {name!r}: give an image's path, relative to the folder"
            )
        text = next((row[key] for key in CAPTION_KEYS if row.get(key) is not None), "")
        if not isinstance(text, str):
            raise Refusal(f"line {number} of {str(path)!r} has a caption of type {type(text).__name__}: make it a text")
        captions[PurePosixPath(name).as_posix()] = " ".join(text.split())
    return captions
