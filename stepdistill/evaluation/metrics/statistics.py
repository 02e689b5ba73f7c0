"""Mean and covariance of features, accumulated batch by batch in float64."""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stepdistill.errors import UserError
from stepdistill.files.atomic import write_atomically


class FeatureStatistics:
    """Count, mean and covariance of a stream of feature vectors (Chan et al. 1983: stable, and mergeable)."""

    def __init__(self, dimension: int) -> None:
        self.count = 0
        self.mean = np.zeros(dimension)
        self._scatter = np.zeros((dimension, dimension))
        self._count_unknown = False

    @classmethod
    def of(cls, features: NDArray[np.floating]) -> FeatureStatistics:
        """The statistics of ``features`` (N, D)."""
        statistics = cls(features.shape[1])
        statistics.update(features)
        return statistics

    @classmethod
    def from_batches(cls, parts: Iterable[NDArray[np.floating]], rows: int = 512) -> FeatureStatistics | None:
        """Computes the statistics of a stream of (n, D), or None if it is empty.

        Features are added `rows` at a time, because each update costs a D x D product.
        """
        statistics: FeatureStatistics | None = None
        waiting: list[NDArray[np.floating]] = []
        held = 0
        for part in parts:
            statistics = statistics or cls(part.shape[1])
            waiting.append(part)
            held += len(part)
            if held >= rows:
                statistics.update(np.concatenate(waiting))
                waiting, held = [], 0
        if statistics is not None and waiting:
            statistics.update(np.concatenate(waiting))
        return statistics

    @property
    def covariance(self) -> NDArray[np.float64]:
        """The unbiased covariance (D, D)."""
        if self._count_unknown:
            return self._scatter
        if self.count < 2:
            raise ValueError(f"a covariance needs two feature vectors or more; {self.count} came in")
        return self._scatter / (self.count - 1)

    def update(self, features: NDArray[np.floating]) -> None:
        """Adds ``features`` (N, D)."""
        self._require_count()
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features of shape {features.shape} came in; (N, {len(self.mean)}) are wanted")
        if len(features) == 0:
            return
        x = np.asarray(features, dtype=np.float64)
        mean = x.mean(axis=0)
        self._combine(len(x), mean, x - mean)

    def merge(self, other: FeatureStatistics) -> None:
        """Adds everything that ``other`` has accumulated."""
        self._require_count()
        other._require_count()
        if other.count > 0:
            self._scatter += other._scatter
            self._combine(other.count, other.mean, np.zeros((0, len(self.mean))))

    def _require_count(self) -> None:
        if self._count_unknown:
            raise ValueError("statistics without a count, from another library's file, cannot be added to")

    def _combine(self, count: int, mean: NDArray[np.float64], centred: NDArray[np.float64]) -> None:
        """Adds `count` vectors of this mean; `centred` are those whose scatter is not counted yet."""
        total, shift = self.count + count, mean - self.mean
        # the shift between the means is one more row, so that a single D x D product adds everything
        rows = np.vstack([centred, shift * np.sqrt(self.count * count / total)])
        self._scatter += rows.T @ rows
        self.mean = self.mean + shift * (count / total)
        self.count = total

    def save(self, path: str | Path, record: dict[str, str] | None = None, **extra: NDArray[np.generic]) -> None:
        """Writes an npz with `mu`, `sigma` (as clean-fid and pytorch-fid read), `count`, `record` and further arrays.

        The file is written completely or not at all; `.npz` is appended to a name without it, as numpy does.
        """
        text = np.array(json.dumps(record or {}, sort_keys=True))
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            mu=self.mean,
            sigma=self.covariance,
            count=np.int64(self.count),
            record=text,
            **extra,  # type: ignore[arg-type]
        )
        name = str(path)
        write_atomically(Path(name if name.endswith(".npz") else name + ".npz"), buffer.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> FeatureStatistics:
        """Reads what :meth:`save`, clean-fid or pytorch-fid wrote. The other two record no count, which is then 0.

        Raises:
            UserError: missing, not an npz, without `mu` and `sigma`, or of shapes that do not fit.
        """
        return load_statistics_file(path).statistics


@dataclass(frozen=True)
class StatisticsFile:
    """A statistics file.

    Attributes:
        record: how the features were made; empty for other libraries' files.
        features: (N, D), or None if the file has none.
    """

    statistics: FeatureStatistics
    record: dict[str, str]
    features: NDArray[np.float32] | None


def load_statistics_file(path: str | Path) -> StatisticsFile:
    """Reads everything in a statistics file. Raises as `FeatureStatistics.load`."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there are no statistics {str(path)!r}: check the path")
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = dict(loaded) if isinstance(loaded, np.lib.npyio.NpzFile) else {}
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(
            f"the statistics {str(path)!r} cannot be read ({error}): give an .npz with 'mu' and 'sigma'"
        ) from None
    if not {"mu", "sigma"} <= set(arrays):
        raise UserError(
            f"{str(path)!r} holds {sorted(arrays) or 'one bare array'} and 'mu' and 'sigma' are wanted: save them with "
            "clean-fid, pytorch-fid or stepdistill"
        )
    mean, covariance = np.asarray(arrays["mu"], dtype=np.float64), np.asarray(arrays["sigma"], dtype=np.float64)
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(
            f"{str(path)!r} has mu of shape {mean.shape} and sigma of {covariance.shape}: they do not fit each other"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{str(path)!r} holds NaN or infinity: measure it again")
    try:
        record = json.loads(str(arrays["record"])) if "record" in arrays else {}
        count = int(arrays["count"]) if "count" in arrays else 0
    except (ValueError, TypeError) as error:
        raise UserError(f"{str(path)!r} has an unreadable record or count ({error}): measure it again") from None
    statistics = FeatureStatistics(len(mean))
    statistics.count, statistics.mean = count, mean
    # without a count the covariance is stored as if of two vectors; such statistics cannot be merged
    statistics._scatter = covariance * (max(count, 2) - 1)
    statistics._count_unknown = count == 0
    features = arrays["features"].astype(np.float32) if "features" in arrays else None
    return StatisticsFile(statistics, record, features)
