"""Maximum mean discrepancies: KID (unbiased, for few images) and CMMD (CLIP embeddings)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CHUNK = 1024


@dataclass(frozen=True)
class KIDResult:
    """Mean and standard deviation over subsets; unbiased, so it may be negative. Reports multiply by 1000."""

    mean: float
    std: float
    subset_size: int


def kernel_inception_distance(
    samples: NDArray[np.floating],
    reference: NDArray[np.floating],
    rng: np.random.Generator,
    *,
    subsets: int = 100,
    subset_size: int | None = None,
) -> KIDResult:
    """KID (Binkowski et al. 2018): MMD^2 under (x.y / d + 1)^3 over random subsets of (N, D) and (M, D).

    Args:
        subset_size: 1000, or all where there are fewer, by default.

    Raises:
        ValueError: a subset larger than a set.
    """
    fewest = min(len(samples), len(reference))
    size = min(1000, fewest) if subset_size is None else subset_size
    if not 2 <= size <= fewest:
        raise ValueError(
            f"KID subsets of {size} were asked of {len(samples)} and {len(reference)} images: take 2 to {fewest}"
        )
    values = []
    for _ in range(subsets):
        x = np.asarray(samples[rng.choice(len(samples), size, replace=False)], dtype=np.float64)
        y = np.asarray(reference[rng.choice(len(reference), size, replace=False)], dtype=np.float64)
        values.append(_polynomial_mmd(x, y))
    return KIDResult(float(np.mean(values)), float(np.std(values)), size)


def cmmd(samples: NDArray[np.floating], reference: NDArray[np.floating], sigma: float = 10.0) -> float:
    """CMMD (Jayasumana et al., CVPR 2024): biased MMD^2 of normalised CLIP embeddings under a Gaussian kernel, times 1000.

    Raises:
        ValueError: rows that are not of unit length.
    """
    for name, x in (("samples", samples), ("reference", reference)):
        lengths = np.linalg.norm(x, axis=1)
        if np.abs(lengths - 1.0).max() > 1e-3:
            raise ValueError(
                f"CMMD takes embeddings of unit length and the {name} reach {lengths.max():.3g}: use clip features"
            )
    xx, yy, xy = (
        _mean_gaussian(a, b, sigma) for a, b in ((samples, samples), (reference, reference), (samples, reference))
    )
    return 1000.0 * (xx + yy - 2.0 * xy)


def _polynomial_mmd(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    count, dimension = x.shape

    def kernel(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
        values: NDArray[np.float64] = (a @ b.T / dimension + 1.0) ** 3
        return values

    xx, yy = kernel(x, x), kernel(y, y)
    within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (count * (count - 1))
    return float(within - 2.0 * kernel(x, y).mean())


def _mean_gaussian(a: NDArray[np.floating], b: NDArray[np.floating], sigma: float) -> float:
    """Computes the mean of exp(-|x - y|^2 / 2 sigma^2) over all pairs, in blocks of rows."""
    b = np.asarray(b, dtype=np.float64)
    total = 0.0
    for start in range(0, len(a), CHUNK):
        x = np.asarray(a[start : start + CHUNK], dtype=np.float64)
        squared = np.square(x).sum(1)[:, None] + np.square(b).sum(1)[None, :] - 2.0 * x @ b.T
        total += float(np.exp(-np.maximum(squared, 0.0) / (2.0 * sigma**2)).sum())
    return total / (len(a) * len(b))
