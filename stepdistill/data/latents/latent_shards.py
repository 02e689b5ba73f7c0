"""Latents that a teacher or a student has drawn, on disk: the data of methods that learn from pairs or samples.

    with ShardWriter("pairs", "pairs", fingerprint) as writer:
        for start in range(writer.completed, count, batch): writer.write(seeds, latents, prompts)
    item = TensorFolder("pairs")[0]

A folder holds `index.json` and safetensors shards. The index alone says what is complete: it is rewritten after each
shard, so whatever a killed run leaves beside it is ignored and overwritten. Noise is not stored: `noise_for` makes it.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from stepdistill.config.collection import CollectionKind, StoredDtype
from stepdistill.data.latents.shard_index import (
    DTYPE_BY_SAFETENSORS_NAME,
    INDEX,
    Fingerprint,
    Index,
    find_shard_fault,
    shard_columns,
    shard_name,
)
from stepdistill.errors import UserError
from stepdistill.files.atomic import write_atomically

log = logging.getLogger(__name__)

MAX_MAPPED_SHARDS = 4096
"""Shards that stay mapped, of each folder; a process may hold some sixty thousand mappings."""


@dataclass(frozen=True)
class PairItem:
    """One latent image, (C, h, w), float32; the seed of its noise; its prompt, an index into the fingerprint's list."""

    seed: int
    latents: Tensor
    prompt: int

    @property
    def noise(self) -> Tensor:
        """Initial noise, (C, h, w), float32."""
        return noise_for(self.seed, self.latents.shape)


def float32_copy(mapped: Tensor) -> Tensor:
    """A tensor of its own: what is done to it must not reach the mapped shard."""
    return mapped.to(torch.float32, copy=True)


