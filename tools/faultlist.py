"""The faults: each makes one kind of trouble on a `Bed`, some of them several times, and tells a `Tally` what came of it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from faultbed import PATIENCE, Bed, Kind, Lost, NotRun, Tally, Trainee, compare, due, iteration, newest

SLOW = ("slow-iteration", "0.05@0")


@contextmanager
def one_run(tally: Tally) -> Iterator[None]:
    """A run that is lost counts as such, and the campaign goes on."""
    try:
        yield
    except Lost as lost:
        tally.runs_lost += 1
        tally.remarks.append(str(lost))


def reached(trainee: Trainee, wanted: int) -> None:
    """Wait for an iteration.

    Raises:
        Lost: the run ended before it.
    """
    if not trainee.wait_for(lambda: iteration(trainee.run) >= wanted):
        raise Lost(f"the run ended before iteration {wanted}: {trainee.last_line()}")


# ---------------------------------------------------------------- kill -9


def kills(bed: Bed, tally: Tally) -> None:
    """kill -9 at random moments: one in four while starting up, the others somewhere in the iterations."""

    def at_random(trainee: Trainee, run: Path) -> bool:
        if bed.random.random() < 0.25:
            time.sleep(bed.random.uniform(0, 6))
            return True
        aim = iteration(run) // bed.save_every * bed.save_every + bed.random.randint(1, 3 * bed.save_every)
        arrived = trainee.wait_for(lambda: iteration(run) >= aim)
        time.sleep(bed.random.uniform(0, 0.06))  # anywhere in the iteration or in the checkpoint's write
        return arrived

    _kill_again_and_again(bed, tally, at_random, None)


def kills_while_saving(bed: Bed, tally: Tally) -> None:
    """kill -9 while a checkpoint is written, which takes a second here since every sync is slow."""

    def while_saving(trainee: Trainee, run: Path) -> bool:
        before = due(run, bed.save_every)
        step = before + bed.save_every * bed.random.randint(1, 2)
        aside = run / "checkpoints" / f".step-{step:08d}.partial"
        arrived = trainee.wait_for(lambda: aside.exists() or iteration(run) > step)
        time.sleep(bed.random.uniform(0, 0.8))
        return arrived and aside.exists()

    _kill_again_and_again(bed, tally, while_saving, ("slow-sync", "0.1"))


def _kill_again_and_again(
    bed: Bed, tally: Tally, moment: Callable[[Trainee, Path], bool], fault: tuple[str, str] | None
) -> None:
    """Start, wait for the moment (False: it was missed), kill, resume ...; a run that is done is followed by another."""
    config = bed.config("points", bed.steps)
    bed.begin_reference("points", bed.steps)
    for number in range(1 + bed.kills):
        run = bed.folder / f"{tally.fault}-{number}"
        with one_run(tally):
            resume = False
            before = 0
            while tally.injected < bed.kills:
                trainee = bed.start(config, run, resume=resume, fault=fault)
                resume = True
                hit = moment(trainee, run)
                over = trainee.process.poll() is not None
                trainee.kill()
                if over:
                    if trainee.process.returncode != 0:
                        raise Lost(f"it could not go on: {trainee.last_line()}")
                    break
                tally.injected += hit
                if "resumed at" in trainee.text():
                    tally.steps_lost += max(0, before - trainee.resumed_at())
                before = due(run, bed.save_every)
            bed.finish(config, run, bed.reference("points", bed.steps), tally)
        if tally.injected >= bed.kills:
            return


# ---------------------------------------------------------------- files


def broken_files(bed: Bed, tally: Tally) -> None:
    """Files of the newest checkpoint cut short, garbled, emptied or gone: the one before it takes over."""

    def cut(folder: Path) -> None:
        file = folder / "generator.safetensors"
        os.truncate(file, file.stat().st_size - 8)

    def garble(folder: Path) -> None:
        file = folder / "optimizer.fake_score.safetensors"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(content)

    def empty(folder: Path) -> None:
        (folder / "state.json").write_bytes(b"")

    def nonsense(folder: Path) -> None:
        (folder / "state.json").write_text('{"counters": 3')

    def remove(folder: Path) -> None:
        (folder / "rng.safetensors").unlink()

    config, reference = bed.config("points", bed.steps), bed.reference("points", bed.steps)
    for breakage in (cut, garble, empty, nonsense, remove)[: bed.kills]:
        run = bed.folder / f"{tally.fault}-{breakage.__name__}"
        with one_run(tally):
            shutil.copytree(reference, run)
            breakage(newest(run))
            tally.injected += 1
            bed.finish(config, run, reference, tally, reached=bed.steps - bed.save_every)


def full_disk(bed: Bed, tally: Tally) -> None:
    """A disk that fills while a run goes on and is freed again; and one that stays full until the end."""
    disk = bed.folder / "disk"
    disk.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "stepdistill-faults", str(disk)], capture_output=True
    )
    if made.returncode != 0:
        raise NotRun(f"a small disk could not be mounted ({made.stderr.decode().strip()})")
    try:
        for freed in (True, False):
            with one_run(tally):
                _on_a_full_disk(bed, tally, disk, disk / f"freed-{freed}", freed)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _on_a_full_disk(bed: Bed, tally: Tally, disk: Path, run: Path, freed: bool) -> None:
    config, reference, ballast = bed.config("points", bed.steps), bed.reference("points", bed.steps), disk / "ballast"
    trainee = bed.start(config, run, fault=SLOW)
    reached(trainee, bed.save_every + 2)
    try:
        _fill(ballast)
        tally.injected += 1
        if freed and not trainee.wait_for(lambda: "the checkpoint of iteration" in trainee.text()):
            raise Lost(f"it did not outlive the full disk: {trainee.last_line()}")
        code = None if freed else trainee.ended()
    finally:
        ballast.unlink()
    if code is None:
        if trainee.ended() != 0:
            raise Lost(f"it did not outlive the full disk: {trainee.last_line()}")
        compare(run, reference)
        return
    if code == 0:
        raise Lost("its last checkpoint could not be written and it ended as if all were well")
    if "Traceback" in trainee.text():
        raise Lost(f"it ended with a traceback and not with a sentence: {trainee.last_line()}")
    bed.finish(config, run, reference, tally, reached=bed.save_every)


def _fill(ballast: Path) -> None:
    with ballast.open("wb", buffering=0) as file:
        for block in (1 << 16, 1 << 12, 1):
            try:
                while file.write(b"\0" * block) == block:
                    pass
            except OSError:
                continue


def deleted_folder(bed: Bed, tally: Tally) -> None:
    """Someone deletes the run's folder: what was deleted is gone, the run goes on, its end is that of the unbroken one."""
    run = bed.folder / tally.fault
    config, reference = bed.config("points", bed.steps), bed.reference("points", bed.steps)
    with one_run(tally):
        trainee = bed.start(config, run, fault=SLOW)
        reached(trainee, bed.save_every + 2)
        while run.exists():  # a line may be written in between
            shutil.rmtree(run, ignore_errors=True)
            if not any(run.glob("*")):
                break
        tally.injected += 1
        if trainee.ended() != 0:
            raise Lost(f"it did not outlive its folder: {trainee.last_line()}")
        compare(run, reference, tail=True)
        if not (run / "config.yaml").exists():
            raise Lost("the folder has no config.yaml, so that it can be neither resumed nor exported")


