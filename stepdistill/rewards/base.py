"""The interface of a reward, and the rewards that need no file of their own: a user's function, and a weighted sum."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from stepdistill.errors import UserError

REWARD, HELD_OUT = "reward", "held_out_reward"
"""Keys in `Triple.frozen`: the reward that is optimized, and one that is only logged."""


class Reward(nn.Module, ABC):
    """A frozen model that scores images.

    Attributes:
        differentiable: gradients flow from the reward to the images.
    """

    differentiable: bool = True

    @abstractmethod
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Returns rewards (B,), higher is better, of images (B, 3, H, W) in [0, 1] for B prompts.

        A sample's reward depends on its own image and prompt only.
        """


class RewardLoader(Protocol):
    """What `config.registry.REWARDS` names: a function that loads one kind of reward."""

    def __call__(self, option: str, *, download: bool = True) -> Reward:
        """Loads the reward.

        Args:
            option: the text after the colon of the reward's name, "" if there is none.
            download: allow fetching weights from the hub.

        Raises:
            UserError: an unknown option, or weights that cannot be loaded.
        """
        ...


class FunctionReward(Reward):
    """A user's function (images, prompts) -> (B,); it is differentiable if the function is."""

    def __init__(self, function: Callable[[Tensor, Sequence[str]], Tensor]) -> None:
        super().__init__()
        self.function = function  # if it is a module, its weights move with this module's

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.function(images, prompts)


class WeightedSum(Reward):
    """sum_k w_k r_k; differentiable if all rewards are.

    Raises:
        UserError: the images require gradients that only some of the rewards pass on.
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
                f"the sum of {len(found)} rewards is to be maximized with gradients, and part {', '.join(stuck)} of it has no "
                "gradient: leave it out, or use method.name: pso, which needs no gradient of the reward"
            )
        return torch.stack(found).sum(0)
