"""Scores that read the pictures themselves beside their prompts: attribute accuracy, CLIP scores, rewards, LPIPS.

Every process scores its own share, a few pictures at a time; the values come together in global order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object

from stepdistill.assets import FOLDER
from stepdistill.errors import UserError
from stepdistill.evaluation.fashion import prompt_accuracy_per_image
from stepdistill.evaluation.generation import GeneratedImages
from stepdistill.evaluation.images import ImageArray, PixelChain, indices_of_rank
from stepdistill.evaluation.metrics.lpips import Lpips
from stepdistill.evaluation.networks.judge import Judge
from stepdistill.evaluation.protocols import Metric, PromptSet
from stepdistill.evaluation.text import (
    CLIP_SCORE_CONVENTIONS,
    ClipScorer,
    Reward,
    ScoreArray,
    UnavailableReward,
    clip_score,
    convention_mean,
)

BATCH = 32
Score = Callable[[Sequence[ImageArray], Sequence[str]], ScoreArray]


@dataclass(frozen=True)
class ImageScorers:
    """What is measured on pictures and prompts beside the features.

    Raises:
        UserError: a CLIP convention that is not known.
    """

    clip: ClipScorer | None = None
    conventions: Sequence[str] = ()
    rewards: Sequence[Reward | UnavailableReward] = ()
    lpips: Lpips | None = None

    def __post_init__(self) -> None:
        for convention in self.conventions:
            if convention not in CLIP_SCORE_CONVENTIONS:
                raise UserError(
                    f"the CLIP convention {convention!r} is not known: use one of {', '.join(CLIP_SCORE_CONVENTIONS)}"
                )

    def record(self) -> str:
        """The networks that these scores come from, for the protocol record."""
        clip = [f"clip {self.clip.weights[:12]} {','.join(self.conventions)}"] if self.clip is not None else []
        rewards = [reward.name for reward in self.rewards if not isinstance(reward, UnavailableReward)]
        return "; ".join([*clip, *rewards, *([self.lpips.name] if self.lpips is not None else [])])


@dataclass(frozen=True)
class ImageScores:
    """Means by name, values an image by name where they are paired with the teacher's, and what failed."""

    means: dict[str, float] = field(default_factory=dict)
    values: dict[str, ScoreArray] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def score_images(
    drawn: GeneratedImages, prompts: PromptSet, metrics: Sequence[Metric], scores: ImageScorers, chain: PixelChain
) -> ImageScores:
    """All of them for one sampler's images, after the protocol's pixel chain. A collective.

    A reward that fails is reported, with its reason, in place of its number.
    """
    wanted: dict[str, Score] = {}
    if "prompt_accuracy" in metrics:
        judge = Judge.load(FOLDER / "judge.safetensors")
        wanted["prompt_accuracy"] = lambda images, texts: prompt_accuracy_per_image(judge, np.stack(images), texts)
    conventions = {f"clip[{scores.clip.name},{c}]": c for c in scores.conventions} if scores.clip is not None else {}
    for name, convention in conventions.items():
        wanted[name] = partial(_clip, scores.clip, convention)
    rewards = {reward.name: reward for reward in scores.rewards if not isinstance(reward, UnavailableReward)}
    wanted |= {name: reward.score for name, reward in rewards.items()}
    own, failed = _own_values(drawn, prompts, wanted, chain, frozenset(rewards))
    shares = gather_object([(own, failed)])
    notes = {name: reason for _, bad in shares for name, reason in bad.items()}
    values: dict[str, ScoreArray] = {}
    for name in wanted:
        if name not in notes:
            values[name] = np.empty(drawn.total)
            for rank, (part, _) in enumerate(shares):
                values[name][indices_of_rank(drawn.total, rank, len(shares))] = part[name]
    means = {
        name: convention_mean(value, conventions[name]) if name in conventions else float(value.mean())
        for name, value in values.items()
    }
    if scores.lpips is not None and (spread := scores.lpips.diversity(drawn.images_at, prompts.prompts)) is not None:
        means[f"diversity[{scores.lpips.name}]"] = spread
    paired = {name: value for name, value in values.items() if name != "prompt_accuracy"}
    return ImageScores(means, paired, tuple(f"{name}: not available ({reason})" for name, reason in notes.items()))


def _own_values(
    drawn: GeneratedImages, prompts: PromptSet, wanted: dict[str, Score], chain: PixelChain, may_fail: frozenset[str]
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """This process's values by score, and the reasons of those that failed."""
    values: dict[str, list[float]] = {name: [] for name in wanted}
    failed: dict[str, str] = {}
    if not wanted:
        return values, failed
    state = PartialState()
    images = map(chain, drawn.iter_local_images())
    indices = list(indices_of_rank(drawn.total, state.process_index, state.num_processes))
    for start in range(0, len(indices), BATCH):
        rows = indices[start : start + BATCH]
        batch, texts = list(islice(images, len(rows))), [prompts.prompts[i] for i in rows]
        for name, score in wanted.items():
            if name in failed:
                continue
            try:
                values[name].extend(np.asarray(score(batch, texts), dtype=np.float64).tolist())
            except Exception as error:
                if name not in may_fail:
                    raise
                # third-party reward packages fail in every way there is, after hours of drawing
                failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return values, failed


def _clip(scorer: ClipScorer | None, convention: str, images: Sequence[ImageArray], texts: Sequence[str]) -> ScoreArray:
    if scorer is None:
        raise ValueError("a CLIP score without a CLIP network")
    return clip_score(scorer, images, texts, convention).values
