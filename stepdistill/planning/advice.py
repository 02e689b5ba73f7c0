"""What to change where a run does not fit: the changes that cost least come first, each planned anew."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from stepdistill.config.schema import CacheConfig, RunConfig
from stepdistill.errors import UserError
from stepdistill.methods.base import RoleKind
from stepdistill.planning.forecast import Planner, changed
from stepdistill.planning.report import Advice, Forecast

LEAST = 10_000_000
"""Bytes that a change must gain to be worth saying."""
SMALLEST_RANK = 16

Change = tuple[str, RunConfig]
"""What to write into the config, and the config with it."""
Step = Callable[[RunConfig, int], Change | None]
"""Given a config and the number of processes; None where there is nothing left to change."""


def advise(planner: Planner, config: RunConfig, forecast: Forecast) -> tuple[Advice, ...]:
    """Changes on top of one another, until the run fits or nothing is left to change; empty where it fits as it is."""
    found: list[Advice] = []
    for step in STEPS:
        if forecast.memory.fits:
            break
        change = step(config, planner.machine.processes)
        if change is None:
            continue
        said, candidate = change
        try:
            tried = planner.forecast(candidate)
        except UserError:  # does not go with what the config has, or with a change before it
            continue
        gain = forecast.memory.peak - tried.memory.peak
        if gain >= LEAST:
            found.append(Advice(change=said, gain=gain, peak=tried.memory.peak))
            config, forecast = candidate, tried
    return tuple(found)


def _checkpointing(config: RunConfig, processes: int) -> Change | None:
    if config.training.gradient_checkpointing:
        return None
    return "training.gradient_checkpointing=true", changed(config, "training", gradient_checkpointing=True)


def _cached(config: RunConfig, processes: int) -> Change | None:
    cache = config.cache
    if cache is None:
        return "cache={folder: cache}", config.model_copy(update={"cache": CacheConfig(folder="cache")})
    if cache.text and cache.latents:
        return None
    return "cache.text=true with cache.latents=true", changed(config, "cache", text=True, latents=True)


def _small_batch(config: RunConfig, processes: int) -> Change | None:
    batch, accumulation = config.training.batch_size, config.training.accumulation
    if batch == 1:
        return None
    said = f"training.batch_size=1 with training.accumulation={batch * accumulation}"
    return said, changed(config, "training", batch_size=1, accumulation=batch * accumulation)


def _small_grid(config: RunConfig, processes: int) -> Change | None:
    if config.training.grid_prompts == 1:
        return None
    return "training.grid_prompts=1", changed(config, "training", grid_prompts=1)


def _small_moments(role: RoleKind, config: RunConfig, processes: int) -> Change | None:
    chosen = {"generator": config.optimizers.generator, "fake_score": config.optimizers.fake_score}[role]
    if chosen.kind != "adamw":
        return None
    small = chosen.model_copy(update={"kind": "adamw8bit"})
    return f"optimizers.{role}.kind=adamw8bit", changed(config, "optimizers", **{role: small})


def _small_rank(role: RoleKind, config: RunConfig, processes: int) -> Change | None:
    held = {"generator": config.roles.generator, "fake_score": config.roles.fake_score}[role]
    if held.mode != "lora" or held.rank <= SMALLEST_RANK:
        return None
    rank = max(SMALLEST_RANK, held.rank // 4)
    small = held.model_copy(update={"rank": rank})
    return f"roles.{role}.rank={rank}", changed(config, "roles", **{role: small})


def _quantized(kind: Literal["int8", "int4"], config: RunConfig, processes: int) -> Change | None:
    full = config.roles.generator.mode == "full" or config.roles.fake_score.mode == "full"
    if full or config.model.quantization in (kind, "int4"):
        return None
    return f"model.quantization={kind}", changed(config, "model", quantization=kind)


def _offloaded(what: Literal["optimizer", "ema"], config: RunConfig, processes: int) -> Change | None:
    if what in config.training.offload:
        return None
    offload = [*config.training.offload, what]
    return f"training.offload=[{', '.join(offload)}]", changed(config, "training", offload=offload)


def _sharded(config: RunConfig, processes: int) -> Change | None:
    if processes == 1 or config.training.sharding == "full":
        return None
    return "training.sharding=full", changed(config, "training", sharding="full")


def _adapter(role: RoleKind, config: RunConfig, processes: int) -> Change | None:
    held = {"generator": config.roles.generator, "fake_score": config.roles.fake_score}[role]
    if held.mode != "full":
        return None
    return f"roles.{role}.mode=lora", changed(config, "roles", **{role: held.model_copy(update={"mode": "lora"})})


STEPS: tuple[Step, ...] = (
    _checkpointing,
    _cached,
    _small_batch,
    _small_grid,
    partial(_small_moments, "generator"),
    partial(_small_moments, "fake_score"),
    partial(_small_rank, "generator"),
    partial(_small_rank, "fake_score"),
    partial(_quantized, "int8"),
    partial(_quantized, "int4"),
    partial(_offloaded, "optimizer"),
    partial(_offloaded, "ema"),
    _sharded,
    # these change what is learnt
    partial(_adapter, "fake_score"),
    partial(_adapter, "generator"),
)
