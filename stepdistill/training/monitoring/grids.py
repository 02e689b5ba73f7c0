"""Pictures of a run, and what they show: fixed prompts and fixed noise, teacher, student and scores."""

from __future__ import annotations

import logging
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from stepdistill.data import appearance as looks
from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.timesteps import NoiseLevels
from stepdistill.families.conditioning import Conditioning, MicroConditioning
from stepdistill.methods.parts import latent_statistics, score_gap
from stepdistill.roles.sampler import StepNoise, student_sample, teacher_sample
from stepdistill.roles.triple import FAKE_SCORE
from stepdistill.training.run_folder.logs import GRID, SCORES, grid_path
from stepdistill.training.session import Session

logger = logging.getLogger(__name__)
SCORE_LEVELS = (0.2, 0.5, 0.8)
"""Of the scores' picture, as fractions of the noise axis."""


def student_latents(session: Session, role: str, cond: Conditioning, noise: Tensor, draws: Draws) -> Tensor:
    """Samples by the method's recipe with `role` (generator or EMA) as what is in training."""
    return student_sample(
        session.triple,
        session.method.experts(role, session.stage),
        session.recipe,
        cond,
        noise,
        step_noise_from(draws, noise),
    )


def step_noise_from(draws: Draws, noise: Tensor) -> StepNoise:
    """Fresh noise for the steps of a walk from `noise`."""
    return lambda index: draws.normal(f"fresh{index}", noise.shape[1:])


class Grid:
    """Draws the student for fixed prompts and noise, beside the teacher, which is drawn once.

    grids/step-N.png      the teacher's row above the student's; a column is a prompt. A method that tunes a student has that
                          student, as it was, in the teacher's place (`Method.beside`), here and in the signals
    grids/scores-N.png    where the method has a fake score, from top to bottom: the student's samples, then for 0.2, 0.5 and
                          0.8 of the noise axis (before a flow shift) two rows each, real_score's x0 (guided) and fake_score's
                          of the same noised samples. Healthy: the fake score's row has the student's style, the real score's
                          is a little better. A fake score of mush lags; a real score of noise is a wrong conversion or time.

    Args:
        session: the run's.
        folder: the run's; None draws and writes nothing, for processes that only have to take part.
        count: columns.
        guidance: scale w of the teacher.
        seeds: noises per prompt, of which the first is shown.
    """

    def __init__(
        self,
        session: Session,
        folder: Path | None,
        count: int,
        guidance: float,
        seeds: int = 1,
        teacher_steps: int = 25,
    ) -> None:
        setup = session.setup
        self.session, self.folder, self.guidance = session, folder, guidance
        self.writes_images = folder is not None and session.checkpoint.pipeline is not None
        prompts = [setup.prompts[i % len(setup.prompts)] for i in range(count)]
        sizes = [MicroConditioning.plain(*setup.problem.size)] * count
        self.draws = [
            Draws(
                setup.config.training.seed, 0, "grid", range(k * count, (k + 1) * count), session.device, session.dtype
            )
            for k in range(seeds)
        ]
        self.noises = [draws.normal("noise", setup.problem.latent_shape) for draws in self.draws]
        with torch.no_grad():
            self.cond, self.null = session.encoder.text(prompts, sizes), session.encoder.null(sizes)
        self.teacher_steps = teacher_steps

    @cached_property
    def teacher(self) -> list[Tensor]:
        """The teacher's latents for every noise, or those of the role that the method names (`Method.beside`); drawn when
        they are first wanted, by all processes that have a grid."""
        session, real = self.session, self.session.triple.real_score
        beside = session.method.beside
        with torch.no_grad():
            if beside is not None:
                return [
                    student_sample(
                        session.triple, (beside,), session.recipe, self.cond, noise, step_noise_from(draws, noise)
                    )
                    for noise, draws in zip(self.noises, self.draws, strict=True)
                ]
            return [
                teacher_sample(real, self.cond, self.null, noise, self.teacher_steps, self.guidance)
                for noise in self.noises
            ]

    @cached_property
    def row(self) -> Tensor | None:
        """The teacher's pictures, (P, 3, H, W) in [0, 1]; None where none are shown."""
        return self._decode(self.teacher[0]) if self.writes_images else None

    def reference(self) -> tuple[float, float]:
        """Mean and standard deviation of the teacher's latents."""
        found = latent_statistics(torch.cat(self.teacher))
        return float(found["latent_mean"]), float(found["latent_std"])

    @torch.no_grad()
    def draw(self, iteration: int) -> dict[str, float]:
        """Draw the current student. What the disk refuses is named, and no more.

        Returns what it shows:
            signals/diversity_ratio   distance between samples of one prompt over the teacher's, see `diversity`
            signals/brightness, signals/brightness_drift, signals/saturation_drift   mean luma, it and HSV saturation less the
                                      teacher's, all in [0, 1]; where the family has pictures and this process shows them
            signals/fake_shift        |mu_fake - mu_base| / |x - mu_base| over the levels of the scores' picture, unguided: 0
                                      where the fake score is the base still
        """
        session, values = self.session, dict[str, float]()
        latents = [
            student_latents(session, session.student, self.cond, noise, draws)
            for noise, draws in zip(self.noises, self.draws, strict=True)
        ]
        if len(latents) > 1:
            values["signals/diversity_ratio"] = diversity(latents) / max(diversity(self.teacher), 1e-12)
        if self.row is not None:
            student = self._decode(latents[0])
            ours, theirs = to_pixel_array(student), to_pixel_array(self.row)
            values["signals/brightness"] = looks.brightness(ours)
            values["signals/brightness_drift"] = looks.brightness(ours) - looks.brightness(theirs)
            values["signals/saturation_drift"] = looks.saturation(ours) - looks.saturation(theirs)
            self._write(GRID, iteration, [self.row, student])
        if FAKE_SCORE in session.setup.roles:
            rows, values["signals/fake_shift"] = self._scores(latents[0])
            if self.writes_images:
                self._write(SCORES, iteration, [self._decode(row) for row in rows])
        return values

    def _scores(self, x: Tensor) -> tuple[list[Tensor], float]:
        """Rows of latents as the scores' picture has them, and how far the fake score is from the base."""
        triple, rows, shifts = self.session.triple, [x], []
        for level in SCORE_LEVELS:
            t = NoiseLevels(level, level).times(triple.schedule, torch.zeros(len(x), device=x.device))
            x_t = triple.schedule.add_noise(x, self.draws[0].normal(f"scores{level}", x.shape[1:]), t)
            base, fake = triple.real_score.x0(x_t, t, self.cond), triple.fake_score.x0(x_t, t, self.cond)
            rows += [triple.real_score.guided(x_t, t, self.cond, self.null, self.guidance), fake]
            shifts.append(float(score_gap(x, base, fake)))
        return rows, sum(shifts) / len(shifts)

    def _decode(self, latents: Tensor) -> Tensor:
        rows = [self.session.setup.family.decode(self.session.checkpoint, latent[None]) for latent in latents]
        return torch.cat(rows).float().cpu()

    def _write(self, kind: str, iteration: int, rows: list[Tensor]) -> None:
        if self.folder is None:
            return
        path = grid_path(self.folder, iteration, kind)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            make_image_grid(rows).save(path)
        except OSError as error:
            logger.warning("the picture %s could not be written (%s)", path, error)


