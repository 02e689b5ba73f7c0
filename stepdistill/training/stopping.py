"""Signals that ask a run to stop: the first one finishes the iteration, the second one stops at once."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

logger = logging.getLogger(__name__)
SAME = 2.0
"""Seconds within which a second signal is the first one, come twice: a launcher passes on to its processes what a terminal or
a cluster has sent to all of them."""


@dataclass
class Stop:
    """Whether a signal has come."""

    asked: bool = False


@contextmanager
def graceful() -> Iterator[Stop]:
    """SIGINT and SIGTERM set `asked`; one that comes later raises KeyboardInterrupt. Handlers are restored afterwards."""
    stop, first = Stop(), 0.0

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal first
        if not stop.asked:
            first = time.monotonic()
            logger.warning("signal %d: finishing this iteration, then saving; once more stops at once", number)
        elif time.monotonic() - first > SAME:
            raise KeyboardInterrupt
        stop.asked = True

    try:
        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread (a notebook server, a test runner): signals belong to others there
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
