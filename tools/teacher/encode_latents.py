"""Encodes several renderings of each training photograph: latents.safetensors and latents.json in the runs folder.

PYTHONPATH=. python tools/teacher/encode_latents.py --data fashion-mnist.npz --runs runs

The autoencoder is that of the runs folder, or the embedded teacher's where there is none.
"""

from __future__ import annotations

from pathlib import Path

import common
import networks
import numpy as np
import torch
from diffusers import AutoencoderKL


def load_autoencoder(runs: Path) -> AutoencoderKL:
    """The one trained in `runs`, or the embedded teacher's."""
    checkpoint = runs / "autoencoder_both_ema.safetensors"
    if not checkpoint.exists():
        return AutoencoderKL.from_pretrained(common.ASSETS / "teacher", subfolder="vae", torch_dtype=torch.float32)
    autoencoder = networks.build_autoencoder()
    common.load_checkpoint(checkpoint, {"autoencoder": autoencoder}, {})
    return autoencoder


@torch.no_grad()
def main() -> None:
    parser = common.arguments(__doc__, seed=404)
    parser.add_argument("--renderings", type=int, default=2)
    options = parser.parse_args()
    common.begin(options)
    photographs = common.load_photographs(options.data, common.TRAINING)
    autoencoder = load_autoencoder(options.runs).eval()
    means, stds, attributes = [], [], []
    for rendering in range(options.renderings):
        for first in range(0, len(photographs), 500):
            rng = common.step_rng(options.seed + rendering, first)
            batch = common.render_random(photographs, np.arange(first, min(first + 500, len(photographs))), rng)
            for images in common.to_tensor(batch.images).split(100):
                posterior = autoencoder.encode(images).latent_dist
                means.append(posterior.mean.half())
                stds.append(posterior.std.half())
            attributes.append(np.stack([batch.garment, batch.colour, batch.background], axis=1).astype(np.uint8))
        common.log.info("rendering %d of %d encoded", rendering + 1, options.renderings)
    mean, std = torch.cat(means), torch.cat(stds)
    variance = mean.float().var().item() + std.float().square().mean().item()
    common.write_json(options.runs / "latents.json", {"scaling_factor": variance**-0.5})
    common.save_tensors(
        options.runs / "latents.safetensors",
        {"mean": mean, "std": std, "attributes": torch.from_numpy(np.concatenate(attributes))},
    )
    common.log.info("latent variance %.4f, posterior std %.4f", variance, std.float().mean().item())


if __name__ == "__main__":
    main()
