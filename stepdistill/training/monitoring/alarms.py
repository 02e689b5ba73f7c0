"""Alarms: what is said when a logged value leaves its band, since the losses of distribution matching do not fall.

A band is a key of `training.alarms`. A value is judged once it has been outside for a while, and is then named in one warning
with its likely cause and remedy; again only when it has come back (by a tenth of the band) and left anew, or is twice as far
out. What has been said is a function of the lines of stats.jsonl: a resumed run reads them again, silently, and so neither
repeats nor forgets.

    band            judged                                                       what helps, in this order
    latent_std      spread of the samples over real latents', rising             lower guidance; higher ratio; GAN or moments
    latent_mean     swing of the samples' mean, to and fro                       higher ratio; higher fake-score rate
    score_gap       |mu_fake - mu_real| / |x - mu_real|                          higher ratio; higher fake-score rate; less guidance
    score_gap_rise  the same over its start, once above 1                        the same; lower generator rate
    fake_loss       the fake score's loss has never moved                        higher fake-score rate
    fake_shift      at the grids: the fake score is still the base               the same
    gradient        a role gets no gradient at all                               its section of `roles`
    logits          of the discriminator, either way                             smaller critic_weight, lower fake-score rate
    diversity       at the grids: over the teacher's                             less guidance; GAN; more odds on the first steps
    saturation      at the grids: beyond the teacher's                           less guidance; GAN or moments; stop early, use EMA
    clipped         share of a role's updates that were clipped                  lower rate, or a larger clip
    skipped         share of steps whose gradient was not finite                 bfloat16 or float32, lower rate

The thresholds are rules of thumb: they say where to look, never that a run is bad.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from stepdistill.config.schema import AlarmsConfig
from stepdistill.roles.triple import FAKE_SCORE, GENERATOR

GRID_PATIENCE = 2
"""Judgements in a row outside a band, where they are rare and steady."""
CLEAR_FRACTION = 0.9
"""Of the way from a healthy value to the band: inside this it has come back."""


class SignalStatistic(Protocol):
    """Takes a signal's values, one at a time."""

    def __call__(self, value: float) -> float | None:
        """What is judged now; None as long as there is too little."""


class MovingAverage:
    """Mean of the last `window` values."""

    def __init__(self, window: int) -> None:
        self.last: deque[float] = deque(maxlen=window)

    def __call__(self, value: float) -> float | None:
        self.last.append(value)
        return _mean(self.last) if len(self.last) == self.last.maxlen else None


class MovingAverageOfAbs(MovingAverage):
    """Of the values without sign."""

    def __call__(self, value: float) -> float | None:
        return super().__call__(abs(value))


class LevelAboveStart(MovingAverage):
    """Level of a ratio where it is above that of the first `FIRST` values, and 1 elsewhere: a bad reference is no rise."""

    FIRST, MARGIN = 3, 1.05

    def __init__(self, window: int) -> None:
        super().__init__(window)
        self.first: list[float] = []

    def __call__(self, value: float) -> float | None:
        if len(self.first) < self.FIRST:
            self.first.append(value)
        level = super().__call__(value)
        return 1.0 if level is not None and level <= self.MARGIN * _mean(self.first) else level


class RatioToStart(MovingAverage):
    """Level over the first one where it is above `least`, and 1 elsewhere."""

    def __init__(self, window: int, least: float = 1.0) -> None:
        super().__init__(window)
        self.least, self.start = least, 0.0

    def __call__(self, value: float) -> float | None:
        level = super().__call__(value)
        if level is None:
            return None
        self.start = self.start or max(level, 1e-12)
        return level / self.start if level > self.least else 1.0


class LargestChange(MovingAverage):
    """The largest relative change of the level since the first one; judged after five windows."""

    def __init__(self, window: int) -> None:
        super().__init__(window)
        self.start, self.most, self.seen, self.least = 0.0, 0.0, 0, 5 * window

    def __call__(self, value: float) -> float | None:
        level = super().__call__(value)
        self.seen += 1
        if level is None:
            return None
        self.start = self.start or level
        self.most = max(self.most, abs(level / self.start - 1) if self.start else 0.0)
        return self.most if self.seen >= self.least else None


