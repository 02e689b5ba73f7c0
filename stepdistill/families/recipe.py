"""Recipe: how a distilled model must be sampled. Travels with the weights: metadata, `recipe.json`, model card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin

from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.diffusion.transitions import Transition, TransitionKind
from stepdistill.errors import UserError
from stepdistill.families.checkpoints.schedulers import make_scheduler

SCHEDULERS = {
    (TransitionKind.RENOISE, False): "LCMScheduler",
    (TransitionKind.DETERMINISTIC, False): "EulerDiscreteScheduler",
    (TransitionKind.TCD, False): "TCDScheduler",
    (TransitionKind.ANCESTRAL, False): "EulerAncestralDiscreteScheduler",
    (TransitionKind.RENOISE, True): "FlowMatchLCMScheduler",
    (TransitionKind.DETERMINISTIC, True): "FlowMatchEulerDiscreteScheduler",
}
"""(transition, is_flow) -> the stock scheduler that walks it along a custom ladder; EulerAncestral takes none, and walks even ones
alone, which its config says. DDIM is absent on purpose: Euler walks the same, and takes custom timesteps."""
TRIGFLOW_SCHEDULER = "SCMScheduler"
"""Re-noises along angles; for pipelines that speak TrigFlow to a network."""


@dataclass(frozen=True)
class Recipe:
    """How to sample.

    Attributes:
        scheduler_class: a stock diffusers scheduler.
        scheduler_config: what to change in the base checkpoint's scheduler config.
        num_inference_steps: network calls.
        timesteps: VP ladder, integers, noisiest first; empty for flow, and where `spaced` says it.
        sigmas: flow ladder *before* the scheduler's own shift; empty for VP.
        angles: TrigFlow ladder, which `call` says in its scheduler's own words; empty for all others.
        spaced: VP ladder of a scheduler that takes none, which `scheduler_config` says in its own words; empty for all others.
        guidance_scale: w for the pipeline; 1 is off, and off is the rule for a distilled model, unless its network is told w.
        base: the checkpoint that the LoRA belongs to.
        method: what trained it.
        baked_guidance: teacher guidance scale w that the student has absorbed.
        resolution: (height, width) in pixels that it was trained at.
        alpha, rank: of the LoRA; 0 for a full model.
        experts: network calls of each expert, noisiest first, where the student is several; empty for one.
        call: further arguments of the pipeline's call (TCDScheduler's eta, Sana-Sprint's timesteps).
        told_guidance: w that guidance adapters, or an embedding, tell the network; None where it is told none.
        base_family: family that the base was opened as, where the run's config said it; empty where it was found by itself.
        base_config_dir: diffusers folder whose configs a single-file base was opened with; empty for the packaged ones.
    """

    scheduler_class: str
    num_inference_steps: int
    prediction_type: str
    scheduler_config: dict[str, Any] = field(default_factory=dict)
    timesteps: tuple[int, ...] = ()
    sigmas: tuple[float, ...] = ()
    angles: tuple[float, ...] = ()
    guidance_scale: float = 1.0
    base: str = ""
    method: str = ""
    baked_guidance: float = 1.0
    resolution: tuple[int, int] = (0, 0)
    alpha: float = 0.0
    rank: int = 0
    experts: tuple[int, ...] = ()
    call: dict[str, Any] = field(default_factory=dict)
    told_guidance: float | None = None
    spaced: tuple[int, ...] = ()
    base_family: str = ""
    base_config_dir: str = ""

    @property
    def times(self) -> tuple[float, ...]:
        """The ladder in whichever words it is said, for a reader."""
        return self.timesteps or self.sigmas or self.angles or self.spaced

    @property
    def w(self) -> float:
        """Guidance scale that its samples are of, by whichever way it is said."""
        return self.guidance_scale if self.told_guidance is None else self.told_guidance

    def to_json(self) -> str:
        record = asdict(self)
        if not self.experts:
            del record["experts"]
        if self.told_guidance is None:
            del record["told_guidance"]
        if not self.spaced:
            del record["spaced"]
        for key in ("base_family", "base_config_dir"):
            if not record[key]:
                del record[key]
        scheduler = {"class_name": record.pop("scheduler_class"), "config": record.pop("scheduler_config")}
        return json.dumps({"scheduler": scheduler, **record}, indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Raises UserError where the text is not a recipe."""
        try:
            record = json.loads(text)
            scheduler = record.pop("scheduler")
            for key in ("timesteps", "sigmas", "angles", "resolution", "experts", "spaced"):
                record[key] = tuple(record.get(key, ()))
            return cls(scheduler_class=scheduler["class_name"], scheduler_config=scheduler["config"], **record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"the recipe is not readable ({error}): export the run again") from None

    @classmethod
    def read(cls, folder: Path) -> Recipe | None:
        """`recipe.json` of an exported folder, None where there is none."""
        path = folder / "recipe.json"
        return cls.from_json(path.read_text()) if path.is_file() else None

    def scheduler(self, base_config: dict[str, Any]) -> SchedulerMixin:
        """The stock scheduler: the base checkpoint's config with the recipe's changes.

        Raises:
            UserError: unknown class.
        """
        scheduler: SchedulerMixin = make_scheduler(self.scheduler_class, base_config, self.scheduler_config)
        return scheduler

    def apply(self, pipeline: DiffusionPipeline) -> dict[str, Any]:
        """Put the scheduler into a pipeline; returns the keyword arguments for its call."""
        pipeline.scheduler = self.scheduler(dict(pipeline.scheduler.config))
        arguments: dict[str, Any] = {
            "guidance_scale": self.guidance_scale,
            "num_inference_steps": self.num_inference_steps,
        }
        if self.timesteps:
            arguments["timesteps"] = list(self.timesteps)
        if self.sigmas:
            arguments["sigmas"] = list(self.sigmas)
        return {**arguments, **self.call}

    def native_timesteps(self, schedule: NoiseSchedule) -> tuple[float, ...]:
        """The native times of our own sampler for this recipe."""
        if self.sigmas:
            return tuple(schedule.time_at_fraction(torch.tensor(self.sigmas, dtype=torch.float64)).tolist())
        if self.angles:
            return tuple(schedule.time_at_angle(torch.tensor(self.angles, dtype=torch.float64)).tolist())
        return tuple(float(t) for t in self.timesteps or self.spaced)

    def expert_of_step(self, experts: Sequence[str]) -> tuple[str, ...]:
        """Which of the student's experts makes each network call."""
        shares = zip(experts, self.experts or (self.num_inference_steps,), strict=True)
        return tuple(expert for expert, calls in shares for _ in range(calls))

    def transition(self) -> Transition:
        """The transition of our own sampler for this recipe.

        Raises:
            UserError: the scheduler class is none of ours.
        """
        if self.scheduler_class == TRIGFLOW_SCHEDULER:
            return Transition(TransitionKind.RENOISE)
        for (kind, _), name in SCHEDULERS.items():
            if name == self.scheduler_class:
                return Transition(kind, float(self.call.get("eta", 0.0)) if kind is TransitionKind.TCD else 1.0)
        raise UserError(
            f"the recipe's scheduler {self.scheduler_class!r} has no transition of ours: use one of {', '.join(SCHEDULERS.values())}"
        )