def noise_for(seed: int, shape: Sequence[int]) -> Tensor:
    """Standard normal noise of one sample, float32, on the CPU: the one function that collecting and training share."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


class ShardWriter:
    """Appends samples to a folder, shard by shard; a later writer goes on after the last complete one.

    A shard is written to a temporary file, synced and renamed. Leaving the `with` block, even by an exception, writes
    what is pending. One writer a folder at a time.

    Args:
        folder: made where missing.
        kind: `pairs` or `samples`; trajectories have a writer of their own.
        fingerprint: what makes the latents; must agree with what is in the folder already.
        shard_size: samples in a shard; as many at most are lost when the process is killed.
        dtype: that latents are stored in.

    Raises:
        UserError: the folder holds another kind or fingerprint, or a malformed index.
    """

    def __init__(
        self,
        folder: str | Path,
        kind: CollectionKind,
        fingerprint: Fingerprint,
        shard_size: int = 256,
        dtype: StoredDtype = "float16",
    ) -> None:
        if shard_size < 1:
            raise UserError(f"shard_size is {shard_size}: write at least one sample in a shard")
        self.folder = Path(folder)
        self.shard_size = shard_size
        self.folder.mkdir(parents=True, exist_ok=True)
        self._index = Index(kind, fingerprint, dtype=dtype)
        if (self.folder / INDEX).exists():
            self._index = self._resume_index(Index.load(self.folder))
        write_atomically(self.folder / INDEX, self._index.encoded())
        self._shape = self._index.shape
        self._pending: dict[str, list[Tensor]] = {name: [] for name in shard_columns(self._index, 0)}

    @property
    def completed(self) -> int:
        """Samples that are on disk."""
        return self._index.count

    def write(self, seeds: Tensor, latents: Tensor, prompts: Tensor) -> None:
        """Append B samples: seeds (B,) and prompt indices (B,), integers; latents (B, C, h, w).

        Raises:
            UserError: shapes that do not fit each other or the folder, latents that the stored dtype cannot hold.
        """
        if latents.ndim != 4 or not seeds.shape == prompts.shape == (len(latents),):
            given = f"{tuple(seeds.shape)}, {tuple(latents.shape)} and {tuple(prompts.shape)}"
            raise UserError(f"seeds, latents and prompts have shapes {given}: make them (B,), (B, C, h, w) and (B,)")
        self._append({"seed": seeds, "latents": latents, "prompt": prompts}, tuple(latents.shape[1:]))

    def _append(self, rows: Mapping[str, Tensor], shape: tuple[int, ...]) -> None:
        """Rows of every column; latents are of `shape`. Raises as `write`."""
        if shape != (self._shape or shape):
            held = f"{str(self.folder)!r} holds {self._shape}"
            raise UserError(f"latents of shape {shape} were given, but {held}: collect each size in its own folder")
        codes = {name: code for name, (code, _) in shard_columns(self._index, 0).items()}
        stored = {
            name: tensor.detach().to("cpu", DTYPE_BY_SAFETENSORS_NAME[codes[name]]) for name, tensor in rows.items()
        }
        if not all(bool(tensor.isfinite().all()) for tensor in stored.values()):
            raise UserError(
                f"some latents are not finite in {self._index.dtype}: check the sampler, or run the network in float32"
            )
        self._shape = shape
        for name, tensor in stored.items():
            self._pending[name].extend(tensor.unbind())
        while len(self._pending["seed"]) >= self.shard_size:
            self._flush()

    def close(self) -> None:
        """Write what is pending as a last, smaller shard."""
        if self._pending["seed"]:
            self._flush()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _flush(self) -> None:
        tensors = {name: torch.stack(rows[: self.shard_size]) for name, rows in self._pending.items()}
        write_atomically(self.folder / shard_name(len(self._index.shards)), save(tensors))
        index = replace(self._index, shape=self._shape, shards=(*self._index.shards, len(tensors["seed"])))
        write_atomically(self.folder / INDEX, index.encoded())
        # only now: an error above leaves the samples pending and the index as it was
        self._index = index
        self._pending = {name: rows[self.shard_size :] for name, rows in self._pending.items()}

    def _resume_index(self, found: Index) -> Index:
        ours = self._index
        difference = ours.fingerprint.difference(found.fingerprint)
        if ours.kind != found.kind:
            difference = f"kind is {ours.kind!r} here and {found.kind!r} there"
        elif ours.dtype != found.dtype:
            difference = f"dtype is {ours.dtype!r} here and {found.dtype!r} there"
        if difference is not None:
            raise UserError(f"{str(self.folder)!r} was collected otherwise ({difference}): name another or delete it")
        for stale in self.folder.glob("*.tmp"):
            stale.unlink()
        kept = found.shards
        for number in range(len(kept)):
            if (fault := find_shard_fault(self.folder, found, number)) is not None:
                kept = found.shards[:number]
                lost = f"{found.count - sum(kept)} of {found.count} samples"
                log.warning("dropping %s (%s), and with it %s", self.folder / shard_name(number), fault, lost)
                break
        return replace(ours, shards=kept, shape=found.shape if kept else None)


class TensorFolder:
    """Reads what a `ShardWriter` wrote; the headers of all shards are checked at once, latents are read on demand.

    Attributes: `kind`, `fingerprint`, and `shape`, which is (C, h, w) of the latents.

    Raises:
        UserError: no such folder, nothing collected in it, a shard that is missing, cut short or of another shape.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / INDEX).is_file():
            raise UserError(f"{str(self.folder)!r} holds no {INDEX}: make the folder with 'stepdistill collect'")
        self._index = Index.load(self.folder)
        if not self._index.shards:
            raise UserError(f"{str(self.folder)!r} holds no samples yet: run 'stepdistill collect' to its end")
        for number in range(len(self._index.shards)):
            if (fault := find_shard_fault(self.folder, self._index, number)) is not None:
                name = str(self.folder / shard_name(number))
                raise UserError(f"{name!r} is damaged ({fault}): run the same 'stepdistill collect' again to mend it")
        self.kind = self._index.kind
        self.fingerprint = self._index.fingerprint
        self.shape = self._index.shape or ()
        self._ends = tuple(accumulate(self._index.shards))
        self._mapped = lru_cache(MAX_MAPPED_SHARDS)(load_file)

    def __len__(self) -> int:
        return self._index.count

    @property
    def shards(self) -> tuple[Path, ...]:
        """Files, in the order of their samples."""
        return tuple(self.folder / shard_name(number) for number in range(len(self._index.shards)))

    def place(self, index: int) -> tuple[Mapping[str, Tensor], int]:
        """(tensors of its shard, row) of a sample. They are mapped: what is not looked at is not read."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a folder of {len(self)}")
        number = bisect_right(self._ends, index)
        return self._mapped(self.folder / shard_name(number)), index - self._ends[number] + self._index.shards[number]

    def __getitem__(self, index: int) -> PairItem:
        shard, row = self.place(index)
        return PairItem(int(shard["seed"][row]), float32_copy(shard["latents"][row]), int(shard["prompt"][row]))
