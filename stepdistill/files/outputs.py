"""Checks of the places that a command is going to write to, made before any work."""

from __future__ import annotations

import os
from pathlib import Path

from stepdistill.errors import UserError


def check_folder_is_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made, or is something else, before hours go into what it should hold.

    Raises:
        UserError: it is a file, or below one, or cannot be written to.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise UserError(
            f"the output folder {str(folder)!r} cannot be made, since {str(there)!r} is a file: choose another"
        )
    if not os.access(there, os.W_OK):
        raise UserError(
            f"the output folder {str(folder)!r} cannot be written to: choose another, or mend its permissions"
        )


def check_file_is_writable(path: Path) -> None:
    """Refuse a file that cannot be written, before the work that it should hold. Raises UserError."""
    if path.is_dir():
        raise UserError(f"{str(path)!r} is a folder and a file is to be written: name one inside it")
    if not path.parent.is_dir():
        raise UserError(
            f"{str(path)!r} lies in a folder that does not exist: make {str(path.parent)!r}, or name another file"
        )
