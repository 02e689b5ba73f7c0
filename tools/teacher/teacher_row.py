"""Measure the teacher's row of the quickstart table and ship it.

    python tools/teacher/teacher_row.py [GUIDANCE ...]      writes stepdistill/assets/teacher_row.json

One row per guidance scale: 50 DDIM steps, the prompts and seeds of the `fashion` protocol. `stepdistill quickstart
--remeasure` draws the same row afresh.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from stepdistill.assets import TEACHER, resolve
from stepdistill.config import load_config
from stepdistill.data.tensors import write_atomically
from stepdistill.demo import FOLDER, TEACHER_ROW, Bench, teacher_row
from stepdistill.evaluation.fashion import Scorer, evaluation_set
from stepdistill.exporting.artefact import load_artefact


def main() -> None:
    default = load_config(FOLDER / "quickstart.yaml").method_options["guidance"]
    scales = [float(word) for word in sys.argv[1:]] or [float(default)]
    pipeline = load_artefact(resolve(TEACHER), None, torch.float32, "cpu").pipeline
    prompts, seeds = evaluation_set()
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(pipeline, prompts, seeds, Scorer(), Path(folder))
        for scale in scales:
            rows[f"{scale:g}"] = asdict(teacher_row(bench, scale))
            print(scale, rows[f"{scale:g}"])
    write_atomically(TEACHER_ROW, (json.dumps(rows, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
