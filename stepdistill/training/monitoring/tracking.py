"""What a run says of itself: a live bar, `stats.jsonl` always, trackers when asked for."""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from stepdistill.training.run_folder.logs import SPEED, STATS, JsonLinesFile

logger = logging.getLogger(__name__)


class Tracker:
    """Logs of one run.

    `stats.jsonl` holds what a run computed, `speed.jsonl` what the machine took for it: the first is the same for a
    broken and an unbroken run, the second cannot be.

    Args:
        folder: the run's.
        total: last iteration.
        start: iterations done before this process.
        accelerator: logs to TensorBoard, W&B or trackio where they were asked for.
    """

    def __init__(self, folder: Path, total: int, start: int, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.is_main_process = accelerator.is_main_process
        self.stats, self.speed = JsonLinesFile(folder / STATS), JsonLinesFile(folder / SPEED)
        self.bar = tqdm(total=total, initial=start, disable=not self.is_main_process, unit="it", dynamic_ncols=True)
        self.interval_start = time.perf_counter()
        self.images = 0

    def advance(self, images: int) -> None:
        self.bar.update()
        self.images += images

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        """Write one line; a tracker that throws is named once a line and never stops the run."""
        seconds = time.perf_counter() - self.interval_start
        throughput = {
            "images_per_second": self.images / max(seconds, 1e-9),
            "peak_memory_gb": peak_memory_gb(self.accelerator.device),
        }
        self.interval_start, self.images = time.perf_counter(), 0
        if not self.is_main_process:
            return
        self.speed.append(iteration, throughput)
        losses = {key: f"{value:.3g}" for key, value in values.items() if key.endswith("/loss")}
        self.bar.set_postfix(
            {**losses, "img/s": f"{throughput['images_per_second']:.1f}", "GB": f"{throughput['peak_memory_gb']:.1f}"}
        )
        self._write(iteration, values, throughput)

    def log_evaluation(self, iteration: int, values: Mapping[str, float]) -> None:
        """Write a line of what was measured between iterations; the time it took is nobody's pace."""
        self.interval_start, self.images = time.perf_counter(), 0
        if self.is_main_process:
            self._write(iteration, values, {})

    def _write(self, iteration: int, values: Mapping[str, float], throughput: Mapping[str, float]) -> None:
        self.stats.append(iteration, values)
        try:
            self.accelerator.log({**values, **throughput}, step=iteration)
        except Exception as error:  # third-party code: whatever it raises, the run is worth more than its plot
            logger.warning(
                "a tracker failed at iteration %d (%s); training goes on, stats.jsonl has the line", iteration, error
            )

    def close(self) -> None:
        self.bar.close()
        for tracker in self.accelerator.trackers:  # not `end_training`, which ends the group of processes as well
            try:
                tracker.finish()
            except Exception as error:
                logger.warning("a tracker failed to close (%s)", error)


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory in GB (1e9 bytes): allocated on a CUDA device, else resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9
