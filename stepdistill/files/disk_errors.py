"""Turns errors of the disk (full, read-only, no permission) into one sentence."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stepdistill.errors import UserError

DISK_ERRORS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG, errno.ENOTDIR}
)


@contextmanager
def disk_errors_as_user_errors(output: Path) -> Iterator[None]:
    """Re-raises errors of the disk as `UserError`; other errors pass unchanged.

    Args:
        output: what is being written, for the message.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise UserError(
            f"{str(output)!r} could not be written ({error.strerror}): make room or mend the permissions, and repeat the same command"
        ) from None
