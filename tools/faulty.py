"""The `stepdistill` command with one fault built in: python tools/faulty.py FAULT VALUE ARGUMENTS...

slow-sync SECONDS                  every sync of a checkpoint's file takes so much longer
slow-iteration SECONDS@ITERATION   so does every iteration from that one on
nan RANK@ITERATION                 the fake score's loss is NaN on that rank ("all" for every rank); at the end, each rank
                                   says what it holds
bad-read SAMPLE                    reading the images' item of that global sample number raises
bad-tracker NAME                   that tracker raises at every line

Product code knows nothing of this: the faults are put in from outside, before the command runs.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from accelerate import tracking

from stepdistill import cli
from stepdistill.data.loader import SampledDataset
from stepdistill.diffusion.draws import Draws
from stepdistill.methods.base import Progress, Rollout, Terms
from stepdistill.methods.matching.dmd2 import DMD2
from stepdistill.roles.triple import FAKE_SCORE, Triple
from stepdistill.training.run_folder import checkpoints as checkpoint
from stepdistill.training.trainer import Trainer

TRACKERS: Mapping[str, type[tracking.GeneralTracker]] = {"tensorboard": tracking.TensorBoardTracker}


def slow_sync(value: str) -> None:
    sync = checkpoint._fsync

    def slow(path: Any) -> None:
        time.sleep(float(value))
        sync(path)

    checkpoint._fsync = slow


def slow_iteration(value: str) -> None:
    seconds, _, first = value.partition("@")
    iteration = Trainer.iteration

    def slow(self: Trainer, micro_batches: Any) -> Any:
        if self.counters.iteration >= int(first):
            time.sleep(float(seconds))
        return iteration(self, micro_batches)

    Trainer.iteration = slow  # type: ignore[method-assign]


def nan(value: str) -> None:
    who, _, when = value.partition("@")
    rank = os.environ.get("RANK", "0")
    loss, run = DMD2.loss, Trainer.run

    def poisoned(self: DMD2, role: str, rollout: Rollout, triple: Triple, progress: Progress, draws: Draws) -> Terms:
        terms = loss(self, role, rollout, triple, progress, draws)
        hit = role == FAKE_SCORE and progress.iteration == int(when) and who in ("all", rank)
        return replace(terms, total=terms.total * math.nan) if hit else terms

    def telling(self: Trainer) -> bool:
        finished = run(self)
        digest = hashlib.sha256()
        for role in sorted(self.triple.layouts):
            for key, tensor in sorted(self.triple.state(role).items()):
                digest.update(key.encode() + tensor.contiguous().numpy().tobytes())
        print(f"rank {rank} skipped {self.counters.skipped} and holds {digest.hexdigest()}", flush=True)
        return finished

    DMD2.loss, Trainer.run = poisoned, telling  # type: ignore[method-assign]


def bad_read(value: str) -> None:
    read = SampledDataset.__getitem__

    def broken(self: SampledDataset[Any], sample: int) -> Any:
        if sample == int(value):
            raise RuntimeError("the reader died")
        return read(self, sample)

    SampledDataset.__getitem__ = broken  # type: ignore[method-assign]


def bad_tracker(value: str) -> None:
    def log(self: Any, values: Mapping[str, Any], step: int | None = None, **rest: Any) -> None:
        raise ConnectionError("the tracker's server is away")

    TRACKERS[value].log = log  # type: ignore[method-assign]


FAULTS: Mapping[str, Callable[[str], None]] = {
    "slow-sync": slow_sync,
    "slow-iteration": slow_iteration,
    "nan": nan,
    "bad-read": bad_read,
    "bad-tracker": bad_tracker,
}


def main(arguments: Sequence[str]) -> None:
    fault, value, *rest = arguments
    FAULTS[fault](value)
    sys.argv[1:] = rest
    cli.main()


if __name__ == "__main__":
    main(sys.argv[1:])
