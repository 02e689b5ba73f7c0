"""Writes coloured training photographs with captions, as an image folder: what GAN terms and consistency methods call images.

PYTHONPATH=. python tools/teacher/write_images.py --data fashion-mnist.npz --runs runs --output data/fashion_images
"""

from __future__ import annotations

from pathlib import Path

import common
import numpy as np
from PIL import Image

from stepdistill.data import fashion


def main() -> None:
    parser = common.arguments(__doc__, seed=505)
    parser.add_argument("--count", type=int, default=4096)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    common.begin(options)
    photographs = common.load_photographs(options.data, common.TRAINING)
    rng = common.step_rng(options.seed, 0)
    rows = rng.choice(len(photographs), options.count, replace=False)
    batch = common.render_random(photographs, rows, rng)
    options.output.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(batch.images):
        Image.fromarray(np.ascontiguousarray(image)).save(options.output / f"{i:05d}.png")
        (options.output / f"{i:05d}.txt").write_text(fashion.caption(batch.attributes(i), rng) + "\n")
    common.log.info("%d images in %s", options.count, options.output)


if __name__ == "__main__":
    main()
