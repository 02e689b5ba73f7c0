"""The seam for whoever measures a student while it trains; training itself knows no metric."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class EvaluationResult:
    """What a watcher found.

    Attributes:
        values: to log, by name.
        best: what made this the best student so far, whose checkpoint is kept; None where it is not.
        enough: the run ends here, as a signal ends it: with a checkpoint, and resumable. All processes must agree.
    """

    values: Mapping[str, float]
    best: Mapping[str, str | int | float] | None
    should_stop: bool = False


class EvaluationHook(Protocol):
    """Called on every process, every `every` iterations; draws nothing from global random state."""

    every: int

    def __call__(self, iteration: int) -> EvaluationResult: ...
