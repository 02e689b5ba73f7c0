"""HPS v2.1 (Wu et al. 2023, arXiv 2306.09341): the cosine of a CLIP ViT-H/14 that was fine-tuned on human preferences.

The published preprocessing keeps the whole image: the longer side is resized to the input size and the rest is padded with black.
HPS tables show 100 times this cosine.
"""

from __future__ import annotations

from stepdistill.errors import UserError
from stepdistill.rewards.base import Reward
from stepdistill.rewards.clip import load_clip


def load(option: str, *, download: bool = True) -> Reward:
    """Loads the reward from a transformers folder or hub id that holds the weights as a `CLIPModel`.

    The authors publish an OpenCLIP pickle only, so there is no default.
    """
    if not option:
        raise UserError(
            "the reward 'hps' names no weights, and HPS v2.1 is published as an OpenCLIP pickle: give hps:FOLDER with them as a "
            "CLIPModel of transformers and its tokenizer"
        )
    return load_clip("hps", option, "padded", download=download)
