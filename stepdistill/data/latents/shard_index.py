"""The `index.json` of a folder of collected latents, and the checks of its shards."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import get_args

import torch
from safetensors import SafetensorError, safe_open

from stepdistill.config.collection import CollectionKind, StoredDtype
from stepdistill.errors import UserError

SCHEMA = 1
INDEX = "index.json"
STORED_DTYPES: dict[StoredDtype, tuple[torch.dtype, str]] = {
    "float16": (torch.float16, "F16"),
    "bfloat16": (torch.bfloat16, "BF16"),
    "float32": (torch.float32, "F32"),
}
"""Maps a name in the config to the dtype of stored latents and its name in safetensors."""
DTYPE_BY_SAFETENSORS_NAME = {
    "I64": torch.int64,
    "F64": torch.float64,
    **{code: dtype for dtype, code in STORED_DTYPES.values()},
}


@dataclass(frozen=True)
class Fingerprint:
    """Identifies how latents were made.

    Attributes:
        model: path or hub id of the model that sampled them.
        guidance: guidance scale w, 1 is off.
        steps: steps of the sampler.
        seed: seed of the collection, from which the seeds of the samples are derived.
        prompts_sha256: of the prompt list that the prompt indices point into.
        resolution: (height, width), pixels.
        sampler: scheduler and transition.
        precision: dtype of the network.
        command: the command that was run; for people, not compared.
        negative_prompt: of the unconditional branch; None where it is empty.
        guidance_range, keep: of trajectories: where w is drawn from for each, and the states that are kept of it.
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
    negative_prompt: str | None = None
    guidance_range: tuple[float, float] | None = None
    keep: int | None = None

    def difference(self, other: Fingerprint) -> str | None:
        """The first field that differs, as `name is A here and B there`; None where all agree."""
        for item in fields(self):
            mine, theirs = vars(self)[item.name], vars(other)[item.name]
            if item.compare and mine != theirs:
                return f"{item.name} is {mine!r} here and {theirs!r} there"
        return None


@dataclass(frozen=True)
class Index:
    """What `index.json` says: latents of `shape` (C, h, w), None before the first shard, samples in each shard, and dtype."""

    kind: CollectionKind
    fingerprint: Fingerprint
    shape: tuple[int, ...] | None = None
    shards: tuple[int, ...] = ()
    dtype: StoredDtype = "float16"

    @property
    def count(self) -> int:
        return sum(self.shards)

    def content(self) -> dict[str, object]:
        """The file's content, as JSON types."""
        shape = None if self.shape is None else list(self.shape)
        shards = [{"file": shard_name(i), "count": count} for i, count in enumerate(self.shards)]
        made = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self.fingerprint).items()
            if value is not None
        }
        head = {"schema": SCHEMA, "kind": self.kind, "count": self.count, "shape": shape, "dtype": self.dtype}
        return {**head, "shards": shards, "fingerprint": made}

    def encoded(self) -> bytes:
        """The file."""
        return (json.dumps(self.content(), indent=2) + "\n").encode()

    @classmethod
    def load(cls, folder: Path) -> Index:
        """The index of a folder that has one; a malformed one, or one of another schema, is refused."""
        path = folder / INDEX
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            made, shape = content["fingerprint"], content["shape"]
            pairs = {key: tuple(value) for key, value in made.items() if isinstance(value, list)}
            fingerprint = Fingerprint(**{**made, **pairs})
            counts = tuple(shard["count"] for shard in content["shards"])
            index = cls(content["kind"], fingerprint, None if shape is None else tuple(shape), counts, content["dtype"])
            faithful = (
                index.content() == content and index.kind in get_args(CollectionKind) and index.dtype in STORED_DTYPES
            )
        except (ValueError, TypeError, KeyError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"{str(path)!r} is no index of collected latents ({reason}): collect them anew") from None
        if not faithful:
            raise UserError(f"{str(path)!r} contradicts itself or schema {SCHEMA}: collect the latents anew")
        return index


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def shard_columns(index: Index, count: int) -> dict[str, tuple[str, list[int]]]:
    """Tensors of a shard of `count` samples: name -> (dtype by its name in safetensors, shape)."""
    shape, (_, latents) = list(index.shape or ()), STORED_DTYPES[index.dtype]
    head = {"seed": ("I64", [count]), "prompt": ("I64", [count])}
    if index.kind != "trajectories":
        return {**head, "latents": (latents, [count, *shape])}
    states = [count, index.fingerprint.keep or 0]
    told = {"w": ("F64", [count]), "t": ("F64", states), "plain": ("F32", states)}
    return {**head, **told, "x_t": (latents, [*states, *shape]), "target": (latents, [*states, *shape])}


def find_shard_fault(folder: Path, index: Index, number: int) -> str | None:
    """What is wrong with a shard, told from its header and length alone; None where nothing is."""
    wanted = shard_columns(index, index.shards[number])
    try:
        with safe_open(folder / shard_name(number), framework="pt") as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118
            found = {name: (part.get_dtype(), list(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        return " ".join(str(error).split())
    return None if found == wanted else f"it holds {found}, not {wanted}"
