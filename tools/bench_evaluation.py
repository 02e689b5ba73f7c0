"""What measuring costs beside the feature network, as ratios within one run.

    python tools/bench_evaluation.py [--json FILE]

memory      peak of the streaming path at 50,000 synthetic images over that at 1,000, each in its own process
statistics  time of gathering mean and covariance of 2048 features over the Inception's own time (random weights)
torchmetrics   its time over ours for the same 2048 features, gathering and final distance included
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from stepdistill.evaluation.images import ImageArray
from stepdistill.evaluation.measure import measure_images
from stepdistill.evaluation.metrics.frechet import frechet_between
from stepdistill.evaluation.metrics.statistics import FeatureStatistics
from stepdistill.evaluation.networks.features import FEATURE_BATCH_SIZE, FeatureExtractor, FeatureRecord
from stepdistill.evaluation.networks.inception import inception_layers

WIDTH = 2048


def synthetic(count: int) -> Iterator[ImageArray]:
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)


def peak_memory(count: int, answer: multiprocessing.Queue[float]) -> None:
    """MB of this process after `count` images."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(3072, WIDTH)).requires_grad_(False)

    def prepare(image: ImageArray) -> torch.Tensor:
        return torch.from_numpy(image).permute(2, 0, 1).float()

    extractor = FeatureExtractor(FeatureRecord("linear", "", ""), prepare, network)
    measure_images(synthetic(count), extractor, keep_features=False, appearance_sums=True)
    answer.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def in_own_process(count: int) -> float:
    context = multiprocessing.get_context("spawn")
    answer: multiprocessing.Queue[float] = context.Queue()
    process = context.Process(target=peak_memory, args=(count, answer))
    process.start()
    process.join()
    return answer.get()


def statistics_share(batches: int = 6) -> float:
    """Seconds of gathering over seconds of the network, for the same batches."""
    network = inception_layers().eval().requires_grad_(False)
    x = torch.rand(FEATURE_BATCH_SIZE, 3, 299, 299)
    gathered = FeatureStatistics(WIDTH)
    gathered.update(np.zeros((FEATURE_BATCH_SIZE, WIDTH), np.float32))
    spent = [0.0, 0.0]
    with torch.inference_mode():
        network(x)
        for _ in range(batches):
            began = time.perf_counter()
            features = network(x).numpy()
            middle = time.perf_counter()
            gathered.update(features)
            spent[0] += middle - began
            spent[1] += time.perf_counter() - middle
    return spent[1] / spent[0]


class Identity(nn.Module):
    """Features come in as they are, so that nothing but the metric is timed."""

    num_features = WIDTH

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def against_torchmetrics(batches: int = 40) -> float:
    """torchmetrics' seconds over ours."""
    stream = torch.Generator().manual_seed(0)
    features = [torch.randn(FEATURE_BATCH_SIZE, WIDTH, generator=stream) for _ in range(2 * batches)]
    began = time.perf_counter()
    metric = FrechetInceptionDistance(feature=Identity())
    for index, batch in enumerate(features):
        metric.update(batch, real=index < batches)
    theirs_value = float(metric.compute())
    middle = time.perf_counter()
    arrays = [batch.numpy() for batch in features]
    first, second = FeatureStatistics.from_batches(arrays[:batches]), FeatureStatistics.from_batches(arrays[batches:])
    if first is None or second is None:
        raise RuntimeError("no features came")
    ours_value = frechet_between(first, second)
    ended = time.perf_counter()
    if abs(ours_value - theirs_value) > 1e-3 * theirs_value:
        raise RuntimeError(f"the values differ: {ours_value} and {theirs_value}")
    return (middle - began) / (ended - middle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--images", type=int, nargs=2, default=[1000, 50_000])
    options = parser.parse_args()
    few, many = (in_own_process(count) for count in options.images)
    result = {
        "images": options.images,
        "peak_mb": [few, many],
        "memory_ratio": many / few,
        "statistics_over_network": statistics_share(),
        "torchmetrics_over_ours": against_torchmetrics(),
    }
    print(json.dumps(result, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
