"""One of several processes that run jobs one after the other: `torchrun worker.py JOBS.json`.

A job names a config, an output folder, what to resume, and a fault that befalls the second process alone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from stepdistill.api.training import distill
from stepdistill.config.schema import load_config
from stepdistill.diffusion.draws import Draws
from stepdistill.methods.base import Batch, Progress, Rollout, Terms
from stepdistill.methods.matching.dmd2 import DMD2
from stepdistill.roles.triple import Triple
from stepdistill.training.trainer import Trainer

RANK = int(os.environ["RANK"])
WHEN = 2
"""Iteration of the fault."""


@contextmanager
def fault(kind: str | None, output: Path) -> Iterator[None]:
    """nan: a loss that is not a number; stop: a SIGTERM; late: it comes two seconds after the first process; record: none, but
    what is drawn is written to RANK.jsonl."""
    if kind == "late" and RANK == 1:
        time.sleep(2.0)
    loss, rollout, iteration = DMD2.loss, DMD2.rollout, Trainer.iteration

    def poisoned(self: DMD2, role: str, rolled: Rollout, triple: Triple, progress: Progress, draws: Draws) -> Terms:
        terms = loss(self, role, rolled, triple, progress, draws)
        bad = RANK == 1 and progress.iteration == WHEN
        return replace(terms, total=terms.total * torch.nan) if bad else terms

    def recorded(self: DMD2, batch: Batch, triple: Triple, progress: Progress, draws: Draws) -> Rollout:
        rolled = rollout(self, batch, triple, progress, draws)
        with (output.parent / f"{output.name}-{RANK}.jsonl").open("a") as file:
            file.write(json.dumps({"x": rolled.x_t.flatten().tolist(), "t": rolled.t.tolist()}) + "\n")
        return rolled

    def stopped(self: Trainer, batches: Sequence[tuple[Sequence[int], Batch]]) -> dict[str, Tensor]:
        if RANK == 1 and self.counters.iteration == WHEN:
            os.kill(os.getpid(), signal.SIGTERM)
        return iteration(self, batches)

    DMD2.loss = poisoned if kind == "nan" else loss  # type: ignore[method-assign]
    DMD2.rollout = recorded if kind == "record" else rollout  # type: ignore[method-assign]
    Trainer.iteration = stopped if kind == "stop" else iteration  # type: ignore[method-assign]
    try:
        yield
    finally:
        DMD2.loss, DMD2.rollout, Trainer.iteration = loss, rollout, iteration  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        with fault(job["fault"], Path(job["output"])):
            distill(load_config(job["config"]), job["output"], job["resume"])
    torch.distributed.destroy_process_group()
