"""Names of methods and families -> where their classes live. Imports none of them, so that listing names is free.

Another package adds its own without touching this one, in its `pyproject.toml`:

    [project.entry-points."stepdistill.methods"]
    mine = "my_package.mine:Mine"
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from stepdistill.errors import UserError

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
"""Name before the colon -> the import string of a `RewardLoader` (`rewards/base.py`)."""


def method_names() -> tuple[str, ...]:
    """All method names, this package's first."""
    return tuple(_registered_names("method", METHODS))


def family_names() -> tuple[str, ...]:
    """All family names, this package's first."""
    return tuple(_registered_names("family", FAMILIES))


def load_method(name: str) -> type[Any]:
    """The class of a method. Raises UserError for an unknown name, or where its package cannot be imported."""
    return _load("method", METHODS, name)


def load_family(name: str) -> Any:
    """An instance of a `Family`. Raises UserError for an unknown name, or where its package cannot be imported."""
    return _load("family", FAMILIES, name)()


def suggestion_for(name: str, known: tuple[str, ...]) -> str:
    """`did you mean 'x'?` and the known names, for the end of a refusal."""
    close = get_close_matches(name, known, n=1, cutoff=0.4)
    listed = ", ".join(repr(item) for item in known)
    return f"did you mean {close[0]!r} (known: {listed})?" if close else f"use one of {listed}"


def _registered_names(kind: str, builtin: Mapping[str, str]) -> dict[str, str]:
    group = "stepdistill.families" if kind == "family" else "stepdistill.methods"
    # a third party may add names but not take over one that configs and papers refer to
    return dict(builtin) | {point.name: point.value for point in entry_points(group=group) if point.name not in builtin}


def _load(kind: str, builtin: Mapping[str, str], name: str) -> type[Any]:
    known = _registered_names(kind, builtin)
    if name not in known:
        raise UserError(f"there is no {kind} named {name!r}: {suggestion_for(name, tuple(known))}")
    module, _, attribute = known[name].partition(":")
    try:
        loaded: type[Any] = vars(import_module(module))[attribute]
    except (ImportError, KeyError) as error:
        if name in builtin:  # this package is broken: a traceback says more than a sentence
            raise
        raise UserError(
            f"the {kind} {name!r} of another package is registered as {known[name]!r}, which cannot be imported "
            f"({type(error).__name__}: {error}): mend or uninstall that package"
        ) from error
    return loaded
