"""Measures the teacher against its floors and writes the statistics, reference features and prompt lists of the assets.

PYTHONPATH=. python tools/teacher/measure.py --data fashion-mnist.npz --runs runs --only reference
PYTHONPATH=. python tools/teacher/measure.py --data fashion-mnist.npz --runs runs --images 5000 --sweep 1.5 2 3 4

``--only reference`` needs the judge alone: prompts and reference.npz. Without it the teacher is sampled with guided DDIM:
each scale of the sweep on few images, the best (least Fréchet distance among those whose prompt accuracy is within one
per cent of the best) on ``--images``. Distances are taken at equal numbers of images.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

import common
import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray

from stepdistill.data import fashion
from stepdistill.data.appearance import saturation
from stepdistill.evaluation.metrics.diversity import pairwise_diversity
from stepdistill.evaluation.metrics.frechet import frechet_of_features
from stepdistill.evaluation.metrics.prdc import compute_prdc, pairwise_distances
from stepdistill.evaluation.metrics.statistics import FeatureStatistics
from stepdistill.evaluation.networks.judge import Judge

STEPS = 50
PROMPTS = 5000
KEPT_FEATURES = 2000
GROUP = 4


@dataclass(frozen=True)
class Accuracy:
    """Share of images whose attribute is seen as said."""

    garment: float
    colour: float
    background: float

    @property
    def mean(self) -> float:
        return (self.garment + self.colour + self.background) / 3.0


@dataclass(frozen=True)
class Measurement:
    """One set of images against as many held-out photographs."""

    guidance_scale: float
    images: int
    frechet: float
    accuracy: Accuracy
    saturation: float


def distance(first: NDArray[np.floating], second: NDArray[np.floating]) -> float:
    """The Fréchet distance of two feature sets."""
    return frechet_of_features(first, second)


def accuracy(judge: Judge, images: NDArray[np.uint8], said: list[fashion.Attributes]) -> Accuracy:
    """Per-attribute accuracy on fully specified captions."""
    seen = judge.predict(images)
    garment = np.array([fashion.GARMENTS.index(a.garment) for a in said])
    colour = np.array([fashion.COLOURS.index(a.colour or "") for a in said])
    background = np.array([fashion.BACKGROUNDS.index(a.background or "") for a in said])
    return Accuracy(
        float((seen.garment == garment).mean()),
        float((seen.colour == colour).mean()),
        float((seen.background == background).mean()),
    )


def write_prompts(folder: Path, seed: int) -> None:
    """``fashion.txt``: full captions, garments in balanced blocks; ``fashion_train.txt``: some attributes left unsaid."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, offset, said in (("fashion", 0, (1.0, 0.0, 0.0, 0.0)), ("fashion_train", 1, (0.7, 0.1, 0.1, 0.1))):
        rng = common.step_rng(seed, offset)
        garment = np.concatenate([rng.permutation(len(fashion.GARMENTS)) for _ in range(PROMPTS // 10)])
        colour, background = fashion.draw_attributes(garment, rng)
        kind = rng.choice(4, size=PROMPTS, p=said)
        lines = [
            fashion.caption(
                fashion.Attributes(
                    fashion.GARMENTS[garment[i]],
                    fashion.COLOURS[colour[i]] if kind[i] <= 1 else None,
                    fashion.BACKGROUNDS[background[i]] if kind[i] in (0, 2) else None,
                ),
                rng,
            )
            for i in range(PROMPTS)
        ]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")


@torch.no_grad()
def sample(
    pipeline: StableDiffusionPipeline, prompts: list[str], scale: float, seed: int, batch: int = 100
) -> NDArray[np.uint8]:
    """Images (N, 32, 32, 3) of ``prompts``; image i starts from the noise of seed + i, whatever the batch."""
    parts = []
    for first in range(0, len(prompts), batch):
        chunk = prompts[first : first + batch]
        generators = [torch.Generator().manual_seed(seed + first + i) for i in range(len(chunk))]
        images = pipeline(
            chunk, num_inference_steps=STEPS, guidance_scale=scale, generator=generators, output_type="np"
        ).images
        parts.append(np.round(images * 255.0).astype(np.uint8))
    return np.concatenate(parts)


def load_pipeline(path: Path) -> StableDiffusionPipeline:
    """The assembled teacher in float32."""
    pipeline = StableDiffusionPipeline.from_pretrained(path, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def reconstruct(pipeline: StableDiffusionPipeline, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images through the autoencoder, posterior means decoded."""
    parts = common.to_tensor(images).split(100)
    return np.concatenate(
        [common.to_uint8(pipeline.vae.decode(pipeline.vae.encode(part).latent_dist.mode()).sample) for part in parts]
    )


def nearest_distances(images: NDArray[np.uint8], photographs: common.Photographs) -> NDArray[np.float64]:
    """Distance of each image's shape (contrast to its corner, unit norm) to the nearest training shape.

    Shapes are compared rather than features: a copied photograph in another colour is still a copy.
    """

    def shapes(x: NDArray[np.floating]) -> NDArray[np.float32]:
        x = x.reshape(len(x), 32, 32, -1).astype(np.float32)
        x = np.abs(x - x[:, :1, :1]).sum(3)[:, ::2, ::2].reshape(len(x), -1)
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6)

    training = shapes(np.pad(photographs.gray, ((0, 0), (2, 2), (2, 2)))[..., None])
    return pairwise_distances(shapes(images), training).min(axis=1)


def write_reference(judge: Judge, photographs: common.Photographs, seed: int) -> None:
    """``reference.npz``: statistics of all held-out photographs in random colours, and 2,000 feature vectors."""
    batch = common.render_random(photographs, np.arange(len(photographs)), common.step_rng(seed, 2))
    features = judge.features(batch.images)
    FeatureStatistics.of(features).save(
        common.ASSETS / "reference.npz", features=features[:KEPT_FEATURES].astype(np.float16)
    )


def measure(options: argparse.Namespace, judge: Judge, photographs: common.Photographs) -> dict[str, object]:
    """Everything about the teacher, as it stands in teacher_statistics.json."""
    pipeline = load_pipeline(options.teacher)
    batch = common.render_random(photographs, np.arange(len(photographs)), common.step_rng(options.seed, 2))
    half = len(photographs) // 2
    real, real_said = judge.features(batch.images), [batch.attributes(i) for i in range(len(photographs))]
    floor = distance(real[:half], real[half:])
    rebuilt = distance(judge.features(reconstruct(pipeline, batch.images[:half])), real[half:])
    common.log.info("halves %.4f reconstruction %.4f (%.1fx)", floor, rebuilt, rebuilt / floor)

    prompts = (common.ASSETS / "prompts" / "fashion.txt").read_text().splitlines()
    said = [fashion.parse_caption(prompt) for prompt in prompts]

    def at(scale: float, count: int) -> tuple[Measurement, NDArray[np.uint8], NDArray[np.float32]]:
        images = sample(pipeline, prompts[:count], scale, options.seed)
        features = judge.features(images)
        result = Measurement(
            scale,
            count,
            distance(features, real[half : half + count]),
            accuracy(judge, images, said[:count]),
            saturation(images),
        )
        common.log.info("%s", result)
        return result, images, features

    sweep = [at(scale, options.sweep_images)[0] for scale in options.sweep]
    best = max(entry.accuracy.mean for entry in sweep)
    scale = min((e for e in sweep if e.accuracy.mean >= 0.99 * best), key=lambda e: e.frechet).guidance_scale
    result, images, features = at(scale, options.images)
    equal_floor = distance(real[: options.images], real[half : half + options.images])
    real_accuracy = accuracy(judge, batch.images, real_said)
    kept = min(KEPT_FEATURES, options.images)
    quality = compute_prdc(features[:kept], real[:kept])
    quality_real = compute_prdc(real[half : half + kept], real[:kept])
    grouped = [prompt for prompt in prompts[:100] for _ in range(GROUP)]
    groups = judge.features(sample(pipeline, grouped, scale, options.seed + 1_000_000)).reshape(100, GROUP, -1)
    training = common.load_photographs(options.data, common.TRAINING)
    nearest = nearest_distances(images[:500], training)
    nearest_real = nearest_distances(batch.images[:500], training)
    common.save_grid(options.runs / "teacher.png", images[:160], 20)
    # On few images the sampling bias of both distances hides the difference: such a comparison would always pass.
    enough = options.images >= half
    statistics = FeatureStatistics.of(features)
    statistics.save(common.ASSETS / "teacher_statistics.npz")
    return {
        "steps": STEPS,
        "guidance_scale": scale,
        "images": options.images,
        "seed": options.seed,
        "command": f"python tools/teacher/measure.py --data fashion-mnist.npz --runs runs --images {options.images} "
        f"--sweep {' '.join(map(str, options.sweep))} --sweep-images {options.sweep_images}",
        "frechet": result.frechet,
        "frechet_of_real_halves": {"5000": floor, str(options.images): equal_floor},
        "frechet_of_reconstructions": rebuilt,
        "accuracy": asdict(result.accuracy),
        "accuracy_on_photographs": asdict(real_accuracy),
        "pairwise_diversity": pairwise_diversity(groups, real.mean(0)),
        "saturation": result.saturation,
        "saturation_of_photographs": saturation(batch.images),
        "precision": quality.precision,
        "recall": quality.recall,
        "precision_recall_of_photographs": asdict(quality_real),
        "nearest_training_shape": {"samples": float(np.median(nearest)), "held_out": float(np.median(nearest_real))},
        "sweep": [asdict(entry) for entry in sweep],
        "floors": {
            "reconstruction_at_most_4x": rebuilt <= 4.0 * floor,
            "teacher_at_most_8x": result.frechet <= 8.0 * equal_floor if enough else None,
            "accuracy_at_least_0.95x": all(
                drawn >= 0.95 * photographed
                for drawn, photographed in zip(
                    asdict(result.accuracy).values(), asdict(real_accuracy).values(), strict=True
                )
            ),
            "precision_and_recall_at_least_0.7": (quality.precision >= 0.7 and quality.recall >= 0.7)
            if enough
            else None,
            "no_copies": float(np.median(nearest)) >= 0.8 * float(np.median(nearest_real)),
        },
    }


def main() -> None:
    parser = common.arguments(__doc__, seed=606)
    parser.add_argument("--teacher", type=Path, default=common.ASSETS / "teacher")
    parser.add_argument("--only", choices=("reference",))
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--sweep", type=float, nargs="+", default=[1.5, 2.0, 3.0, 4.0])
    parser.add_argument("--sweep-images", type=int, default=1000)
    options = parser.parse_args()
    common.begin(options)
    judge = Judge.load(common.ASSETS / "judge.safetensors")
    photographs = common.load_photographs(options.data, common.HELD_OUT)
    write_prompts(common.ASSETS / "prompts", options.seed)
    write_reference(judge, photographs, options.seed)
    if options.only is None:
        results = measure(options, judge, photographs)
        common.write_json(common.ASSETS / "teacher_statistics.json", results)
        common.log.info("%s", results)


if __name__ == "__main__":
    main()
