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
SAME_SIGNAL_SECONDS = 2.0
"""Seconds within which a second signal is the first one, come twice: a launcher passes on to its processes what a terminal or
a cluster has sent to all of them."""


@dataclass
class StopRequest:
    """Whether a signal has come."""

    requested: bool = False


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """SIGINT and SIGTERM set `asked`; one that comes later raises KeyboardInterrupt. Handlers are restored afterwards."""
    stop, first = StopRequest(), 0.0

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal first
        if not stop.requested:
            first = time.monotonic()
            logger.warning("signal %d: finishing this iteration, then saving; once more stops at once", number)
        elif time.monotonic() - first > SAME_SIGNAL_SECONDS:
            raise KeyboardInterrupt
        stop.requested = True

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
