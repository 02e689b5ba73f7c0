"""PickScore v1 (Kirstain et al., NeurIPS 2023, arXiv 2305.01569): a CLIP of preferences; its cosine, without the logit scale."""

from __future__ import annotations

from stepdistill.rewards.base import Reward
from stepdistill.rewards.clip import PICKSCORE, load_clip


def load(option: str) -> Reward:
    """`option` is a transformers folder or hub id with its tokenizer; the published model by default."""
    return load_clip("pickscore", option or PICKSCORE)
