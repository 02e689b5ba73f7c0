"""TSCD: trajectory-segmented consistency distillation, of Hyper-SD (Ren et al., NeurIPS 2024, arXiv 2404.13686).

The trajectory is cut into k equal segments and every point mapped to a random cleaner point of its own segment (section 3.1),
with k = 8, 4, 2, 1 as stages of one run: short leaps are learnt first. One adapter, the unified LoRA, serves 1 to 8 steps. The
discriminator compares f with its target at the end-time; its features are a critic's that starts as the teacher.

The last stage, by option, strengthens the first step by score distillation (section 3.3) with the consistency model of the
stages before in place of the teacher, whose scores are worse at high noise, says the paper; `real: teacher` takes the teacher's
all the same. The trajectory loss goes on beside it, where the paper regresses onto the teacher's samples, and keeps the other
steps. Human feedback (section 3.2) is not part of this: see `reward`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from stepdistill.config.reading import Settings
from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.timesteps import segment_edges, segment_of
from stepdistill.errors import UserError
from stepdistill.methods import parts
from stepdistill.methods.base import STUDENT, Batch, Decode, Problem, Progress, RoleKind, Rollout, Stage, Terms
from stepdistill.methods.consistency.discrete import (
    Consistency,
    ConsistencyConfig,
    ConsistencyGanConfig,
    ConsistencyRollout,
)
from stepdistill.methods.gan import attach_discriminator
from stepdistill.methods.student_recipe import tcd_transition
from stepdistill.roles.triple import FAKE_SCORE, GENERATOR, REAL_SCORE, Triple

TRAJECTORY = "trajectory"
"""Role of the consistency model that scores the one-step samples."""


class SegmentStage(Settings):
    """A stage of the run."""

    segments: int = Field(ge=1)
    iterations: int | None = Field(None, ge=1, description="length; the last stage of all may run to max_steps")
    gan: float = Field(1.0, ge=0, description="share of gan.weight in this stage")


class ScoreConfig(Settings):
    """Score distillation of the one-step samples, after the segments. Generator and fake score alternate 1:1."""

    iterations: int | None = Field(None, ge=1, description="length; to max_steps by default")
    weight: float = Field(1.0, gt=0)
    trajectory: float = Field(1.0, ge=0, description="weight of the trajectory loss beside it")
    real: Literal["trajectory", "teacher"] = Field(
        "trajectory", description="the consistency model as this stage found it, or the guided teacher"
    )
    dm_weight: parts.DmWeight = "code"
    dm_levels: parts.NoiseLevelConfig = parts.NoiseLevelConfig()
    fake_levels: parts.NoiseLevelConfig = parts.NoiseLevelConfig(low=0.0, high=1.0)


class TSCDConfig(ConsistencyConfig):
    stages: list[SegmentStage] = Field(
        [SegmentStage(segments=k, iterations=2000 if k > 1 else None) for k in (8, 4, 2, 1)], min_length=1
    )
    distance: parts.Distance = "l2"
    target: Literal["student", "ema"] = "ema"
    gan: ConsistencyGanConfig = ConsistencyGanConfig(weight=0.0, features="fake_score")
    score: ScoreConfig | None = None
    eta: float | None = Field(None, ge=0, le=1, description="of the sampler; 1 by default, as for the unified LoRA")

    @model_validator(mode="after")
    def _scores_of_one_scale(self) -> TSCDConfig:
        if self.tell_guidance and self.score is not None:
            raise ValueError("score distils one guidance scale and tell_guidance is true")
        return self


@dataclass(frozen=True, kw_only=True)
class OneStepRollout(ConsistencyRollout):
    """A leap, and the student's one-step sample of the same prompts from pure noise."""

    sample: Tensor


