"""How much a set of images varies: pairwise distances, precision and recall, saturation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class PrecisionRecall:
    """Share of samples inside the reference's manifold, and of the reference inside the samples' manifold."""

    precision: float
    recall: float


def pairwise_diversity(groups: NDArray[np.floating], centre: NDArray[np.floating]) -> float:
    """Mean over prompts of the mean pairwise cosine distance 1 - cos of the features of ONE prompt's images.

    ``groups`` is (P, K, D): K >= 2 images of each of P prompts. ``centre`` (D,), the mean feature of the reference, is
    subtracted first: cosines around the origin would say little else than that all features share a large mean.
    """
    if groups.ndim != 3 or groups.shape[1] < 2:
        raise ValueError(f"groups of shape {groups.shape} came in; (prompts, images of one prompt >= 2, D) are wanted")
    x = np.asarray(groups, dtype=np.float64) - centre
    x = x / np.maximum(np.linalg.norm(x, axis=2, keepdims=True), 1e-12)
    images = x.shape[1]
    off_diagonal = np.square(x.sum(axis=1)).sum(axis=1) - np.square(x).sum(axis=(1, 2))
    return float(np.mean(1.0 - off_diagonal / (images * (images - 1))))


def precision_recall(
    samples: NDArray[np.floating], reference: NDArray[np.floating], neighbours: int = 3
) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019) of ``samples`` (N, D) against ``reference`` (M, D)."""
    distances = pairwise_distances(samples, reference)
    sample_radii = np.sort(pairwise_distances(samples, samples), axis=1)[:, neighbours]
    reference_radii = np.sort(pairwise_distances(reference, reference), axis=1)[:, neighbours]
    return PrecisionRecall(
        precision=float((distances <= reference_radii[None, :]).any(axis=1).mean()),
        recall=float((distances <= sample_radii[:, None]).any(axis=0).mean()),
    )


def pairwise_distances(first: NDArray[np.floating], second: NDArray[np.floating]) -> NDArray[np.float64]:
    """Euclidean distances (N, M) between the rows of ``first`` (N, D) and of ``second`` (M, D)."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    squared = np.square(a).sum(1)[:, None] + np.square(b).sum(1)[None, :] - 2.0 * a @ b.T
    if first is second:
        np.fill_diagonal(squared, 0.0)  # cancellation must not put a point away from itself
    return np.sqrt(np.maximum(squared, 0.0))


def saturation(images: NDArray[np.uint8]) -> float:
    """Mean HSV saturation (max - min) / max over all pixels of uint8 RGB images (N, H, W, 3); black counts as 0."""
    x = images.astype(np.float32)
    highest = x.max(axis=-1)
    return float(np.mean((highest - x.min(axis=-1)) / np.maximum(highest, 1.0)))
