"""One loop for all methods: roll out, update the roles that are due, checkpoint, draw a grid, and survive."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import set_seed
from torch import Tensor

from stepdistill.config.paths import with_absolute_paths
from stepdistill.diffusion.draws import Draws
from stepdistill.errors import UserError
from stepdistill.methods.base import STUDENT, Batch, Progress, Stage, Terms
from stepdistill.roles.triple import GENERATOR
from stepdistill.training.distributed import Processes
from stepdistill.training.evaluation_hook import EvaluationHook
from stepdistill.training.global_rng import global_rng_states, restore_global_rng
from stepdistill.training.inputs.batches import BatchSource, sample_numbers
from stepdistill.training.iteration import IterationHooks, run_iteration
from stepdistill.training.monitoring.monitor import Monitor
from stepdistill.training.monitoring.tracking import Tracker
from stepdistill.training.optimizers import RoleOptimizer
from stepdistill.training.run_folder import checkpoints
from stepdistill.training.run_folder.checkpoints import CheckpointMetadata, Counters, NonFiniteError
from stepdistill.training.run_folder.environment import Environment
from stepdistill.training.run_folder.logs import CONFIG, discard_records_after, write_config
from stepdistill.training.run_folder.tensor_store import STORE_FOLDER, RunTensorStore
from stepdistill.training.session import EMA, Session, finalize_placement
from stepdistill.training.stopping import stop_on_signal

logger = logging.getLogger(__name__)
CHECKPOINTS = "checkpoints"


class RoleUpdates(IterationHooks):
    """Differentiates the losses of an iteration, updates the roles, and gathers what is logged.

    Attributes:
        values: named values to log, means over this process's samples.
    """

    def __init__(self, trainer: Trainer, progress: Progress, micro_batches: int) -> None:
        self.values: dict[str, Tensor] = {}
        self._trainer, self._progress, self._count = trainer, progress, micro_batches
        self._parts: dict[str, Tensor] = {}
        self._statistics: dict[str, Tensor] = {}

    def begin_role(self, role: str) -> None:
        self._trainer.optimizers[role].zero_grad()
        self._parts, self._statistics = {}, {}

    def on_terms(self, role: str, piece: int, terms: Terms) -> None:
        (terms.total / self._count).backward()
        self._add(self._parts, {"loss": terms.total, **terms.parts})
        self._add(self._statistics, terms.statistics)

    def end_role(self, role: str) -> None:
        trainer = self._trainer
        self.values |= {f"{role}/{key}": value for key, value in self._parts.items()}
        logged, stepped = trainer.update(role)
        self.values |= logged
        if stepped:
            with torch.no_grad():
                means = trainer.processes.mean(self._statistics)
                trainer.method.after_update(role, means, trainer.triple, self._progress)

    def _add(self, sums: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
        for key, value in more.items():
            sums[key] = sums.get(key, torch.zeros_like(value)) + value.detach() / self._count


class Trainer:
    """Trains a session into a folder.

    Args:
        session: what to train; its roles are placed on the processes here.
        folder: the run's; checkpoints, logs and grids go there.
        processes: those that share the work.
        watch: measures the student as training goes.
    """

    def __init__(
        self, session: Session, folder: Path, processes: Processes, evaluation_hook: EvaluationHook | None = None
    ) -> None:
        self.evaluation_hook = evaluation_hook
        self.session, self.folder, self.processes = session, folder, processes
        self.config = session.setup.config.training
        self.triple, self.method = session.triple, session.method
        self.base = self.triple.fingerprint()
        processes.place(self.triple)
        finalize_placement(session)
        self.counters = Counters(updates={role: 0 for role in session.setup.roles})
        self.optimizers = self._optimizers()
        self.latest_values: dict[str, float] = {}
        """Of every role's last update since a line was logged: at a ratio of 5 few updates fall on the line's iteration."""
        self._loaded_from: Path | None = None
        self.method.attach_storage(RunTensorStore(folder / STORE_FOLDER, processes))
        self.environment = Environment.of_this_process(
            session.setup.config, session.device, processes.count, processes.sharded
        )

    # ---------------------------------------------------------------- the loop

    def run(self) -> bool:
        """Train to `max_steps`. True when done, False when a signal asked to stop early; a checkpoint exists either way.

        Raises:
            UserError: too many non-finite steps in a row, or a last checkpoint that the disk refused.
        """
        config, processes = self.config, self.processes
        if self.counters.iteration == 0:
            set_seed(config.seed)
        saved = self._discard_later_state()
        tracker = Tracker(self.folder, config.max_steps, self.counters.iteration, processes.accelerator)
        monitor = Monitor(self.session, self.folder, processes)
        numbers = sample_numbers(
            self.counters.iteration,
            config.max_steps,
            batch=config.batch_size,
            accumulation=config.accumulation,
            process=processes.index,
            processes=processes.count,
        )
        source = BatchSource(self.session, config.seed, processes.count).batches(numbers)
        with stop_on_signal() as stop:
            should_stop = False
            # a signal may reach the processes at different iterations, and they must stop at the same
            while self.counters.iteration < config.max_steps and not should_stop and not processes.any(stop.requested):
                self._enter_stage()
                self.latest_values |= processes.mean(self.iteration([next(source) for _ in range(config.accumulation)]))
                done = self.counters.iteration
                tracker.advance(config.batch_size * config.accumulation * processes.count)
                drawn = monitor.draw(done) if monitor.draws(done) else {}
                due = done % config.log_every == 0 or monitor.draws(done)
                if due or done == config.max_steps:
                    values = {**self.latest_values, **drawn}
                    tracker.log(done, monitor.line(done, values, self.counters.skipped))
                if due:
                    self.latest_values = {}
                if done % config.save_every == 0 and self.save():
                    saved = done
                if self.evaluation_hook is not None and done % self.evaluation_hook.every == 0:
                    saved, should_stop = self._evaluate_student(self.evaluation_hook, tracker, saved)
            if saved != self.counters.iteration and not self.save():
                raise UserError(
                    f"the last checkpoint, of iteration {self.counters.iteration}, could not be written to {str(self.folder)!r} "
                    f"(see above), and the newest one there is of iteration {saved}: make room and resume with --resume latest"
                )
            finished = self.counters.iteration >= config.max_steps
            if finished:
                self._check_updates()
            if finished and not monitor.draws(config.max_steps):
                monitor.draw(config.max_steps)
        tracker.close()
        return finished

    def _discard_later_state(self) -> int:
        """Drop what lies beyond the iteration to go on from; the iteration of the newest checkpoint in this run's folder.

        A checkpoint from elsewhere (`best`, `abandoned`, another folder) becomes one of this run first: whatever happens
        next, `latest` finds it.
        """
        iteration, place = self.counters.iteration, self.folder / CHECKPOINTS
        from_elsewhere = (
            self._loaded_from is not None
            and self._loaded_from.resolve() != checkpoints.checkpoint_path(place, iteration).resolve()
        )
        self.processes.wait_for_everyone()  # a slower one may still be reading the checkpoint that is set aside here
        if self.processes.is_main_process:
            discard_records_after(self.folder, iteration)
            checkpoints.move_later_checkpoints(place, iteration, itself=from_elsewhere)
        if not from_elsewhere:
            return iteration
        return iteration if self.save() else 0

    def iteration(self, micro_batches: Sequence[tuple[Sequence[int], Batch]]) -> dict[str, Tensor]:
        """Runs one iteration and updates every role that is due.

        Gradients are the mean over the global batch, whatever its division into micro-batches and processes.
        Returns the named values to log, of this process's samples.
        """
        progress, session = self._progress(), self.session
        drawn = [
            (Draws(self.config.seed, progress.iteration, "", samples, session.device, session.dtype), batch)
            for samples, batch in micro_batches
        ]
        updates = RoleUpdates(self, progress, len(micro_batches))
        run_iteration(self.method, self.triple, drawn, progress, updates)
        self.counters.iteration += 1
        return updates.values

    def update(self, role: str) -> tuple[dict[str, Tensor], bool]:
        """Reduces a role's gradients, clips them and steps; a non-finite gradient skips the step on all processes alike.

        Returns the values to log, and whether the step was made.

        Raises:
            UserError: `training.max_bad_steps` steps of this role in a row had non-finite gradients.
        """
        optimizer, counters = self.optimizers[role], self.counters
        self.processes.reduce_gradients(optimizer.parameters.values())
        norm = optimizer.clip()
        limit = optimizer.config.clip
        clipped = norm.new_tensor(float(bool(limit) and bool(norm > limit)))
        logged = {f"{role}/grad_norm": norm, f"{role}/clipped": clipped}
        if not bool(torch.isfinite(norm)):
            counters.skip(role)
            logger.warning("iteration %d: the gradient of %s is not finite, step skipped", counters.iteration, role)
            optimizer.zero_grad()
            if max(counters.bad_in_row, counters.bad_in_row_of[role]) >= self.config.max_bad_steps:
                raise UserError(
                    f"{self.config.max_bad_steps} steps in a row had non-finite gradients, the last of role {role!r} at iteration "
                    f"{counters.iteration}: resume from the last checkpoint with a lower learning rate or model.dtype bfloat16"
                )
            return logged, False
        update = counters.updates[role]
        lr = optimizer.step(update)
        optimizer.zero_grad()
        counters.step(role)
        if role == GENERATOR and self.config.ema > 0:
            self.triple.lerp_role(EMA, GENERATOR, 1 - self.config.ema)
        return {**logged, f"{role}/lr": torch.tensor(lr, dtype=torch.float64)}, True

    def _check_updates(self) -> None:
        """Refuses to end a stage in which a role was due and no step of it was made.

        Raises:
            UserError: all steps of a role in this stage were skipped.
        """
        for role, skipped in self.counters.skipped_of.items():
            if skipped and self.counters.updates.get(role) == 0:
                raise UserError(
                    f"the {role} was never updated: all {skipped} of its steps in this stage had non-finite gradients, so there is "
                    "nothing to export; lower method.guidance or the learning rates, or use model.dtype bfloat16, and start anew"
                )

    # ---------------------------------------------------------------- stages

    def _stage_starts(self) -> list[tuple[int, Stage]]:
        """(first iteration, stage) of every stage."""
        first, found = 0, []
        for stage in self.method.stages():
            found.append((first, stage))
            first += stage.iterations if stage.iterations is not None else self.config.max_steps
        return found

    def _progress(self) -> Progress:
        counters = self.counters
        first = self._stage_starts()[counters.stage][0]
        return Progress(counters.iteration, dict(counters.updates), counters.stage, counters.iteration - first)

    def _enter_stage(self) -> None:
        """At a stage's first iteration: set its roles up and give it optimizers of its own."""
        for index, (first, stage) in enumerate(self._stage_starts()):
            begins = index > self.counters.stage or self.counters.iteration == 0
            if begins and self.counters.iteration >= first:
                self._check_updates()
                self.counters.stage = self.session.stage = index
                for source, target in stage.copies:
                    self.triple.copy_role(self.session.student if source == STUDENT else source, target)
                for role in stage.reset:
                    self.triple.reset_role(role)
                if EMA in self.triple.layouts and GENERATOR in {*stage.reset, *(t for _, t in stage.copies)}:
                    self.triple.copy_role(GENERATOR, EMA)
                self.counters.begin_stage()
                self.optimizers = self._optimizers()
                self.latest_values = {}

    def _optimizers(self) -> dict[str, RoleOptimizer]:
        configured = self.session.setup.config.optimizers
        chosen = {"generator": configured.generator, "fake_score": configured.fake_score}
        roles = self.session.setup.roles
        offload = "optimizer" in self.config.offload
        return {
            role: RoleOptimizer(self.triple.parameters(role), chosen[kind], offload=offload)
            for role, kind in roles.items()
        }

    # ---------------------------------------------------------------- checkpoints

    def save(self) -> bool:
        """Write a checkpoint of everything that the next iteration depends on; every process must call this.

        False, on all of them, where the disk refuses it; what was there before is untouched then.

        Raises:
            UserError: a weight, a moment or another tensor of the state is not finite; nothing is written then.
        """
        failed, broken = False, ""
        groups = self._tensor_groups()
        if self.processes.is_main_process:
            counters = replace(self.counters, updates=dict(self.counters.updates))
            metadata = CheckpointMetadata(self.session.setup.config.method_name, self.base, counters, self.environment)
            try:
                if not (self.folder / CONFIG).is_file():  # somebody deleted the folder: make it a run again
                    write_config(self.folder, with_absolute_paths(self.session.setup.config))
                checkpoints.write(self.folder / CHECKPOINTS, metadata, groups, self.config.keep)
            except NonFiniteError as error:
                broken = str(error)
            except OSError as error:
                failed = True
                logger.error("the checkpoint of iteration %d could not be written (%s)", self.counters.iteration, error)
        for _ in groups:  # the shards that were not asked for: putting one together takes all processes
            pass
        if self.processes.any(bool(broken)):
            raise UserError(
                f"the weights of iteration {self.counters.iteration} are not finite ({broken or 'found by the main process'}), so they "
                "were not saved: resume from the last checkpoint with lower learning rates, or with model.dtype bfloat16"
            )
        return not self.processes.any(failed)

    def _tensor_groups(self) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
        """(name, tensors on the main process's CPU), one at a time."""
        whole = self.processes.whole
        for role in self.triple.layouts:
            yield role, whole(self.triple.state(role))
        for role, optimizer in self.optimizers.items():
            yield f"optimizer.{role}", whole(optimizer.state_dict())
        yield "method", whole(self.method.state_dict())
        yield (
            checkpoints.LOG,
            {key: torch.tensor(value, dtype=torch.float64) for key, value in self.latest_values.items()},
        )
        yield "rng", global_rng_states(self.processes)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint, into the existing parameters.

        Raises:
            UserError: corrupt, of another method or base, or not fitting these roles.
        """
        saved = checkpoints.read(path)
        self._loaded_from = path
        metadata, mine = saved.metadata, self.session.setup.config.method_name
        if metadata.method != mine:
            raise UserError(
                f"the checkpoint {path} was made by method {metadata.method!r} and the config says {mine!r}: use the run's own config"
            )
        if metadata.base != self.base and metadata.environment.dtype == self.environment.dtype:
            raise UserError(
                f"the checkpoint {path} was trained on a base with fingerprint {metadata.base}, and the weights of "
                f"{self.session.setup.config.model.path!r} have {self.base}: put the weights back that the run was started with"
            )
        self.environment.warn_about_changes(metadata.environment)
        self.counters, self.session.stage = metadata.counters, metadata.counters.stage
        for role in self.triple.layouts:
            if role not in saved.tensors:
                raise UserError(
                    f"the checkpoint {path} lacks the role {role!r}: use the config that the run was started with"
                )
            self.triple.load_state(role, saved.tensors[role])
        self.optimizers = self._optimizers()
        for role, optimizer in self.optimizers.items():
            optimizer.load_state_dict(saved.tensors[f"optimizer.{role}"])
        self.method.load_state_dict(saved.tensors["method"])
        self.latest_values = {key: float(value) for key, value in saved.tensors.get(checkpoints.LOG, {}).items()}
        restore_global_rng(saved.tensors["rng"], self.processes)
        found = [int(other) for other in self.processes.gather(torch.tensor([self.counters.iteration]))]
        if len(set(found)) > 1:
            raise UserError(
                f"the processes resumed at different iterations ({found}): give all machines the same, whole output folder"
            )

    # ---------------------------------------------------------------- looking at the student

    def _evaluate_student(self, evaluation_hook: EvaluationHook, tracker: Tracker, saved: int) -> tuple[int, bool]:
        """Let the watcher measure; the best student's checkpoint is kept beside the newest ones.

        Returns the newest saved iteration, and whether the watcher has seen enough.
        """
        seen = evaluation_hook(self.counters.iteration)
        tracker.log_evaluation(self.counters.iteration, seen.values)
        if seen.best is not None:
            if saved != self.counters.iteration and self.save():
                saved = self.counters.iteration
            if saved == self.counters.iteration and self.processes.is_main_process:
                try:
                    checkpoints.keep_best(self.folder / CHECKPOINTS, saved, seen.best)
                except OSError as error:
                    logger.error("the best checkpoint so far could not be kept (%s)", error)
        return saved, seen.should_stop
