"""Reward models, one file each: they score how well images match prompts or human preferences.

Training (`reward`, `pso`, held-out rewards) and `stepdistill evaluate --rewards` load them by the same names and get the same numbers.
"""

from __future__ import annotations

from stepdistill.rewards.base import HELD_OUT, REWARD, Reward
from stepdistill.rewards.naming import load_reward, report_name, split_reward_names

__all__ = ["HELD_OUT", "REWARD", "Reward", "load_reward", "report_name", "split_reward_names"]
