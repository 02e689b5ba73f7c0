"""The three ways of resizing an image to 299 x 299 for the 2015 Inception. They give three different values of the FID.

clean              PIL bicubic with antialias, channel by channel in float (clean-fid; Parmar et al., CVPR 2022)
legacy_pytorch     bilinear, no antialias, half-pixel centres (pytorch-fid)
legacy_tensorflow  TensorFlow 1's bilinear: no antialias, corner-aligned origin (the original, torch-fidelity, torchmetrics
                   with antialias=False)
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from stepdistill.evaluation.images import ImageArray

INCEPTION_SIZE = 299
ResizeMode = Literal["clean", "legacy_pytorch", "legacy_tensorflow"]
RESIZE_MODES: tuple[ResizeMode, ...] = ("clean", "legacy_pytorch", "legacy_tensorflow")


def resize_for_inception(image: ImageArray, mode: ResizeMode) -> torch.Tensor:
    """Resizes a uint8 image (H, W, 3) to float32 (3, 299, 299) in [0, 255], without rounding."""
    if mode == "clean":
        channels = [Image.fromarray(image[:, :, c].astype(np.float32)) for c in range(3)]
        resized = [
            np.asarray(channel.resize((INCEPTION_SIZE, INCEPTION_SIZE), Image.Resampling.BICUBIC))
            for channel in channels
        ]
        return torch.from_numpy(np.stack(resized).clip(0.0, 255.0))
    x = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float()
    if mode == "legacy_pytorch":
        return F.interpolate(x, size=(INCEPTION_SIZE, INCEPTION_SIZE), mode="bilinear", align_corners=False)[0].clamp(
            0.0, 255.0
        )
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    return interpolate_bilinear_2d_like_tensorflow1x(x, size=(INCEPTION_SIZE, INCEPTION_SIZE), align_corners=False)[0]  # type: ignore[no-any-return]


def normalize_for_inception(x: torch.Tensor, mode: ResizeMode) -> torch.Tensor:
    """Maps [0, 255] to the network's input: x / 127.5 - 1 in pytorch-fid, (x - 128) / 128 in the original graph."""
    return x / 127.5 - 1.0 if mode == "legacy_pytorch" else (x - 128.0) / 128.0
