"""Latents that a teacher or a student has drawn, on disk: the data of methods that learn from pairs or samples.

    with ShardWriter("pairs", "pairs", fingerprint) as writer:
        for start in range(writer.completed, count, batch): writer.write(seeds, latents, prompts)
    item = TensorFolder("pairs")[0]

A folder holds `index.json` and safetensors shards. The index alone says what is complete: it is rewritten after each
shard, so whatever a killed run leaves beside it is ignored and overwritten. Noise is not stored: `noise_for` makes it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import accumulate
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from stepdistill.errors import Refusal

log = logging.getLogger(__name__)

SCHEMA = 1
INDEX = "index.json"
Kind: TypeAlias = Literal["pairs", "samples"]
"""`pairs`: the latents are where the sampler takes the noise of that seed; `samples`: mere draws."""


@dataclass(frozen=True)
class Fingerprint:
    """What made the latents.

    Attributes:
        model: path or id of the model that drew them.
        guidance: guidance scale w, 1 is off.
        steps: steps of the sampler.
        seed: seed of the collection, from which the seeds of the samples are derived.
        prompts_sha256: of the prompt list that the prompt indices point into.
        resolution: (height, width), pixels.
        sampler: scheduler and transition.
        precision: dtype of the network.
        command: the command that was run; for people, not compared.
    """

    model: str
    guidance: float
    steps: int
    seed: int
    prompts_sha256: str
    resolution: tuple[int, int]
    sampler: str = ""
    precision: str = ""
    command: str = field(default="", compare=False)

    def difference(self, other: Fingerprint) -> str | None:
        """The first field that differs, as `name is A here and B there`; None where all agree."""
        for item in fields(self):
            mine, theirs = vars(self)[item.name], vars(other)[item.name]
            if item.compare and mine != theirs:
                return f"{item.name} is {mine!r} here and {theirs!r} there"
        return None


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


def noise_for(seed: int, shape: Sequence[int]) -> Tensor:
    """Standard normal noise of one sample, float32, on the CPU: the one function that collecting and training share."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Index:
    """What `index.json` says: latents of `shape` (C, h, w), None before the first shard, and samples in each shard."""

    kind: Kind
    fingerprint: Fingerprint
    shape: tuple[int, ...] | None = None
    shards: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        return sum(self.shards)

    def content(self) -> dict[str, object]:
        """The file's content, as JSON types."""
        shape = None if self.shape is None else list(self.shape)
        shards = [{"file": shard_name(i), "count": count} for i, count in enumerate(self.shards)]
        made = {**asdict(self.fingerprint), "resolution": list(self.fingerprint.resolution)}
        head = {"schema": SCHEMA, "kind": self.kind, "count": self.count, "shape": shape, "dtype": "float16"}
        return {**head, "shards": shards, "fingerprint": made}

    def save(self, folder: Path) -> None:
        write_atomically(folder / INDEX, (json.dumps(self.content(), indent=2) + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> Index:
        """The index of a folder that has one; a malformed one, or one of another schema, is refused."""
        path = folder / INDEX
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            made, shape = content["fingerprint"], content["shape"]
            fingerprint = Fingerprint(**{**made, "resolution": tuple(made["resolution"])})
            counts = tuple(shard["count"] for shard in content["shards"])
            index = cls(content["kind"], fingerprint, None if shape is None else tuple(shape), counts)
            faithful = index.content() == content and index.kind in get_args(Kind)
        except (ValueError, TypeError, KeyError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise Refusal(f"{str(path)!r} is no index of collected latents ({reason}): collect them anew") from None
        if not faithful:
            raise Refusal(f"{str(path)!r} contradicts itself or schema {SCHEMA}: collect the latents anew")
        return index


class ShardWriter:
    """Appends samples to a folder, shard by shard; a later writer goes on after the last complete one.

    A shard is written to a temporary file, synced and renamed. Leaving the `with` block, even by an exception, writes
    what is pending. One writer a folder at a time.

    Args:
        folder: made where missing.
        kind: `pairs` or `samples`.
        fingerprint: what makes the latents; must agree with what is in the folder already.
        shard_size: samples in a shard; as many at most are lost when the process is killed.

    Raises:
        Refusal: the folder holds another kind or fingerprint, or a malformed index.
    """

    def __init__(self, folder: str | Path, kind: Kind, fingerprint: Fingerprint, shard_size: int = 256) -> None:
        if shard_size < 1:
            raise Refusal(f"shard_size is {shard_size}: write at least one sample in a shard")
        self.folder = Path(folder)
        self.shard_size = shard_size
        self.folder.mkdir(parents=True, exist_ok=True)
        self._index = Index(kind, fingerprint)
        if (self.folder / INDEX).exists():
            self._index = self._resumed(Index.load(self.folder))
        self._index.save(self.folder)
        self._shape = self._index.shape
        self._pending: dict[str, list[Tensor]] = {"seed": [], "latents": [], "prompt": []}

    @property
    def completed(self) -> int:
        """Samples that are on disk."""
        return self._index.count

    def write(self, seeds: Tensor, latents: Tensor, prompts: Tensor) -> None:
        """Append B samples: seeds (B,) and prompt indices (B,), integers; latents (B, C, h, w), stored as float16.

        Raises:
            Refusal: shapes that do not fit each other or the folder, latents that float16 cannot hold.
        """
        if latents.ndim != 4 or not seeds.shape == prompts.shape == (len(latents),):
            given = f"{tuple(seeds.shape)}, {tuple(latents.shape)} and {tuple(prompts.shape)}"
            raise Refusal(f"seeds, latents and prompts have shapes {given}: make them (B,), (B, C, h, w) and (B,)")
        shape = tuple(latents.shape[1:])
        if shape != (self._shape or shape):
            held = f"{str(self.folder)!r} holds {self._shape}"
            raise Refusal(f"latents of shape {shape} were given, but {held}: collect each size in its own folder")
        half = latents.detach().to("cpu", torch.float16)
        if not half.isfinite().all():
            raise Refusal("some latents are not finite in float16: check the sampler, or run the network in float32")
        self._shape = shape
        rows = {"seed": seeds.to("cpu", torch.int64), "latents": half, "prompt": prompts.to("cpu", torch.int64)}
        for name, tensor in rows.items():
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
        index.save(self.folder)
        # only now: an error above leaves the samples pending and the index as it was
        self._index = index
        self._pending = {name: rows[self.shard_size :] for name, rows in self._pending.items()}

    def _resumed(self, found: Index) -> Index:
        ours = self._index
        difference = ours.fingerprint.difference(found.fingerprint)
        if ours.kind != found.kind:
            difference = f"kind is {ours.kind!r} here and {found.kind!r} there"
        if difference is not None:
            raise Refusal(f"{str(self.folder)!r} was collected otherwise ({difference}): name another or delete it")
        for stale in self.folder.glob("*.tmp"):
            stale.unlink()
        kept = found.shards
        for number in range(len(kept)):
            if (fault := fault_of(self.folder, found, number)) is not None:
                kept = found.shards[:number]
                lost = f"{found.count - sum(kept)} of {found.count} samples"
                log.warning("dropping %s (%s), and with it %s", self.folder / shard_name(number), fault, lost)
                break
        return replace(ours, shards=kept, shape=found.shape if kept else None)


class TensorFolder:
    """Reads what a `ShardWriter` wrote; the headers of all shards are checked at once, latents are read on demand.

    Attributes: `kind`, `fingerprint`, and `shape`, which is (C, h, w) of the latents.

    Raises:
        Refusal: no such folder, nothing collected in it, a shard that is missing, cut short or of another shape.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / INDEX).is_file():
            raise Refusal(f"{str(self.folder)!r} holds no {INDEX}: make the folder with 'stepdistill collect'")
        self._index = Index.load(self.folder)
        if not self._index.shards:
            raise Refusal(f"{str(self.folder)!r} holds no samples yet: run 'stepdistill collect' to its end")
        for number in range(len(self._index.shards)):
            if (fault := fault_of(self.folder, self._index, number)) is not None:
                name = str(self.folder / shard_name(number))
                raise Refusal(f"{name!r} is damaged ({fault}): run the same 'stepdistill collect' again to mend it")
        self.kind = self._index.kind
        self.fingerprint = self._index.fingerprint
        self.shape = self._index.shape or ()
        self._ends = tuple(accumulate(self._index.shards))

    def __len__(self) -> int:
        return self._index.count

    def __getitem__(self, index: int) -> PairItem:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a folder of {len(self)}")
        number = bisect_right(self._ends, index)
        row = index - self._ends[number] + self._index.shards[number]
        # opened anew each time: mapping a shard is cheap, and nothing is shared between threads or forked processes
        with safe_open(self.folder / shard_name(number), framework="pt") as shard:
            seed, latents, prompt = (shard.get_slice(name)[row : row + 1][0] for name in ("seed", "latents", "prompt"))
        return PairItem(int(seed), latents.float(), int(prompt))


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def fault_of(folder: Path, index: Index, number: int) -> str | None:
    """What is wrong with a shard, told from its header and length alone; None where nothing is."""
    count = index.shards[number]
    wanted = {"seed": ("I64", [count]), "latents": ("F16", [count, *(index.shape or ())]), "prompt": ("I64", [count])}
    try:
        with safe_open(folder / shard_name(number), framework="pt") as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118
            found = {name: (part.get_dtype(), list(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        return " ".join(str(error).split())
    return None if found == wanted else f"it holds {found}, not {wanted}"


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary file beside `path`, sync, rename: `path` is the old file or the new, never half of one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    if os.name == "posix":
        # the rename itself lives in the folder
        handle = os.open(path.parent, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
