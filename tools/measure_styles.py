"""What PSO makes of a style and of a subject, beside plain fine-tuning on the same images: the embedded teacher's student.

    python tools/measure_styles.py style --student runs/fashion_dmd2 --work runs/style --json tools/results/measure_style.json
    python tools/measure_styles.py subject --student runs/fashion_dmd2 --work runs/subject --json tools/results/measure_subject.json

style      sepia photographs of all garments but one; losers are the student's own samples for their captions. Measured on the
           garment that was left out.
subject    one bag, which the student drew once, in purple on five backgrounds, told "a photo of a sks bag ..."; losers are
           the student's own samples for "a photo of a bag ...". Measured on the two backgrounds that were left out.

Held against the untouched student on the same prompts and noise: the share of samples that are nearer to what was shown, the
judge's Fréchet distance to it, and sharpness. `plain` is fitted to the same images by the denoising loss, at the same times and
for as many iterations. A student that is not there is trained first, by configs/fashion_dmd2.yaml.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measure_pso import ROOT, Measured, Pixels, add_training, drawn, keep, tell, tuning
from numpy.typing import NDArray

from stepdistill.assets import FOLDER
from stepdistill.config.schema import RunConfig, load_config
from stepdistill.data import fashion
from stepdistill.data.appearance import sharpness
from stepdistill.data.prompts import read_prompts
from stepdistill.evaluation.metrics.frechet import frechet_of_features
from stepdistill.evaluation.metrics.win_rate import win_rate
from stepdistill.evaluation.networks.judge import Judge
from stepdistill.training.monitoring.grids import save_images
from stepdistill.training.run import open_run, train
from stepdistill.training.session import Session

LEFT_OUT = "bag"
SUBJECT_GARMENT, SUBJECT_COLOUR, WORD = "bag", "purple", "sks"
UNSEEN = ("blue", "yellow")
SEPIA = np.array([1.26, 0.96, 0.52])
"""Of a tone whose luma is that of the picture: a look that leaves sharpness as it is."""
LUMA = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Task:
    """What is shown, and what is measured.

    Attributes:
        images, captions: shown.
        prompts: of the losers, where they are not the captions.
        asked: held-out prompts.
        target: held-out images of what was to be learned.
        distance: of images to it, one each.
    """

    images: Pixels
    captions: Sequence[str]
    prompts: Sequence[str] | None
    asked: Sequence[str]
    target: Pixels
    distance: Callable[[Pixels], NDArray[np.float64]]


def sepia(images: Pixels) -> Pixels:
    """(N, H, W, 3) in one tone, of the same luma."""
    luma = images.astype(np.float64) @ LUMA
    return np.clip(luma[..., None] * SEPIA, 0, 255).round().astype(np.uint8)


def style_task(student: Session, count: int, images: int) -> Task:
    """Sepia samples of the student itself."""
    texts = [text for text in read_prompts("builtin:fashion_train").texts if LEFT_OUT not in text][:count]
    held_out = [text for text in read_prompts("builtin:fashion").texts if LEFT_OUT in text][:images]

    def distance(pictures: Pixels) -> NDArray[np.float64]:
        return np.abs(pictures.astype(np.float64) - sepia(pictures)).mean((1, 2, 3))

    shown, target = (
        sepia(drawn(student, prompts, 1, purpose)[:, 0])
        for prompts, purpose in ((texts, "shown"), (held_out, "target"))
    )
    return Task(shown, texts, None, held_out, target, distance)


def subject_task(student: Session, count: int, images: int, judge: Judge) -> Task:
    """One bag of the student's in purple; the first of eight whose sharpness is the middle one."""
    bags = drawn(student, ["a photo of a white bag on a black background"] * 8, 1, "subject")[:, 0]
    middle = int(np.argsort([sharpness(bag[None]) for bag in bags])[len(bags) // 2])
    gray = (bags[middle, 2:-2, 2:-2].astype(np.float64) @ LUMA).round().astype(np.uint8)
    # the renderer takes what is nearly black as background
    gray = np.where(gray < 40, 0, gray).astype(np.uint8)

    def render(backgrounds: Sequence[str], seed: int) -> Pixels:
        rng = np.random.default_rng(seed)
        colour = fashion.jittered_rgb(
            fashion.GARMENT_HSV, np.full(len(backgrounds), fashion.COLOURS.index(SUBJECT_COLOUR)), rng
        )
        behind = np.array([fashion.BACKGROUNDS.index(name) for name in backgrounds])
        return fashion.render(
            np.repeat(gray[None], len(backgrounds), 0),
            colour,
            fashion.jittered_rgb(fashion.BACKGROUND_HSV, behind, rng),
        )

    def captions(word: str, backgrounds: Sequence[str]) -> list[str]:
        return [f"a photo of a {word}{SUBJECT_GARMENT} on a {name} background" for name in backgrounds]

    seen = [name for name in fashion.BACKGROUNDS if name not in UNSEEN]
    shown, asked = ([names[i % len(names)] for i in range(n)] for names, n in ((seen, count), (UNSEEN, images)))
    target = render(asked, 1)
    middle_of = judge.features(target).mean(0)

    def distance(pictures: Pixels) -> NDArray[np.float64]:
        return np.linalg.norm(judge.features(pictures) - middle_of, axis=1).astype(np.float64)

    return Task(
        render(shown, 0), captions(f"{WORD} ", shown), captions("", seen), captions(f"{WORD} ", asked), target, distance
    )


def config_of(name: str, student: Path, work: Path, settings: argparse.Namespace) -> RunConfig:
    """The tuning of that name on the images of `work`."""
    sources = [f"data.images={work / 'images'}", f"data.prompts={work / 'prompts.txt'}"]
    return tuning(f"fashion_pso_{settings.form}.yaml", name, student, work, settings, sources)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train what is missing in `arguments.work`, and measure all."""
    student, work = Path(arguments.student), Path(arguments.work or f"runs/measure_{arguments.form}")
    if not student.exists():
        train(load_config(ROOT / "configs/fashion_dmd2.yaml"), student)
    untouched, _ = open_run(student, "cpu")
    judge = Judge.load(FOLDER / "judge.safetensors")
    if arguments.form == "style":
        task = style_task(untouched, arguments.count, arguments.images)
    else:
        task = subject_task(untouched, arguments.count, arguments.images, judge)
    if not (work / "images").exists():
        for path, caption in zip(save_images(task.images, work / "images"), task.captions, strict=True):
            path.with_suffix(".txt").write_text(caption)
        (work / "prompts.txt").write_text("\n".join(task.prompts or task.captions) + "\n")
    target = judge.features(task.target)
    before = drawn(untouched, task.asked, 1, "held out")[:, 0]
    own = task.distance(before)

    def row(name: str, images: Pixels) -> Measured:
        found = task.distance(images)
        won = win_rate(-found, -own, task.asked, np.random.default_rng(0))
        gone = frechet_of_features(judge.features(images), target)
        return Measured(
            name, won.rate, won.low, won.high, float(found.mean()), gone, sharpness(images) / sharpness(before)
        )

    rows = [row("untouched", before)]
    for name in ("pso", "plain"):
        if not (work / name).exists():
            train(config_of(name, student, work, arguments))
        tuned, _ = open_run(work / name, "cpu")
        images = drawn(tuned, task.asked, 1, "held out")[:, 0]
        save_images(images[:64], work / f"{name}-images")
        rows.append(row(name, images))
    shown = sharpness(task.target) / sharpness(before)
    asked = {key: value for key, value in vars(arguments).items() if key not in ("json", "work", "student")}
    return {"settings": asked, "target_sharpness": shown, "rows": [asdict(found) for found in rows]}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("form", choices=["style", "subject"])
    made.add_argument(
        "--student", default="runs/fashion_dmd2", help="run of a few-step student of the embedded teacher"
    )
    made.add_argument(
        "--work", default=None, help="images and runs, what is there is kept; runs/measure_FORM by default"
    )
    made.add_argument("--count", type=int, default=256, help="images that are shown")
    made.add_argument("--images", type=int, default=256, help="held-out prompts")
    add_training(made)
    return made


def main() -> None:
    arguments = parser().parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    found = measure(arguments)
    tell(found["rows"], "distance")
    print(f"the target's sharpness is {found['target_sharpness']:.3f} of the untouched student's")
    keep(arguments.json, found)


if __name__ == "__main__":
    main()
