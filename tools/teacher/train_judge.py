"""Trains the judge on the first 30,000 photographs and writes stepdistill/assets/judge.safetensors.

PYTHONPATH=. python tools/teacher/train_judge.py --data fashion-mnist.npz --runs runs --threads 1
"""

from __future__ import annotations

import common
import numpy as np
import torch
from torch.nn import functional as F

from stepdistill.evaluation.judge import Judge


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
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02)
    checkpoint = options.runs / "judge.safetensors"
    start = common.load_checkpoint(checkpoint, {"judge": judge}, {"adamw": optimizer})
    for step in range(start, options.steps):
        rng = common.step_rng(options.seed, step)
        rate = 2e-3 * min(1.0, (step + 1) / 100) * 0.5 * (1.0 + np.cos(np.pi * step / options.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        # The judge knows the held-out pairs: it must be a fair judge of composition.
        rows = rng.integers(len(photographs), size=options.batch)
        batch = common.render_random(photographs, rows, rng, held_out_pairs=True)
        loss = judge_loss(judge, batch, common.step_torch_rng(options.seed, step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (step + 1) % 400 == 0 or step + 1 == options.steps:
            judge.eval()
            common.log.info("step %d loss %.4f held-out %s", step + 1, loss.item(), accuracy(judge, held_out, 5))
            judge.train()
            common.save_checkpoint(checkpoint, {"judge": judge}, {"adamw": optimizer}, step + 1)
    common.save_tensors(common.ASSETS / "judge.safetensors", judge.eval().state_dict())


if __name__ == "__main__":
    main()
