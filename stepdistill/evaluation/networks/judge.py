"""The judge: a small network that recognises garment, colour and background, and whose features measure distances.

It is for evaluation only. No training code may import it, because a student trained on it would be measured by its own reward.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn

from stepdistill.data.fashion import BACKGROUNDS, COLOURS, GARMENTS

FEATURE_DIM = 64


@dataclass(frozen=True)
class Predictions:
    """Recognised attributes as indices into the vocabulary, each (N,)."""

    garment: NDArray[np.int64]
    colour: NDArray[np.int64]
    background: NDArray[np.int64]


@dataclass(frozen=True)
class JudgeOutputs:
    """All outputs that the judge is trained on: logits of three attributes, and two RGB colours in [0, 1]."""

    garment: torch.Tensor  # (B, 10)
    colour: torch.Tensor  # (B, 8)
    background: torch.Tensor  # (B, 7)
    garment_rgb: torch.Tensor  # (B, 3)
    background_rgb: torch.Tensor  # (B, 3)


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class Judge(nn.Module):
    """A plain convolutional network, 32x32 RGB -> 64 features -> five linear heads."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            _stage(3, 16, 1), _stage(16, 32, 2), _stage(32, 32, 1), _stage(32, 64, 2), _stage(64, 64, 1),
            _stage(64, 128, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, FEATURE_DIM),
        )  # fmt: skip
        self.garment = nn.Linear(FEATURE_DIM, len(GARMENTS))
        self.colour = nn.Linear(FEATURE_DIM, len(COLOURS))
        self.background = nn.Linear(FEATURE_DIM, len(BACKGROUNDS))
        # Predicting the colours themselves makes the features depend on saturation, which class labels do not.
        self.garment_rgb = nn.Linear(FEATURE_DIM, 3)
        self.background_rgb = nn.Linear(FEATURE_DIM, 3)

    @classmethod
    def load(cls, path: str | Path) -> Judge:
        """Loads the frozen judge from a safetensors file."""
        judge = cls()
        judge.load_state_dict(load_file(path))
        return judge.eval().requires_grad_(False)

    def forward(self, images: torch.Tensor) -> JudgeOutputs:
        """Computes all outputs for ``images`` (B, 3, 32, 32) in [-1, 1]."""
        features = self.trunk(images)
        return JudgeOutputs(
            self.garment(features),
            self.colour(features),
            self.background(features),
            self.garment_rgb(features),
            self.background_rgb(features),
        )

    @torch.no_grad()
    def features(self, images: NDArray[np.uint8] | torch.Tensor, batch_size: int = 250) -> NDArray[np.float32]:
        """Computes features (N, 64) of ``images``: uint8 (N, 32, 32, 3), or float (N, 3, 32, 32) in [-1, 1]."""
        parts = [self.trunk(batch) for batch in torch.split(_as_input(images), batch_size)]
        return torch.cat(parts).cpu().numpy()

    @torch.no_grad()
    def predict(self, images: NDArray[np.uint8] | torch.Tensor, batch_size: int = 250) -> Predictions:
        """Recognises the attributes in ``images``, which have one of the forms of :meth:`features`."""
        outputs = [self(batch) for batch in torch.split(_as_input(images), batch_size)]
        return Predictions(
            torch.cat([output.garment.argmax(1) for output in outputs]).cpu().numpy(),
            torch.cat([output.colour.argmax(1) for output in outputs]).cpu().numpy(),
            torch.cat([output.background.argmax(1) for output in outputs]).cpu().numpy(),
        )


def _as_input(images: NDArray[np.uint8] | torch.Tensor) -> torch.Tensor:
    """Converts either accepted form of ``images`` to float (N, 3, 32, 32) in [-1, 1]."""
    tensor = torch.from_numpy(np.ascontiguousarray(images)) if isinstance(images, np.ndarray) else images
    if tensor.dtype == torch.uint8 and tensor.ndim == 4 and tensor.shape[-1] == 3:
        return tensor.permute(0, 3, 1, 2).float() / 127.5 - 1.0
    if tensor.is_floating_point() and tensor.ndim == 4 and tensor.shape[1] == 3:
        # float images are rounded to 8 bits, so that distances do not depend on whether the images were stored
        return ((tensor.float() + 1.0) * 127.5).round().clamp(0.0, 255.0) / 127.5 - 1.0
    raise ValueError(
        f"the judge got images of shape {tuple(tensor.shape)} and type {tensor.dtype}; "
        "give it uint8 (N, 32, 32, 3) or float (N, 3, 32, 32) in [-1, 1]"
    )
