"""Mean and covariance of features, gathered batch by batch in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class FeatureStatistics:
    """Count, mean and covariance of a stream of feature vectors (Chan et al. 1983: stable, and mergeable)."""

    def __init__(self, dimension: int) -> None:
        self.count = 0
        self.mean = np.zeros(dimension)
        self._scatter = np.zeros((dimension, dimension))

    @classmethod
    def of(cls, features: NDArray[np.floating]) -> FeatureStatistics:
        """The statistics of ``features`` (N, D)."""
        statistics = cls(features.shape[1])
        statistics.update(features)
        return statistics

    @property
    def covariance(self) -> NDArray[np.float64]:
        """The unbiased covariance (D, D)."""
        if self.count < 2:
            raise ValueError(f"a covariance needs two feature vectors or more; {self.count} came in")
        return self._scatter / (self.count - 1)

    def update(self, features: NDArray[np.floating]) -> None:
        """Takes in ``features`` (N, D)."""
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features of shape {features.shape} came in; (N, {len(self.mean)}) are wanted")
        if len(features) == 0:
            return
        x = np.asarray(features, dtype=np.float64)
        mean = x.mean(axis=0)
        self._combine(len(x), mean, (x - mean).T @ (x - mean))

    def merge(self, other: FeatureStatistics) -> None:
        """Takes in all that ``other`` has seen."""
        if other.count > 0:
            self._combine(other.count, other.mean, other._scatter)

    def _combine(self, count: int, mean: NDArray[np.float64], scatter: NDArray[np.float64]) -> None:
        total, shift = self.count + count, mean - self.mean
        self._scatter = self._scatter + scatter + np.outer(shift, shift) * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total

    def save(self, path: str | Path, **extra: NDArray[np.generic]) -> None:
        """Writes ``mean``, ``covariance`` and ``count`` to an npz, with further arrays beside them."""
        np.savez_compressed(path, mean=self.mean, covariance=self.covariance, count=np.int64(self.count), **extra)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | Path) -> FeatureStatistics:
        """What :meth:`save` wrote."""
        with np.load(path, allow_pickle=False) as data:
            statistics = cls(len(data["mean"]))
            statistics.count = int(data["count"])
            statistics.mean = data["mean"]
            statistics._scatter = data["covariance"] * (statistics.count - 1)
        return statistics
