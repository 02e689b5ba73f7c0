"""What a reward is, and how one is named: a registered name, with an option after a colon, any `module:function`, or a sum.

A sum is `0.1*pickscore + imagereward:FOLDER`: a weight before a star, 1 where there is none, and spaces around the plus.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib import import_module

import torch
from torch import Tensor, nn

from stepdistill.config.registry import REWARDS, nearest
from stepdistill.errors import UserError

REWARD, HELD_OUT = "reward", "held_out_reward"
"""In `Triple.frozen`: the one that is optimised, and one that is looked at."""


class Reward(nn.Module, ABC):
    """A frozen judge of images.

    Attributes:
        differentiable: gradients flow from the reward to the images.
    """

    differentiable: bool = True

    @abstractmethod
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rewards (B,), higher is better, of images (B, 3, H, W) in [0, 1] for prompts of length B.

        A sample's reward depends on its own image and prompt alone.
        """


Factory = Callable[[str], Reward]
"""Option after the colon, "" where there is none -> the reward; raises UserError for an option that it does not know."""


class FunctionReward(Reward):
    """A function of the user's, (images, prompts) -> (B,); differentiable as far as it is."""

    def __init__(self, function: Callable[[Tensor, Sequence[str]], Tensor]) -> None:
        super().__init__()
        self.function = function  # a module's weights move with the reward's

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.function(images, prompts)


class WeightedSum(Reward):
    """sum_k w_k r_k; differentiable where all are.

    Raises:
        UserError: images carry a gradient that only some of the parts hand on.
    """

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float]) -> None:
        super().__init__()
        self.rewards, self.weights = nn.ModuleList(rewards), tuple(weights)
        self.differentiable = all(reward.differentiable for reward in rewards)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        found = [w * reward(images, prompts) for w, reward in zip(self.weights, self.rewards, strict=True)]
        if images.requires_grad and len({part.requires_grad for part in found}) > 1:
            stuck = [str(k + 1) for k, part in enumerate(found) if not part.requires_grad]
            raise UserError(
                f"a sum of {len(found)} rewards is to be climbed and part {', '.join(stuck)} of it has no gradient: leave it out, or "
                "rank samples by the sum with method.name: pso"
            )
        return torch.stack(found).sum(0)


def load_reward(name: str) -> Reward:
    """The reward of that name, or the sum of those, frozen; an outline of it where tensors are made on the meta device.

    Raises:
        UserError: no such reward, or it cannot be had.
    """
    terms = [_parse_term(term) for term in name.split(" + ")]
    if terms == [(1.0, name)]:
        return _load(name)
    return WeightedSum([_load(one) for _, one in terms], [weight for weight, _ in terms])


def _parse_term(term: str) -> tuple[float, str]:
    """(weight, name) of `0.5*NAME`, 1 where there is none."""
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


def _load(name: str) -> Reward:
    registered, _, option = name.partition(":")
    if registered in REWARDS:
        module, _, attribute = REWARDS[registered].partition(":")
        factory: Factory = vars(import_module(module))[attribute]
        reward = factory(option)
    else:
        reward = FunctionReward(_import_function(name))
    return reward.eval().requires_grad_(False)


def _import_function(name: str) -> Callable[[Tensor, Sequence[str]], Tensor]:
    module, _, attribute = name.partition(":")
    if not attribute:
        raise UserError(
            f"there is no reward named {name!r}, so give MODULE:FUNCTION or change it: {nearest(name, tuple(REWARDS))}"
        )
    try:
        function = vars(import_module(module))[attribute]
    except (ImportError, KeyError) as error:
        raise UserError(
            f"the reward {name!r} cannot be imported ({type(error).__name__}: {error}): give MODULE:FUNCTION of a module on the path"
        ) from None
    if not callable(function):
        raise UserError(f"the reward {name!r} is a {type(function).__name__}: give a function of images and prompts")
    return function  # type: ignore[no-any-return]
