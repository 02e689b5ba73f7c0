"""The seam for whoever measures a student while it trains; training itself knows no metric."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Seen:
    """What a watcher found.

    Attributes:
        values: to log, by name.
        best: this is the best student so far; its checkpoint is kept.
    """

    values: Mapping[str, float]
    best: bool


class Watch(Protocol):
    """Called on every process, every `every` iterations; draws nothing from global random state."""

    every: int

    def __call__(self, iteration: int) -> Seen: ...
