"""One of several processes that run jobs one after the other: `torchrun worker.py JOBS.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from stepdistill.config import load_config
from stepdistill.training.run import train

if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        train(load_config(job["config"]), job["output"], job["resume"])
    torch.distributed.destroy_process_group()
