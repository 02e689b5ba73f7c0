"""One micro-batch of the run's own code on weights without content: what its phases hold in memory and compute."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor, nn

from stepdistill.diffusion.draws import Draws
from stepdistill.errors import UserError
from stepdistill.families.base import Checkpoint
from stepdistill.families.conditioning import Conditioning, MicroConditioning
from stepdistill.methods.base import Batch, Progress
from stepdistill.planning.fake_tensors import DataDependentOutputError, replace_meta_tensors
from stepdistill.planning.meter import Flops, Meter, upcast_norm_inputs
from stepdistill.planning.network_calls import CallCounter, CallStatistics, CountingHooks
from stepdistill.roles.sampler import GuidedState
from stepdistill.training.iteration import run_iteration
from stepdistill.training.session import DTYPES, Session, build_session
from stepdistill.training.setup import RunSetup

ENCODE_TEXT, ENCODE_IMAGES, SAMPLE_GRID = "encode text", "encode images", "draw grid"
DUMMY_TIMESTEP = 500.0
"""Native time at which the grid's network is called; any will do."""


@dataclass(frozen=True)
class Phase:
    """A stretch of a micro-batch.

    Attributes:
        name: `encode text`, `encode images`, `ROLE forward`, `ROLE backward` or `draw grid`.
        role: whose update it belongs to; empty where it is no role's.
        transient: bytes at its peak beyond weights and what optimizers keep, gradients included.
        gradients: bytes of those gradients once all are there.
        flops: operations done in it.
    """

    name: str
    role: str
    transient: int
    gradients: int
    flops: Flops


@dataclass(frozen=True)
class Trace:
    """What a micro-batch takes.

    Attributes:
        phases: of the traced iterations in their order, with a sample grid at the end.
        per_row: operations for one row of a forward of a role's network, by (role, whether it is left for its features).
        cond: the conditioning of the batch, for its shapes.
    """

    phases: tuple[Phase, ...]
    per_row: Mapping[tuple[str, bool], Flops]
    cond: Conditioning


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, ghosts or not."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def auxiliary_modules(checkpoint: Checkpoint) -> dict[str, nn.Module]:
    """The checkpoint's networks beside the denoising one, by component: text encoders and autoencoder."""
    parts = checkpoint.pipeline.components if checkpoint.pipeline is not None else {}
    return {
        name: part for name, part in parts.items() if isinstance(part, nn.Module) and part is not checkpoint.network
    }


def build_on_meta(setup: RunSetup) -> Session:
    """The session that training would open, every weight on the meta device."""
    checkpoint = setup.family.build_on_meta(setup.info, DTYPES[setup.config.model.dtype])
    with torch.device("meta"):
        return build_session(setup, checkpoint, torch.device("meta"))


def trace(session: Session, call_statistics: CallStatistics) -> Trace:
    """Run the iterations that `walk` chose, and draw a grid. An outlined session's weights become ghosts.

    A session with real weights is traced as well, at the price of the work itself: the tests hold the two together.

    Raises:
        UserError: the method's course depends on what a network says, which a plan cannot know.
    """
    try:
        return _Tracer(session).run(call_statistics)
    except DataDependentOutputError as error:
        raise UserError(
            f"the method {session.setup.config.method_name!r} lets a network's output decide what is computed ({error}), which "
            "cannot be planned: measure a short run of it instead"
        ) from None


