"""`stepdistill quickstart`: distils the embedded teacher with DMD2 into 4 steps, as a LoRA, and measures the student.

    DIR/report.json  grid.png  images/<row>/*.png  lora/  run/

Every step runs the same code as for a Stable Diffusion checkpoint: train, export with its proof, load with diffusers, sample.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from stepdistill.api import training as api
from stepdistill.assets import FOLDER, TEACHER, resolve
from stepdistill.config.schema import load_config
from stepdistill.errors import UserError
from stepdistill.evaluation.fashion import NUM_IMAGES, FashionScorer, ResultRow, evaluation_set
from stepdistill.exporting.base_loading import base_location, loading_code
from stepdistill.exporting.export import EXPORT_FILES, check_output_folder
from stepdistill.exporting.model_card import usage_snippet
from stepdistill.families.recipe import Recipe
from stepdistill.inference.artifact import draw, load_artifact
from stepdistill.training.monitoring.grids import images_to_tensor, make_image_grid, save_images

logger = logging.getLogger(__name__)
TEACHER_STEPS, BATCH = 50, 64
PIPELINE = "StableDiffusionPipeline"
"""The class that loads the embedded teacher."""
TEACHER_ROW = FOLDER / "teacher_row.json"


@dataclass(frozen=True)
class Report:
    """The quickstart's table, and the folder of its files."""

    rows: tuple[ResultRow, ...]
    noise_floor: float
    seconds_total: float
    folder: Path

    def row(self, name: str) -> ResultRow:
        """Returns the row of that name."""
        return next(row for row in self.rows if row.name == name)

    def to_json(self) -> str:
        record = {
            "rows": [asdict(row) for row in self.rows],
            "noise_floor": self.noise_floor,
            "seconds_total": self.seconds_total,
        }
        return json.dumps(record, indent=2)

    def text(self) -> str:
        """Formats the table, and the lines that load the LoRA in diffusers."""
        head = f"{'':<18} {'steps':>5} {'calls':>5} {'Frechet':>8} {'accuracy':>8} {'diversity':>9} {'saturation':>10} {'s/image':>8}"
        lines = [
            f"{row.name:<18} {row.steps:>5} {row.network_calls:>5} {row.frechet:>8.3f} {row.prompt_accuracy:>8.3f} "
            f"{row.diversity:>9.3f} {row.saturation:>10.3f} {row.seconds_per_image:>8.4f}"
            for row in self.rows
        ]
        lora = self.folder / "lora"
        recipe = Recipe.read(lora)
        if recipe is None:
            raise UserError(f"{str(lora)!r} holds no recipe: run the quickstart again")
        return "\n".join(
            [
                head,
                *lines,
                f"n = {self.rows[-1].num_images} images a row; noise floor of the Frechet distance {self.noise_floor:.3f}; "
                f"{self.seconds_total:.0f} s in all",
                "",
                f"pictures: {self.folder / 'grid.png'}    the LoRA, and reproduce.py that loads it: {lora}",
                "",
                usage_snippet(
                    PIPELINE,
                    loading_code(PIPELINE, repr(base_location(recipe.base)), None),
                    recipe,
                    "diffusers-lora",
                    EXPORT_FILES["diffusers-lora"],
                    lora,
                ),
            ]
        )


