"""The bound on OpenMP's spinning."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from stepdistill.runtime.threads import BOUNDED_SPIN_COUNT, bound_spinning


def test_the_spin_count_is_bounded_where_the_user_has_set_nothing() -> None:
    environment: dict[str, str] = {}
    bound_spinning(environment)
    assert environment == {"GOMP_SPINCOUNT": str(BOUNDED_SPIN_COUNT)}


@pytest.mark.parametrize("chosen", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}])
def test_what_the_user_has_set_stays(chosen: dict[str, str]) -> None:
    environment = dict(chosen)
    bound_spinning(environment)
    assert environment == chosen


def test_importing_the_package_leaves_the_environment_alone() -> None:
    script = "import os, stepdistill.cli; print('GOMP_SPINCOUNT' in os.environ, 'torch' in __import__('sys').modules)"
    plain = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run([sys.executable, "-c", script], env=plain, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
