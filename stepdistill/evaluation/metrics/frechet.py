"""The Fréchet distance between two Gaussians (Dowson & Landau 1982; FID, Heusel et al. 2017), without a matrix square root
of an asymmetric product: symmetric eigenvalues only, so nothing complex can arise.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stepdistill.evaluation.metrics.statistics import FeatureStatistics

logger = logging.getLogger(__name__)


def frechet_distance(
    mean1: NDArray[np.floating],
    covariance1: NDArray[np.floating],
    mean2: NDArray[np.floating],
    covariance2: NDArray[np.floating],
) -> float:
    """|mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1^(1/2) C2 C1^(1/2))^(1/2)), in float64; rounding may make it slightly negative.

    Raises:
        ValueError: shapes that do not fit, or a result too negative to be rounding.
    """
    m1, c1, m2, c2 = (np.asarray(array, dtype=np.float64) for array in (mean1, covariance1, mean2, covariance2))
    if m1.ndim != 1 or m1.shape != m2.shape or {c1.shape, c2.shape} != {(len(m1), len(m1))}:
        raise ValueError(
            f"means of shape {m1.shape} and {m2.shape} with covariances {c1.shape} and {c2.shape} came in; "
            "(D,) and (D, D) of one D are wanted"
        )
    root = _square_root(c1)
    cross = np.linalg.eigvalsh(_symmetric(root @ c2 @ root))
    return _assemble(m1 - m2, c1, c2, float(np.sqrt(np.maximum(cross, 0.0)).sum()))


def frechet_between(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Computes the distance of two statistics; warns if a covariance is singular because there are too few images.

    Raises:
        ValueError: as `frechet_distance`.
    """
    _warn_if_singular(first, second)
    return frechet_distance(first.mean, first.covariance, second.mean, second.covariance)


def frechet_of_features(first: NDArray[np.floating], second: NDArray[np.floating]) -> float:
    """Computes the distance of two feature sets (N, D) and (M, D).

    With few images, tr (C1 C2)^(1/2) is the nuclear norm of A B^T for the centred, scaled rows A and B: exact where the
    covariances are singular and their eigenvalues carry only half the digits.
    """
    a, b = FeatureStatistics.of(first), FeatureStatistics.of(second)
    if min(a.count, b.count) > len(a.mean):
        return frechet_between(a, b)
    _warn_if_singular(a, b)
    rows1 = (np.asarray(first, dtype=np.float64) - a.mean) / np.sqrt(a.count - 1)
    rows2 = (np.asarray(second, dtype=np.float64) - b.mean) / np.sqrt(b.count - 1)
    cross = float(np.linalg.svd(rows1 @ rows2.T, compute_uv=False).sum())
    return _assemble(a.mean - b.mean, a.covariance, b.covariance, cross)


@dataclass(frozen=True)
class Extrapolation:
    """The Fréchet distance at infinitely many images, extrapolated by a line in 1/n; None if the line fits badly (R^2 below 0.9)."""

    value: float | None
    r_squared: float


def frechet_infinity(
    features: NDArray[np.floating], reference: FeatureStatistics, rng: np.random.Generator, points: int = 15
) -> Extrapolation:
    """FD-infinity (Chong & Forsyth, CVPR 2020): the intercept of the distance against 1/n over subsets of `features`."""
    count = len(features)
    sizes = np.unique(np.linspace(max(count // 10, min(5000, count // 2)), count, points).astype(int))
    measured = []
    for size in sizes:
        subset = FeatureStatistics.of(features[rng.choice(count, size, replace=False)])
        measured.append(frechet_distance(subset.mean, subset.covariance, reference.mean, reference.covariance))
    distances = np.array(measured)
    slope, intercept = np.polyfit(1.0 / sizes, distances, 1)
    residual = np.square(distances - (slope / sizes + intercept)).sum()
    r_squared = float(1.0 - residual / max(float(np.square(distances - distances.mean()).sum()), 1e-300))
    return Extrapolation(float(intercept) if r_squared >= 0.9 else None, r_squared)


def frechet_standard_error(
    features: NDArray[np.floating], reference: FeatureStatistics, rng: np.random.Generator, subsets: int = 20
) -> float:
    """Estimates the standard error of the distance of `features` (N, D) from `reference` due to the choice of samples.

    The spread over random halves drawn without replacement: with m = N / 2 the larger variance of a half and the finite
    population correction cancel, sigma / sqrt(m) sqrt(1 - m / N) = sigma / sqrt(N). A bootstrap would count images twice
    and move the distance itself.
    """
    halves = [
        FeatureStatistics.of(features[rng.permutation(len(features))[: len(features) // 2]]) for _ in range(subsets)
    ]
    distances = [frechet_distance(h.mean, h.covariance, reference.mean, reference.covariance) for h in halves]
    return float(np.std(distances, ddof=1))


def noise_floor(covariance: NDArray[np.floating], count1: int, count2: int) -> float:
    """Computes the first-order expectation of the distance between two samples of N(mu, C), ``count1`` and ``count2`` large.

    E|mu1 - mu2|^2 = tr(C) h with h = 1/n1 + 1/n2. The covariance term is |C2 - C1|^2 in the Bures metric, of
    expectation h/2 sum_ij (l_i l_j) / (l_i + l_j) + the diagonal's share, over the eigenvalues l of C.
    """
    eigenvalues = np.maximum(np.linalg.eigvalsh(np.asarray(covariance, dtype=np.float64)), 0.0)
    inverse = 1.0 / count1 + 1.0 / count2
    total = eigenvalues[:, None] + eigenvalues[None, :]
    product = eigenvalues[:, None] * eigenvalues[None, :]
    ratio = np.divide(product, total, out=np.zeros_like(product), where=total > 0.0)
    # Bures: d^2(C, C + H) = 1/2 sum_ij H_ij^2 / (l_i + l_j); E H_ij^2 = h (l_i l_j)(1 + delta_ij).
    return float(inverse * (eigenvalues.sum() + 0.5 * (ratio.sum() + np.diag(ratio).sum())))


def _warn_if_singular(*sets: FeatureStatistics) -> None:
    for statistics in sets:
        if 0 < statistics.count <= len(statistics.mean):
            logger.warning(
                "%d images for %d features: the covariance is singular and the distance mostly bias",
                statistics.count, len(statistics.mean),
            )  # fmt: skip


def _assemble(shift: NDArray[np.float64], c1: NDArray[np.float64], c2: NDArray[np.float64], cross: float) -> float:
    traces = float(np.trace(c1) + np.trace(c2))
    value = float(shift @ shift) + traces - 2.0 * cross
    if not np.isfinite(value) or value < -1e-3 * traces:
        raise ValueError(
            f"the Fréchet distance came out as {value:.4g}: a covariance is not positive semi-definite, or not finite"
        )
    return value


def _symmetric(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    return (matrix + matrix.T) / 2.0


def _square_root(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Computes the symmetric square root of a positive semi-definite matrix."""
    values, vectors = np.linalg.eigh(_symmetric(covariance))
    root: NDArray[np.float64] = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    return root
