"""Pictures of a run: fixed prompts and fixed noise, teacher above student."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from stepdistill.diffusion.draws import Draws
from stepdistill.models.conditioning import Conditioning, ImageSize
from stepdistill.models.sampler import student_sample, teacher_sample
from stepdistill.training.folder import grid_path
from stepdistill.training.session import Session


def student_latents(session: Session, role: str, cond: Conditioning, noise: Tensor, draws: Draws) -> Tensor:
    """Samples by the method's recipe with `role` (generator or EMA) as what is in training."""
    return student_sample(
        session.triple,
        session.method.experts(role, session.stage),
        session.recipe,
        cond,
        noise,
        lambda index: draws.normal(f"fresh{index}", noise.shape[1:]),
    )


class Grid:
    """Draws `grids/step-N.png`: the teacher's row, drawn once, above the student's.

    Args:
        session: the run's.
        folder: the run's; None draws and writes nothing, for processes that only have to take part.
        count: columns.
        guidance: scale w of the teacher.
    """

    def __init__(
        self, session: Session, folder: Path | None, count: int, guidance: float, teacher_steps: int = 25
    ) -> None:
        plan = session.plan
        self.session, self.folder = session, folder
        prompts = [plan.prompts[i % len(plan.prompts)] for i in range(count)]
        sizes = [ImageSize.plain(*plan.setting.size)] * count
        self.draws = Draws(plan.config.training.seed, 0, "grid", range(count), session.device, session.dtype)
        self.noise = self.draws.normal("noise", plan.setting.latent_shape)
        with torch.no_grad():
            self.cond, self.null = session.encoder.text(prompts, sizes), session.encoder.null(sizes)
        self.teacher_steps, self.guidance = teacher_steps, guidance

    @cached_property
    def teacher(self) -> Tensor:
        """The teacher's row, (N, 3, H, W) in [0, 1]; drawn when the first picture is wanted."""
        session = self.session
        with torch.no_grad():
            return self._decoded(
                teacher_sample(
                    session.triple.real_score, self.cond, self.null, self.noise, self.teacher_steps, self.guidance
                )
            )

    @torch.no_grad()
    def draw(self, iteration: int) -> None:
        """Draw the current student. Raises OSError where the disk refuses the picture."""
        latents = student_latents(self.session, self.session.student, self.cond, self.noise, self.draws)
        student, teacher = self._decoded(latents), self.teacher
        if self.folder is not None:
            path = grid_path(self.folder, iteration)
            path.parent.mkdir(parents=True, exist_ok=True)
            tile([teacher, student]).save(path)

    def _decoded(self, latents: Tensor) -> Tensor:
        rows = [self.session.plan.family.decode(self.session.checkpoint, latent[None]) for latent in latents]
        return torch.cat(rows).float().cpu()


def save_images(images: NDArray[np.uint8], folder: Path, start: int = 0) -> list[Path]:
    """Write uint8 images (N, H, W, 3) as START.png, START + 1.png, ... and return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{start + index:05d}.png" for index in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    return paths


def as_floats(images: NDArray[np.uint8]) -> Tensor:
    """uint8 (N, H, W, 3) -> (N, 3, H, W) in [0, 1], as `tile` takes them."""
    return torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float() / 255


def tile(rows: list[Tensor], gap: int = 2) -> Image.Image:
    """Rows of images (N, 3, H, W) in [0, 1] as one picture, white between them."""
    height, width = rows[0].shape[-2:]
    columns = max(len(row) for row in rows)
    canvas = np.full((len(rows) * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            top, left = r * (height + gap), c * (width + gap)
            canvas[top : top + height, left : left + width] = pixels
    return Image.fromarray(canvas)
