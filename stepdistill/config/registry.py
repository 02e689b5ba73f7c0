"""Maps the names of methods, families and rewards to their classes, and imports a class only when it is asked for.

Another package adds its own without touching this one, in its `pyproject.toml`:

    [project.entry-points."stepdistill.methods"]
    mine = "my_package.mine:Mine"

A config may also name a method that is not registered, as `MODULE:CLASS`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from stepdistill.errors import UserError

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
"""MODULE:CLASS."""
METHODS: Mapping[str, str] = {
    "dmd": "stepdistill.methods.matching.dmd:DMD",
    "dmd2": "stepdistill.methods.matching.dmd2:DMD2",
    "flash": "stepdistill.methods.matching.flash:Flash",
    "decoupled": "stepdistill.methods.matching.decoupled:Decoupled",
    "disback": "stepdistill.methods.matching.disback:DisBack",
    "phased": "stepdistill.methods.matching.phased:Phased",
    "lcm": "stepdistill.methods.consistency.lcm:LCM",
    "tcd": "stepdistill.methods.consistency.tcd:TCD",
    "pcm": "stepdistill.methods.consistency.pcm:PCM",
    "cm": "stepdistill.methods.consistency.cm:CM",
    "tscd": "stepdistill.methods.consistency.tscd:TSCD",
    "scm": "stepdistill.methods.consistency.scm:SCM",
    "tbcm": "stepdistill.methods.consistency.tbcm:TBCM",
    "agd": "stepdistill.methods.guidance.agd:AGD",
    "guidance": "stepdistill.methods.guidance.guidance:Guidance",
    "pso": "stepdistill.methods.preference.pso:PSO",
    "reward": "stepdistill.methods.preference.reward:RewardTuning",
}
FAMILIES: Mapping[str, str] = {
    "sd": "stepdistill.families.sd:SD",
    "sdxl": "stepdistill.families.sdxl:SDXL",
    "sd3": "stepdistill.families.sd3:SD3",
    "sana": "stepdistill.families.sana:Sana",
    "analytic": "stepdistill.families.analytic:Analytic",
}
REWARDS: Mapping[str, str] = {
    "critic": "stepdistill.rewards.critic:load",
    "clip": "stepdistill.rewards.clip:load",
    "pickscore": "stepdistill.rewards.pickscore:load",
    "hps": "stepdistill.rewards.hps:load",
    "aesthetic": "stepdistill.rewards.aesthetic:load",
    "imagereward": "stepdistill.rewards.imagereward:load",
}
"""Maps the name before the colon to the import string of a `RewardLoader` (`rewards/base.py`)."""


def method_names() -> tuple[str, ...]:
    """Returns the names of all methods, those of this package first."""
    return tuple(_registered_names("method", METHODS))


def family_names() -> tuple[str, ...]:
    """Returns the names of all families, those of this package first."""
    return tuple(_registered_names("family", FAMILIES))


def load_method(name: str) -> type[Any]:
    """Returns the class of a method by its name, or by MODULE:CLASS.

    Raises:
        UserError: unknown name, or a class that cannot be imported or is not a method.
    """
    return _load("method", METHODS, name)


def check_method_name(name: str) -> None:
    """Raises UserError for a method that is neither registered nor of the form MODULE:CLASS. Imports nothing."""
    if not _IMPORT_PATH.fullmatch(name):
        _target("method", METHODS, name)


def load_family(name: str) -> Any:
    """Returns an instance of a `Family`. Raises UserError for an unknown name, or where its package cannot be imported."""
    return _load("family", FAMILIES, name)()


def suggestion_for(name: str, known: tuple[str, ...]) -> str:
    """Returns `did you mean 'x'?` and the known names, for the end of an error message."""
    close = get_close_matches(name, known, n=1, cutoff=0.4)
    listed = ", ".join(repr(item) for item in known)
    return f"did you mean {close[0]!r} (known: {listed})?" if close else f"use one of {listed}"


def _registered_names(kind: str, builtin: Mapping[str, str]) -> dict[str, str]:
    group = "stepdistill.families" if kind == "family" else "stepdistill.methods"
    # another package may add names, but not replace one that configs and papers refer to
    return dict(builtin) | {point.name: point.value for point in entry_points(group=group) if point.name not in builtin}


def _target(kind: str, builtin: Mapping[str, str], name: str) -> str:
    """Returns MODULE:CLASS of a registered name."""
    known = builtin if name in builtin else _registered_names(kind, builtin)
    if name not in known:
        raise UserError(f"there is no {kind} named {name!r}: {suggestion_for(name, tuple(known))}")
    return known[name]


def _load(kind: str, builtin: Mapping[str, str], name: str) -> type[Any]:
    direct = kind == "method" and _IMPORT_PATH.fullmatch(name) is not None
    target = name if direct else _target(kind, builtin, name)
    module, _, attribute = target.partition(":")
    try:
        loaded: type[Any] = vars(import_module(module))[attribute]
    except (ImportError, KeyError) as error:
        if name in builtin:  # this package itself is broken, and a traceback helps more than a sentence
            raise
        found = f"the {kind} {name!r}" + ("" if direct else f" of another package is registered as {target!r}, which")
        raise UserError(
            f"{found} cannot be imported ({type(error).__name__}: {error}): check the module's name and that it is installed"
        ) from error
    if not isinstance(loaded, type) or (direct and "Config" not in dir(loaded)):
        raise UserError(f"{target!r} is not a class of a {kind}: name a subclass of stepdistill.methods.base.Method")
    return loaded
