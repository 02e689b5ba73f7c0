"""Runs an export's `reproduce.py` without this package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BLOCKED = "import sys, runpy; sys.modules['stepdistill'] = None; sys.argv = ['reproduce.py']; runpy.run_path({!r}, run_name='__main__')"


def reproduced(folder: Path) -> bool:
    """Whether reproduce.py agrees, with `stepdistill` not importable."""
    script = BLOCKED.format(str(folder / "reproduce.py"))
    return subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0
