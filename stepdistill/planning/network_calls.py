"""The order of a run's iterations, and the network calls of each, as the trainer makes them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stepdistill.diffusion.draws import Draws
from stepdistill.families.analytic import Analytic, Mixture, MixtureNetwork
from stepdistill.families.conditioning import Conditioning
from stepdistill.frozen.vision import VISION_ENCODER, VisionEncoder
from stepdistill.methods.base import Batch, Method, Progress, Terms
from stepdistill.planning.meter import Flops
from stepdistill.rewards.base import HELD_OUT, REWARD, FunctionReward
from stepdistill.roles.sampler import GuidedState
from stepdistill.roles.triple import REAL_SCORE, RoleLayout, Triple
from stepdistill.training.inputs.batches import sample_numbers
from stepdistill.training.iteration import IterationHooks, run_iteration
from stepdistill.training.setup import RunSetup

ROLLOUT = "rollout"
COUNTED_ITERATIONS = 120
"""Iterations that are walked through to find the average of network calls that are drawn by lot or change with time."""
MAX_SCHEDULED_ITERATIONS = 100_000
"""Iterations whose due roles are looked at."""


@dataclass(frozen=True)
class CallKind:
    """A kind of network call.

    Attributes:
        phase: `rollout`, or the role whose loss asks.
        network: the role that is called.
        features: left at the feature module, for a discriminator head.
        graph: kept for a backward pass.
    """

    phase: str
    network: str
    features: bool
    graph: bool


@dataclass(frozen=True)
class CallCount:
    """Network calls of one micro-batch: how many, and how many rows all of them had together."""

    calls: float = 0.0
    rows: float = 0.0

    def __add__(self, other: CallCount) -> CallCount:
        return CallCount(self.calls + other.calls, self.rows + other.rows)

    def __mul__(self, factor: float) -> CallCount:
        return CallCount(self.calls * factor, self.rows * factor)


CallCounts = Mapping[CallKind, CallCount]


@dataclass(frozen=True)
class CallStatistics:
    """What a run's iterations ask for.

    Attributes:
        patterns: the roles that are due together, with the share of the run's iterations in which they are.
        calls: mean of each kind of call over all iterations, for one micro-batch.
        dearest: of the iterations walked through, those to be traced: together they update every role and call every
            network, and their rollouts are short, since further calls without graph take time and no memory.
    """

    update_pattern_shares: Mapping[tuple[str, ...], float]
    calls: CallCounts
    iterations_to_trace: Sequence[Progress]

    def updates_per_iteration(self, role: str) -> float:
        """Updates of a role per iteration."""
        return sum(
            updates_per_iteration
            for roles, updates_per_iteration in self.update_pattern_shares.items()
            if role in roles
        )


class CallCounter:
    """Counts the forwards of a triple's networks while it is entered.

    Args:
        triple: whose networks are watched, by hooks that are removed at the end.
        work: reads the operations done so far; what each kind of call did is kept in `work`.
    """

    def __init__(self, triple: Triple, flops: Callable[[], Flops] = Flops) -> None:
        self.triple, self.phase = triple, ROLLOUT
        self.found: defaultdict[CallKind, CallCount] = defaultdict(CallCount)
        self.flops: defaultdict[CallKind, Flops] = defaultdict(Flops)
        self._read = flops
        self._hooks = ExitStack()

    def __enter__(self) -> CallCounter:
        for role, network in {REAL_SCORE: self.triple.base, **self.triple.networks}.items():
            for handle in self._watch(network, role):
                self._hooks.callback(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def _watch(self, network: nn.Module, role: str) -> Iterator[RemovableHandle]:
        before: list[Flops] = []

        def start(_module: nn.Module, _args: tuple[Any, ...]) -> None:
            before.append(self._read())

        def end(_module: nn.Module, args: tuple[Any, ...], output: object) -> None:
            asked = role if network is not self.triple.base else self.triple.active_role
            # a forward that the denoiser leaves for its features ends without an output
            call = CallKind(self.phase, asked, output is None, torch.is_grad_enabled())
            self.found[call] += CallCount(1, len(args[0]))
            self.flops[call] += self._read() - before.pop()

        yield network.register_forward_pre_hook(start)
        yield network.register_forward_hook(end, always_call=True)


class CountingHooks(IterationHooks):
    """Tells a counter which phase of an iteration runs, and hands on each loss while its graph lives.

    Args:
        counter: counts the network calls of each phase.
        on_loss: called with the role, the piece's number and the loss.
    """

    def __init__(self, counter: CallCounter, on_loss: Callable[[str, int, Tensor], None] | None = None) -> None:
        self.counter, self.on_loss = counter, on_loss

    def begin_rollout(self) -> None:
        self.counter.phase = ROLLOUT

    def begin_loss(self, role: str) -> None:
        self.counter.phase = role

    def on_terms(self, role: str, piece: int, terms: Terms) -> None:
        if self.on_loss is not None:
            self.on_loss(role, piece, terms.total)


def count_network_calls(setup: RunSetup) -> CallStatistics:
    """Walk through iterations of the whole run with a network of a hundred weights in place of the model's.

    Every lot is drawn as process 0 of the run itself will draw it, so that the counts of these iterations are its own.
    """
    method, training = setup.method_class(setup.method_config, setup.problem), setup.config.training
    count = min(training.max_steps, MAX_SCHEDULED_ITERATIONS)
    due: dict[tuple[str, ...], list[int]] = {}
    for progress in iterate_progress(method, count):
        due.setdefault(tuple(method.updates(progress)), []).append(progress.iteration)
    update_pattern_shares = {roles: len(iterations) / count for roles, iterations in due.items()}
    walked = set(
        chain.from_iterable(_evenly_spaced(iterations, COUNTED_ITERATIONS // len(due)) for iterations in due.values())
    )
    if count <= COUNTED_ITERATIONS:
        walked = set(range(count))
    toy, triple, batch = _toy_run(setup)
    found: dict[tuple[str, ...], list[tuple[Progress, CallCounts]]] = {}
    with torch.no_grad():
        toy.prepare(triple, _toy_images)
    for progress in iterate_progress(toy, count):
        if progress.iteration not in walked:
            continue
        first = progress.iteration
        (samples,) = sample_numbers(first, first + 1, batch=training.batch_size, accumulation=1)
        draws = Draws(training.seed, first, "", samples)
        with CallCounter(triple) as counter:
            run_iteration(toy, triple, [(draws, batch)], progress, CountingHooks(counter))
        found.setdefault(tuple(toy.updates(progress)), []).append((progress, dict(counter.found)))
    mean: defaultdict[CallKind, CallCount] = defaultdict(CallCount)
    for roles, seen in found.items():
        for _, calls in seen:
            for call, counted in calls.items():
                mean[call] += counted * (update_pattern_shares[roles] / len(seen))
    return CallStatistics(update_pattern_shares, dict(mean), _choose_iterations_to_trace(found))


def _evenly_spaced(items: Sequence[int], count: int) -> Sequence[int]:
    """At most `count` of them, evenly spread."""
    if len(items) <= count:
        return items
    return [items[index * len(items) // count] for index in range(count)]


def iterate_progress(method: Method[Any], count: int) -> Iterator[Progress]:
    """Where the run stands at each of its first `count` iterations."""
    stages, updates = list(method.stages()), Counter[str]()
    stage = first = 0
    for iteration in range(count):
        length = stages[stage].iterations
        if stage + 1 < len(stages) and length is not None and iteration - first >= length:
            stage, first, updates = stage + 1, iteration, Counter()
        progress = Progress(iteration, dict(updates), stage, iteration - first)
        yield progress
        updates.update(method.updates(progress))


def _toy_images(latents: Tensor) -> Tensor:
    """What the toy's latents (B, C, h, w) are decoded to, (B, 3, 1, 1): their means."""
    return latents.mean((1, 2, 3), keepdim=True).expand(-1, 3, -1, -1)


