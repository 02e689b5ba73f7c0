"""LPIPS (Zhang et al., CVPR 2018) between images of one prompt: the diversity that DMD2 and others report.

Network and linear layers are torchmetrics'; the backbone's ImageNet weights come from torch's hub cache. The network expects
[-1, 1]. With [0, 1] it gives numbers on another scale, which some publications report, so the range must always be stated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Literal

import torch

from stepdistill.errors import UserError
from stepdistill.evaluation.images import ImageArray, ValueRange
from stepdistill.evaluation.metrics.diversity import prompt_groups

Backbone = Literal["alex", "vgg", "squeeze"]
BACKBONES: dict[str, str] = {
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}
"""File names in torch's hub cache."""


class Lpips:
    """The LPIPS distance with one backbone.

    Raises:
        UserError: unknown backbone, torchmetrics or torchvision missing, or weights that are not here and may not be fetched.
    """

    def __init__(self, backbone: str = "alex", device: torch.device | str = "cpu", *, download: bool = False) -> None:
        if backbone not in BACKBONES:
            raise UserError(f"the LPIPS backbone {backbone!r} is not known: use one of {', '.join(BACKBONES)}")
        file = Path(torch.hub.get_dir()) / "checkpoints" / BACKBONES[backbone]
        if not file.is_file() and not download:
            raise UserError(
                f"LPIPS needs {file.name!r} and downloading is off: put it into {str(file.parent)!r}, or give --download"
            )
        try:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            self._metric = LearnedPerceptualImagePatchSimilarity(net_type=backbone, normalize=False).to(device)  # type: ignore[arg-type]
        except ImportError as error:
            raise UserError(
                f"LPIPS needs torchmetrics and torchvision ({error}): pip install torchmetrics torchvision"
            ) from None
        self.name, self.device = f"lpips[{backbone}]", torch.device(device)

    @torch.inference_mode()
    def mean(
        self, first: torch.Tensor, second: torch.Tensor, *, value_range: ValueRange, batch_size: int = 32
    ) -> float:
        """Computes the mean distance of pairs of images (N, 3, H, W), floats in `value_range`.

        Raises:
            ValueError: values outside the range.
        """
        low, high = value_range
        for images in (first, second):
            if float(images.min()) < low - 1e-6 or float(images.max()) > high + 1e-6:
                found = f"[{float(images.min()):.3g}, {float(images.max()):.3g}]"
                raise ValueError(
                    f"images lie in {found} and were said to lie in [{low:g}, {high:g}]: state the true range"
                )
        self._metric.reset()
        for start in range(0, len(first), batch_size):
            a, b = (2 * (x[start : start + batch_size].float() - low) / (high - low) - 1 for x in (first, second))
            self._metric.update(a.clamp(-1, 1).to(self.device), b.clamp(-1, 1).to(self.device))
        return float(self._metric.compute())

    def diversity(
        self, images_at: Callable[[Sequence[int]], Sequence[ImageArray]], prompts: Sequence[str]
    ) -> float | None:
        """Computes the mean distance over all pairs of images of one prompt; None if no prompt has two images.

        Args:
            images_at: global indices -> images; it is called for one prompt at a time.
            prompts: of all images, by global index.
        """
        total, count = 0.0, 0
        for rows in prompt_groups(prompts):
            images = (
                torch.stack([torch.from_numpy(image.copy()) for image in images_at(rows)]).permute(0, 3, 1, 2).float()
            )
            pairs = list(combinations(range(len(rows)), 2))
            first, second = images[[a for a, _ in pairs]], images[[b for _, b in pairs]]
            total += len(pairs) * self.mean(first, second, value_range=(0, 255))
            count += len(pairs)
        return total / count if count else None
