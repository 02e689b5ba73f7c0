"""From a config alone to what its run will take; nothing is downloaded, and no weight is loaded."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import NamedTuple

from stepdistill.config.reading import Settings
from stepdistill.config.schema import OptimizerConfigs, RunConfig
from stepdistill.data.prompts import BUILTIN_PREFIX, read_prompts
from stepdistill.planning.architecture import find_architecture
from stepdistill.planning.hardware import UTILISATION, Gpu
from stepdistill.planning.memory import Sizes, memory_of, sizes_of
from stepdistill.planning.meter import Flops
from stepdistill.planning.network_calls import CallStatistics, count_network_calls
from stepdistill.planning.report import GB, Compute, Disk, Forecast, NetworkCalls
from stepdistill.planning.trace import ENCODE_IMAGES, ENCODE_TEXT, Trace, build_on_meta, trace
from stepdistill.training.inputs.caching import bytes_per_image, bytes_per_prompt
from stepdistill.training.option_checks import check_combinations
from stepdistill.training.session import Session
from stepdistill.training.setup import RunSetup, prepare_without_data


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


class TracedRun(NamedTuple):
    """A run's outline, the order of its iterations, and what they take."""

    session: Session
    call_statistics: CallStatistics
    trace: Trace


@dataclass
class Planner:
    """Forecasts variants of one run; what two of them have in common is traced once.

    Args:
        machine: where they run.
    """

    machine: Machine
    _traces: dict[str, TracedRun] = field(default_factory=dict)

    def forecast(self, config: RunConfig) -> Forecast:
        """What the run will take, without advice.

        Raises:
            UserError: the config cannot work, or its architecture is not known here.
        """
        source = find_architecture(config.model)
        simplified_setup = prepare_without_data(_simplified_config(config), source.info)
        check_combinations(
            config, simplified_setup.roles, simplified_setup.needs, sharded=config.training.sharding == "full"
        )
        session, call_statistics, traced = self._trace_run(simplified_setup)
        sizes = sizes_of(session, config)
        machine = self.machine
        sharded = config.training.sharding == "full"
        return Forecast(
            model=config.model.path,
            family=source.info.family,
            method=config.method_name,
            size=simplified_setup.problem.size,
            dtype=config.model.dtype,
            device=config.training.device or "cuda",
            source=source.origin,
            processes=machine.processes,
            sharding="full" if sharded else "replicated",
            parameters=sizes.parameters,
            memory=memory_of(sizes, traced.phases, config, machine.processes, machine.memory),
            calls=_calls(call_statistics, config),
            compute=_compute(call_statistics, traced, config, machine.gpu),
            disk=_disk(simplified_setup, sizes, config),
        )

    def _trace_run(self, setup: RunSetup) -> TracedRun:
        key = setup.config.model_dump_json()
        if key not in self._traces:
            session, call_statistics = build_on_meta(setup), count_network_calls(setup)
            self._traces[key] = TracedRun(session, call_statistics, trace(session, call_statistics))
        return self._traces[key]


def with_section_values(config: RunConfig, section: str, **changes: object) -> RunConfig:
    """A config with other values in one section."""
    part: Settings = vars(config)[section]
    return config.model_copy(update={section: part.model_copy(update=changes)})


def _simplified_config(config: RunConfig) -> RunConfig:
    """The run in its plainest form: what decides neither shapes nor branches is set to one value, and added up later."""
    plain = {"quantization": "none", "compile": False, "attention": "sdpa", "channels_last": False}
    config = with_section_values(config, "model", **plain)
    if config.data.buckets:  # memory must do for the largest
        config = with_section_values(config, "model", size=max(config.data.buckets, key=prod))
    accumulation = min(config.training.accumulation, 2)
    config = with_section_values(config, "training", accumulation=accumulation, offload=[], sharding="auto")
    return config.model_copy(update={"optimizers": OptimizerConfigs(), "cache": None, "output": "", "preset": None})


def _calls(call_statistics: CallStatistics, config: RunConfig) -> tuple[NetworkCalls, ...]:
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
        for call, counted in call_statistics.calls.items()
    )


def _compute(call_statistics: CallStatistics, traced: Trace, config: RunConfig, gpu: Gpu) -> Compute:
    """Forwards by the mean number of rows, backwards by the share of iterations in which their role is due."""
    training, cache, done = config.training, config.cache, Flops()
    traced_often = Counter(phase.name for phase in traced.phases)
    for call, counted in call_statistics.calls.items():
        done += traced.per_row[call.network, call.features] * counted.rows
    encoded = {ENCODE_TEXT: cache is None or not cache.text, ENCODE_IMAGES: cache is None or not cache.latents}
    for phase in traced.phases:
        if phase.name == f"{phase.role} backward":
            done += phase.flops * (call_statistics.updates_per_iteration(phase.role) / traced_often[phase.name])
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


def _disk(setup: RunSetup, sizes: Sizes, config: RunConfig) -> Disk:
    prompt, source = bytes_per_prompt(setup), str(config.data.prompts)
    present = source.startswith(BUILTIN_PREFIX) or Path(source).is_file()
    prompts = len(read_prompts(source, config.data.prompt_column)) if present else None
    saved = sum(sizes.roles.values()) + sizes.heads + sizes.ema + sum(sizes.optimizers.values())
    return Disk(
        prompt=prompt,
        image=bytes_per_image(setup, setup.problem.size) if setup.needs.images else 0,
        text_cache=None if prompts is None else prompts * prompt,
        checkpoint=saved,
    )