def diversity(samples: list[Tensor]) -> float:
    """Mean over prompts and pairs of noises of rms(a - b) / sqrt(var a + var b), a and b latents of one prompt.

    In units of the samples' own spread, since rising contrast would hide that they grow alike; 0 for fewer than two.

    samples: for every noise (P, C, h, w), the same prompts each time.
    """
    found = []
    for a, b in combinations([latents.double().flatten(1) for latents in samples], 2):
        spread = a.var(1, correction=0) + b.var(1, correction=0)
        found.append(((a - b).square().mean(1) / spread.clamp_min(1e-12)).sqrt().mean())
    return float(torch.stack(found).mean()) if found else 0.0


def to_pixel_array(images: Tensor) -> NDArray[np.floating]:
    """(N, 3, H, W) in [0, 1] -> (N, H, W, 3) in [0, 255], not rounded."""
    pixels: NDArray[np.floating] = (images.double().clamp(0, 1) * 255).permute(0, 2, 3, 1).numpy()
    return pixels


def save_images(images: NDArray[np.uint8], folder: Path, start: int = 0) -> list[Path]:
    """Write uint8 images (N, H, W, 3) as START.png, START + 1.png, ... and return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{start + index:05d}.png" for index in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    return paths


def images_to_tensor(images: NDArray[np.uint8]) -> Tensor:
    """uint8 (N, H, W, 3) -> (N, 3, H, W) in [0, 1], as `tile` takes them."""
    return torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float() / 255


def make_image_grid(rows: list[Tensor], gap: int = 2) -> Image.Image:
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