# ---------------------------------------------------------------- signals


def sigterm(bed: Bed, tally: Tally) -> None:
    """SIGTERM: the iteration is finished and saved, exit 0, and the command that goes on is printed."""
    run = bed.folder / tally.fault
    config, reference = bed.config("points", bed.steps), bed.reference("points", bed.steps)
    with one_run(tally):
        trainee = bed.start(config, run, fault=SLOW)
        reached(trainee, bed.save_every + 2)
        trainee.send(signal.SIGTERM)
        tally.injected += 1
        if (code := trainee.ended()) != 0:
            raise Lost(f"SIGTERM ended it with {code}: {trainee.last_line()}")
        if "--resume latest" not in trainee.text():
            raise Lost("SIGTERM ended it and the way to go on was not printed")
        bed.finish(config, run, reference, tally, reached=iteration(run))


def two_sigints(bed: Bed, tally: Tally) -> None:
    """A second SIGINT does not wait for a long iteration."""
    run = bed.folder / tally.fault
    config, reference = bed.config("points", bed.steps), bed.reference("points", bed.steps)
    with one_run(tally):
        trainee = bed.start(config, run, fault=("slow-iteration", "60@7"))
        reached(trainee, 7)
        trainee.send(signal.SIGINT)
        if not trainee.wait_for(lambda: "once more stops at once" in trainee.text()):
            raise Lost(f"one SIGINT stopped it at once: {trainee.last_line()}")
        trainee.send(signal.SIGINT)
        tally.injected += 1
        if trainee.ended(patience=30) == 0:
            raise Lost("two SIGINTs ended it as if all were well")
        bed.finish(config, run, reference, tally)