class TSCD(Consistency[TSCDConfig]):
    """L = d(f(x_s, s -> r), sg f^(x_e, e -> r)) + w_gan L_adv,   r ~ U[lower edge of the segment of s, e]."""

    Config = TSCDConfig
    name = "tscd"

    def __init__(self, config: TSCDConfig, problem: Problem) -> None:
        self.segment_edges = [segment_edges(config.points, stage.segments) for stage in config.stages]
        super().__init__(config, problem)
        self.transition = tcd_transition(self.schedule, 1.0 if config.eta is None else config.eta)
        earlier = config.stages if config.score is not None else config.stages[:-1]
        endless = [stage.segments for stage in earlier if stage.iterations is None]
        if endless:
            raise UserError(
                f"the stage of {endless[0]} segments in method.stages has no iterations and another stage follows: say how many"
            )

    def stages(self) -> Sequence[Stage]:
        found = [Stage(f"segments-{stage.segments}", stage.iterations) for stage in self.config.stages]
        if self.config.score is not None:
            copies = ((STUDENT, TRAJECTORY),) if self.config.score.real == "trajectory" else ()
            found.append(Stage("score", self.config.score.iterations, copies, reset=(FAKE_SCORE,)))
        return found

    def end(self, start: Tensor, uniform: Tensor, progress: Progress) -> Tensor:
        edge = self.segment_edges[min(progress.stage, len(self.segment_edges) - 1)].to(start.device)
        floor = edge[segment_of(start, edge)]
        return floor + (uniform * (start - floor)).long()

    # ---------------------------------------------------------------- adversary and score

    @classmethod
    def roles(cls, config: TSCDConfig) -> Mapping[str, RoleKind]:
        if config.gan.weight > 0 or config.score is not None:
            return {GENERATOR: "generator", FAKE_SCORE: "fake_score"}
        return super().roles(config)

    def gan_config(self, progress: Progress) -> ConsistencyGanConfig:
        share = self.config.stages[min(progress.stage, len(self.segment_edges) - 1)].gan
        return self.config.gan.model_copy(update={"weight": self.config.gan.weight * share})

    def prepare(self, triple: Triple, decode: Decode | None = None) -> None:
        super().prepare(triple, decode)
        if self.config.gan.weight > 0:
            attach_discriminator(triple, self.problem, self.config.gan.width)
        if self.config.score is not None and self.config.score.real == "trajectory":
            triple.add_copy(TRAJECTORY, GENERATOR)

    def updates(self, progress: Progress) -> Sequence[str]:
        return (GENERATOR, FAKE_SCORE) if self._score(progress) is not None else super().updates(progress)

    def rollout(self, batch: Batch, triple: Triple, progress: Progress, draws: Draws) -> ConsistencyRollout:
        rollout = super().rollout(batch, triple, progress, draws)
        if self._score(progress) is None:
            return rollout
        noise = draws.for_role("rollout").normal("one", rollout.x_t.shape[1:])
        return OneStepRollout(**vars(rollout), sample=triple.generator.x0(noise, self.timesteps[0], rollout.batch.cond))

    def loss(self, role: str, rollout: Rollout, triple: Triple, progress: Progress, draws: Draws) -> Terms:
        score = self._score(progress)
        if score is None or not isinstance(rollout, OneStepRollout):
            return super().loss(role, rollout, triple, progress, draws)
        x, cond = rollout.sample, rollout.batch.cond
        if role == FAKE_SCORE:
            t = score.fake_levels.levels().times(self.schedule, draws.uniform("fake.t"))
            eps = draws.normal("fake.eps", x.shape[1:])
            added = parts.fake_score_loss(triple.fake_score, x, t, eps, cond)
            logged = {"denoising": added.detach()}
            if self.gan_config(progress).weight == 0:
                return Terms(added, logged)
            terms = super().loss(role, rollout, triple, progress, draws)
            return Terms(terms.total + added, {**terms.parts, **logged})
        # before the adversary: where a sharded network is left at its features, a later forward frees what backward needs
        direction, logged = parts.distribution_matching_direction(
            x,
            cond,
            rollout.batch.null,
            triple,
            draws,
            levels=score.dm_levels,
            guidance=1.0 if score.real == "trajectory" else self.config.guidance,
            weight=score.dm_weight,
            target=triple.denoiser(TRAJECTORY if score.real == "trajectory" else REAL_SCORE),
        )
        terms = super().loss(role, rollout, triple, progress, draws)
        total = score.trajectory * terms.total + score.weight * parts.surrogate_loss(x, direction)
        return Terms(total, {**terms.parts, **logged})

    def _score(self, progress: Progress) -> ScoreConfig | None:
        """Of the last stage; None before it."""
        return self.config.score if progress.stage >= len(self.config.stages) else None
