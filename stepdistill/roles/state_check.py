"""Whether saved tensors are those of a role."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from stepdistill.errors import UserError


def check_state_matches(role: str, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not, name by name and shape by shape, those of a role."""
    faults = {
        "missing": own.keys() - tensors.keys(),
        "unexpected": tensors.keys() - own.keys(),
        "differently shaped": [key for key in own.keys() & tensors.keys() if own[key].shape != tensors[key].shape],
    }
    if any(faults.values()):
        told = "; ".join(f"{len(keys)} {what} ({_first_names(sorted(keys))})" for what, keys in faults.items() if keys)
        raise UserError(
            f"the saved {role} does not fit this one, with tensors {told}: use the rank, targets and base it was trained with"
        )


def _first_names(names: list[str], count: int = 5) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
