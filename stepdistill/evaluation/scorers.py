"""Scorers: models that give one number to each image and its prompt, either a CLIP score or a reward.

A CLIP score has no unit of its own: the same images score 0.31, 31 or 0.78 by convention, so the convention is part of the
metric's name. Rewards are those of `stepdistill/rewards`, by the same names and on the same scale as in training.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizerFast

from stepdistill.errors import UserError
from stepdistill.evaluation.images import ImageArray, PixelChain
from stepdistill.evaluation.networks.features import (
    CLIP_MEAN,
    CLIP_STD,
    pooled_embedding,
    resize_and_normalize,
    weights_hash,
)
from stepdistill.rewards import load_reward, report_name

logger = logging.getLogger(__name__)
ScoreArray = NDArray[np.float64]


@dataclass(frozen=True)
class ClipScoreConvention:
    """How a cosine becomes a score.

    Attributes:
        prefix: text that is put before every prompt.
        scale: factor of the cosine.
        clamp: "sample" raises each image's score to at least 0, "mean" only the mean, "none" neither.
    """

    prefix: str
    scale: float
    clamp: Literal["none", "sample", "mean"]


CLIP_SCORE_CONVENTIONS = {
    "hessel": ClipScoreConvention("A photo depicts ", 2.5, "sample"),
    "gigagan": ClipScoreConvention("A photo depicts ", 1.0, "none"),
    "torchmetrics": ClipScoreConvention("", 100.0, "mean"),
    "raw": ClipScoreConvention("", 1.0, "none"),
}
"""CLIPScore (Hessel et al. 2021); GigaGAN's script, which DMD and DMD2 use; torchmetrics; the plain cosine."""


@dataclass(frozen=True)
class TextScore:
    """A CLIP score: its name (network and convention), its mean, one value per image, and the number of prompts that were cut."""

    name: str
    mean: float
    values: ScoreArray
    truncated: int


class ClipScorer:
    """Cosines between images and prompts under one CLIP checkpoint (a transformers folder or hub id)."""

    def __init__(self, path: str, device: torch.device | str = "cpu", *, download: bool = False) -> None:
        """Loads the checkpoint; raises UserError if it cannot be loaded."""
        self.name = Path(path).name
        try:
            self.model = (
                CLIPModel.from_pretrained(path, local_files_only=not download, use_safetensors=True)
                .eval()
                .requires_grad_(False)
            )
            self.tokenizer = CLIPTokenizerFast.from_pretrained(path, local_files_only=not download)
        except (OSError, ValueError, TypeError) as error:
            first = " ".join(str(error).split())[:160]
            raise UserError(
                f"the CLIP checkpoint {path!r} cannot be loaded ({first}): give a local folder, or --download"
            ) from None
        self.model = self.model.to(device)
        self.device = torch.device(device)
        self.length = int(self.model.config.text_config.max_position_embeddings)
        self.side = int(self.model.config.vision_config.image_size)
        self.weights = weights_hash(self.model)

    @torch.inference_mode()
    def cosine_similarities(
        self, images: Sequence[ImageArray], prompts: Sequence[str], prefix: str = "", batch_size: int = 32
    ) -> tuple[ScoreArray, int]:
        """Returns (cosine of each image with its prompt (N,), number of prompts that were cut). Cut prompts keep their end token."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images and {len(prompts)} prompts came in; as many of each are wanted")
        values, truncated = [], 0
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            texts = [prefix + prompt for prompt in prompts[rows]]
            truncated += sum(len(ids) > self.length for ids in self.tokenizer(texts).input_ids)
            tokens = self.tokenizer(texts, truncation=True, max_length=self.length, padding=True, return_tensors="pt")
            text = pooled_embedding(self.model.get_text_features(**tokens.to(self.device)))
            pixels = torch.stack(
                [resize_and_normalize(_square(image), self.side, CLIP_MEAN, CLIP_STD) for image in images[rows]]
            )
            image = pooled_embedding(self.model.get_image_features(pixel_values=pixels.to(self.device)))
            values.append(F.cosine_similarity(image.double(), text.double(), dim=1).cpu().numpy())
        if truncated:
            logger.warning(
                "%d of %d prompts are longer than %d tokens and were cut", truncated, len(prompts), self.length
            )
        return np.concatenate(values), truncated


def clip_score(scorer: ClipScorer, images: Sequence[ImageArray], prompts: Sequence[str], convention: str) -> TextScore:
    """Computes the CLIP score in a named convention.

    Raises:
        UserError: unknown convention.
    """
    if convention not in CLIP_SCORE_CONVENTIONS:
        raise UserError(
            f"the CLIP convention {convention!r} is not known: use one of {', '.join(CLIP_SCORE_CONVENTIONS)}"
        )
    rule = CLIP_SCORE_CONVENTIONS[convention]
    cosine_similarities, truncated = scorer.cosine_similarities(images, prompts, rule.prefix)
    values = rule.scale * (np.maximum(cosine_similarities, 0.0) if rule.clamp == "sample" else cosine_similarities)
    return TextScore(f"clip[{scorer.name},{convention}]", convention_mean(values, convention), values, truncated)


def convention_mean(values: ScoreArray, convention: str) -> float:
    """Returns the mean over images as the convention defines it."""
    mean = float(values.mean())
    return max(mean, 0.0) if CLIP_SCORE_CONVENTIONS[convention].clamp == "mean" else mean


def _square(image: ImageArray) -> ImageArray:
    """Crops the centre square, as CLIP's preprocessing does; cropping before resizing gives the same pixels as after it."""
    return PixelChain("square")(image)


class RewardScorer:
    """A reward of `stepdistill/rewards`, applied to uint8 images.

    Attributes:
        name: the reward's name in reports, with paths shortened.
        weights: hash of the reward's weights, for the protocol record.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu", *, download: bool = False) -> None:
        """Loads the reward; raises UserError if there is none of that name, or if it cannot be loaded."""
        self.name, self.device = report_name(name), torch.device(device)
        self.reward = load_reward(name, download=download).to(self.device)
        self.weights = weights_hash(self.reward)

    @torch.no_grad()
    def score(self, images: Sequence[ImageArray], prompts: Sequence[str]) -> ScoreArray:
        """Returns the rewards (N,) of uint8 images (H, W, 3), which may differ in size.

        Raises:
            UserError: the reward does not return one finite number per image.
        """
        same_size = len({image.shape for image in images}) == 1
        groups = [range(len(images))] if same_size else [range(i, i + 1) for i in range(len(images))]
        values = []
        for rows in groups:
            pixels = torch.from_numpy(np.stack([images[i] for i in rows])).permute(0, 3, 1, 2).to(self.device)
            found = self.reward(pixels.float() / 255, [prompts[i] for i in rows])
            if found.shape != (len(rows),):
                raise UserError(
                    f"the reward {self.name!r} returned the shape {tuple(found.shape)} for {len(rows)} images: return one number per image"
                )
            values.append(found.double().cpu().numpy())
        scores: ScoreArray = np.concatenate(values)
        if not np.isfinite(scores).all():
            raise UserError(f"the reward {self.name!r} returned NaN or infinity: check its weights and the images")
        return scores
