"""What to change where a run does not fit: the changes that cost least come first, each planned anew."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from stepdistill.config.schema import CacheConfig, RunConfig
from stepdistill.errors import UserError
from stepdistill.methods.base import RoleKind
from stepdistill.planning.forecast import Planner, with_section_values
from stepdistill.planning.report import Advice, Forecast

MIN_SAVED_BYTES = 10_000_000
"""Bytes that a change must gain to be worth saying."""
SMALLEST_RANK = 16

ProposedChange = tuple[str, RunConfig]
"""What to write into the config, and the config with it."""
ChangeProposer = Callable[[RunConfig, int], ProposedChange | None]
"""Given a config and the number of processes; None where there is nothing left to change."""


def advise(planner: Planner, config: RunConfig, forecast: Forecast) -> tuple[Advice, ...]:
    """Changes on top of one another, until the run fits or nothing is left to change; empty where it fits as it is."""
    found: list[Advice] = []
    for step in CHANGE_PROPOSERS:
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
        saved_bytes = forecast.memory.peak - tried.memory.peak
        if saved_bytes >= MIN_SAVED_BYTES:
            found.append(Advice(change=said, saved_bytes=saved_bytes, peak=tried.memory.peak))
            config, forecast = candidate, tried
    return tuple(found)


def _enable_gradient_checkpointing(config: RunConfig, processes: int) -> ProposedChange | None:
    if config.training.gradient_checkpointing:
        return None
    return "training.gradient_checkpointing=true", with_section_values(config, "training", gradient_checkpointing=True)


def _enable_cache(config: RunConfig, processes: int) -> ProposedChange | None:
    cache = config.cache
    if cache is None:
        return "cache={folder: cache}", config.model_copy(update={"cache": CacheConfig(folder="cache")})
    if cache.text and cache.latents:
        return None
    return "cache.text=true with cache.latents=true", with_section_values(config, "cache", text=True, latents=True)


def _reduce_batch_size(config: RunConfig, processes: int) -> ProposedChange | None:
    batch, accumulation = config.training.batch_size, config.training.accumulation
    if batch == 1:
        return None
    said = f"training.batch_size=1 with training.accumulation={batch * accumulation}"
    return said, with_section_values(config, "training", batch_size=1, accumulation=batch * accumulation)


def _reduce_grid_prompts(config: RunConfig, processes: int) -> ProposedChange | None:
    if config.training.grid_prompts == 1:
        return None
    return "training.grid_prompts=1", with_section_values(config, "training", grid_prompts=1)


def _use_8bit_adam(role: RoleKind, config: RunConfig, processes: int) -> ProposedChange | None:
    chosen = {"generator": config.optimizers.generator, "fake_score": config.optimizers.fake_score}[role]
    if chosen.kind != "adamw":
        return None
    small = chosen.model_copy(update={"kind": "adamw8bit"})
    return f"optimizers.{role}.kind=adamw8bit", with_section_values(config, "optimizers", **{role: small})


def _reduce_lora_rank(role: RoleKind, config: RunConfig, processes: int) -> ProposedChange | None:
    held = {"generator": config.roles.generator, "fake_score": config.roles.fake_score}[role]
    if held.mode != "lora" or held.rank <= SMALLEST_RANK:
        return None
    rank = max(SMALLEST_RANK, held.rank // 4)
    small = held.model_copy(update={"rank": rank})
    return f"roles.{role}.rank={rank}", with_section_values(config, "roles", **{role: small})


def _quantize_base(kind: Literal["int8", "int4"], config: RunConfig, processes: int) -> ProposedChange | None:
    full = config.roles.generator.mode == "full" or config.roles.fake_score.mode == "full"
    if full or config.model.quantization in (kind, "int4"):
        return None
    return f"model.quantization={kind}", with_section_values(config, "model", quantization=kind)


def _offload(what: Literal["optimizer", "ema"], config: RunConfig, processes: int) -> ProposedChange | None:
    if what in config.training.offload:
        return None
    offload = [*config.training.offload, what]
    return f"training.offload=[{', '.join(offload)}]", with_section_values(config, "training", offload=offload)


def _shard(config: RunConfig, processes: int) -> ProposedChange | None:
    if processes == 1 or config.training.sharding == "full":
        return None
    return "training.sharding=full", with_section_values(config, "training", sharding="full")


def _use_lora(role: RoleKind, config: RunConfig, processes: int) -> ProposedChange | None:
    held = {"generator": config.roles.generator, "fake_score": config.roles.fake_score}[role]
    if held.mode != "full":
        return None
    return f"roles.{role}.mode=lora", with_section_values(
        config, "roles", **{role: held.model_copy(update={"mode": "lora"})}
    )


CHANGE_PROPOSERS: tuple[ChangeProposer, ...] = (
    _enable_gradient_checkpointing,
    _enable_cache,
    _reduce_batch_size,
    _reduce_grid_prompts,
    partial(_use_8bit_adam, "generator"),
    partial(_use_8bit_adam, "fake_score"),
    partial(_reduce_lora_rank, "generator"),
    partial(_reduce_lora_rank, "fake_score"),
    partial(_quantize_base, "int8"),
    partial(_quantize_base, "int4"),
    partial(_offload, "optimizer"),
    partial(_offload, "ema"),
    _shard,
    # these change what is learnt
    partial(_use_lora, "fake_score"),
    partial(_use_lora, "generator"),
)
