"""One loop for all methods: roll out, update the roles that are due, checkpoint, draw a grid, and survive."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from stepdistill.diffusion.draws import Draws
from stepdistill.errors import Refusal
from stepdistill.methods.base import Batch, Progress, Rollout, Stage
from stepdistill.models.triple import GENERATOR
from stepdistill.training import checkpoint as checkpoints
from stepdistill.training.batches import BatchSource, sample_numbers
from stepdistill.training.grids import Grid
from stepdistill.training.optimizers import RoleOptimizer
from stepdistill.training.session import EMA, Session
from stepdistill.training.tracking import Tracker
from stepdistill.training.watch import Watch

logger = logging.getLogger(__name__)


@dataclass
class Counters:
    """Where a run stands; saved in every checkpoint. `bad_in_row` counts non-finite steps since the last good one."""

    iteration: int = 0
    updates: dict[str, int] = field(default_factory=dict)
    skipped: int = 0
    bad_in_row: int = 0


class Trainer:
    """Trains a session into a folder.

    Args:
        session: what to train.
        folder: the run's; checkpoints, logs and grids go there.
        accelerator: device, processes and trackers.
        watch: measures the student as training goes.
    """

    def __init__(self, session: Session, folder: Path, accelerator: Accelerator, watch: Watch | None = None) -> None:
        self.watch = watch
        self.session, self.folder, self.accelerator = session, folder, accelerator
        self.config = session.plan.config.training
        self.triple, self.method = session.triple, session.method
        self.counters = Counters(updates={role: 0 for role in session.plan.roles})
        self.stage = 0
        self.optimizers = self._optimizers()
        self._stop = False

    # ---------------------------------------------------------------- the loop

    def run(self) -> bool:
        """Train to `max_steps`. True when done, False when a signal asked to stop early; a checkpoint exists either way."""
        config = self.config
        if self.counters.iteration == 0:
            set_seed(config.seed)
        tracker = Tracker(self.folder, config.max_steps, self.counters.iteration, self.accelerator)
        grid = self._grid()
        numbers = sample_numbers(
            self.counters.iteration,
            config.max_steps,
            batch=config.batch_size,
            accumulation=config.accumulation,
            process=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
        )
        source = BatchSource(self.session, config.seed).batches(numbers)
        saved = self.counters.iteration
        with self._graceful():
            while self.counters.iteration < config.max_steps and not self._stop:
                self._enter_stage()
                values = self.iteration([next(source) for _ in range(config.accumulation)])
                done = self.counters.iteration
                tracker.advance(config.batch_size * config.accumulation * self.accelerator.num_processes)
                if done % config.log_every == 0 or done == config.max_steps:
                    tracker.log(done, {key: float(value) for key, value in values.items()})
                if done % config.save_every == 0:
                    saved = self._save_and_go_on(saved)
                if grid is not None and config.grid_every and done % config.grid_every == 0:
                    grid.draw(done)
                if self.watch is not None and done % self.watch.every == 0:
                    saved = self._look(self.watch, tracker, saved)
        if saved != self.counters.iteration:
            self.save()
        if grid is not None and self.counters.iteration == config.max_steps:
            grid.draw(self.counters.iteration)
        tracker.close()
        return self.counters.iteration >= config.max_steps

    def iteration(self, micro_batches: Sequence[tuple[Sequence[int], Batch]]) -> dict[str, Tensor]:
        """One iteration: every role that is due, in the method's order, on rollouts made before the first update.

        Gradients are the mean over the global batch, whatever its division into micro-batches and processes.
        Returns the named values to log.
        """
        progress = self._progress()
        values: dict[str, Tensor] = {}
        rollouts: list[Rollout] = []
        for order, role in enumerate(self.method.updates(progress)):
            optimizer = self.optimizers[role]
            optimizer.zero_grad()
            parts: dict[str, Tensor] = {}
            for micro, (samples, batch) in enumerate(micro_batches):
                draws = Draws(
                    self.config.seed, progress.iteration, role, samples, self.session.device, self.session.dtype
                )
                with self.triple.training(role):
                    rollout = (
                        self.method.rollout(batch, self.triple, progress, draws) if order == 0 else rollouts[micro]
                    )
                    terms = self.method.loss(role, rollout, self.triple, progress, draws)
                    (terms.total / len(micro_batches)).backward()
                if order == 0:
                    rollouts.append(rollout.detach())
                _accumulate(parts, {"loss": terms.total.detach(), **terms.parts}, len(micro_batches))
            values |= {f"{role}/{key}": self._mean(value) for key, value in parts.items()}
            values |= self._update(role, optimizer)
        self.counters.iteration += 1
        return values

    def _update(self, role: str, optimizer: RoleOptimizer) -> dict[str, Tensor]:
        """Reduce, clip, step; a non-finite gradient skips the step on all processes alike."""
        self._reduce_gradients(optimizer)
        norm = optimizer.clip()
        update = self.counters.updates[role]
        if not bool(torch.isfinite(norm)):
            self.counters.skipped += 1
            self.counters.bad_in_row += 1
            logger.warning(
                "iteration %d: the gradient of %s is not finite, step skipped", self.counters.iteration, role
            )
            optimizer.zero_grad()
            if self.counters.bad_in_row >= self.config.max_bad_steps:
                raise Refusal(
                    f"{self.counters.bad_in_row} steps in a row had non-finite gradients, the last of role {role!r} at iteration "
                    f"{self.counters.iteration}: resume from the last checkpoint with a lower learning rate or model.dtype bfloat16"
                )
            return {f"{role}/grad_norm": norm}
        self.counters.bad_in_row = 0
        lr = optimizer.step(update)
        optimizer.zero_grad()
        self.counters.updates[role] = update + 1
        if role == GENERATOR and self.config.ema > 0:
            self.triple.lerp_role(EMA, GENERATOR, 1 - self.config.ema)
        return {f"{role}/grad_norm": norm, f"{role}/lr": torch.tensor(lr)}

    # ---------------------------------------------------------------- stages

    def _boundaries(self) -> list[tuple[int, Stage]]:
        """(first iteration, stage) of every stage."""
        first, found = 0, []
        for stage in self.method.stages():
            found.append((first, stage))
            first += stage.iterations if stage.iterations is not None else self.config.max_steps
        return found

    def _progress(self) -> Progress:
        first = self._boundaries()[self.stage][0]
        return Progress(
            self.counters.iteration, dict(self.counters.updates), self.stage, self.counters.iteration - first
        )

    def _enter_stage(self) -> None:
        """At a stage's first iteration: set its roles up and give it optimizers of its own."""
        for index, (first, stage) in enumerate(self._boundaries()):
            if index > self.stage and self.counters.iteration >= first:
                self.stage = index
                for role in stage.reset:
                    self.triple.reset_role(role)
                for source, target in stage.copies:
                    self.triple.copy_role(source, target)
                self.counters.updates = {role: 0 for role in self.counters.updates}
                self.optimizers = self._optimizers()

    def _optimizers(self) -> dict[str, RoleOptimizer]:
        configured = self.session.plan.config.optimizers
        chosen = {"generator": configured.generator, "fake_score": configured.fake_score}
        roles = self.session.plan.roles
        offload = "optimizer" in self.config.offload
        return {
            role: RoleOptimizer(self.triple.parameters(role), chosen[kind], offload=offload)
            for role, kind in roles.items()
        }

    # ---------------------------------------------------------------- processes

    def _reduce_gradients(self, optimizer: RoleOptimizer) -> None:
        if self.accelerator.num_processes == 1:
            return
        for parameter in optimizer.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")

    def _mean(self, value: Tensor) -> Tensor:
        return value if self.accelerator.num_processes == 1 else self.accelerator.reduce(value, reduction="mean")

    # ---------------------------------------------------------------- checkpoints

    def save(self) -> Path | None:
        """Write a checkpoint of everything that the next iteration depends on (main process only)."""
        if not self.accelerator.is_main_process:
            return None
        tensors: dict[str, Mapping[str, Tensor]] = {role: self.triple.state(role) for role in self.triple.layouts}
        tensors |= {f"optimizer.{role}": optimizer.state_dict() for role, optimizer in self.optimizers.items()}
        tensors |= {"method": self.method.state_dict(), "rng": _global_rng()}
        counters = {**vars(self.counters), "stage": self.stage, "method": self.session.plan.config.method_name}
        return checkpoints.write(
            self.folder / "checkpoints", self.counters.iteration, counters, tensors, self.config.keep
        )

    def load(self, path: Path) -> None:
        """Continue from a checkpoint, into the existing parameters.

        Raises:
            Refusal: corrupt, of another method, or not fitting these roles.
        """
        saved = checkpoints.read(path)
        made, mine = saved.counters.pop("method"), self.session.plan.config.method_name
        if made != mine:
            raise Refusal(
                f"the checkpoint {path} was made by method {made!r} and the config says {mine!r}: use the run's own config"
            )
        self.stage = int(saved.counters.pop("stage"))
        self.counters = Counters(**saved.counters)
        for role in self.triple.layouts:
            if role not in saved.tensors:
                raise Refusal(
                    f"the checkpoint {path} lacks the role {role!r}: use the config that the run was started with"
                )
            self.triple.load_state(role, saved.tensors[role])
        self.optimizers = self._optimizers()
        for role, optimizer in self.optimizers.items():
            optimizer.load_state_dict(saved.tensors[f"optimizer.{role}"])
        self.method.load_state_dict(saved.tensors["method"])
        _set_global_rng(saved.tensors["rng"])

    def _look(self, watch: Watch, tracker: Tracker, saved: int) -> int:
        """Let the watcher measure; the best student's checkpoint is kept beside the newest ones."""
        seen = watch(self.counters.iteration)
        tracker.log(self.counters.iteration, dict(seen.values))
        if seen.best is not None:
            saved = saved if saved == self.counters.iteration else self._save_and_go_on(saved)
            if saved == self.counters.iteration and self.accelerator.is_main_process:
                checkpoints.keep_best(self.folder / "checkpoints", saved, seen.best)
        return saved

    def _save_and_go_on(self, before: int) -> int:
        try:
            self.save()
        except OSError as error:
            logger.error(
                "the checkpoint at iteration %d could not be written (%s); training goes on",
                self.counters.iteration,
                error,
            )
            return before
        return self.counters.iteration

    # ---------------------------------------------------------------- the rest

    def _grid(self) -> Grid | None:
        if self.session.checkpoint.pipeline is None or not self.accelerator.is_main_process:
            return None
        guidance = self.method.recipe().baked_guidance
        return Grid(self.session, self.folder / "grids", self.config.grid_prompts, guidance)

    @contextmanager
    def _graceful(self) -> Iterator[None]:
        """SIGINT and SIGTERM finish the iteration first; a second one stops at once."""

        def handle(number: int, _frame: FrameType | None) -> None:
            if self._stop:
                raise KeyboardInterrupt
            logger.warning("signal %d: finishing this iteration, then saving; once more stops at once", number)
            self._stop = True

        try:
            previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread (a notebook server, a test runner): signals belong to others there
            yield
            return
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _accumulate(parts: dict[str, Tensor], more: Mapping[str, Tensor], count: int) -> None:
    for key, value in more.items():
        parts[key] = parts.get(key, torch.zeros_like(value)) + value.detach() / count


def _global_rng() -> dict[str, Tensor]:
    """State of torch's global generators: nothing of ours draws from them, third-party modules may."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_global_rng(state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