# ---------------------------------------------------------------- parts that fail


def dead_reader(bed: Bed, tally: Tally) -> None:
    """A thread that reads images raises: an error, not a hang."""
    _raising(bed, tally, "images", ("bad-read", str(4 * 8 + 1)))


def _raising(bed: Bed, tally: Tally, kind: Kind, fault: tuple[str, str], steps: int = 12) -> None:
    run = bed.folder / tally.fault
    config, reference = bed.config(kind, steps), bed.reference(kind, steps)
    with one_run(tally):
        trainee = bed.start(config, run, fault=fault)
        tally.injected += 1
        if trainee.ended() == 0:
            raise Lost("it ended as if all were well")
        if "the reader died" not in trainee.text():
            raise Lost(f"it ended for another reason: {trainee.last_line()}")
        bed.finish(config, run, reference, tally)


def bad_tracker(bed: Bed, tally: Tally) -> None:
    """A tracker that raises at every line: named, and that is all."""
    run = bed.folder / tally.fault
    config, reference = bed.config("points", bed.steps, ["tensorboard"]), bed.reference("points", bed.steps)
    with one_run(tally):
        trainee = bed.start(config, run, fault=("bad-tracker", "tensorboard"))
        tally.injected += 1
        if trainee.ended() != 0:
            raise Lost(f"it did not outlive its tracker: {trainee.last_line()}")
        if "tracker" not in trainee.text():
            raise Lost("the tracker's failure was not named")
        compare(run, reference)


# ---------------------------------------------------------------- two ranks


def nan_on_one_rank(bed: Bed, tally: Tally) -> None:
    """A NaN on one rank of two: both skip the step, and end as if both had had it."""
    config, said, runs = bed.config("points", bed.steps), [], []
    with one_run(tally):
        for who in ("1", "all"):
            run = bed.folder / f"{tally.fault}-{who}"
            trainee = bed.start(config, run, ranks=2, fault=("nan", f"{who}@7"))
            tally.injected += who == "1"
            if trainee.ended() != 0:
                raise Lost(f"a NaN on rank {who} ended the run: {trainee.last_line()}")
            # a rank's line may stand behind a progress bar
            told = dict(re.findall(r"rank (\d) (skipped \d+ and holds [0-9a-f]{64})", trainee.text()))
            if sorted(told) != ["0", "1"] or any("skipped 1 " not in end for end in told.values()):
                raise Lost(f"not every rank skipped one step: {told}")
            said.append(set(told.values()))
            runs.append(run)
        if len(said[0]) != 1:
            raise Lost("the ranks hold different weights")
        compare(runs[0], runs[1])


def dead_rank(bed: Bed, tally: Tally) -> None:
    """kill -9 of one rank of two: the launcher ends with an error, and the run goes on from its checkpoint."""
    run = bed.folder / tally.fault
    config, reference = bed.config("points", bed.steps), bed.reference("points", bed.steps, ranks=2)
    with one_run(tally):
        trainee = bed.start(config, run, ranks=2, fault=SLOW)
        reached(trainee, bed.save_every + 2)
        os.kill(trainee.ranks()[1], signal.SIGKILL)
        tally.injected += 1
        if trainee.ended(PATIENCE / 2) == 0:
            raise Lost("a rank died and the run ended as if all were well")
        bed.finish(config, run, reference, tally, ranks=2)


FAULTS: Mapping[str, Callable[[Bed, Tally], None]] = {
    "kills": kills,
    "kills-while-saving": kills_while_saving,
    "broken-files": broken_files,
    "full-disk": full_disk,
    "nan-on-one-rank": nan_on_one_rank,
    "dead-reader": dead_reader,
    "dead-rank": dead_rank,
    "sigterm": sigterm,
    "two-sigints": two_sigints,
    "deleted-folder": deleted_folder,
    "bad-tracker": bad_tracker,
}
