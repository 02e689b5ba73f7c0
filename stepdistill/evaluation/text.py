"""How well images match their prompts, and which of two images people would prefer.

A CLIP score has no unit of its own: the same images score 0.31, 31 or 0.78 by convention, so the convention is part of
the metric's name. Preference models are optional: one that cannot be loaded is reported with its reason, never a crash.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

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
from stepdistill.rewards.aesthetic import load_head

logger = logging.getLogger(__name__)
ScoreArray = NDArray[np.float64]


@dataclass(frozen=True)
class ClipScoreConvention:
    """How a cosine becomes a score.

    Attributes:
        prefix: put before every prompt.
        scale: times the cosine.
        clamp: "sample" at 0 for each image, "mean" for the mean alone, "none".
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
    """A mean with its name, which says network and convention, and how many prompts were cut to the network's length."""

    name: str
    mean: float
    values: ScoreArray
    truncated: int


class Reward(Protocol):
    """A judge of single images; higher is better. `name` says version and scale."""

    name: str

    def score(self, images: Sequence[ImageArray], prompts: Sequence[str]) -> ScoreArray:
        """One number an image, (N,)."""
        ...


class ClipScorer:
    """Cosines between images and prompts under one CLIP checkpoint (a transformers folder or hub id)."""

    def __init__(self, path: str, device: torch.device | str = "cpu", *, download: bool = False) -> None:
        """Raises UserError where the checkpoint cannot be loaded."""
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
                f"the CLIP checkpoint {path!r} cannot be loaded ({first}): give a local folder, or allow downloading"
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
        """(cosine of each image with its prompt (N,), number of prompts cut). Long prompts keep their end token."""
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
    """The CLIP score in a named convention.

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
    """The mean over images as the convention takes it."""
    mean = float(values.mean())
    return max(mean, 0.0) if CLIP_SCORE_CONVENTIONS[convention].clamp == "mean" else mean


def _square(image: ImageArray) -> ImageArray:
    """CLIP's own centre crop; bicubic resampling of the short side afterwards is the same as before it, for squares."""
    return PixelChain("square")(image)


# ---------------------------------------------------------------- preference


class PickScore:
    """PickScore v1 (Kirstain et al. 2023): the fine-tuned CLIP's logit, about 20 to 23."""

    def __init__(self, path: str, device: torch.device | str = "cpu", *, download: bool = False) -> None:
        self._scorer = ClipScorer(path, device, download=download)
        self.name = "pickscore[v1,logit]"

    def score(self, images: Sequence[ImageArray], prompts: Sequence[str]) -> ScoreArray:
        scale = float(self._scorer.model.logit_scale.exp())
        return scale * self._scorer.cosine_similarities(images, prompts)[0]


class HPSv2:
    """HPSv2.1 (Wu et al. 2023) through the `hpsv2` package, times 100; v2.0 is another scale."""

    name = "hps[v2.1,100cos]"

    def __init__(self) -> None:
        import hpsv2

        self._package = hpsv2

    def score(self, images: Sequence[ImageArray], prompts: Sequence[str]) -> ScoreArray:
        from PIL import Image

        rows = zip(images, prompts, strict=True)
        scored = [self._package.score(Image.fromarray(image), text, hps_version="v2.1")[0] for image, text in rows]
        return 100.0 * np.array(scored, dtype=np.float64)


class ImageReward:
    """ImageReward v1.0 (Xu et al. 2023) through its package; about N(0, 1) over its training data."""

    name = "imagereward[v1.0]"

    def __init__(self) -> None:
        import ImageReward as package

        self._model = package.load("ImageReward-v1.0")

    def score(self, images: Sequence[ImageArray], prompts: Sequence[str]) -> ScoreArray:
        from PIL import Image

        rows = zip(images, prompts, strict=True)
        return np.array([self._model.score(text, Image.fromarray(image)) for image, text in rows], dtype=np.float64)


class Aesthetic:
    """LAION's aesthetic predictor v2: a linear stack without activations on L2-normalised ViT-L/14 embeddings, 1 to 10."""

    name = "aesthetic[laion-v2]"

    def __init__(self, clip: str, head: str, device: torch.device | str = "cpu", *, download: bool = False) -> None:
        """`head` is a .safetensors with layers.{0,2,4,6,7}.{weight,bias}, 768-1024-128-64-16-1."""
        self._scorer = ClipScorer(clip, device, download=download)
        self._layers = load_head(head, self._scorer.model.config.projection_dim).to(device)

    @torch.inference_mode()
    def score(self, images: Sequence[ImageArray], prompts: Sequence[str]) -> ScoreArray:
        scorer = self._scorer
        pixels = [resize_and_normalize(_square(image), scorer.side, CLIP_MEAN, CLIP_STD) for image in images]
        embedded = pooled_embedding(scorer.model.get_image_features(pixel_values=torch.stack(pixels).to(scorer.device)))
        return self._layers(F.normalize(embedded, dim=1))[:, 0].double().cpu().numpy()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class UnavailableReward:
    """A reward that could not be loaded, and why."""

    name: str
    reason: str


def load_reward(spec: str, device: torch.device | str = "cpu", *, download: bool = False) -> Reward | UnavailableReward:
    """The reward of NAME[:WEIGHTS]: pickscore:PATH, hps, imagereward, aesthetic:CLIP_PATH,HEAD_FILE.

    Raises:
        UserError: unknown name. What is known but cannot be loaded comes back as `Unavailable`.
    """
    kind, _, weights = spec.partition(":")
    try:
        if kind == "pickscore":
            return PickScore(weights or "yuvalkirstain/PickScore_v1", device, download=download)
        if kind in ("hps", "imagereward") and not download:
            return UnavailableReward(kind, "its package fetches the weights: allow --download")
        if kind == "hps":
            return HPSv2()
        if kind == "imagereward":
            return ImageReward()
        if kind == "aesthetic":
            clip, _, head = weights.partition(",")
            return Aesthetic(clip or "openai/clip-vit-large-patch14", head, device, download=download)
    except Exception as error:
        # third-party packages fail at import in every way there is; the run must go on and say so
        return UnavailableReward(kind, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    raise UserError(f"the reward {spec!r} is not known: use pickscore, hps, imagereward or aesthetic")


@dataclass(frozen=True)
class WinRate:
    """Share of prompts on which the student scores above the teacher, ties half, with a 95 % bootstrap interval."""

    rate: float
    low: float
    high: float
    prompts: int


def win_rate(
    student: ScoreArray, teacher: ScoreArray, prompts: Sequence[str], rng: np.random.Generator, resamples: int = 2000
) -> WinRate:
    """Paired comparison at equal prompts and seeds; seeds of one prompt are averaged, since they are not independent."""
    if not len(student) == len(teacher) == len(prompts):
        raise ValueError(
            f"{len(student)}, {len(teacher)} scores and {len(prompts)} prompts came in; as many of each are wanted"
        )
    _, groups = np.unique(np.asarray(prompts), return_inverse=True)
    wins = (student > teacher) + 0.5 * (student == teacher)
    per_prompt = np.bincount(groups, weights=wins) / np.bincount(groups)
    drawn = per_prompt[rng.integers(len(per_prompt), size=(resamples, len(per_prompt)))].mean(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return WinRate(float(per_prompt.mean()), float(low), float(high), len(per_prompt))
