"""What faults are tried on: small runs as real processes, the unbroken run of each kind, and a bit-for-bit comparison."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from PIL import Image

from stepdistill.config.registry import load_family
from stepdistill.errors import UserError
from stepdistill.training.run_folder import checkpoints

Kind = Literal["points", "images"]
FAULTY = Path(__file__).with_name("faulty.py")
PATIENCE = 180.0
"""Seconds after which a process that should have ended counts as hanging."""
POLL = 0.002


class Lost(Exception):
    """A run that did not come back as it should."""


class NotRun(Exception):
    """A fault that this machine cannot make."""


@dataclass
class Tally:
    """What one fault did.

    Attributes:
        injected: times that it was made.
        runs_lost: runs that ended wrongly, could not be resumed, or came to another end than the unbroken run.
        steps_lost: iterations done again although a checkpoint of them had been written.
        remarks: why a run was lost, or why the fault was not made.
    """

    fault: str
    injected: int = 0
    runs_lost: int = 0
    steps_lost: int = 0
    seconds: float = 0.0
    ran: bool = True
    remarks: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        if not self.ran:
            return "not run"
        return "passed" if self.injected and not self.runs_lost and not self.steps_lost else "failed"


class Trainee:
    """One `stepdistill train` process (or the launcher of two), its output in a file of the folder `logs`."""

    def __init__(self, command: Sequence[str], run: Path, logs: Path) -> None:
        self.run = run
        self.log = logs / f"{run.name}-{time.monotonic_ns()}.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # standard output is a file here, where lines would wait in a buffer that a kill empties
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            )

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def resumed_at(self) -> int:
        """The iteration that it says it went on from; 0 where it started afresh."""
        found = re.search(r"resumed at iteration (\d+)", self.text())
        return int(found[1]) if found else 0

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        """Wait until the condition holds; False where the process ended first.

        Raises:
            Lost: neither happened.
        """
        until = time.monotonic() + PATIENCE
        while not condition():
            if self.process.poll() is not None:
                return False
            if time.monotonic() > until:
                self.kill_all()
                raise Lost(f"the run hung: {self.last_line()}")
            time.sleep(POLL)
        return True

    def ended(self, patience: float = PATIENCE) -> int:
        """Exit code.

        Raises:
            Lost: it did not end.
        """
        try:
            return self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise Lost(f"the process did not end within {patience:.0f} s: {self.last_line()}") from None

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """kill -9, and no chance to say anything."""
        self.process.kill()
        self.process.wait()

    def kill_all(self) -> None:
        """The process and all that it started."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def ranks(self) -> list[int]:
        """Process ids of a launcher's ranks, in their order."""
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return sorted(int(number) for number in listed.split())

    def last_line(self) -> str:
        lines = [line for line in re.split(r"[\r\n]+", self.text()) if line.strip()]
        return lines[-1][:300] if lines else "it said nothing"


