"""The Fréchet distance between two Gaussians (Dowson & Landau 1982; FID, Heusel et al. 2017)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def frechet_distance(
    mean1: NDArray[np.floating],
    covariance1: NDArray[np.floating],
    mean2: NDArray[np.floating],
    covariance2: NDArray[np.floating],
) -> float:
    """|mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1^(1/2) C2 C1^(1/2))^(1/2)), in float64.

    The symmetric form needs eigenvalues of symmetric matrices only, so nothing complex or unstable can arise.
    """
    mean1, covariance1 = np.asarray(mean1, dtype=np.float64), np.asarray(covariance1, dtype=np.float64)
    mean2, covariance2 = np.asarray(mean2, dtype=np.float64), np.asarray(covariance2, dtype=np.float64)
    root = _square_root(covariance1.astype(np.float64))
    cross = np.linalg.eigvalsh(root @ covariance2 @ root)
    shift = mean1 - mean2
    trace = np.trace(covariance1) + np.trace(covariance2) - 2.0 * np.sqrt(np.maximum(cross, 0.0)).sum()
    return float(max(shift @ shift + trace, 0.0))


def noise_floor(covariance: NDArray[np.floating], count1: int, count2: int) -> float:
    """First-order expectation of the distance between two samples of N(mu, C), ``count1`` and ``count2`` large.

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


def _square_root(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """The symmetric square root of a positive semi-definite matrix."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2.0)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
