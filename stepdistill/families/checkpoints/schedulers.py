"""Stock schedulers by the name that configs and recipes have for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers

from stepdistill.errors import UserError


def scheduler_class(name: str) -> type[Any]:
    """Looks up a scheduler class of diffusers by its name.

    Raises:
        UserError: diffusers has no scheduler of this name.
    """
    found = getattr(diffusers, name, None) if name.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin)):
        raise UserError(
            f"this diffusers has no scheduler {name!r}: upgrade diffusers, or correct the scheduler's config"
        )
    return found


def make_scheduler(name: str, config: Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> Any:
    """Makes a stock scheduler from a checkpoint's scheduler config with some entries changed.

    The changes are handed to diffusers as keyword arguments. In a loaded `scheduler.config`, diffusers lists the entries that
    the checkpoint's file did not state (`_use_default_values`), and drops them when a scheduler of another class is made, also
    where a value was merged into the config afterwards; keyword arguments are kept.

    Args:
        name: class name in diffusers.
        config: of the checkpoint's own scheduler.
        changes: entries that differ from it.

    Raises:
        UserError: diffusers has no such class.
    """
    return scheduler_class(name).from_config(dict(config), **dict(changes or {}))