class Bed:
    """Checkpoints, data, configs and unbroken runs.

    Args:
        folder: where everything goes; new.
        kills: how often the faults that come at random moments are made; longer runs for more of them.
        seed: of those moments.

    Attributes:
        steps: iterations of a run.
        save_every: iterations between its checkpoints.
    """

    def __init__(self, folder: Path, kills: int, seed: int) -> None:
        self.folder, self.kills = folder, kills
        self.random = random.Random(seed)
        self.steps = 40 + 8 * kills
        self.save_every = 5
        self.unbroken: dict[tuple[Kind, int, int], Trainee] = {}

    # ---------------------------------------------------------------- runs

    def config(self, kind: Kind, steps: int, trackers: Sequence[str] = ()) -> Path:
        """A config file: dmd2 with EMA, LoRA roles, ratio 3, a checkpoint every 5 iterations, a line at each."""
        path = self.folder / f"{kind}-{steps}{''.join(f'-{name}' for name in trackers)}.yaml"
        if path.exists():
            return path
        family = "analytic" if kind == "points" else "sd"
        model = self.folder / family
        if not model.exists():
            load_family(family).write_tiny(model)
        role = {"mode": "lora", "rank": 8, "alpha": 4}
        method: dict[str, Any] = {"name": "dmd2", "guidance": 1.5, "ratio": 3}
        data: dict[str, Any] = {"prompts": str(self._prompts())}
        if kind == "images":
            method |= {"steps": 2, "gan": {"weight": 1e-2}}
            data = {"prompts": "builtin:general", "images": str(self._images()), "workers": 2}
        config = {
            "model": {"path": str(model), "dtype": "float64" if kind == "points" else "float32"},
            "method": method,
            "roles": {"generator": role, "fake_score": role},
            "optimizers": {"generator": {"lr": 1e-3, "warmup": 3}, "fake_score": {"lr": 1e-3}},
            "data": data,
            "training": {
                "max_steps": steps, "batch_size": 4, "ema": 0.9, "save_every": self.save_every, "log_every": 1,
                "device": "cpu", "threads": 1, "grid_prompts": 1, "trackers": list(trackers),
            },
        }  # fmt: skip
        path.write_text(yaml.safe_dump(config))
        return path

    def start(
        self,
        config: Path,
        run: Path,
        *,
        resume: bool = False,
        ranks: int = 1,
        fault: tuple[str, str] | None = None,
    ) -> Trainee:
        """`stepdistill train`, by torchrun where there are several ranks, with a fault of `faulty.py` in it."""
        program = ["-m", "stepdistill.cli"] if fault is None else [str(FAULTY), *fault]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
        command = [sys.executable, *launcher, *program, "train", str(config), "--output", str(run)]
        return Trainee([*command, *(["--resume", "latest"] if resume else [])], run, self.folder)

    def begin_reference(self, kind: Kind, steps: int, ranks: int = 1) -> Trainee:
        """Start the unbroken run of this kind, once; it may go on while others are hit."""
        key = (kind, steps, ranks)
        if key not in self.unbroken:
            run = self.folder / f"unbroken-{kind}-{steps}-{ranks}"
            self.unbroken[key] = self.start(self.config(kind, steps), run, ranks=ranks)
        return self.unbroken[key]

    def reference(self, kind: Kind, steps: int, ranks: int = 1) -> Path:
        """The finished folder of the unbroken run.

        Raises:
            Lost: it did not finish.
        """
        trainee = self.begin_reference(kind, steps, ranks)
        if trainee.ended() != 0:
            raise Lost(f"the unbroken run failed: {trainee.last_line()}")
        return trainee.run

    def finish(
        self, config: Path, run: Path, reference: Path, tally: Tally, *, ranks: int = 1, reached: int | None = None
    ) -> None:
        """Resume a run, let it end, and hold it against the unbroken one.

        reached: iteration whose checkpoint must be there; that of the last whole checkpoint before the last line by default.

        Raises:
            Lost: it did not come to the same end.
        """
        wanted = due(run, self.save_every) if reached is None else reached
        trainee = self.start(config, run, resume=True, ranks=ranks)
        if trainee.ended() != 0:
            raise Lost(f"resuming failed: {trainee.last_line()}")
        tally.steps_lost += max(0, wanted - trainee.resumed_at())
        compare(run, reference)

    # ---------------------------------------------------------------- data

    def _prompts(self) -> Path:
        path = self.folder / "prompts.txt"
        path.write_text("mode 0\nmode 1\nmode 2\nmode 3\nmode 1\n")
        return path

    def _images(self) -> Path:
        folder = self.folder / "images"
        folder.mkdir(exist_ok=True)
        for index, colour in enumerate(("red", "green", "blue")):
            Image.new("RGB", (80, 96), colour).save(folder / f"{index}.png")
            (folder / f"{index}.txt").write_text(f"a {colour} square")
        return folder


def lines(run: Path) -> list[str]:
    """Whole lines of stats.jsonl."""
    file = run / "stats.jsonl"
    text = file.read_text() if file.exists() else ""
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def iteration(run: Path) -> int:
    """The last one that stats.jsonl speaks of; 0 where it is not there."""
    written = lines(run)
    facts: Mapping[str, float] = json.loads(written[-1]) if written else {"iteration": 0}
    return int(facts["iteration"])


def due(run: Path, save_every: int) -> int:
    """The newest checkpoint that must be whole: an iteration's is written after its line and before the next one's."""
    return max(0, iteration(run) - 1) // save_every * save_every


def newest(run: Path) -> Path:
    """The newest whole checkpoint.

    Raises:
        Lost: there is none.
    """
    found = checkpoints.latest(run / "checkpoints")
    if found is None:
        raise Lost("there is no whole checkpoint")
    return found


def compare(run: Path, reference: Path, *, tail: bool = False) -> None:
    """The last checkpoints and stats.jsonl must be equal, byte for byte.

    tail: stats.jsonl may lack its beginning.

    Raises:
        Lost: they are not.
    """
    mine, theirs = newest(run), newest(reference)
    if mine.name != theirs.name:
        raise Lost(f"it ended at {mine.name}, the unbroken run at {theirs.name}")
    names = {path.name for folder in (mine, theirs) for path in folder.iterdir()}
    for name in sorted(names):
        pair = [folder / name for folder in (mine, theirs)]
        if not all(path.is_file() for path in pair) or pair[0].read_bytes() != pair[1].read_bytes():
            raise Lost(f"{mine.name}/{name} differs from the unbroken run's")
    said, wanted = lines(run), lines(reference)
    if said != (wanted[-len(said) :] if tail and said else wanted):
        raise Lost(f"stats.jsonl differs from the unbroken run's ({len(said)} lines and {len(wanted)})")
    try:
        checkpoints.read(mine)
    except UserError as refusal:
        raise Lost(str(refusal)) from None
