"""How much a set of images varies: pairwise distances of one prompt's images, and drift of colour, light and sharpness."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray


def prompt_groups(prompts: Sequence[str]) -> list[list[int]]:
    """Indices of the images of one prompt, P groups of K: runs of equal prompts, as protocols draw them; maybe none.

    K is the length that most images in runs have: a prompt that a long list happens to hold twice is no group.
    """
    numbered = groupby(range(len(prompts)), key=lambda index: prompts[index])
    runs = [rows for _, members in numbered if len(rows := list(members)) > 1]
    images = Counter[int]()
    for rows in runs:
        images[len(rows)] += len(rows)
    return [rows for rows in runs if len(rows) == images.most_common(1)[0][0]]


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


def saturation(images: NDArray[np.uint8]) -> float:
    """Mean HSV saturation (max - min) / max over all pixels of uint8 RGB images (N, H, W, 3); black counts as 0."""
    x = images.astype(np.float32)
    highest = x.max(axis=-1)
    return float(np.mean((highest - x.min(axis=-1)) / np.maximum(highest, 1.0)))


def brightness(images: NDArray[np.uint8]) -> float:
    """Mean luma (Rec. 601) in [0, 1] of uint8 RGB images (N, H, W, 3)."""
    return float((images.astype(np.float32) @ _LUMA).mean() / 255.0)


def sharpness(images: NDArray[np.uint8]) -> float:
    """Root mean square of the luma's 4-neighbour Laplacian, in [0, 8]: falls with blur, rises with noise and halos."""
    luma = images.astype(np.float32) @ _LUMA / 255.0
    inner = luma[:, 1:-1, 1:-1]
    laplacian = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:] - 4.0 * inner
    return float(np.sqrt(np.square(laplacian).mean()))


_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
