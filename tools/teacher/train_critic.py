"""Trains the critic on the other 30,000 photographs and writes stepdistill/assets/critic.safetensors.

PYTHONPATH=. python tools/teacher/train_critic.py --data fashion-mnist.npz --runs runs --threads 1
"""

from __future__ import annotations

import common
import numpy as np
import torch
from torch.nn import functional as F

from stepdistill.frozen.critic import Critic


def critic_loss(critic: Critic, batch: common.RenderedBatch, noise: torch.Generator) -> torch.Tensor:
    """Cross-entropies of the three attributes under noise of a random level, so that gradients stay smooth."""
    images = common.to_tensor(batch.images)
    level = 0.15 * torch.rand(len(images), 1, 1, 1, generator=noise)
    seen = critic(images + level * torch.randn(images.shape, generator=noise))
    return (
        F.cross_entropy(seen.garment, torch.from_numpy(batch.garment))
        + 0.5 * F.cross_entropy(seen.colour, torch.from_numpy(batch.colour))
        + 0.5 * F.cross_entropy(seen.background, torch.from_numpy(batch.background))
    )


@torch.no_grad()
def accuracy(critic: Critic, photographs: common.Photographs, seed: int) -> dict[str, float]:
    """Share of held-out photographs whose attribute is seen rightly."""
    batch = common.render_random(photographs, np.arange(len(photographs)), common.step_rng(seed, 0))
    outputs = [critic(part) for part in common.to_tensor(batch.images).split(250)]
    truth = {"garment": batch.garment, "colour": batch.colour, "background": batch.background}
    seen = {
        "garment": torch.cat([output.garment.argmax(1) for output in outputs]),
        "colour": torch.cat([output.colour.argmax(1) for output in outputs]),
        "background": torch.cat([output.background.argmax(1) for output in outputs]),
    }
    return {name: float((seen[name].numpy() == truth[name]).mean()) for name in truth}


def main() -> None:
    parser = common.arguments(__doc__, seed=202)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args()
    common.begin(options)
    torch.manual_seed(options.seed)
    photographs = common.load_photographs(options.data, common.CRITIC_HALF)
    held_out = common.load_photographs(options.data, common.HELD_OUT)
    critic = Critic()

    def loss_of(rng: np.random.Generator, torch_rng: torch.Generator) -> torch.Tensor:
        batch = common.render_random(photographs, rng.integers(len(photographs), size=options.batch), rng)
        return critic_loss(critic, batch, torch_rng)

    common.fit(critic, "critic", options, loss_of, lambda: accuracy(critic, held_out, 5))


if __name__ == "__main__":
    main()
