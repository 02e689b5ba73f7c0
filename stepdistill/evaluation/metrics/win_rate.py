"""The share of prompts on which one model scores above another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class WinRate:
    """Share of prompts on which the student scores above the teacher; ties count half; with a 95 % bootstrap interval."""

    rate: float
    low: float
    high: float
    prompts: int


def win_rate(
    student: NDArray[np.float64],
    teacher: NDArray[np.float64],
    prompts: Sequence[str],
    rng: np.random.Generator,
    resamples: int = 2000,
) -> WinRate:
    """Compares scores at equal prompts and seeds. Seeds of one prompt are averaged, because they are not independent."""
    if not len(student) == len(teacher) == len(prompts):
        raise ValueError(
            f"{len(student)}, {len(teacher)} scores and {len(prompts)} prompts came in; as many of each are wanted"
        )
    _, groups = np.unique(np.asarray(prompts), return_inverse=True)
    wins = (student > teacher) + 0.5 * (student == teacher)
    per_prompt = np.bincount(groups, weights=wins) / np.bincount(groups)
    drawn = per_prompt[rng.integers(len(per_prompt), size=(resamples, len(per_prompt)))].mean(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return WinRate(float(per_prompt.mean()), float(low), float(high), len(per_prompt))
