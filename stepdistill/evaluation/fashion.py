"""The `fashion` protocol, which measures samples of the embedded teacher and of its students.

It has four scores: the Fréchet distance between the judge's 64 features of the samples and of held-out photographs; prompt
accuracy, the share of the prompt's attributes that the judge recognises; diversity, the distance between samples of one prompt;
and colour saturation. Rows are comparable only at the same number of images, because the Fréchet distance is biased by about
the noise floor that is printed with it. Most images have a prompt of their own: with four images per prompt, real photographs
have a distance of 0.44 instead of 0.16 at 1,024 images, because of the choice of prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from stepdistill.assets import FOLDER
from stepdistill.data.appearance import saturation
from stepdistill.data.fashion import BACKGROUNDS, COLOURS, GARMENTS, parse_caption
from stepdistill.data.prompts import read_prompts
from stepdistill.errors import UserError
from stepdistill.evaluation.metrics.diversity import pairwise_diversity
from stepdistill.evaluation.metrics.frechet import frechet_between, noise_floor
from stepdistill.evaluation.metrics.statistics import FeatureStatistics
from stepdistill.evaluation.networks.judge import Judge

SEEDS_PER_PROMPT = 4
NUM_IMAGES = 1536
"""24 times the feature dimension."""
FIRST_SEED = 1_000_000
"""Image i of any protocol has the seed FIRST_SEED + i, whichever process draws it."""
IMAGES_PER_BLOCK = 12
"""Of every IMAGES_PER_BLOCK images, SEEDS_PER_PROMPT share a prompt."""


@dataclass(frozen=True)
class Scores:
    """The four scores of one set of images."""

    frechet: float
    prompt_accuracy: float
    diversity: float
    saturation: float
    num_images: int


@dataclass(frozen=True)
class ResultRow:
    """A row of the table: a sampler and its scores. `seconds_per_image` is wall time on this machine, including decoding."""

    name: str
    steps: int
    network_calls: int
    frechet: float
    prompt_accuracy: float
    diversity: float
    saturation: float
    seconds_per_image: float
    num_images: int

    @classmethod
    def of(cls, name: str, steps: int, network_calls: int, scores: Scores, seconds_per_image: float) -> ResultRow:
        return cls(
            name=name, steps=steps, network_calls=network_calls, seconds_per_image=seconds_per_image, **asdict(scores)
        )


def evaluation_set(images: int = NUM_IMAGES) -> tuple[list[str], list[int]]:
    """Returns the protocol's (prompts, seeds): a third of the images in groups of SEEDS_PER_PROMPT per prompt, the rest alone.

    Raises:
        UserError: `images` is not a positive multiple of 12.
    """
    if images <= 0 or images % IMAGES_PER_BLOCK:
        raise UserError(
            f"the protocol takes a positive multiple of {IMAGES_PER_BLOCK} images and was given {images}: change the number"
        )
    prompts = list(read_prompts("builtin:fashion").texts)
    groups = images // IMAGES_PER_BLOCK
    if images - groups * (SEEDS_PER_PROMPT - 1) > len(prompts):
        raise UserError(f"the protocol has {len(prompts)} prompts, too few for {images} images: take fewer")
    grouped = [prompt for prompt in prompts[:groups] for _ in range(SEEDS_PER_PROMPT)]
    return grouped + prompts[groups : images - len(grouped) + groups], [FIRST_SEED + i for i in range(images)]


def prompt_accuracy_per_image(judge: Judge, images: NDArray[np.uint8], prompts: Sequence[str]) -> NDArray[np.float64]:
    """Computes the share (N,) of the attributes in each image's prompt that the judge recognises.

    Raises:
        ValueError: a prompt without a garment.
    """
    seen = judge.predict(images)
    shares = []
    for i, prompt in enumerate(prompts):
        said = parse_caption(prompt)
        right = [seen.garment[i] == GARMENTS.index(said.garment)]
        if said.colour is not None:
            right.append(seen.colour[i] == COLOURS.index(said.colour))
        if said.background is not None:
            right.append(seen.background[i] == BACKGROUNDS.index(said.background))
        shares.append(float(np.mean(right)))
    return np.array(shares, dtype=np.float64)


class FashionScorer:
    """The judge with its reference statistics."""

    def __init__(self) -> None:
        self.judge = Judge.load(FOLDER / "judge.safetensors")
        self.reference = FeatureStatistics.load(FOLDER / "reference.npz")

    def score(self, images: NDArray[np.uint8], prompts: Sequence[str]) -> Scores:
        """Scores of uint8 images (N, 32, 32, 3) drawn for `prompts`, in the order of `evaluation_set`."""
        features = self.judge.features(images)
        grouped = features[: len(features) // IMAGES_PER_BLOCK * SEEDS_PER_PROMPT]
        groups = grouped.reshape(-1, SEEDS_PER_PROMPT, features.shape[1])
        return Scores(
            frechet=frechet_between(FeatureStatistics.of(features), self.reference),
            prompt_accuracy=float(prompt_accuracy_per_image(self.judge, images, prompts).mean()),
            diversity=pairwise_diversity(groups, self.reference.mean),
            saturation=saturation(images),
            num_images=len(images),
        )

    def frechet_noise_floor(self, images: int) -> float:
        """Fréchet distance that two sets of this size of one distribution have on average."""
        return noise_floor(self.reference.covariance, images, self.reference.count)
