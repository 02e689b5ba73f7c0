"""Draws without the independence from the layout of the work, for closed forms on large batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepdistill.diffusion.draws import Draws, generator


class WholeBatchDraws(Draws):
    """One stream for the whole batch: no layout to be independent of here, and 100 times fewer generators."""

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        stream = generator(self.seed, self.step, self.role, purpose)
        return torch.randn(len(self.samples), *shape, generator=stream, dtype=self.dtype)

    def uniform(self, purpose: str) -> Tensor:
        stream = generator(self.seed, self.step, self.role, purpose)
        return torch.rand(len(self.samples), generator=stream, dtype=torch.float64)
