"""Precision, recall, density and coverage: how many points of one set lie in the nearest-neighbour balls of the other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CHUNK = 2048


@dataclass(frozen=True)
class PRDCResult:
    """Improved precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

    precision: share of samples inside a ball of the reference. recall: share of the reference inside a ball of the samples.
    density: how many of the reference's balls hold a sample, over k; above 1 where samples crowd the reference's core.
    coverage: share of the reference's balls that hold a sample.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def compute_prdc(
    samples: NDArray[np.floating], reference: NDArray[np.floating], neighbours: int = 3, density_neighbours: int = 5
) -> PRDCResult:
    """Computes all four for ``samples`` (N, D) against ``reference`` (M, D); a ball's radius is the distance to the k-th neighbour.

    Raises:
        ValueError: a set with no more points than neighbours.
    """
    fewest, k = min(len(samples), len(reference)), max(neighbours, density_neighbours)
    if fewest <= k:
        raise ValueError(f"{fewest} images came in and more than {k} neighbours are wanted: give more images")
    sample_radii, _ = _radii(samples, neighbours, density_neighbours)
    reference_radii, density_radii = _radii(reference, neighbours, density_neighbours)
    inside = np.zeros(len(samples), dtype=bool)
    held = np.zeros(len(samples), dtype=np.int64)
    recalled = np.zeros(len(reference), dtype=bool)
    covered = np.zeros(len(reference), dtype=bool)
    for start in range(0, len(samples), CHUNK):
        rows = slice(start, start + CHUNK)
        distances = pairwise_distances(samples[rows], reference)
        inside[rows] = (distances <= reference_radii).any(axis=1)
        recalled |= (distances <= sample_radii[rows, None]).any(axis=0)
        within = distances <= density_radii
        held[rows] = within.sum(axis=1)
        covered |= within.any(axis=0)
    density = held.mean() / density_neighbours
    return PRDCResult(float(inside.mean()), float(recalled.mean()), float(density), float(covered.mean()))


def pairwise_distances(first: NDArray[np.floating], second: NDArray[np.floating]) -> NDArray[np.float64]:
    """Computes Euclidean distances (N, M) between the rows of ``first`` (N, D) and of ``second`` (M, D), in float64."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    centre = b.mean(axis=0)  # features share a large mean, which would cancel most digits of the expanded square
    a, b = a - centre, b - centre
    squared = np.square(a).sum(1)[:, None] + np.square(b).sum(1)[None, :] - 2.0 * a @ b.T
    # equal points must have distance 0 in spite of cancellation, so values below the rounding error are set to 0
    scale = np.square(a).sum(1)[:, None] + np.square(b).sum(1)[None, :]
    squared[squared < 1e-14 * scale] = 0.0
    distances: NDArray[np.float64] = np.sqrt(squared)
    return distances


def _radii(x: NDArray[np.floating], *ks: int) -> tuple[NDArray[np.float64], ...]:
    """Computes the distance of each row to its k-th neighbour, excluding itself, for each k."""
    nearest = []
    for start in range(0, len(x), CHUNK):
        distances = pairwise_distances(x[start : start + CHUNK], x)
        nearest.append(np.partition(distances, ks, axis=1)[:, list(ks)])  # index 0 is the point itself
    return tuple(np.concatenate(nearest).T)
