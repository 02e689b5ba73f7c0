"""How pictures look as a whole: colour, light, sharpness. RGB images (N, H, W, 3), uint8 or floats of the same range, 0 to 255."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
"""Rec. 601."""


def saturation(images: NDArray[Any]) -> float:
    """Mean HSV saturation (max - min) / max over all pixels; black counts as 0."""
    x = _floats(images)
    highest = x.max(axis=-1)
    return float(np.mean((highest - x.min(axis=-1)) / np.maximum(highest, 1.0)))


def brightness(images: NDArray[Any]) -> float:
    """Mean luma in [0, 1]."""
    return float((_floats(images) @ _LUMA).mean() / 255.0)


def sharpness(images: NDArray[Any]) -> float:
    """Root mean square of the luma's 4-neighbour Laplacian, in [0, 8]: falls with blur, rises with noise and halos."""
    luma = _floats(images) @ _LUMA / 255.0
    inner = luma[:, 1:-1, 1:-1]
    laplacian = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:] - 4.0 * inner
    return float(np.sqrt(np.square(laplacian).mean()))


def _floats(images: NDArray[Any]) -> NDArray[np.floating]:
    """float32 of bytes, floats as they are."""
    return images.astype(np.result_type(images.dtype, np.float32))
