"""What keeps an eye on a run: pictures and drawn signals at the grids' cadence, signals of every line, and alarms.

`signals/` in stats.jsonl, beside what a method logs of itself:

    latent_std_ratio   generator/latent_std over real latents': those of the run's images, averaged over the lines so far
                       (generator/real_std), else the teacher's samples for the grids' prompts
    latent_mean_shift  generator/latent_mean less theirs, in their standard deviations
    skipped            steps skipped for gradients that were not finite, per iteration of a hundred or more

and, where `training.grid_every` says so, those of `grids.py`. All are functions of the samples and of the lines before, so a
broken run logs what an unbroken one does.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import cached_property
from itertools import accumulate
from pathlib import Path

from stepdistill.roles.triple import GENERATOR
from stepdistill.training.distributed import Processes
from stepdistill.training.monitoring.alarms import Alarms
from stepdistill.training.monitoring.grids import Grid
from stepdistill.training.run_folder.logs import STATS, read_records
from stepdistill.training.session import Session

logger = logging.getLogger(__name__)
MIN_ITERATIONS = 100
"""Iterations over which skipped steps are counted at least: one early one is no habit."""


class LatentReference:
    """Mean and standard deviation of the latents that the student's are held against.

    Args:
        teacher: (mean, std) of the teacher's samples, until real latents are seen.
    """

    def __init__(self, teacher: tuple[float, float]) -> None:
        self.mean, self.std = teacher
        self._seen = 0

    def signals(self, values: Mapping[str, float]) -> dict[str, float]:
        """Signals of one line; takes its real latents in first."""
        found = [values.get(f"{GENERATOR}/{name}") for name in ("latent_mean", "latent_std", "real_mean", "real_std")]
        mean, std, real_mean, real_std = (x if x is not None and math.isfinite(x) else None for x in found)
        if real_mean is not None and real_std is not None:
            before, self._seen = self._seen, self._seen + 1
            self.mean, self.std = (
                (old * before + new) / self._seen for old, new in ((self.mean, real_mean), (self.std, real_std))
            )
        if mean is None or std is None:
            return {}
        scale = max(self.std, 1e-6)
        return {"signals/latent_std_ratio": std / scale, "signals/latent_mean_shift": (mean - self.mean) / scale}


class Monitor:
    """Every process of a run has one; the main process alone speaks.

    Args:
        session: the run's.
        folder: the run's; the lines of stats.jsonl there are gone through, as they were when they were written.
        processes: all of them draw where networks are sharded, else the main one.
    """

    def __init__(self, session: Session, folder: Path, processes: Processes) -> None:
        config = session.setup.config.training
        self.every, self.is_main_process, self.folder = config.grid_every, processes.is_main_process, folder
        self.grid: Grid | None = None
        if processes.is_main_process or processes.sharded:
            place = folder if processes.is_main_process else None
            guidance = session.method.recipe().baked_guidance
            self.grid = Grid(session, place, config.grid_prompts, guidance, config.grid_seeds)
        lengths = [stage.iterations or 0 for stage in session.method.stages()[:-1]]
        self.alarms = Alarms(config.alarms, list(accumulate(lengths)))

    @cached_property
    def latent_reference(self) -> LatentReference | None:
        """What latents are held against, brought up to date by the lines so far when the first one is to follow them."""
        if self.grid is None:
            return None
        reference = LatentReference(self.grid.reference())
        if self.is_main_process:
            for iteration, values in read_records(self.folder / STATS):
                reference.signals(values)
                for _said in self.alarms.judge(iteration, values):
                    pass
        return reference

    def draws(self, iteration: int) -> bool:
        """Whether this iteration is one of the grids'."""
        return bool(self.every) and iteration % self.every == 0

    def draw(self, iteration: int) -> dict[str, float]:
        """Draw the student, and give what it shows; empty on processes that do not draw."""
        return {} if self.grid is None else self.grid.draw(iteration)

    def line(self, iteration: int, values: Mapping[str, float], skipped: int) -> dict[str, float]:
        """What is to be logged: the values and their signals. Alarms are said here.

        skipped: steps skipped so far.
        """
        # before who is who: drawing the teacher takes all processes where it is sharded
        latent_reference = self.latent_reference
        if latent_reference is None or not self.is_main_process:
            return dict(values)
        line = {
            **values,
            **latent_reference.signals(values),
            "signals/skipped": skipped / max(iteration, MIN_ITERATIONS),
        }
        for said in self.alarms.judge(iteration, line):
            logger.warning("%s", said)
        return line
