"""Stock schedulers by the name that configs and recipes have for them."""

from __future__ import annotations

from typing import Any

import diffusers

from stepdistill.errors import UserError


def scheduler_class(name: str) -> type[Any]:
    """The scheduler of diffusers with this class name, which is imported where it was not yet. Raises UserError."""
    try:
        found: type[Any] = getattr(diffusers, name)
    except AttributeError:
        raise UserError(f"this diffusers has no scheduler {name!r}: upgrade diffusers") from None
    return found
