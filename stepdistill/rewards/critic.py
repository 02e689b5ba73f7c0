"""Rewards for tests and demos: class probabilities of the embedded critic, and plain pixel statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from stepdistill.config.registry import suggestion_for
from stepdistill.data.fashion import COLOURS, GARMENTS, parse_caption
from stepdistill.errors import UserError
from stepdistill.frozen.critic import Critic
from stepdistill.frozen.vision import load_critic
from stepdistill.rewards.base import Reward

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue (ITU-R BT.601)."""


class AttributeReward(Reward):
    """The critic's probability of the garment or colour that the prompt names; 1 if the prompt names none."""

    def __init__(self, critic: Critic, colour: bool) -> None:
        super().__init__()
        self.critic, self.colour = critic, colour

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        seen = self.critic(2 * images.to(self.critic.stem.weight.dtype) - 1)
        logits = seen.colour if self.colour else seen.garment
        index = torch.tensor([_attribute_index(prompt, self.colour) for prompt in prompts], device=logits.device)
        chosen = logits.softmax(1).gather(1, index.clamp_min(0)[:, None])[:, 0]
        return torch.where(index >= 0, chosen, torch.ones_like(chosen))


def _attribute_index(prompt: str, colour: bool) -> int:
    """Returns the index of the colour or garment that a prompt names, or -1 if it names none."""
    try:
        said = parse_caption(prompt)
    except ValueError:
        return -1
    if not colour:
        return GARMENTS.index(said.garment)
    return COLOURS.index(said.colour) if said.colour is not None else -1


class PixelReward(Reward):
    """A statistic of the pixels; the prompts are ignored."""

    def __init__(self, measure: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.measure = measure

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.measure(images)


def brightness(images: Tensor) -> Tensor:
    """Mean luma (B,), in [0, 1]."""
    return _luma(images).mean((1, 2))


def sharpness(images: Tensor) -> Tensor:
    """Mean absolute Laplacian of luma (B,): energy at the finest scale."""
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
    edges = F.conv2d(_luma(images)[:, None], kernel.to(images)[None, None])
    return edges.abs().mean((1, 2, 3))


def _luma(images: Tensor) -> Tensor:
    return (images * images.new_tensor(LUMA)[:, None, None]).sum(1)


MEASURES: Mapping[str, Callable[[Tensor], Tensor]] = {"brightness": brightness, "sharpness": sharpness}


def load(option: str, *, download: bool = True) -> Reward:
    """Loads the reward `garment`, `colour`, `brightness` or `sharpness`; nothing is ever downloaded."""
    known = ("garment", "colour", *MEASURES)
    if option not in known:
        raise UserError(f"the reward 'critic' has no option {option!r}: {suggestion_for(option, known)}")
    if option in MEASURES:
        return PixelReward(MEASURES[option])
    return AttributeReward(load_critic(), option == "colour")