def quickstart(
    output: str | Path, *, remeasure: bool = False, overrides: Sequence[str] = (), images: int = NUM_IMAGES
) -> Report:
    """Runs the quickstart into a new folder.

    Args:
        output: must be new or empty.
        remeasure: draw the teacher's row afresh; otherwise it is the shipped one, where `images` is the default.
        overrides: changes to the packaged config, as `--set` takes them.
        images: number of images a row; a multiple of 12.

    Raises:
        UserError: the output folder is not empty, or `images` is no multiple of 12.
    """
    started = time.perf_counter()
    folder = Path(output)
    check_output_folder(folder)
    prompts, seeds = evaluation_set(images)
    config = load_config(FOLDER / "quickstart.yaml", list(overrides))
    guidance = float(config.method_options["guidance"])
    outcome = api.distill(config, folder / "run")
    if not outcome.finished:
        raise UserError(
            f"the quickstart was stopped at iteration {outcome.iteration}: run it again with a new --output"
        )
    api.export(folder / "run", "diffusers-lora", folder / "lora", device="cpu")

    scorer = FashionScorer()
    pipeline = load_artifact(resolve(TEACHER), None, torch.float32, "cpu").pipeline
    bench = Bench(pipeline, prompts, seeds, scorer, folder / "images")
    student = load_artifact(resolve(TEACHER), folder / "lora", torch.float32, "cpu")
    recipe = student.recipe
    if recipe is None:
        raise RuntimeError("the exported LoRA has no recipe")
    steps = recipe.num_inference_steps
    rows = [
        (None if remeasure or images != NUM_IMAGES else shipped_teacher_row(guidance)) or teacher_row(bench, guidance),
        bench.measure("base", steps, 2 * steps, steps=steps, guidance=guidance, scheduler="dpm++2m"),
        bench.measure("base_same_recipe", steps, steps, recipe=recipe),
        Bench(student.pipeline, prompts, seeds, scorer, folder / "images").measure(
            "student", steps, steps, recipe=recipe, experts=student.experts
        ),
    ]
    draw_grid(pipeline, guidance, prompts, seeds, folder)
    report = Report(tuple(rows), scorer.frechet_noise_floor(images), time.perf_counter() - started, folder)
    (folder / "report.json").write_text(report.to_json() + "\n")
    return report


class Bench:
    """Draws the protocol's images with one pipeline, writes them as PNG, scores them and measures the time."""

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        prompts: Sequence[str],
        seeds: Sequence[int],
        scorer: FashionScorer,
        folder: Path,
    ) -> None:
        self.pipeline, self.prompts, self.seeds, self.scorer, self.folder = pipeline, prompts, seeds, scorer, folder

    def measure(self, name: str, total_steps: int, network_calls: int, **arguments: Any) -> ResultRow:
        """Measures the row of these sampler arguments (those of `stepdistill.inference.artifact.draw`)."""
        logger.info("measuring %s", name)
        begun = time.perf_counter()
        drawn = np.concatenate(list(draw(self.pipeline, self.prompts, self.seeds, batch_size=BATCH, **arguments)))
        seconds = time.perf_counter() - begun
        save_images(drawn, self.folder / name)
        scores = self.scorer.score(drawn, self.prompts)
        return ResultRow.of(name, total_steps, network_calls, scores, seconds / len(drawn))


def teacher_row(bench: Bench, guidance: float) -> ResultRow:
    """Measures the 50-step teacher with guidance."""
    return bench.measure(
        "teacher", TEACHER_STEPS, 2 * TEACHER_STEPS, steps=TEACHER_STEPS, guidance=guidance, scheduler="ddim"
    )


def shipped_teacher_row(guidance: float) -> ResultRow | None:
    """Returns the teacher's row that `tools/teacher/teacher_row.py` measured at this guidance scale; None if it did not."""
    rows = json.loads(TEACHER_ROW.read_text()) if TEACHER_ROW.is_file() else {}
    return ResultRow(**rows[f"{guidance:g}"]) if f"{guidance:g}" in rows else None


def draw_grid(
    pipeline: DiffusionPipeline,
    guidance: float,
    prompts: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    columns: int = 12,
) -> None:
    """Writes grid.png: teacher, base, base_same_recipe and student (top to bottom) on the same prompts and seeds."""
    chosen = list(range(0, len(prompts), max(1, len(prompts) // columns)))[:columns]
    teacher = draw(
        pipeline,
        [prompts[i] for i in chosen],
        [seeds[i] for i in chosen],
        steps=TEACHER_STEPS,
        guidance=guidance,
        scheduler="ddim",
        batch_size=columns,
    )
    rows = [np.concatenate(list(teacher))]
    for name in ("base", "base_same_recipe", "student"):
        rows.append(np.stack([np.asarray(Image.open(folder / "images" / name / f"{i:05d}.png")) for i in chosen]))
    picture = make_image_grid([images_to_tensor(row) for row in rows])
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(folder / "grid.png")