class _Tracer:
    """A session whose weights are ghosts, and the meter that watches them."""

    def __init__(self, session: Session) -> None:
        self.session, self.setup = session, session.setup
        self.training = self.setup.config.training
        self.meter = Meter()
        self.phases: list[Phase] = []
        if session.device.type == "meta":
            # where ghosts are said to lie: a machine without CUDA can differentiate on its CPU only
            session.device = torch.device("cpu")
        triple = session.triple
        heads = (head for named in triple.heads.values() for head in named.values())
        others = (*triple.frozen.values(), *auxiliary_modules(session.checkpoint).values())
        for module in chain(
            [triple.base], triple.networks.values(), triple.guidance_conditioners.values(), heads, others
        ):
            replace_meta_tensors(module)
            if self.training.device != "cpu":
                upcast_norm_inputs(module)
            self.meter.register(chain(module.parameters(), module.buffers()))
        self.weights, self.before = self.meter.live_bytes, Flops()

    def run(self, call_statistics: CallStatistics) -> Trace:
        per_row = dict[tuple[str, bool], Flops]()
        batch = self._batch()
        with self.meter:
            for progress in call_statistics.iterations_to_trace:
                with CallCounter(self.session.triple, lambda: self.meter.flops) as counter:
                    self._micro_batch(batch, progress, counter)
                # a derivative in forward mode is a dearer forward: the mean of both, which come in the run's own numbers
                done, rows = defaultdict[tuple[str, bool], Flops](Flops), defaultdict[tuple[str, bool], float](float)
                for call, flops in counter.flops.items():
                    done[call.network, call.features] += flops
                    rows[call.network, call.features] += counter.found[call].rows
                per_row |= {key: flops * (1 / rows[key]) for key, flops in done.items()}
        if self.session.checkpoint.pipeline is not None:
            self._grid(batch)
        return Trace(tuple(self.phases), per_row, batch.cond)

    def _micro_batch(self, batch: Batch, progress: Progress, counter: CallCounter) -> None:
        training, triple = self.training, self.session.triple
        samples = range(training.batch_size)
        draws = Draws(training.seed, progress.iteration, "", samples, self.session.device, self.session.dtype)

        def finish(role: str, piece: int, loss: Tensor) -> None:
            parameters = list(triple.parameters(role).values())
            gradients = tensor_bytes(parameters)
            accumulating = training.accumulation > 1 or piece > 0
            # the gradients of the micro-batches and pieces before are there all along
            self._record_phase(f"{role} forward", role, gradients, carried_gradients=gradients if accumulating else 0)
            if accumulating:
                for parameter in parameters:
                    parameter.grad = torch.zeros_like(parameter)
            loss.backward()
            self._record_phase(f"{role} backward", role, gradients)
            for parameter in parameters:
                parameter.grad = None
            self.meter.reset_peak()

        run_iteration(self.session.method, triple, [(draws, batch)], progress, CountingHooks(counter, finish))

    # ---------------------------------------------------------------- data

    @torch.no_grad()
    def _batch(self) -> Batch:
        """A micro-batch of the shapes that `BatchSource` makes."""
        setup, checkpoint, rows = self.setup, self.session.checkpoint, self.training.batch_size
        needs = setup.needs
        sizes, prompts = [MicroConditioning.plain(*setup.problem.size)] * rows, [""] * rows
        with self._measured_phase(ENCODE_TEXT):
            cond = setup.family.encode(checkpoint, prompts, sizes)
            null = setup.family.null(checkpoint, sizes, setup.config.model.negative_prompt)
            again = (
                setup.family.encode(checkpoint, prompts, sizes)
                if needs.images or needs.pairs or needs.trajectories
                else None
            )
        latents = torch.zeros(rows, *setup.problem.latent_shape, dtype=self.session.dtype, device=self.session.device)
        batch = Batch(cond, null, prompts=tuple(prompts))
        if needs.images:
            images = torch.zeros(rows, 3, *setup.problem.size, device=self.session.device)
            with self._measured_phase(ENCODE_IMAGES):
                encoded = setup.family.encode_images(checkpoint, images, latents).to(self.session.dtype)
            batch = replace(batch, images=encoded, image_cond=again, losers=encoded if needs.losers else None)
        if needs.pairs:
            batch = replace(batch, pair_noise=latents, pair_latents=latents, pair_cond=again)
        if needs.trajectories and again is not None:
            t = torch.full((rows,), min(DUMMY_TIMESTEP, setup.problem.schedule.terminal_time), dtype=torch.float64)
            states = GuidedState(latents, t, latents, torch.zeros(rows, dtype=self.session.dtype))
            batch = replace(batch, states=states, states_cond=again.told(1.0))
        return batch

    @torch.no_grad()
    def _grid(self, batch: Batch) -> None:
        """The dearest moments of a sample grid: the guided teacher on all its prompts at once, and one image decoded."""
        session, setup = self.session, self.setup
        rows, guidance = [0] * self.training.grid_prompts, session.method.recipe().baked_guidance
        noise = torch.zeros(len(rows), *setup.problem.latent_shape, dtype=session.dtype, device=session.device)
        with self._measured_phase(SAMPLE_GRID):
            cond, null = batch.cond[rows], batch.null[rows]
            time = min(DUMMY_TIMESTEP, setup.problem.schedule.terminal_time)
            latents = session.triple.real_score.guided(noise, time, cond, null, guidance)
            setup.family.decode(session.checkpoint, latents[:1])

    # ---------------------------------------------------------------- the meter

    @contextmanager
    def _measured_phase(self, name: str) -> Iterator[None]:
        self.meter.reset_peak()
        with self.meter:
            yield
        self._record_phase(name)

    def _record_phase(self, name: str, role: str = "", gradients: int = 0, carried_gradients: int = 0) -> None:
        meter = self.meter
        transient = meter.peak - self.weights + carried_gradients
        self.phases.append(Phase(name, role, transient, gradients, meter.flops - self.before))
        self.before = meter.flops
        meter.reset_peak()
