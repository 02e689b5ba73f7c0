"""What PSO makes of a preference, beside plain fine-tuning on the preferred images: on the embedded teacher's 4-step student.

    python tools/measure_pso.py --student runs/fashion_dmd2 --work runs/measure_pso --json tools/results/measure_pso.json

The student draws several samples for each training prompt; of each prompt the sample with most of the attribute wins against
the one with least. `pso` learns from these pairs offline, `online` has the attribute rank samples as it goes, and `plain` is
fitted to the winners by the denoising loss, at the same times and for as many iterations. On held-out prompts and noise all
are held against the untouched student: the share of samples with more of the attribute, the judge's Fréchet distance to
held-out winners, and sharpness. A student that is not there is trained first, by configs/fashion_dmd2.yaml.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepdistill.assets import FOLDER
from stepdistill.config.schema import RunConfig, load_config
from stepdistill.data.appearance import sharpness
from stepdistill.data.prompts import read_prompts
from stepdistill.diffusion.draws import Draws
from stepdistill.evaluation.metrics.frechet import frechet_of_features
from stepdistill.evaluation.metrics.win_rate import win_rate
from stepdistill.evaluation.networks.judge import Judge
from stepdistill.families.conditioning import MicroConditioning
from stepdistill.files.atomic import write_atomically
from stepdistill.rewards import load_reward
from stepdistill.training.monitoring.grids import images_to_tensor, save_images, student_latents
from stepdistill.training.run import open_run, train
from stepdistill.training.session import Session

ROOT = Path(__file__).resolve().parent.parent
Pixels = NDArray[np.uint8]
BATCH = 64
PLAIN = ("method.loss=hinge", "method.beta=1.0", "method.kappa=0.0", "method.anchor=0.0")
"""1 + l(win), whose gradient is the denoising loss's."""
CONFIGS = {"pso": "fashion_pso_offline.yaml", "online": "fashion_pso.yaml", "plain": "fashion_pso_offline.yaml"}
"""Name of a tuning -> its config."""


@dataclass(frozen=True)
class Measured:
    """One student on held-out prompts.

    Attributes:
        win_rate, low, high: share of samples with more of the attribute than the untouched student's, with its interval.
        attribute: its mean.
        frechet: of the judge's features to held-out winners.
        sharpness: over the untouched student's.
    """

    name: str
    win_rate: float
    low: float
    high: float
    attribute: float
    frechet: float
    sharpness: float


