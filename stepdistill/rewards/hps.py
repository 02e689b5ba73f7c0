"""HPS v2.1 (Wu et al. 2023, arXiv 2306.09341): a CLIP ViT-H/14 of preferences; its cosine.

It looks at whole images: the longer side is fitted, and black fills the square.
"""

from __future__ import annotations

from stepdistill.errors import UserError
from stepdistill.rewards.base import Reward
from stepdistill.rewards.clip import load_clip


def load(option: str) -> Reward:
    """`option` is a transformers folder or hub id of the weights as a `CLIPModel`; the published ones are an OpenCLIP pickle."""
    if not option:
        raise UserError(
            "the reward 'hps' names no weights, and HPS v2.1 is published as an OpenCLIP pickle: give hps:FOLDER with them as a "
            "CLIPModel of transformers and its tokenizer"
        )
    return load_clip("hps", option, pad_to_square=True)
