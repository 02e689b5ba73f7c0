"""Random numbers as a function of where they are used, never of how the work is laid out.

A per-sample draw depends on (seed, step, role, purpose, global sample index), a batch-level draw on (seed, step, role,
purpose). Micro-batches, processes and restarts therefore cannot change a run: 4 x 1 equals 1 x 4, two processes equal one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any sequence of integers and words, stable across platforms and versions.

    torch's CPU generator uses the low 32 bits of it: two unrelated streams of a long run may coincide, which is harmless.
    """
    digest = blake2b("\x1f".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded from `parts`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


@dataclass(frozen=True)
class Draws:
    """The random streams of one micro-batch.

    Attributes:
        seed: the run's seed.
        step: iteration (or any counter that names the batch).
        role: whose update draws.
        samples: global index of every sample of this micro-batch, length B.
        device: where drawn tensors are put (they are drawn on the CPU, so that every device draws alike).
    """

    seed: int
    step: int
    role: str
    samples: Sequence[int]
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32

    def for_role(self, role: str) -> Draws:
        """The streams of another role at the same step and samples."""
        return replace(self, role=role)

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Standard normal noise, shape (B, *shape)."""
        # drawn in float64 so that float32 and float64 runs see the same numbers
        rows = [
            torch.randn(tuple(shape), generator=self._stream(purpose, i), dtype=torch.float64) for i in self.samples
        ]
        return torch.stack(rows).to(self.device, self.dtype)

    def uniform(self, purpose: str) -> Tensor:
        """Uniform numbers in [0, 1), float64, shape (B,)."""
        rows = [torch.rand((), generator=self._stream(purpose, i), dtype=torch.float64) for i in self.samples]
        return torch.stack(rows).to(self.device)

    def batch_integer(self, purpose: str, high: int) -> int:
        """One integer in [0, high) for the whole global batch: the same on every process."""
        return int(torch.randint(high, (), generator=generator(self.seed, self.step, self.role, purpose, "batch")))

    def batch_uniform(self, purpose: str) -> float:
        """One number in [0, 1) for the whole global batch."""
        stream = generator(self.seed, self.step, self.role, purpose, "batch")
        return float(torch.rand((), generator=stream, dtype=torch.float64))

    def _stream(self, purpose: str, sample: int) -> torch.Generator:
        return generator(self.seed, self.step, self.role, purpose, sample)
