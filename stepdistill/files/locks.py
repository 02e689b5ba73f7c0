"""One process at a time writes into an output folder."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

from filelock import FileLock, Timeout

from stepdistill.errors import UserError


@contextmanager
def locked_folder(folder: Path, work: str) -> Iterator[None]:
    """Holds the lock of an output folder inside the `with` block.

    The lock is a file beside the folder, so that the folder itself may be new or empty; where that place cannot be written to,
    it is in the machine's temporary folder. The operating system drops the lock of a process that dies.

    Args:
        folder: the output folder; it need not exist.
        work: what is done there, for the message that another process gets: "training", "export".

    Raises:
        UserError: another process holds the lock; the message says which, and what it does.
    """
    file = _lock_file(folder)
    lock, holder = FileLock(file), file.with_suffix(".holder")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"the folder {str(folder)!r} is in use by {_read(holder) or 'another process'}: wait until it has ended, or choose another "
            "--output"
        ) from None
    try:
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()} ({work})", encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        # removed before it is released: who waits for it then locks a file of its own
        file.unlink(missing_ok=True)
        lock.release()


def _lock_file(folder: Path) -> Path:
    place = Path(os.path.abspath(folder))
    name = f".{place.name or 'root'}.lock"
    if place.parent.is_dir() and os.access(place.parent, os.W_OK):
        return place.parent / name
    digest = blake2b(str(place).encode(), digest_size=8).hexdigest()
    return Path(tempfile.gettempdir()) / f"stepdistill-{digest}.lock"


def _read(holder: Path) -> str:
    try:
        return holder.read_text(encoding="utf-8")
    except OSError:
        return ""
