"""WebDataset shards on this disk: tar files whose members with the same key are one sample.

    images = TarImages("data/part-{000..012}.tar", Framing((1024, 1024)))

`0007.jpg` with `0007.txt`, `0007.caption` or `0007.json` is an image with its caption. The headers are scanned once; from
then on a sample is read by its offset, in any order, so that it is the same whatever the layout of the work and a resumed
run needs no state. A million members are scanned in about a minute, and the index takes 450 bytes a sample.
"""

from __future__ import annotations

import glob
import io
import json
import logging
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from stepdistill.data.images.indexed import IndexedImages
from stepdistill.data.images.source import (
    CAPTION_KEYS,
    IMAGE_SUFFIXES,
    CropTransform,
    one_line,
    pick_caption,
    warn_missing_captions,
)
from stepdistill.errors import UserError

log = logging.getLogger(__name__)

CAPTION_SUFFIXES = (".txt", ".caption", ".json")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Where a member's bytes lie in its shard."""

    suffix: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class TarSample:
    """An image in a shard, and its caption where it has one."""

    shard: Path
    key: str
    image: ByteRange
    text: ByteRange | None


class TarImages(IndexedImages):
    """The images of tar shards, in the order of the shards' names and of their members.

    Samples without an image are left out, and counted in a warning. A caption that is not UTF-8 or not JSON makes its
    sample unreadable.

    Args:
        pattern: a path, a glob pattern, or numbers in braces as in `part-{000..012}.tar`.
        framing, max_bad_share: see `IndexedImages`.
        caption_column: key of the caption in .json members; `text`, `caption` or `prompt` by default.

    Raises:
        UserError: no such shard, a compressed one or no tar file at all, no image in any.
    """

    def __init__(
        self,
        pattern: str,
        crop_transform: CropTransform,
        *,
        max_bad_share: float = 0.05,
        caption_column: str | None = None,
    ) -> None:
        super().__init__(pattern, crop_transform, max_bad_share)
        self.shards = expand_pattern(pattern)
        # a named key is looked for in .json first, since no other member has keys
        self._caption_suffixes = CAPTION_SUFFIXES if caption_column is None else tuple(reversed(CAPTION_SUFFIXES))
        self._keys = CAPTION_KEYS if caption_column is None else (caption_column,)
        self.samples: list[TarSample] = []
        imageless = 0
        for shard in tqdm(self.shards, "tar headers", unit="shard", dynamic_ncols=True, disable=None):
            for key, members in _members(shard).items():
                image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
                text = next((members[suffix] for suffix in self._caption_suffixes if suffix in members), None)
                if image is None:
                    imageless += 1
                else:
                    self.samples.append(TarSample(shard, key, image, text))
        if imageless:
            log.warning("left out %d samples of %s, which have no image", imageless, pattern)
        if not self.samples:
            raise UserError(
                f"the {len(self.shards)} shards {pattern!r} hold no image: put members such as 0001.jpg with 0001.txt into them"
            )
        warn_missing_captions(sum(sample.text is None for sample in self.samples), len(self.samples), pattern)

    def __len__(self) -> int:
        return len(self.samples)

    def name_of(self, index: int) -> str:
        sample = self.samples[index]
        return f"{sample.shard.name}:{sample.key}{sample.image.suffix}"

    def open(self, index: int) -> BinaryIO:
        sample = self.samples[index]
        return io.BufferedReader(_FileSlice(sample.shard, sample.image))

    def caption_of(self, index: int) -> str:
        sample = self.samples[index]
        if sample.text is None:
            return ""
        with _FileSlice(sample.shard, sample.text) as part:
            text = part.readall().decode("utf-8-sig")
        if sample.text.suffix != ".json":
            return one_line(text)
        row = json.loads(text)
        if not isinstance(row, dict):
            raise ValueError(f"its .json is no object but a {type(row).__name__}")
        return pick_caption(row, self._keys)


def is_tar_pattern(source: str) -> bool:
    """Whether a path names tar shards rather than a folder."""
    return re.search(r"\.tar(\.\w+)?$|\.tgz$", source, re.IGNORECASE) is not None


def expand_pattern(pattern: str) -> tuple[Path, ...]:
    """The shards that a pattern names, sorted by name; raises UserError where one is missing."""
    paths: list[Path] = []
    for name in _expand_braces(pattern):
        found = [name] if Path(name).is_file() else glob.glob(name)
        if not found:
            raise UserError(f"there is no tar shard {name!r}: check data.images")
        paths.extend(Path(path) for path in found)
    return tuple(sorted(set(paths)))


def _expand_braces(pattern: str) -> Iterator[str]:
    """`a-{08..10}` -> `a-08`, `a-09`, `a-10`; the width is that of the first number, as in WebDataset."""
    braces = _RANGE.search(pattern)
    if braces is None:
        yield pattern
        return
    first, last = braces.groups()
    for number in range(int(first), int(last) + 1):
        yield from _expand_braces(f"{pattern[: braces.start()]}{number:0{len(first)}d}{pattern[braces.end() :]}")


def _members(shard: Path) -> dict[str, dict[str, ByteRange]]:
    """Key -> suffix -> member, in the order of the shard; of two members with one name the later, as `tar -x` has it."""
    found: dict[str, dict[str, ByteRange]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in _complete_members(tar, shard):
                folder, slash, name = member.name.rpartition("/")
                stem, dot, suffix = name.partition(".")
                if stem:
                    extent = ByteRange(dot + suffix.lower(), member.offset_data, member.size)
                    found.setdefault(folder + slash + stem, {})[extent.suffix] = extent
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"{str(shard)!r} is no uncompressed tar file ({error}): unpack .tar.gz shards first, or write it again"
        ) from None
    return found


def _complete_members(tar: tarfile.TarFile, shard: Path) -> Iterator[tarfile.TarInfo]:
    """The files in an open tar file that are there to their last byte; a shard that is cut short is named in a warning."""
    length, end, count = shard.stat().st_size, 0, 0
    while True:
        try:
            member = tar.next()
        except tarfile.TarError:
            break
        if member is None or member.offset_data + member.size > length:
            break
        end = -(-(member.offset_data + member.size) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if member.isfile():
            count += 1
            yield member
    # tarfile takes a torn header for the end: a whole shard ends with blocks of zeros
    with shard.open("rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            log.warning("the tar shard %s breaks off after its first %d members, and these are used", shard, count)


class _FileSlice(io.RawIOBase):
    """A stretch of a file as a file of its own, with a handle of its own: threads share no position."""

    def __init__(self, path: Path, extent: ByteRange) -> None:
        self._file = path.open("rb", buffering=0)
        self._extent, self._position = extent, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._extent.size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self._file.seek(self._extent.offset + self._position)
        wanted = max(0, min(len(buffer), self._extent.size - self._position))
        count = self._file.readinto(memoryview(buffer)[:wanted]) or 0
        self._position += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
