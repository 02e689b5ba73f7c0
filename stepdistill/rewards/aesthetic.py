"""LAION's aesthetic predictor v2: linear layers without activations on normalised CLIP ViT-L/14 embeddings, about 1 to 10."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from stepdistill.errors import UserError
from stepdistill.frozen.vision import builds_on_meta
from stepdistill.rewards.base import Reward
from stepdistill.rewards.clip import DEFAULT, ClipReward, load_clip
from stepdistill.rewards.linear_head import linear_stack


class AestheticReward(Reward):
    """The aesthetic score of images; the prompts are ignored."""

    def __init__(self, clip: ClipReward, head: nn.Sequential) -> None:
        super().__init__()
        self.clip, self.head = clip, head

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.head(F.normalize(self.clip.image_embeddings(images), dim=1))[:, 0]  # type: ignore[no-any-return]


def load(option: str, *, download: bool = True) -> Reward:
    """Loads the reward.

    Args:
        option: `CLIP,HEAD`: a transformers folder or hub id (OpenAI's ViT-L/14 if empty), and the head's .safetensors file.
        download: allow fetching the CLIP checkpoint from the hub.

    Raises:
        UserError: no head, or files of another network.
    """
    clip, comma, head = option.partition(",")
    if not comma or not head:
        raise UserError(
            f"the reward 'aesthetic:{option}' names no head, which is published as a pickle alone: give aesthetic:CLIP,HEAD with "
            "its layers as .safetensors, or aesthetic:,HEAD on OpenAI's ViT-L/14"
        )
    scorer = load_clip("aesthetic", clip or DEFAULT, "torchvision", download=download)
    return AestheticReward(scorer, load_head(head, int(scorer.model.config.projection_dim)))


def load_head(path: str, width: int) -> nn.Sequential:
    """Loads the frozen head for embeddings of that width from layers.{0,2,4,6,7}.{weight,bias}; no weights on the meta device.

    Raises:
        UserError: no such file, or another head.
    """
    layers = linear_stack(width)
    if not Path(path).is_file():
        raise UserError(f"there is no aesthetic head {path!r}: give the predictor's weights as .safetensors")
    if not builds_on_meta():
        state = {key.removeprefix("layers."): value for key, value in load_file(path).items()}
        try:
            layers.load_state_dict(state)
        except RuntimeError as error:
            raise UserError(
                f"{path!r} is not the aesthetic head ({' '.join(str(error).split())[:120]}): give LAION's v2"
            ) from None
    return nn.Sequential(*layers.values()).eval().requires_grad_(False)
