"""Faults against real `stepdistill train` processes, and what is left of the runs (Linux).

    python tools/fault_campaign.py --kills 20 --json tools/results/fault_campaign.json

After each fault the run is resumed with `--resume latest`; its last checkpoint and stats.jsonl must be those of an
unbroken run, byte for byte. Runs are small: two-dimensional mixtures in float64, a tiny Stable Diffusion where images
are read. `--kills` is how often the faults that come at random moments are made. A fault that this machine cannot make
(a small disk takes the right to mount one) counts as not run, and never as passed.

Target: no run lost, no iteration done again that a checkpoint had been written of. Exit code 1 where it is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from faultbed import Bed, Lost, NotRun, Tally
from faultlist import FAULTS


def campaign(names: list[str], kills: int, seed: int, folder: Path) -> list[Tally]:
    """Make each fault; the same seed makes the same random choices."""
    bed = Bed(folder, kills, seed)
    tallies = []
    for name in names:
        tally, began = Tally(name), time.monotonic()
        try:
            FAULTS[name](bed, tally)
        except NotRun as reason:
            tally.ran = False
            tally.remarks.append(str(reason))
        except Lost as lost:  # the unbroken run itself
            tally.runs_lost += 1
            tally.remarks.append(str(lost))
        tally.seconds = round(time.monotonic() - began, 1)
        tallies.append(tally)
        print(f"{name}: {tally.verdict} after {tally.seconds:.0f} s", file=sys.stderr, flush=True)
    return tallies


def table(tallies: list[Tally]) -> str:
    rows = [("fault", "injected", "runs lost", "steps lost", "seconds", "")]
    rows += [
        (t.fault, str(t.injected), str(t.runs_lost), str(t.steps_lost), f"{t.seconds:.0f}", t.verdict) for t in tallies
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(text + [f"{t.fault}: {remark}" for t in tallies for remark in t.remarks])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="times that kill -9 falls, at random and while saving")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--only", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--keep", type=Path, help="new folder in which everything stays to be looked at")
    parser.add_argument("--json", type=Path, help="where the counts go; printed in any case")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        tallies = campaign(options.only, options.kills, options.seed, folder.resolve())
    print(table(tallies))
    if options.json is not None:
        report = {
            "kills": options.kills,
            "seed": options.seed,
            "torch_version": torch.__version__,
            "faults": [{**asdict(tally), "verdict": tally.verdict} for tally in tallies],
            "injected": sum(tally.injected for tally in tallies),
            "runs_lost": sum(tally.runs_lost for tally in tallies),
            "steps_lost": sum(tally.steps_lost for tally in tallies),
            "not_run": [tally.fault for tally in tallies if not tally.ran],
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(any(tally.verdict == "failed" for tally in tallies))


if __name__ == "__main__":
    main()
