"""A forecast as lines to read."""

from __future__ import annotations

from collections.abc import Iterator

from stepdistill.planning.network_calls import ROLLOUT
from stepdistill.planning.report import GB, Forecast, NetworkCalls


def forecast_lines(forecast: Forecast) -> Iterator[str]:
    """The whole forecast; sizes in GB of 10^9 bytes."""
    size = "x".join(map(str, forecast.size))
    yield f"{forecast.method} on {forecast.model}, {size} pixels, family {forecast.family}, base in {forecast.dtype}"
    yield f"architecture: {forecast.source}; nothing was downloaded or loaded"
    yield from ("", "parameters")
    for item in forecast.parameters:
        yield f"  {item.name:<28} {item.count:>15,}{'  trained' if item.trained else ''}"
    yield from _memory(forecast)
    yield from ("", "network calls per iteration and GPU (mean)")
    for call in forecast.calls:
        yield f"  {_describe_call(call):<58} {call.calls:>8.2f} calls, {call.rows:>8.2f} rows"
    yield from _compute(forecast)
    yield from _disk(forecast)
    yield from _verdict(forecast)


def format_bytes(count: float) -> str:
    """GB, or MB where it is less than a tenth of one."""
    return f"{count / GB:.2f} GB" if count >= GB / 10 else f"{count / 1e6:.1f} MB"


def _memory(forecast: Forecast) -> Iterator[str]:
    memory, spread = forecast.memory, ""
    if forecast.processes > 1:
        spread = f", {forecast.processes} processes, {forecast.sharding}"
    yield from ("", f"memory of one GPU at its peak, in {memory.peak_phase!r}{spread}")
    for part in memory.parts:
        yield f"  {part.name:<28} {format_bytes(part.bytes):>12}"
    yield f"  {'peak':<28} {format_bytes(memory.peak):>12}"
    yield from ("", "memory by phase")
    for phase in memory.phases:
        yield f"  {phase.name:<28} {format_bytes(phase.bytes):>12}"


def _describe_call(call: NetworkCalls) -> str:
    how = ", ".join(word for word, said in (("features", call.features), ("with gradient", call.gradient)) if said)
    phase = call.phase if call.phase == ROLLOUT else f"loss of {call.phase}"
    return f"{phase}: {call.network}" + (f" ({how})" if how else "")


def _compute(forecast: Forecast) -> Iterator[str]:
    compute = forecast.compute
    yield from ("", "work and time of one GPU")
    yield f"  {(compute.half + compute.full) / 1e12:,.1f} TFLOP per iteration, {compute.full / 1e12:,.1f} of them in float32"
    yield (
        f"  {compute.seconds:.3g} s per iteration on {compute.gpu} at an assumed {compute.utilisation:.0%} of its published "
        f"rate, {compute.hours:,.1f} h for {compute.iterations:,} iterations; data, optimizers and communication not counted"
    )
    if forecast.device != "cuda":
        yield f"  training.device is {forecast.device}: the time is that of the card, not of this machine"


def _disk(forecast: Forecast) -> Iterator[str]:
    disk = forecast.disk
    whole = "" if disk.text_cache is None else f", {format_bytes(disk.text_cache)} for the prompt list"
    image = f"; latents {disk.image / 1e3:,.0f} KB an image" if disk.image else ""
    yield from ("", "disk")
    yield f"  text cache {disk.prompt / 1e3:,.0f} KB a prompt{whole}{image}"
    yield f"  one checkpoint {format_bytes(disk.checkpoint)}"


def _verdict(forecast: Forecast) -> Iterator[str]:
    memory, advice = forecast.memory, forecast.advice
    yield ""
    if memory.fits:
        yield f"fits: {format_bytes(memory.peak)} of {format_bytes(memory.capacity)}"
        return
    yield f"does not fit: {format_bytes(memory.peak)} wanted, {format_bytes(memory.capacity)} there; changes, on top of one another:"
    for item in advice:
        yield f"  {item.change:<52} -{format_bytes(item.saved_bytes)} -> {format_bytes(item.peak)}"
    if not advice or advice[-1].peak > memory.capacity:
        yield "  even so it does not fit: take a smaller model.size, or more memory"
