"""Measure the teacher's row of the quickstart table and ship it; the flow-matching teacher's, of the comparisons.

    python tools/teacher/teacher_row.py [--flow] [GUIDANCE ...]      writes stepdistill/assets/[flow_]teacher_row.json

One row per guidance scale: 50 DDIM (Euler) steps, the prompts and seeds of the `fashion` protocol. `stepdistill quickstart
--remeasure` draws the first one's row afresh.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from countedzeros import count_zeros

from stepdistill.api.quickstart import TEACHER_ROW, Bench, teacher_row
from stepdistill.assets import FLOW_TEACHER, FOLDER, TEACHER, resolve
from stepdistill.config.schema import load_config
from stepdistill.evaluation.fashion import FashionScorer, evaluation_set
from stepdistill.families.sd3 import T5_TOKENS
from stepdistill.files.atomic import write_atomically
from stepdistill.inference.artifact import load_artifact


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flow", action="store_true")
    parser.add_argument("scales", nargs="*", type=float)
    options = parser.parse_args()
    default = load_config(FOLDER / "quickstart.yaml").method_options["guidance"]
    pipeline = load_artifact(resolve(FLOW_TEACHER if options.flow else TEACHER), None, torch.float32, "cpu").pipeline
    if options.flow:
        count_zeros(pipeline.transformer, T5_TOKENS)
    prompts, seeds = evaluation_set()
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(pipeline, prompts, seeds, FashionScorer(), Path(folder))
        for scale in options.scales or [float(default)]:
            rows[f"{scale:g}"] = asdict(teacher_row(bench, scale))
            print(scale, rows[f"{scale:g}"])
    file = FOLDER / "flow_teacher_row.json" if options.flow else TEACHER_ROW
    write_atomically(file, (json.dumps(rows, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
