"""Scores that are computed from images and prompts, not from features: attribute accuracy, CLIP scores, rewards, LPIPS.

Every process scores its own share of the images in small batches; the values are gathered in global order.
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
from stepdistill.evaluation.scorers import (
    CLIP_SCORE_CONVENTIONS,
    ClipScorer,
    RewardScorer,
    ScoreArray,
    clip_score,
    convention_mean,
)

BATCH = 32
Score = Callable[[Sequence[ImageArray], Sequence[str]], ScoreArray]


@dataclass(frozen=True)
class ImageScorers:
    """The scorers of an evaluation.

    Raises:
        UserError: an unknown CLIP convention, or two rewards of one name.
    """

    clip: ClipScorer | None = None
    conventions: Sequence[str] = ()
    rewards: Sequence[RewardScorer] = ()
    lpips: Lpips | None = None

    def __post_init__(self) -> None:
        for convention in self.conventions:
            if convention not in CLIP_SCORE_CONVENTIONS:
                raise UserError(
                    f"the CLIP convention {convention!r} is not known: use one of {', '.join(CLIP_SCORE_CONVENTIONS)}"
                )
        names = [reward.name for reward in self.rewards]
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise UserError(f"the reward {twice[0]!r} is given twice: leave one out, or give its folder another name")

    @property
    def need_prompts(self) -> bool:
        """Whether any scorer reads the prompts."""
        return self.clip is not None or bool(self.rewards) or self.lpips is not None

    def record(self) -> str:
        """Describes the scorers' networks for the protocol record."""
        clip = [f"clip {self.clip.weights[:12]} {','.join(self.conventions)}"] if self.clip is not None else []
        rewards = [f"{reward.name} {reward.weights[:12]}" for reward in self.rewards]
        return "; ".join([*clip, *rewards, *([self.lpips.name] if self.lpips is not None else [])])


@dataclass(frozen=True)
class ImageScores:
    """Means by name, one value per image by name (for win rates against the teacher), and what failed."""

    means: dict[str, float] = field(default_factory=dict)
    values: dict[str, ScoreArray] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def score_images(
    drawn: GeneratedImages, prompts: PromptSet, metrics: Sequence[Metric], scores: ImageScorers, chain: PixelChain
) -> ImageScores:
    """Computes all scores of one sampler's images, after the protocol's pixel chain. This is a collective.

    A reward that fails is reported with its reason instead of a number, because drawing may have taken hours.
    """
    wanted: dict[str, Score] = {}
    if "prompt_accuracy" in metrics:
        judge = Judge.load(FOLDER / "judge.safetensors")
        wanted["prompt_accuracy"] = lambda images, texts: prompt_accuracy_per_image(judge, np.stack(images), texts)
    conventions = {f"clip[{scores.clip.name},{c}]": c for c in scores.conventions} if scores.clip is not None else {}
    for name, convention in conventions.items():
        wanted[name] = partial(_clip, scores.clip, convention)
    rewards = {reward.name: reward.score for reward in scores.rewards}
    wanted |= rewards
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
    """Returns this process's values by score, and the reasons of those that failed."""
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
                # a user's reward may raise anything, and the images may have taken hours
                failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return values, failed


def _clip(scorer: ClipScorer | None, convention: str, images: Sequence[ImageArray], texts: Sequence[str]) -> ScoreArray:
    if scorer is None:
        raise ValueError("a CLIP score without a CLIP network")
    return clip_score(scorer, images, texts, convention).values
