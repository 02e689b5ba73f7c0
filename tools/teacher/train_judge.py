"""Trains the judge on the first 30,000 photographs and writes stepdistill/assets/judge.safetensors.

PYTHONPATH=. python tools/teacher/train_judge.py --data fashion-mnist.npz --runs runs --threads 1
"""

from __future__ import annotations

import common
import numpy as np
import torch
from torch.nn import functional as F

from stepdistill.evaluation.networks.judge import Judge


def judge_loss(judge: Judge, batch: common.RenderedBatch, noise: torch.Generator) -> torch.Tensor:
    """Cross-entropies of the attributes plus the squared errors of the two colours."""
    images = common.to_tensor(batch.images)
    # Noise below one visible level keeps the features off the exact pixel values, which no decoder reproduces.
    images = images + 0.03 * torch.randn(images.shape, generator=noise)
    seen = judge(images)
    classes = (
        F.cross_entropy(seen.garment, torch.from_numpy(batch.garment), label_smoothing=0.05)
        + 0.5 * F.cross_entropy(seen.colour, torch.from_numpy(batch.colour), label_smoothing=0.05)
        + 0.5 * F.cross_entropy(seen.background, torch.from_numpy(batch.background), label_smoothing=0.05)
    )
    colours = F.mse_loss(seen.garment_rgb, torch.from_numpy(batch.garment_rgb)) + F.mse_loss(
        seen.background_rgb, torch.from_numpy(batch.background_rgb)
    )
    return classes + 5.0 * colours


def accuracy(judge: Judge, photographs: common.Photographs, seed: int) -> dict[str, float]:
    """Share of held-out photographs whose attribute is seen rightly."""
    batch = common.render_random(photographs, np.arange(len(photographs)), common.step_rng(seed, 0))
    seen = judge.predict(batch.images)
    return {
        "garment": float((seen.garment == batch.garment).mean()),
        "colour": float((seen.colour == batch.colour).mean()),
        "background": float((seen.background == batch.background).mean()),
    }


def main() -> None:
    parser = common.arguments(__doc__, seed=101)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args()
    common.begin(options)
    torch.manual_seed(options.seed)
    photographs = common.load_photographs(options.data, common.JUDGE_HALF)
    held_out = common.load_photographs(options.data, common.HELD_OUT)
    judge = Judge()

    def loss_of(rng: np.random.Generator, torch_rng: torch.Generator) -> torch.Tensor:
        # The judge knows the held-out pairs: it must be a fair judge of composition.
        rows = rng.integers(len(photographs), size=options.batch)
        batch = common.render_random(photographs, rows, rng, held_out_pairs=True)
        return judge_loss(judge, batch, torch_rng)

    common.fit(judge, "judge", options, loss_of, lambda: accuracy(judge, held_out, 5))


if __name__ == "__main__":
    main()
