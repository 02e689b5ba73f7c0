"""What an encoder said, on disk: entries of named tensors, addressed by what was encoded.

    entries = EncodingCache(root, identity)
    with EncodingCacheWriter(entries) as writer:
        for text in texts:
            if text_key(text) not in entries: writer.add(text_key(text), tensors_of(text))
    entries[text_key("a cat")]

ROOT/hashes.json                  hashes of large files, remembered by path, size and time of change
     text-0f1e2d3c4b5a6978/       one folder for each encoder: runs that share it share its entries
         index.json               which encoder that is, and the length of every shard
         shard-00000.safetensors  up to SHARD entries; tensors are named KEY/NAME

The index alone says what is complete: it is rewritten after each shard, so whatever a killed run leaves beside it is
ignored and overwritten. A shard that is not what the index says is dropped with a warning, and its entries are missing.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from stepdistill.data.latents.latent_shards import MAX_MAPPED_SHARDS
from stepdistill.data.latents.shard_index import INDEX, shard_name
from stepdistill.files.atomic import file_hash, write_atomically

log = logging.getLogger(__name__)

SCHEMA = 1
ENTRIES_PER_SHARD = 256
"""Entries in a shard; as many at most are lost when the process is killed."""
HASHES_FILE = "hashes.json"


@dataclass(frozen=True)
class EncoderIdentity:
    """Which encoder the entries are of: two that are equal say the same of the same input.

    Attributes:
        kind: what is encoded, prompts or images.
        family: registered name.
        dtype: in which the encoder runs.
        files: name in the checkpoint -> SHA-256, of its weights, configs and tokenizers.
    """

    kind: Literal["text", "latents"]
    family: str
    dtype: str
    files: Mapping[str, str]

    @property
    def folder(self) -> str:
        """Name of the folder of its entries."""
        return f"{self.kind}-{_digest(json.dumps(asdict(self), sort_keys=True))[:16]}"

    def difference(self, other: EncoderIdentity) -> str:
        """In words, where two of one kind differ; "" where they do not."""
        told = [
            f"{name} is {mine} and was {theirs}"
            for name, mine, theirs in (("family", self.family, other.family), ("dtype", self.dtype, other.dtype))
            if mine != theirs
        ]
        names = sorted({**self.files, **other.files})
        changed = [name for name in names if self.files.get(name) != other.files.get(name)]
        return ", ".join([*told, *([f"{', '.join(changed)} changed"] if changed else [])])


def text_key(text: str) -> str:
    """Key of a prompt."""
    return _digest(f"text\x1f{text}")


def null_key(negative_prompt: str) -> str:
    """Key of the unconditional branch: a family may make it of something else than the encoded prompt."""
    return _digest(f"null\x1f{negative_prompt}")


def image_key(content: str, size: tuple[int, int], flipped: bool) -> str:
    """Key of an image file cropped at its centre: hash of its content, (height, width) in pixels, mirrored or not."""
    return _digest(f"image\x1f{content}\x1f{size[0]}x{size[1]}\x1f{flipped}")


class FileHashes:
    """SHA-256 of files, computed once for each (path, size, time of change) and remembered in a folder.

    Args:
        folder: where `hashes.json` is; a missing or malformed one is an empty one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._hashes = _read_hashes(folder)
        self._new_hashes: dict[str, tuple[int, int, str]] = {}

    def hash_of(self, path: Path) -> str:
        """The file's hash. Raises OSError where it cannot be read."""
        real = path.resolve()
        facts = real.stat()
        size, changed, found = self._hashes.get(str(real), (-1, -1, ""))
        if (size, changed) != (facts.st_size, facts.st_mtime_ns):
            found = file_hash(real)
            self._new_hashes[str(real)] = self._hashes[str(real)] = facts.st_size, facts.st_mtime_ns, found
        return found

    def save(self) -> None:
        """Remember what was computed; others may do so at the same time."""
        if not self._new_hashes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / f"{HASHES_FILE}.lock"):
            merged = {**_read_hashes(self.folder), **self._new_hashes}
            write_atomically(self.folder / HASHES_FILE, json.dumps(merged).encode())
        self._new_hashes = {}


class _EntryLocation(NamedTuple):
    """Shard of an entry, and names of its tensors."""

    shard: str
    parts: tuple[str, ...]