@torch.no_grad()
def drawn(session: Session, prompts: Sequence[str], repeats: int, purpose: str) -> Pixels:
    """Samples (P, R, H, W, 3) of a run's student; the same noise whatever the run."""
    shape, size = session.setup.problem.latent_shape, MicroConditioning.plain(*session.setup.problem.size)
    rows = [(prompt, k * repeats + r) for k, prompt in enumerate(prompts) for r in range(repeats)]
    found = []
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        draws = Draws(0, 0, purpose, [number for _, number in part], session.device, session.dtype)
        cond = session.encoder.text([prompt for prompt, _ in part], [size] * len(part))
        latents = student_latents(session, session.student, cond, draws.normal("noise", shape), draws)
        images = session.setup.family.decode(session.checkpoint, latents)
        found.append((images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    pixels = np.concatenate(found)
    return pixels.reshape(len(prompts), repeats, *pixels.shape[1:])


def attribute_of(name: str, images: Pixels, prompts: Sequence[str]) -> NDArray[np.float64]:
    """The attribute (P, R) of images (P, R, H, W, 3)."""
    reward, flat = load_reward(name), images.reshape(-1, *images.shape[2:])
    repeated = [prompt for prompt in prompts for _ in range(images.shape[1])]
    with torch.no_grad():
        found: Tensor = reward(images_to_tensor(flat), repeated)
    return found.double().numpy().reshape(images.shape[:2])


def ranked(images: Pixels, values: NDArray[np.float64]) -> tuple[Pixels, Pixels]:
    """(most, least) of the attribute among each prompt's samples, (P, H, W, 3) each."""
    rows = np.arange(len(images))
    return images[rows, values.argmax(1)], images[rows, values.argmin(1)]


def write_pairs(folder: Path, winners: Pixels, losers: Pixels, prompts: Sequence[str]) -> None:
    """Folders `winners` and `losers` with the same names, and captions."""
    for name, images in (("winners", winners), ("losers", losers)):
        for path, prompt in zip(save_images(images, folder / name), prompts, strict=True):
            path.with_suffix(".txt").write_text(prompt)


def config_of(name: str, student: Path, work: Path, settings: argparse.Namespace) -> RunConfig:
    """The tuning of that name."""
    if name == "online":
        changes = [f"method.reward={settings.attribute}"]
    else:
        changes = [f"data.images={work / 'winners'}", f"data.losers={work / 'losers'}"]
    return tuning(CONFIGS[name], name, student, work, settings, changes)


def tuning(
    file: str, name: str, student: Path, work: Path, settings: argparse.Namespace, changes: Sequence[str]
) -> RunConfig:
    """A config of PSO on this student, with what the command line and then `changes` say; `plain` is fitted to its images."""
    own = {
        "training.max_steps": settings.iterations,
        "training.batch_size": settings.batch,
        "optimizers.generator.lr": settings.lr,
        "method.beta": settings.beta,
    }
    places = [f"init={student}", f"output={work / name}", "training.grid_every=0"]
    asked = [f"{key}={value}" for key, value in own.items() if value is not None]
    plain = PLAIN if name == "plain" else ()
    return load_config(ROOT / "configs" / file, [*places, *asked, *changes, *plain])


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train what is missing in `arguments.work`, and measure all."""
    student, work = Path(arguments.student), Path(arguments.work)
    if not student.exists():
        train(load_config(ROOT / "configs/fashion_dmd2.yaml"), student)
    untouched, _ = open_run(student, "cpu")
    texts = list(read_prompts("builtin:fashion_train").texts)[: arguments.pairs]
    held_out = list(read_prompts("builtin:fashion").texts)[: arguments.images]
    if not (work / "losers").exists():
        samples = drawn(untouched, texts, arguments.candidates, "pairs")
        write_pairs(work, *ranked(samples, attribute_of(arguments.attribute, samples, texts)), texts)
    judge = Judge.load(FOLDER / "judge.safetensors")
    candidates = drawn(untouched, held_out, arguments.candidates, "target")
    target, _ = ranked(candidates, attribute_of(arguments.attribute, candidates, held_out))
    target_features = judge.features(target)
    before = drawn(untouched, held_out, 1, "held out")
    values = attribute_of(arguments.attribute, before, held_out)[:, 0]

    def row(name: str, images: Pixels) -> Measured:
        own = attribute_of(arguments.attribute, images, held_out)[:, 0]
        won = win_rate(own, values, held_out, np.random.default_rng(0))
        distance = frechet_of_features(judge.features(images[:, 0]), target_features)
        sharp = sharpness(images[:, 0]) / sharpness(before[:, 0])
        return Measured(name, won.rate, won.low, won.high, float(own.mean()), distance, sharp)

    rows = [row("untouched", before)]
    for name in arguments.methods:
        if not (work / name).exists():
            train(config_of(name, student, work, arguments))
        tuned, _ = open_run(work / name, "cpu")
        rows.append(row(name, drawn(tuned, held_out, 1, "held out")))
    asked = {key: value for key, value in vars(arguments).items() if key not in ("json", "work", "student")}
    return {"settings": asked, "rows": [asdict(found) for found in rows]}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--student", default="runs/fashion_dmd2", help="run of a few-step student of the embedded teacher"
    )
    made.add_argument("--work", default="runs/measure_pso", help="pairs and runs; what is there is kept")
    made.add_argument("--attribute", default="critic:brightness", help="a reward, in a run's words")
    made.add_argument("--methods", nargs="+", default=["pso", "plain"], choices=list(CONFIGS))
    made.add_argument("--pairs", type=int, default=512)
    made.add_argument("--candidates", type=int, default=4, help="samples of each prompt that are ranked")
    made.add_argument("--images", type=int, default=512, help="held-out prompts")
    add_training(made)
    return made


def add_training(made: argparse.ArgumentParser) -> None:
    """Options that take the place of what the configs say."""
    for option, kind in (("iterations", int), ("batch", int), ("lr", float), ("beta", float)):
        made.add_argument(f"--{option}", type=kind, default=None, help="the config's own by default")
    made.add_argument("--json", type=Path)


def tell(rows: Sequence[dict[str, Any]], attribute: str = "attribute") -> None:
    """Print the table."""
    print(f"{'':10} win rate  (95 %)         {attribute:>9}  Fréchet to target  sharpness")
    for item in rows:
        print(
            f"{item['name']:10} {item['win_rate']:8.3f}  ({item['low']:.3f} to {item['high']:.3f})  {item['attribute']:9.3f}  "
            f"{item['frechet']:17.3f}  {item['sharpness']:9.3f}"
        )


def keep(path: Path | None, found: dict[str, Any]) -> None:
    """Write what was found, where a file is named."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(found, indent=1) + "\n").encode())


def main() -> None:
    arguments = parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    found = measure(arguments)
    tell(found["rows"])
    keep(arguments.json, found)


if __name__ == "__main__":
    main()