class _ToyVision(VisionEncoder):
    """Sees the image itself: what calls of other networks cost is no part of a walk."""

    channels = (3,)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [images]


def _choose_iterations_to_trace(
    found: Mapping[tuple[str, ...], Sequence[tuple[Progress, CallCounts]]],
) -> list[Progress]:
    covered: set[Hashable] = set()
    chosen: list[Progress] = []
    for roles in sorted(found, key=len, reverse=True):
        for progress, calls in sorted(found[roles], key=lambda seen: sum(c.rows for c in seen[1].values())):
            kinds = {*roles, *((call.network, call.features) for call in calls)}
            if not kinds <= covered:
                covered |= kinds
                chosen.append(progress)
    return chosen


def _toy_run(setup: RunSetup) -> tuple[Method[Any], Triple, Batch]:
    """The method posed on a Gaussian in two dimensions, with full roles and a batch of the run's own size."""
    schedule, rows = setup.problem.schedule, setup.config.training.batch_size
    gaussian = Mixture(torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, dtype=torch.float64), 1.0)
    network = MixtureNetwork(gaussian, schedule, width=8)
    problem = replace(setup.problem, latent_shape=(2, 1, 1), feature_channels=8, feature_size=(1, 1))
    triple = Triple(network, Analytic(), schedule, {role: RoleLayout("full") for role in setup.roles})
    mean = FunctionReward(lambda images, prompts: images.mean((1, 2, 3)))
    triple.frozen = {VISION_ENCODER: _ToyVision(), REWARD: mean, HELD_OUT: mean}
    cond, latents = Conditioning(torch.ones(rows, 1, 1)), torch.zeros(rows, 2, 1, 1)
    states = GuidedState(latents, torch.full((rows,), 1e-3, dtype=torch.float64), latents, torch.zeros(rows))
    batch = Batch(cond, cond, latents, cond, latents, latents, cond, states, cond.told(1.0), losers=latents)
    return setup.method_class(setup.method_config, problem), triple, batch
