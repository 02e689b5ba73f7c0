"""Diversity: pairwise distances between images of one prompt."""

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
