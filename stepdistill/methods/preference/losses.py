"""What preference losses share: a frozen reference, log-likelihood ratios of a sampler's steps, their pairwise loss, rewards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from stepdistill.config.reading import WeightedTermConfig
from stepdistill.errors import UserError
from stepdistill.methods.base import Decode
from stepdistill.rewards import HELD_OUT, REWARD
from stepdistill.roles.triple import Triple

REFERENCE = "reference"
"""The generator as it was before preferences, frozen."""


class RewardTermConfig(WeightedTermConfig):
    """A reward that is climbed beside another loss."""

    name: str | None = Field(
        None, description="'imagereward:FOLDER', 'critic:colour', any MODULE:FUNCTION, or a sum, '0.5*A + B'"
    )
    weight: float = Field(0.0, ge=0, description="0 is off")
    margin: float | None = Field(None, description="max(0, margin - r) in place of -r")
    held_out: str | None = Field(None, description="a further reward, logged and never optimised")

    @model_validator(mode="after")
    def _is_named(self) -> RewardTermConfig:
        if self.weight > 0 and self.name is None:
            raise ValueError("it has a weight and no name; say which reward is climbed")
        return self

    @property
    def on(self) -> bool:
        return self.weight > 0 and self.name is not None


def log_ratio(x: Tensor, mean: Tensor, reference: Tensor, std: Tensor) -> Tensor:
    """log p(x) / p_ref(x), (B,), for p = N(mean, std^2 I), p_ref = N(reference, std^2 I).

    It is linear in x, so that its expectation over x is its value at x's mean.
    """
    # ||x - reference||^2 - ||x - mean||^2 = 2 (x - (mean + reference) / 2) . (mean - reference)
    middle = (mean + reference) / 2
    return ((x - middle) * (mean - reference) / std.square()).flatten(1).sum(1)


def clamp_log_ratios(log_ratios: Tensor, trust: float) -> Tensor:
    """Log ratios whose ratio is clamped to 1 -+ `trust`, where no gradient is left; 0 is off."""
    if trust == 0:
        return log_ratios
    bounds = torch.tensor([1 - trust, 1 + trust], dtype=torch.float64).log().tolist()
    return log_ratios.clamp(*bounds)


def pairwise_loss(argument: Tensor) -> Tensor:
    """-log sigmoid of each pair's argument, (B,): log 2 at 0 (Bradley and Terry)."""
    return -F.logsigmoid(argument)


def select_candidates(candidates: Sequence[Tensor], index: Tensor) -> Tensor:
    """Row b of the candidate that index[b] names."""
    stacked = torch.stack(list(candidates), 1)
    place = index.reshape(-1, 1, *(1,) * (stacked.ndim - 2)).expand(-1, 1, *stacked.shape[2:])
    return stacked.gather(1, place)[:, 0]


def compute_rewards(latents: Tensor, prompts: Sequence[str], triple: Triple, decode: Decode | None) -> Tensor:
    """The reward of every sample, (B,), with graph where the latents have one; the autoencoder is frozen."""
    if decode is None:
        raise ValueError("a reward was asked for without a decoder")
    rewards: Tensor = triple.frozen[REWARD](decode(latents), prompts)
    return rewards.to(latents.dtype)


def reward_loss(
    latents: Tensor, prompts: Sequence[str], triple: Triple, decode: Decode | None, margin: float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean of -r, or of max(0, margin - r) (ReFL), and what to log: the reward, and the held-out one where there is one.

    Raises:
        UserError: the reward cannot be differentiated.
    """
    rewards = compute_rewards(latents, prompts, triple, decode)
    if latents.requires_grad and not rewards.requires_grad:
        raise UserError(
            "the reward has no gradient and is to be climbed: name a differentiable one, or rank samples by it with method.name: pso"
        )
    logged = {"reward": rewards.detach().mean()}
    if HELD_OUT in triple.frozen and decode is not None:
        with torch.no_grad():
            logged["held_out"] = triple.frozen[HELD_OUT](decode(latents.detach()), prompts).to(latents.dtype).mean()
    return (-rewards if margin is None else (margin - rewards).clamp_min(0)).mean(), logged
