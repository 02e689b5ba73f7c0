"""Tells local paths from hub ids, and names a path that does not exist, before any heavy library is imported."""

from __future__ import annotations

import re
from pathlib import Path

from stepdistill.errors import UserError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(source: str) -> bool:
    """Whether a name that is not an existing path could be a repository on the hub, `owner/name`."""
    return _HUB_ID.fullmatch(source) is not None


def check_source_exists(source: str) -> None:
    """Raises UserError for a model source that is neither an existing path nor a possible hub id."""
    try:
        exists = Path(source).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, a null character, or an unknown home folder
        exists = False
    # a hub id has no file type: `model.safetensors` in a missing folder is a wrong path
    if not exists and (not is_hub_id(source) or source.endswith((".safetensors", ".ckpt"))):
        raise UserError(
            f"there is no file or folder {source!r}: give a path that exists, or a hub id like 'owner/name'"
        )
