"""A folder of images with captions.

    folder = ImageFolder("photos", size=(1024, 1024), crop="random")
    item = folder.read(7, generator(seed, "data", sample))

Captions are sidecars (`cat.jpg`, `cat.txt`) or `metadata.jsonl` with `file_name` and `text`, `caption` or `prompt`.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal

from stepdistill.data.images.indexed import IndexedImages
from stepdistill.data.images.source import CAPTION_KEYS, IMAGE_SUFFIXES, CropTransform, one_line, pick_caption
from stepdistill.data.prompts import read_jsonl
from stepdistill.errors import UserError


class ImageFolder(IndexedImages):
    """The image files (PNG, JPEG, WebP, AVIF, BMP, GIF, TIFF) below a folder, in the order of their names, cropped to one size.

    Args:
        folder: searched with its subfolders; hidden files are passed over.
        size, crop, flip: see `Framing`.
        max_bad_share: share of unreadable files, of all files, above which reading is refused.
        require_captions: refuse a folder in which an image has no caption.
        caption_column: key of the captions in `metadata.jsonl`; `text`, `caption` or `prompt` by default.

    Raises:
        UserError: missing or empty folder, malformed captions, an option out of range; when reading, too many bad files.
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
        caption_column: str | None = None,
    ) -> None:
        super().__init__(str(folder), CropTransform(size, crop, flip), max_bad_share)
        self.folder = Path(folder)
        captions = _captions(self.folder, (caption_column,) if caption_column is not None else CAPTION_KEYS)
        self.names = tuple(captions)
        self.captions = tuple(captions.values())
        if require_captions and (bare := [name for name, text in captions.items() if not text]):
            raise UserError(
                f"{len(bare)} of {len(captions)} images in {str(self.folder)!r} have no caption, such as {bare[0]!r}: "
                "write a .txt file beside each, or list them in metadata.jsonl"
            )

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files, in order."""
        return tuple(self.folder / name for name in self.names)

    def __len__(self) -> int:
        return len(self.names)

    def name_of(self, index: int) -> str:
        return self.names[index]

    def open(self, index: int) -> BinaryIO:
        return (self.folder / self.names[index]).open("rb")

    def caption_of(self, index: int) -> str:
        return self.captions[index]


def _captions(folder: Path, keys: tuple[str, ...]) -> dict[str, str]:
    """Relative name (with /) -> caption ("" where there is none) of every image, sorted by name."""
    if not folder.is_dir():
        raise UserError(f"there is no image folder {str(folder)!r}: check the path")
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    listed = _metadata(folder / "metadata.jsonl", keys) if "metadata.jsonl" in names else {}
    visible = {name for name in names if not any(part.startswith(".") for part in name.split("/"))}
    # a file that is listed but missing is an image that cannot be read, and is counted as one
    images = sorted({name for name in visible if name.lower().endswith(IMAGE_SUFFIXES)} | listed.keys())
    if not images:
        raise UserError(f"{str(folder)!r} holds no image: put image files there ({', '.join(IMAGE_SUFFIXES)})")
    return {name: listed.get(name) or _sidecar(folder, name, names) for name in images}


def _sidecar(folder: Path, name: str, names: set[str]) -> str:
    note = PurePosixPath(name).with_suffix(".txt").as_posix()
    if note not in names:
        return ""
    try:
        return one_line((folder / note).read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError(f"the caption {str(folder / note)!r} is not UTF-8: save it again in UTF-8") from None


def _metadata(path: Path, keys: tuple[str, ...]) -> dict[str, str]:
    captions: dict[str, str] = {}
    for number, row in read_jsonl(path):
        name = row.get("file_name")
        if not isinstance(name, str) or not name or PurePosixPath(name).is_absolute() or ".." in name.split("/"):
            raise UserError(
                f"line {number} of {str(path)!r} has file_name {name!r}: give an image's path, relative to the folder"
            )
        try:
            captions[PurePosixPath(name).as_posix()] = pick_caption(row, keys)
        except TypeError as error:
            raise UserError(f"line {number} of {str(path)!r} has {error}: make it a text") from None
    return captions
