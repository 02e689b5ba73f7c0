"""From a config alone to what its run will take; nothing is downloaded, and no weight is loaded."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import NamedTuple

from stepdistill.config.reading import Settings
from stepdistill.config.schema import OptimizerConfigs, RunConfig
from stepdistill.data.prompts import BUILTIN, read_prompts
from stepdistill.planning.hardware import UTILISATION, Gpu
from stepdistill.planning.loop import Walk, walk
from stepdistill.planning.memory import Sizes, memory_of, sizes_of
from stepdistill.planning.meter import Flops
from stepdistill.planning.report import GB, Compute, Disk, Forecast, NetworkCalls
from stepdistill.planning.sources import find_source
from stepdistill.planning.trace import IMAGES, TEXT, Trace, outline, trace
from stepdistill.training.inputs.caching import image_bytes, prompt_bytes
from stepdistill.training.options import check_combinations
from stepdistill.training.session import Session
from stepdistill.training.setup import RunSetup, without_data


@dataclass(frozen=True)
class Machine:
    """Where the run is to be.

    Attributes:
        gpu: the card of every process.
        processes: of the run, one a card.
        memory: bytes of each card.
    """

    gpu: Gpu
    processes: int
    memory: int

    @classmethod
    def of(cls, gpu: Gpu, processes: int = 1, memory_gb: float | None = None) -> Machine:
        """memory_gb: GB of 10^9 bytes, where it is not the card's own."""
        return cls(gpu, processes, int((memory_gb or gpu.memory_gb) * GB))


class Traced(NamedTuple):
    """A run's outline, the order of its iterations, and what they take."""

    session: Session
    walk: Walk
    trace: Trace


@dataclass
class Planner:
    """Forecasts variants of one run; what two of them have in common is traced once.

    Args:
        machine: where they run.
    """

    machine: Machine
    _known: dict[str, Traced] = field(default_factory=dict)

    def forecast(self, config: RunConfig) -> Forecast:
        """What the run will take, without advice.

        Raises:
            UserError: the config cannot work, or its architecture is not known here.
        """
        source = find_source(config.model)
        bare = without_data(_bare(config), source.info)
        check_combinations(config, bare.roles, bare.needs, sharded=config.training.sharding == "full")
        session, walked, traced = self._traced(bare)
        sizes = sizes_of(session, config)
        machine = self.machine
        sharded = config.training.sharding == "full"
        return Forecast(
            model=config.model.path,
            family=source.info.family,
            method=config.method_name,
            size=bare.setting.size,
            dtype=config.model.dtype,
            device=config.training.device or "cuda",
            source=source.origin,
            processes=machine.processes,
            sharding="full" if sharded else "replicated",
            parameters=sizes.parameters,
            memory=memory_of(sizes, traced.phases, config, machine.processes, machine.memory),
            calls=_calls(walked, config),
            compute=_compute(walked, traced, config, machine.gpu),
            disk=_disk(bare, sizes, config),
        )

    def _traced(self, plan: RunSetup) -> Traced:
        key = plan.config.model_dump_json()
        if key not in self._known:
            session, walked = outline(plan), walk(plan)
            self._known[key] = Traced(session, walked, trace(session, walked))
        return self._known[key]


def changed(config: RunConfig, section: str, **changes: object) -> RunConfig:
    """A config with other values in one section."""
    part: Settings = vars(config)[section]
    return config.model_copy(update={section: part.model_copy(update=changes)})


def _bare(config: RunConfig) -> RunConfig:
    """The run in its plainest form: what decides neither shapes nor branches is set to one value, and added up later."""
    plain = {"quantization": "none", "compile": False, "attention": "sdpa", "channels_last": False}
    config = changed(config, "model", **plain)
    if config.data.buckets:  # memory must do for the largest
        config = changed(config, "model", size=max(config.data.buckets, key=prod))
    accumulation = min(config.training.accumulation, 2)
    config = changed(config, "training", accumulation=accumulation, offload=[], sharding="auto")
    return config.model_copy(update={"optimizers": OptimizerConfigs(), "cache": None, "output": "", "preset": None})


def _calls(walked: Walk, config: RunConfig) -> tuple[NetworkCalls, ...]:
    times = config.training.accumulation
    return tuple(
        NetworkCalls(
            phase=call.phase,
            network=call.network,
            features=call.features,
            gradient=call.graph,
            calls=counted.calls * times,
            rows=counted.rows * times,
        )
        for call, counted in walked.calls.items()
    )


def _compute(walked: Walk, traced: Trace, config: RunConfig, gpu: Gpu) -> Compute:
    """Forwards by the mean number of rows, backwards by the share of iterations in which their role is due."""
    training, cache, done = config.training, config.cache, Flops()
    traced_often = Counter(phase.name for phase in traced.phases)
    for call, counted in walked.calls.items():
        done += traced.per_row[call.network, call.features] * counted.rows
    encoded = {TEXT: cache is None or not cache.text, IMAGES: cache is None or not cache.latents}
    for phase in traced.phases:
        if phase.name == f"{phase.role} backward":
            done += phase.flops * (walked.share(phase.role) / traced_often[phase.name])
        elif encoded.get(phase.name, False):
            done += phase.flops
    done = done * training.accumulation
    full = gpu.tf32 if training.tf32 else gpu.full
    seconds = (done.half / gpu.half + done.full / full) / (UTILISATION * 1e12)
    return Compute(
        half=done.half,
        full=done.full,
        gpu=gpu.name,
        utilisation=UTILISATION,
        seconds=seconds,
        iterations=training.max_steps,
    )


def _disk(plan: RunSetup, sizes: Sizes, config: RunConfig) -> Disk:
    prompt, source = prompt_bytes(plan), str(config.data.prompts)
    present = source.startswith(BUILTIN) or Path(source).is_file()
    prompts = len(read_prompts(source, config.data.prompt_column)) if present else None
    saved = sum(sizes.roles.values()) + sizes.heads + sizes.ema + sum(sizes.optimizers.values())
    return Disk(
        prompt=prompt,
        image=image_bytes(plan, plan.setting.size) if plan.needs.images else 0,
        text_cache=None if prompts is None else prompts * prompt,
        checkpoint=saved,
    )
