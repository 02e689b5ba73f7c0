"""PickScore v1 (Kirstain et al., NeurIPS 2023, arXiv 2305.01569): the cosine of a CLIP fine-tuned on human preferences.

The logit scale of 100 is left out: 0.21 here is the 21 of published tables.
"""

from __future__ import annotations

from stepdistill.rewards.base import Reward
from stepdistill.rewards.clip import PICKSCORE, load_clip


def load(option: str, *, download: bool = True) -> Reward:
    """Loads the reward from a transformers folder or hub id with its tokenizer; the published model by default."""
    return load_clip("pickscore", option or PICKSCORE, download=download)
