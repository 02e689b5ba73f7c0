"""The run of `stepdistill train` for guidance adapters of a small network, on a GPU, with each gradient one CUDA graph.

    stepdistill collect trajectories configs/fashion_trajectories.yaml --output data/fashion_trajectories
    python tools/train_agd_graphed.py configs/fashion_agd_collected.yaml --set training.device=cuda --output runs/fashion_agd

A network of three million parameters leaves a GPU waiting for kernels to be launched; as one graph, a gradient is one launch.
The states, in their order, the loss and the optimizer are those of `stepdistill train`, so that the two runs are one but for
rounding (a test holds them against each other). What it leaves is a run's folder, with one checkpoint,
that `export`, `train --resume` and `measure_agd.py` take. All states are held on the device.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from stepdistill.config.schema import RunConfig, TrainingConfig, load_config
from stepdistill.data.latents.trajectories import TrajectoryStates
from stepdistill.data.loader import EpochOrder
from stepdistill.diffusion.draws import Draws, derive_seed
from stepdistill.errors import UserError
from stepdistill.families.conditioning import Conditioning, MicroConditioning
from stepdistill.methods.base import Batch, Progress, Terms
from stepdistill.methods.guidance.guidance_distillation import GuidedRollout
from stepdistill.roles.triple import GENERATOR
from stepdistill.training.distributed import Processes
from stepdistill.training.iteration import compute_loss
from stepdistill.training.option_checks import float32_precision
from stepdistill.training.run import find_resume_checkpoint
from stepdistill.training.run_folder.logs import write_config
from stepdistill.training.session import EMA, Session, open_session
from stepdistill.training.setup import RunSetup, prepare
from stepdistill.training.trainer import Trainer

logger = logging.getLogger(__name__)
ENCODED = 256
"""Prompts that are encoded at a time."""


class Gradient:
    """That of the loss on the states at `rows`, whose error and error without guidance are added to `seen`.

    Args:
        session: of a run on collected walks.
        states: all of them, on the session's device.
        batch: states in an update.
    """

    def __init__(self, session: Session, states: TrajectoryStates, batch: int) -> None:
        self.session, self.states, device = session, states, session.device
        self.parameters = list(session.triple.parameters(GENERATOR).values())
        self.rows = torch.zeros(batch, dtype=torch.long, device=device)
        self.seen = torch.zeros(2, dtype=torch.float64, device=device)
        self.cond, self.cond_row = _conditionings(session, states)
        self.replay: Callable[[], None] = self._captured() if device.type == "cuda" else self.run

    def __call__(self, rows: Tensor) -> None:
        """Leave it at the parameters, for the states `rows` (B,)."""
        self.rows.copy_(rows, non_blocking=True)
        self.replay()

    def run(self) -> None:
        triple, method, states, rows = self.session.triple, self.session.method, self.states, self.rows
        cond = self.cond[self.cond_row[rows]]
        # (nothing is drawn in an update on collected states, and x0 is for losses that this method has not)
        draws, progress = Draws(0, 0, GENERATOR, (), self.session.device), Progress(updates={GENERATOR: 0})
        x_t = states.x_t[rows]
        rollout = GuidedRollout(
            batch=Batch(cond, cond),
            x_t=x_t[None],
            t=states.t[rows][None],
            x0=x_t,
            target=states.target[rows][None],
            plain=states.plain[rows][None],
            told=cond.told(states.w[rows]),
        )
        for parameter in self.parameters:
            parameter.grad = None
        with triple.training(GENERATOR):
            compute_loss(method, GENERATOR, rollout, triple, progress, draws, self._differentiate)

    def _differentiate(self, _role: str, _piece: int, terms: Terms) -> None:
        terms.total.backward()
        self.seen += torch.stack([terms.parts["error"], terms.parts["error_unguided"]])

    def _captured(self) -> Callable[[], None]:
        """The graph, after the passes that it needs before it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run()
        self.seen.zero_()
        return graph.replay


def _conditionings(session: Session, states: TrajectoryStates) -> tuple[Conditioning, Tensor]:
    """What each prompt says, and the row of it for each index of the prompt list."""
    setup, prompts = session.setup, session.setup.prompts
    texts = list(dict.fromkeys(prompts[index] for index in range(len(prompts))))
    places = {text: row for row, text in enumerate(texts)}
    sizes = [MicroConditioning.plain(*setup.problem.size)] * len(texts)
    with torch.no_grad():
        parts = [
            session.encoder.text(texts[start : start + ENCODED], sizes[start : start + ENCODED])
            for start in range(0, len(texts), ENCODED)
        ]
    rows = torch.tensor([places[prompts[index]] for index in range(len(prompts))], device=session.device)
    return Conditioning.cat(parts), rows[states.prompt]


def train(config: RunConfig, folder: Path) -> Trainer:
    """The whole run, into a folder. Raises UserError as `stepdistill train`, and where the config asks for more than a graph does."""
    find_resume_checkpoint(config, folder, None)
    setup, training = prepare(config), config.training
    _check(setup)
    processes = Processes(Accelerator(cpu=training.device == "cpu"), training)
    trainer = Trainer(open_session(setup, processes.device), folder, processes)
    session, device = trainer.session, processes.device
    if setup.trajectories is None:
        raise ValueError("a run on trajectories has none")
    whole = setup.trajectories.whole()
    states = TrajectoryStates(**{item.name: vars(whole)[item.name].to(device) for item in fields(whole)})
    write_config(folder, config.model_copy(update={"output": str(folder)}))
    order = EpochOrder(len(setup.trajectories), derive_seed(training.seed, "trajectories"))
    with float32_precision(training.tf32):
        _updates(Gradient(session, states, training.batch_size), trainer, order, training)
    trainer.counters.iteration = trainer.counters.updates[GENERATOR] = training.max_steps
    if not trainer.save():
        raise UserError(f"the checkpoint could not be written to {str(folder)!r} (see above): make room and run again")
    return trainer


def _updates(gradient: Gradient, trainer: Trainer, order: EpochOrder, training: TrainingConfig) -> None:
    """All of them, with a line in the log now and then."""
    optimizer, triple = trainer.optimizers[GENERATOR], trainer.session.triple
    begun, size, told = time.perf_counter(), training.batch_size, 0
    for done in range(training.max_steps):
        rows = torch.tensor(order.indices(done * size, size))
        gradient(rows.pin_memory() if gradient.rows.is_cuda else rows)
        optimizer.clip()
        optimizer.step(done)
        if training.ema > 0:
            triple.lerp_role(EMA, GENERATOR, 1 - training.ema)
        if (done + 1) % training.log_every == 0 or done + 1 == training.max_steps:
            error, plain = (gradient.seen / (done + 1 - told)).tolist()
            gradient.seen.zero_()
            told, spent = done + 1, time.perf_counter() - begun
            logger.info("update %d, %.1f s: error %.5f, %.2f x below no adapter", told, spent, error, plain / error)


def _check(setup: RunSetup) -> None:
    training = setup.config.training
    asked = {
        "method.name": (setup.config.method_name, "agd"),
        "method.source": (setup.config.method.get("source"), "trajectories"),
        "training.accumulation": (training.accumulation, 1),
    }
    for key, (found, wanted) in asked.items():
        if found != wanted:
            raise UserError(
                f"{key} is {found!r} and a graphed run has {wanted!r}: change it, or use 'stepdistill train'"
            )


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="of method agd, with source: trajectories")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE, as of 'stepdistill train' (repeatable)")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(given)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.backends.cudnn.benchmark = True  # shapes never change
    train(load_config(arguments.config, arguments.set), arguments.output)


if __name__ == "__main__":
    main()