class Oscillation:
    """How far the level goes to, fro and to again, over the last 20 blocks of half a window.

    0 where sampling noise, estimated from line to line, would do as much.
    """

    BLOCKS, NOISE = 20, 6.0

    def __init__(self, window: int) -> None:
        self.block = max(1, window // 2)
        self.values: deque[float] = deque(maxlen=self.BLOCKS * self.block)
        self.seen = 0

    def __call__(self, value: float) -> float | None:
        self.values.append(value)
        self.seen += 1
        if self.seen % self.block or self.seen < 4 * self.block:
            return None
        values = list(self.values)
        steps = [abs(b - a) for a, b in pairwise(values)]
        noise = _mean(steps) / 1.128 / math.sqrt(self.block)  # 1.128 sigma is the mean of |a - b| of two normal draws
        levels = [_mean(values[k : k + self.block]) for k in range(0, len(values), self.block)]
        swing = max(oscillation_amplitude(levels), oscillation_amplitude([-level for level in levels]))
        return swing if swing > self.NOISE * noise else 0.0


def oscillation_amplitude(levels: Sequence[float]) -> float:
    """The largest A for which the series rises by A, falls by A and rises by A again; 0 for a monotonic one."""
    best = 0.0
    for j in range(1, len(levels) - 2):
        up = levels[j] - min(levels[:j])
        for k in range(j + 1, len(levels) - 1):
            best = max(best, min(up, levels[j] - levels[k], max(levels[k + 1 :]) - levels[k]))
    return best


@dataclass(frozen=True)
class Alarm:
    """One signal and its band.

    Attributes:
        band: key of `training.alarms`.
        signal: name in stats.jsonl.
        measure: makes what is judged from its values, given the window.
        cause, remedy: of the warning.
        healthy: where the value belongs; distances are taken from there. None is twice the band.
        below: the band is the least value, and not the largest.
        patience: judgements in a row outside; None is the window.
        drawn: at the grids' cadence, from fixed prompts and noise: judged one by one.
    """

    threshold: str
    signal: str
    measure: Callable[[int], SignalStatistic]
    cause: str
    remedy: str
    healthy: float | None = 0.0
    below: bool = False
    patience: int | None = None
    measured_at_grids: bool = False


CAUSE_LAG = "the fake score lags behind the generator"
REMEDY_FASTER_FAKE_SCORE = "raise method.ratio or set method.fake_blend (0.97), then raise optimizers.fake_score.lr"
REMEDY_BOUND_CONTRAST = "add a GAN term (method.gan.weight) or a moment penalty where the method has one"
ALARMS: tuple[Alarm, ...] = (
    Alarm(
        "latent_std", "signals/latent_std_ratio", LevelAboveStart, f"guidance drives the samples' contrast up, or {CAUSE_LAG}",
        f"lower method.guidance, raise method.ratio, or {REMEDY_BOUND_CONTRAST}", healthy=1.0,
    ),
    Alarm(
        "latent_mean", "signals/latent_mean_shift", Oscillation, f"the samples' colours swing since {CAUSE_LAG}",
        REMEDY_FASTER_FAKE_SCORE, patience=GRID_PATIENCE,
    ),
    Alarm(
        "score_gap", f"{GENERATOR}/score_gap", MovingAverage, f"{CAUSE_LAG}, or guidance is too high",
        f"{REMEDY_FASTER_FAKE_SCORE}, then lower method.guidance",
    ),
    Alarm(
        "score_gap_rise", f"{GENERATOR}/score_gap", RatioToStart, f"the scores come apart, since {CAUSE_LAG} or guidance is too high",
        f"{REMEDY_FASTER_FAKE_SCORE}, then lower optimizers.generator.lr and method.guidance", healthy=1.0,
    ),
    Alarm(
        "fake_loss", f"{FAKE_SCORE}/denoising", LargestChange, "the fake score has not moved from its start",
        "raise optimizers.fake_score.lr, and look whether roles.fake_score trains what it should", healthy=None, below=True,
    ),
    Alarm(
        "fake_shift", "signals/fake_shift", MovingAverage, "the fake score still says what the base says",
        "raise optimizers.fake_score.lr, and look whether roles.fake_score trains what it should",
        healthy=None, below=True, patience=GRID_PATIENCE, measured_at_grids=True,
    ),
    *(
        Alarm(
            "gradient", f"{role}/grad_norm", MovingAverage, "no gradient reaches this role, whose parameters stay as they are",
            f"look at roles.{role} (mode, targets) and at the weights of the method's losses", healthy=None, below=True,
        )
        for role in (GENERATOR, FAKE_SCORE)
    ),
    *(
        Alarm(
            "logits", f"{FAKE_SCORE}/{side}", MovingAverageOfAbs, "the discriminator is sure of itself and teaches the generator little",
            "lower method.gan.critic_weight or optimizers.fake_score.lr",
        )
        for side in ("d_real", "d_fake")
    ),
    Alarm(
        "diversity", "signals/diversity_ratio", MovingAverage, "the student's samples of one prompt grow alike",
        f"lower method.guidance, {REMEDY_BOUND_CONTRAST}, train the first steps more (method.exit_odds), raise "
        "method.stay or method.beta where a reward is climbed or ranks, or stop early and use the EMA",
        healthy=1.0, below=True, patience=GRID_PATIENCE, measured_at_grids=True,
    ),
    Alarm(
        "saturation", "signals/saturation_drift", MovingAverage, "guidance has gone on for too long, or is too high",
        f"lower method.guidance, {REMEDY_BOUND_CONTRAST}, or stop earlier and use the EMA (training.ema)",
        patience=GRID_PATIENCE, measured_at_grids=True,
    ),
    *(
        Alarm(
            "clipped", f"{role}/clipped", MovingAverage, "the clip, and not the loss, sets the size of nearly every gradient",
            f"lower optimizers.{role}.lr, or raise optimizers.{role}.clip",
        )
        for role in (GENERATOR, FAKE_SCORE)
    ),
    Alarm(
        "skipped", "signals/skipped", MovingAverage, "gradients are not finite again and again",
        "set model.dtype to bfloat16 or float32, or lower the learning rates",
    ),
)  # fmt: skip


class _AlarmState:
    """One alarm over time."""

    def __init__(self, alarm: Alarm, threshold: float, window: int) -> None:
        self.alarm, self.threshold = alarm, threshold
        self.patience = alarm.patience or window
        self.measure = alarm.measure(1 if alarm.measured_at_grids else window)
        self.outside = 0
        self.warned_distance: float | None = None
        """How far out the value was when it was named; None while it is inside."""

    def judge(self, value: float) -> float | None:
        """The judged value, where it is to be said."""
        judged = self.measure(value)
        if judged is None:
            return None
        healthy = 2 * self.threshold if self.alarm.healthy is None else self.alarm.healthy
        distance = (judged - healthy) / (self.threshold - healthy)
        self.outside = self.outside + 1 if distance > 1 else 0
        if distance <= CLEAR_FRACTION:
            self.warned_distance = None
        anew = self.warned_distance is None and self.outside >= self.patience
        if anew or (self.warned_distance is not None and distance >= 2 * self.warned_distance):
            self.warned_distance = distance
            return judged
        return None


class Alarms:
    """All alarms of a run.

    Args:
        starts: iterations after which a new stage began. What a stage's first values were is nothing to hold the next one's
            against: it has other roles, targets or losses.
    """

    def __init__(self, config: AlarmsConfig, stage_starts: Sequence[int] = ()) -> None:
        self.config, self.stage_starts, self.stage = config, stage_starts, 0
        self.watched = self._new_states()

    def _new_states(self) -> list[_AlarmState]:
        config, thresholds = self.config, self.config.model_dump(exclude={"enabled", "window"})
        return [
            _AlarmState(alarm, threshold, config.window)
            for alarm in ALARMS
            if config.enabled and (threshold := thresholds[alarm.threshold]) is not None
        ]

    def judge(self, iteration: int, values: Mapping[str, float]) -> Iterator[str]:
        """Judge one line of stats.jsonl, and give a sentence for every alarm. What is no number is passed over."""
        stage = sum(iteration > start for start in self.stage_starts)
        if stage != self.stage:
            self.stage, self.watched = stage, self._new_states()
        for watched in self.watched:
            alarm = watched.alarm
            value = values.get(alarm.signal)
            if value is None or not math.isfinite(value):
                continue
            judged = watched.judge(value)
            if judged is not None:
                yield (
                    f"iteration {iteration}: {alarm.signal} is at {judged:.3g}, {'below' if alarm.below else 'above'} "
                    f"training.alarms.{alarm.threshold} = {watched.threshold:g}: {alarm.cause}; {alarm.remedy}"
                )


def _mean(values: Sequence[float] | deque[float]) -> float:
    return math.fsum(values) / len(values)