class EncodingCache:
    """Reads the entries of one encoder; a folder that is not there yet has none.

    Safe to read from several threads. An entry is a dictionary of tensors, on the CPU, by the names it was added with.

    Args:
        root: the cache, which may hold the entries of other encoders too.
        identity: of the encoder.
    """

    def __init__(self, root: Path, identity: EncoderIdentity) -> None:
        self.root, self.identity = root, identity
        self.path = root / identity.folder
        self.shards: dict[str, int] = {}
        self._entry_locations: dict[str, _EntryLocation] = {}
        self._opened = lru_cache(MAX_MAPPED_SHARDS)(safe_open)
        self.reload()

    def __len__(self) -> int:
        return len(self._entry_locations)

    def __contains__(self, key: str) -> bool:
        return key in self._entry_locations

    def __getitem__(self, key: str) -> dict[str, Tensor]:
        place = self._entry_locations[key]
        shard = self._opened(self.path / place.shard, framework="pt")
        # clones: what is done to an entry must not reach the mapped shard
        return {part: shard.get_tensor(f"{key}/{part}").clone() for part in place.parts}

    def reload(self) -> None:
        """Read the index and the headers of the shards; what does not fit it is left out, with a warning."""
        self.shards, self._entry_locations = {}, {}
        self._opened.cache_clear()
        if not (self.path / INDEX).is_file():
            return
        listed = _read_index(self.path / INDEX, self.identity)
        if listed is None:
            log.warning("%s is damaged: its entries are made anew", self.path / INDEX)
            return
        for name, size in listed.items():
            try:
                names = self._names(name, size)
            except (SafetensorError, OSError) as error:
                log.warning("dropping %s (%s): its entries are made anew", self.path / name, _one_line(error))
                continue
            self.shards[name] = size
            self._entry_locations |= _entry_locations(name, names)

    def add_shard(self, name: str, size: int, names: Iterable[str]) -> None:
        """Take in a shard of `size` bytes and these tensors that was just written, and say so in the index."""
        shards = {**self.shards, name: size}
        content = {"schema": SCHEMA, "identity": asdict(self.identity), "shards": shards}
        write_atomically(self.path / INDEX, (json.dumps(content, indent=2) + "\n").encode())
        self.shards = shards
        self._opened.cache_clear()
        self._entry_locations |= _entry_locations(name, names)

    def previous_identity(self) -> EncoderIdentity | None:
        """The encoder of the same kind that entries were last made of, where it is another one."""
        pattern = f"{self.identity.kind}-*/{INDEX}"
        others = [path for path in self.root.glob(pattern) if path.parent != self.path]
        for path in sorted(others, key=lambda path: -path.stat().st_mtime_ns):
            if (found := _read_identity(path)) is not None:
                return found
        return None

    def _names(self, name: str, size: int) -> list[str]:
        path = self.path / name
        if path.stat().st_size != size:
            raise OSError(f"{path.stat().st_size} bytes where {size} were written")
        with safe_open(path, framework="pt") as shard:
            return list(shard.keys())


class EncodingCacheWriter:
    """Adds entries, shard by shard. Leaving the `with` block, even by an exception, writes what is pending.

    Entering waits until no other process writes entries of this encoder, and then knows what that one has added.
    """

    def __init__(self, entries: EncodingCache) -> None:
        self.entries = entries
        self._lock = FileLock(entries.root / f"{entries.path.name}.lock")
        self._pending: dict[str, dict[str, Tensor]] = {}

    def __enter__(self) -> EncodingCacheWriter:
        self.entries.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            log.info("another process is filling %s: waiting for it", self.entries.path)
            self._lock.acquire()
        for stale in self.entries.path.glob("*.tmp"):
            stale.unlink()
        self.entries.reload()
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._flush()
        finally:
            self._lock.release()

    def add(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Add an entry; a tensor is stored in its own dtype."""
        # clones: safetensors refuses tensors that share memory, such as rows of one batch
        self._pending[key] = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        if len(self._pending) >= ENTRIES_PER_SHARD:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        number = 0
        while shard_name(number) in self.entries.shards:
            number += 1
        name = shard_name(number)
        tensors = {f"{key}/{part}": tensor for key, entry in self._pending.items() for part, tensor in entry.items()}
        content = save(tensors)
        write_atomically(self.entries.path / name, content)
        self.entries.add_shard(name, len(content), tensors)
        self._pending = {}


def _entry_locations(shard: str, names: Iterable[str]) -> dict[str, _EntryLocation]:
    """Where entries are, by key, given the names of all tensors of a shard."""
    parts: dict[str, list[str]] = {}
    for name in names:
        key, _, part = name.partition("/")
        parts.setdefault(key, []).append(part)
    shared: dict[_EntryLocation, _EntryLocation] = {}  # entries of an encoder are alike, and there may be millions
    places = {key: _EntryLocation(shard, tuple(found)) for key, found in parts.items()}
    return {key: shared.setdefault(place, place) for key, place in places.items()}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _read_hashes(folder: Path) -> dict[str, tuple[int, int, str]]:
    try:
        content = json.loads((folder / HASHES_FILE).read_text(encoding="utf-8"))
        return {str(path): (int(size), int(changed), str(found)) for path, (size, changed, found) in content.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _read_index(path: Path, identity: EncoderIdentity) -> dict[str, int] | None:
    """Shard name -> bytes; None where the index is malformed, of another schema or of another encoder."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        shards = {str(name): int(size) for name, size in content["shards"].items()}
        fits = content["schema"] == SCHEMA and content["identity"] == asdict(identity)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return shards if fits and all(Path(name).name == name for name in shards) else None


def _read_identity(path: Path) -> EncoderIdentity | None:
    try:
        return EncoderIdentity(**json.loads(path.read_text(encoding="utf-8"))["identity"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
