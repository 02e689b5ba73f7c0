"""Rewards: how well images match their prompts or a taste, differentiable where they can be. One small file each."""

from __future__ import annotations

from stepdistill.rewards.base import HELD_OUT, REWARD, Reward, load_reward

__all__ = ["HELD_OUT", "REWARD", "Reward", "load_reward"]
