"""DisBack: Distribution Backtracking Distillation (Zhang et al., ICLR 2025, arXiv 2408.15991).

A teacher knows little of the samples of a student that has just begun. So the way between the two is recorded first
(section 3.2, degradation): the generator stands still, and the fake score, beginning as the teacher s'_0, is trained on its
samples until it knows them, leaving s'_1 ... s'_N behind. Then the generator walks that way back (section 3.3): its targets
are s'_{N-1}, ..., s'_1 and at last the teacher, `interval` updates each, while the fake score goes on from s'_N. With no
checkpoint to record there is no way, and this is DMD2.

The recorded scores were trained without guidance and are asked without; the teacher's belongs to the last target alone.
(The released code guides them all, by the difference of two estimates that have lost their meaning.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.diffusion.draws import Draws
from stepdistill.errors import UserError
from stepdistill.methods import parts
from stepdistill.methods.base import Batch, Decode, Problem, Progress, Rollout, Stage, TensorStore, Terms
from stepdistill.methods.matching.few_step import FewStep, FewStepConfig
from stepdistill.roles.deltas import load_role_delta, role_delta
from stepdistill.roles.triple import FAKE_SCORE, GENERATOR, Triple

TARGET = "target"
"""The role that plays the recorded scores, one after the other."""
RECORD, BACKTRACK = "record", "backtrack"


class DisBackConfig(FewStepConfig):
    steps: int = Field(1, ge=1, description="network calls of the student; the paper's are of one")
    checkpoints: int = Field(
        10,
        ge=0,
        description="recorded scores N; the last is where the fake score goes on, N - 1 are targets; 0 is DMD2",
    )
    record_every: int = Field(100, ge=1, description="iterations of the record from one to the next")
    interval: int = Field(200, ge=1, description="generator updates towards each recorded target")
    ramp: int = Field(
        0, ge=0, description="generator updates over which w - 1 grows from 0 once the teacher is the target; 0 is none"
    )
    dm_weight: parts.DmWeight = "code"
    dm_levels: parts.NoiseLevelConfig = parts.NoiseLevelConfig()


class DisBack(FewStep[DisBackConfig]):
    Config = DisBackConfig
    name = "disback"

    def __init__(self, config: DisBackConfig, problem: Problem) -> None:
        super().__init__(config, problem)
        self.targets = max(config.checkpoints - 1, 0)
        self._store: TensorStore | None = None
        self._digests = torch.zeros(self.targets, 32, dtype=torch.uint8)
        self._recorded = 0
        self._loaded_target = 0
        """Which s'_i the role `target` is; 0 is the teacher."""

    def prepare(self, triple: Triple, decode: Decode | None = None) -> None:
        super().prepare(triple, decode)
        if self.targets:
            triple.add_role(TARGET, triple.layouts[FAKE_SCORE], trainable=False)

    def attach_storage(self, store: TensorStore) -> None:
        self._store = store

    def stages(self) -> Sequence[Stage]:
        backtrack = Stage(BACKTRACK)
        if self.config.checkpoints == 0:
            return (backtrack,)
        length = self.config.checkpoints * self.config.record_every
        # a fake score that came with the student of an earlier run would know its samples already
        return Stage(RECORD, length, reset=(FAKE_SCORE,)), backtrack

    def _is_recording(self, progress: Progress) -> bool:
        return self.stages()[progress.stage].name == RECORD

    def updates(self, progress: Progress) -> Sequence[str]:
        return (FAKE_SCORE,) if self._is_recording(progress) else super().updates(progress)

    # ---------------------------------------------------------------- the way there

    def after_update(self, role: str, statistics: Mapping[str, float], triple: Triple, progress: Progress) -> None:
        """Keep s'_i once its iterations are over, with the next update where the last one was skipped."""
        super().after_update(role, statistics, triple, progress)
        due = min((progress.stage_iteration + 1) // self.config.record_every, self.targets)
        if self._store is not None and self._is_recording(progress) and self._recorded < due:
            self._digests[self._recorded] = self._store.put(
                _recorded_score_name(self._recorded + 1), role_delta(triple, FAKE_SCORE)
            )
            self._recorded += 1

    # ---------------------------------------------------------------- the way back

    def target(self, progress: Progress) -> int:
        """i of the target s'_i: N - 1 at first, 0 for the teacher."""
        return max(self.targets - progress.updates.get(GENERATOR, 0) // self.config.interval, 0)

    def rollout(self, batch: Batch, triple: Triple, progress: Progress, draws: Draws) -> Rollout:
        # before the first forward: a sharded network must not be written to while it is put together
        if GENERATOR in self.updates(progress):
            self._load_target(self.target(progress), triple)
        return super().rollout(batch, triple, progress, draws)

    def _load_target(self, index: int, triple: Triple) -> None:
        """Make the role `target` s'_index. The teacher has a role of its own, and a plan has no shelf.

        Raises:
            UserError: its file is gone, is another, does not fit, or changes nothing.
        """
        if index in (0, self._loaded_target) or self._store is None:
            return
        if not load_role_delta(triple, TARGET, self._store.get(_recorded_score_name(index), self._digests[index - 1])):
            raise UserError(
                f"the recorded score {_recorded_score_name(index)!r} equals the target before it, so the path does not lead anywhere: "
                "raise method.record_every or optimizers.fake_score.lr and start the run afresh"
            )
        self._loaded_target = index

    def loss(self, role: str, rollout: Rollout, triple: Triple, progress: Progress, draws: Draws) -> Terms:
        """The record is denoising alone: a GAN would move the fake score's features off the path, and learn a student at rest."""
        if self._is_recording(progress):
            return self.denoising_loss(rollout, triple, draws)
        return super().loss(role, rollout, triple, progress, draws)

    def generator_loss(self, rollout: Rollout, triple: Triple, progress: Progress, draws: Draws) -> Terms:
        """L_DM with s'_i in the teacher's place and w = 1, then with the teacher and its w   (section 3.3)."""
        index, guidance = self.target(progress), 1.0
        if index == 0:
            done = progress.updates.get(GENERATOR, 0) - self.targets * self.config.interval
            guidance = parts.ramped_guidance(self.config.guidance, done, self.config.ramp)
        terms = self.matching(
            rollout,
            triple,
            draws,
            self.config.dm_levels,
            self.config.dm_weight,
            guidance=guidance,
            target=triple.denoiser(TARGET) if index else triple.real_score,
        )
        told = {"target": rollout.x0.new_tensor(index), "guidance": rollout.x0.new_tensor(guidance)}
        return replace(terms, parts={**terms.parts, **told})

    # ---------------------------------------------------------------- memory

    def state_dict(self) -> dict[str, Tensor]:
        if not self.targets:
            return super().state_dict()
        return super().state_dict() | {
            "digests": self._digests.clone(),
            "recorded": torch.tensor(self._recorded),
            "held": torch.tensor(self._loaded_target),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        if not self.targets:
            return
        self._digests = state["digests"].clone()
        self._recorded, self._loaded_target = int(state["recorded"]), int(state["held"])


def _recorded_score_name(index: int) -> str:
    return f"path-{index:03d}"
