"""How a reward is named, in training configs and in `stepdistill evaluate --rewards` alike.

A name is a registered one, with an option after a colon (`pickscore`, `hps:FOLDER`, `critic:colour`), any MODULE:FUNCTION, or a
weighted sum such as `0.1*pickscore + imagereward:FOLDER`: a weight before a star (1 if there is none), and spaces around the plus.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import PurePath

from torch import Tensor

from stepdistill.config.registry import REWARDS, suggestion_for
from stepdistill.errors import UserError
from stepdistill.rewards.base import FunctionReward, Reward, RewardLoader, WeightedSum


def load_reward(name: str, *, download: bool = True) -> Reward:
    """Loads the frozen reward of a name, or the sum; without weights if tensors are created on the meta device.

    Args:
        name: see the module's docstring.
        download: allow fetching weights from the hub.

    Raises:
        UserError: no such reward, or it cannot be loaded.
    """
    terms = _terms(name)
    if terms == [(1.0, name)]:
        return _load(name, download)
    return WeightedSum([_load(one, download) for _, one in terms], [weight for weight, _ in terms])


def report_name(name: str) -> str:
    """Returns the name for reports: paths are shortened to their last part, so that reports of two machines agree."""
    parts = []
    for weight, one in _terms(name):
        registered, colon, option = one.partition(":")
        if registered in REWARDS:
            option = ",".join(PurePath(piece).name for piece in option.split(","))
        parts.append(("" if weight == 1 else f"{weight:g}*") + registered + colon + option)
    return " + ".join(parts)


def split_reward_names(text: str) -> list[str]:
    """Splits a comma-separated list of rewards; the comma of `aesthetic:CLIP,HEAD` does not separate."""
    names: list[str] = []
    for piece in text.split(","):
        last = names[-1].rpartition(" + ")[2].rpartition("*")[2].strip() if names else ""
        if last.startswith("aesthetic:") and "," not in last:
            names[-1] += f",{piece.rstrip()}"
        elif piece.strip():
            names.append(piece.strip())
    return names


def _terms(name: str) -> list[tuple[float, str]]:
    """Returns (weight, name) of each term of a sum."""
    return [_weighted(term) for term in name.split(" + ")]


def _weighted(term: str) -> tuple[float, str]:
    """Splits `0.5*NAME` into (weight, name); the weight is 1 if there is none."""
    weight, star, name = term.strip().rpartition("*")
    if not star:
        return 1.0, name
    try:
        found = float(weight)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise UserError(
            f"the reward {term.strip()!r} has {weight!r} before its star: write a number there, as in 0.5*{name}"
        )
    return found, name.strip()


def _load(name: str, download: bool) -> Reward:
    registered, _, option = name.partition(":")
    if registered in REWARDS:
        module, _, attribute = REWARDS[registered].partition(":")
        loader: RewardLoader = vars(import_module(module))[attribute]
        reward = loader(option, download=download)
    else:
        reward = FunctionReward(_import_function(name))
    return reward.eval().requires_grad_(False)


def _import_function(name: str) -> Callable[[Tensor, Sequence[str]], Tensor]:
    module, _, attribute = name.partition(":")
    if not attribute:
        raise UserError(
            f"there is no reward named {name!r}, so give MODULE:FUNCTION or change it: {suggestion_for(name, tuple(REWARDS))}"
        )
    try:
        function = vars(import_module(module))[attribute]
    except (ImportError, KeyError) as error:
        raise UserError(
            f"the reward {name!r} cannot be imported ({type(error).__name__}: {error}): give MODULE:FUNCTION of an importable module"
        ) from None
    if not callable(function):
        raise UserError(f"the reward {name!r} is a {type(function).__name__}: give a function of images and prompts")
    return function  # type: ignore[no-any-return]
