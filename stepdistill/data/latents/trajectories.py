"""Trajectories of a guided teacher, on disk: states that it walked through, and what it said there.

A sample is one walk of `keep` states; shards and index are those of `data/tensors.py`. What the network saw is stored (x_t on
the schedule's own scale), so that no sampler's scaling need be known. Shards are mapped; reading a state copies that state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from stepdistill.config.collection import StoredDtype
from stepdistill.data.latents.latent_shards import ShardWriter, TensorFolder, float32_copy
from stepdistill.data.latents.shard_index import Fingerprint
from stepdistill.errors import UserError


@dataclass(frozen=True)
class TrajectoryState:
    """One state of one walk.

    Attributes:
        x_t, target: what the network saw, and its guided prediction in its own type, (C, h, w), float32.
        t: native time.
        w: guidance scale of the walk.
        plain: ||pred - target||^2 / ||target||^2 of the prediction without guidance.
        prompt: an index into the fingerprint's list.
    """

    x_t: Tensor
    target: Tensor
    t: float
    w: float
    plain: float
    prompt: int


@dataclass(frozen=True)
class TrajectoryStates:
    """All states of a folder, in the order of their index; fields as of `TrajectoryState`, M rows each, times in float64."""

    x_t: Tensor
    target: Tensor
    t: Tensor
    w: Tensor
    plain: Tensor
    prompt: Tensor


class TrajectoryWriter(ShardWriter):
    """Appends walks to a folder.

    Args:
        fingerprint: with `guidance_range` and `keep`.
        others: as of `ShardWriter`.
    """

    def __init__(
        self, folder: str | Path, fingerprint: Fingerprint, shard_size: int = 16, dtype: StoredDtype = "float16"
    ) -> None:
        super().__init__(folder, "trajectories", fingerprint, shard_size, dtype)

    def __enter__(self) -> TrajectoryWriter:
        return self

    def write_trajectories(self, rows: Mapping[str, Tensor]) -> None:
        """Append B walks of K states: `seed`, `prompt` and `w` (B,), `t` and `plain` (B, K), `x_t` and `target` (B, K, C, h, w).

        Raises:
            UserError: as `write`.
        """
        self._append(rows, tuple(rows["x_t"].shape[2:]))


class TrajectoryFolder:
    """Reads what a `TrajectoryWriter` wrote, state by state: index i is state i % keep of walk i // keep.

    Attributes: `fingerprint`, and `shape`, which is (C, h, w) of the latents.

    Raises:
        UserError: as `TensorFolder`, or the folder holds something else.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = TensorFolder(folder)
        if self._folder.kind != "trajectories":
            raise UserError(
                f"{str(folder)!r} holds {self._folder.kind}, not trajectories: make the folder with 'stepdistill collect trajectories'"
            )
        self.fingerprint, self.shape = self._folder.fingerprint, self._folder.shape
        self.keep = self.fingerprint.keep or 1

    def __len__(self) -> int:
        return len(self._folder) * self.keep

    def __getitem__(self, index: int) -> TrajectoryState:
        if not 0 <= index < len(self):
            raise IndexError(f"state {index} of a folder of {len(self)}")
        shard, row = self._folder.place(index // self.keep)
        x_t, target, t, plain = (shard[name][row, index % self.keep] for name in ("x_t", "target", "t", "plain"))
        w, prompt = float(shard["w"][row]), int(shard["prompt"][row])
        return TrajectoryState(float32_copy(x_t), float32_copy(target), float(t), w, float(plain), prompt)

    def whole(self) -> TrajectoryStates:
        """All states at once, for sets that fit into memory."""
        shards = [load_file(path) for path in self._folder.shards]
        x_t, target, t, plain = (
            torch.cat([s[name] for s in shards]).flatten(0, 1) for name in ("x_t", "target", "t", "plain")
        )
        w, prompt = (torch.cat([s[name] for s in shards]).repeat_interleave(self.keep) for name in ("w", "prompt"))
        return TrajectoryStates(x_t.float(), target.float(), t.double(), w, plain, prompt)
