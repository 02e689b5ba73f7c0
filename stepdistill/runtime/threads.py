"""How long OpenMP threads spin before they sleep: a bound that suits a machine with other work on it.

GNU OpenMP, which the Linux builds of PyTorch use, lets a thread that waits at a barrier spin for a long time. On an idle
machine this is fastest. Where another process occupies a core, the waiting threads take the time of the thread that they
wait for, and a training iteration can take 40 times as long. `tools/bench_threads.py` measures both cases.
"""

from __future__ import annotations

from collections.abc import MutableMapping

SPIN_COUNT = "GOMP_SPINCOUNT"
WAIT_POLICY = "OMP_WAIT_POLICY"
BOUNDED_SPIN_COUNT = 10_000
"""Spins before a thread sleeps; `tools/bench_threads.py` compares this value with the default and with no spinning."""


def bound_spinning(environment: MutableMapping[str, str]) -> None:
    """Sets `GOMP_SPINCOUNT`, unless the user has chosen a wait policy or a spin count.

    The OpenMP library reads the variable once, when it is loaded, so this must run before torch is imported. Processes that
    are started later inherit it. OpenMP libraries other than GNU's ignore the variable.

    Args:
        environment: the variables of this process, `os.environ`.
    """
    if WAIT_POLICY not in environment and SPIN_COUNT not in environment:
        environment[SPIN_COUNT] = str(BOUNDED_SPIN_COUNT)
