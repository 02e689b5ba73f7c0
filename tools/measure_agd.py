"""Guidance adapters on the embedded teacher: half the network calls, against guided sampling, at several w.

    stepdistill train configs/fashion_agd_collected.yaml --output runs/fashion_agd
    python tools/measure_agd.py runs/fashion_agd --products bfloat16 --json tools/results/measure_agd.json

Both samplers walk the adapter's own recipe, guided sampling with two calls a step, by stock diffusers. The judge, which nothing
is trained against, takes the Frechet distances. Relative errors are ||pred - target||^2 / ||target||^2 over the states of guided
walks of the same number of steps; wall times are of alternating batches in this process, decoding included, and the ratio of
times is the median over pairs of batches that were drawn one after the other, which what else the machine does moves least. A
network as small as this one keeps a GPU waiting, whatever it is given: distances may be taken there, times say something on a
CPU alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from stepdistill.api import training as api
from stepdistill.assets import TEACHER, resolve
from stepdistill.diffusion.timesteps import trailing_timesteps
from stepdistill.errors import UserError
from stepdistill.evaluation.fashion import NUM_IMAGES, FashionScorer, evaluation_set
from stepdistill.families.conditioning import MicroConditioning
from stepdistill.files.atomic import write_atomically
from stepdistill.inference.artifact import draw, load_artifact
from stepdistill.roles.guidance_adapter import GuidanceAdapter
from stepdistill.roles.sampler import guided_trajectory, relative_error
from stepdistill.training.run import open_run
from stepdistill.training.session import DTYPES, Session

BATCH = 64


@dataclass(frozen=True)
class Sampled:
    """One way of guidance at one w."""

    network_calls: int
    frechet: float
    prompt_accuracy: float
    diversity: float
    saturation: float
    seconds_per_image: float


@dataclass(frozen=True)
class Line:
    """One w."""

    w: float
    guided: Sampled
    adapter: Sampled
    frechet_ratio: float
    time_ratio: float
    error: float
    error_unguided: float


def measure(
    folder: Path, session: Session, scales: Sequence[float], images: int, states: int, products: torch.dtype | None
) -> list[Line]:
    """A line for each w, of the exported adapter and of the run's live one."""
    prompts, seeds = evaluation_set(images)
    scorer, lines = FashionScorer(), []
    base, adapted = (
        load_artifact(resolve(TEACHER), lora, torch.float32, str(session.device)) for lora in (None, folder)
    )
    recipe, live = adapted.recipe, session.triple.denoiser(session.student).guide
    if recipe is None or adapted.adapter is None or not isinstance(live, GuidanceAdapter):
        raise UserError(f"{str(folder)!r} holds no guidance adapter: give a run of method agd")
    adapted.adapter.products = live.products = products
    steps = recipe.num_inference_steps
    for w in scales:
        guided = replace(recipe, guidance_scale=w, told_guidance=None)
        drawn: dict[str, list[np.ndarray]] = {"guided": [], "adapter": []}
        seconds: dict[str, list[float]] = {"guided": [], "adapter": []}
        for start in range(0, images, BATCH):
            rows = slice(start, start + BATCH)
            for name in drawn:
                begun = time.perf_counter()
                artifact = base if name == "guided" else adapted
                drawn[name] += draw(
                    artifact.pipeline, prompts[rows], seeds[rows], recipe=guided if name == "guided" else recipe,
                    adapter=artifact.adapter, guidance=w if name == "adapter" else None, batch_size=BATCH,
                )  # fmt: skip
                seconds[name].append(time.perf_counter() - begun)
        found = {}
        for name, calls in (("guided", 2 * steps), ("adapter", steps)):
            scores = scorer.score(np.concatenate(drawn[name]), prompts)
            values = {
                k: round(getattr(scores, k), 5) for k in ("frechet", "prompt_accuracy", "diversity", "saturation")
            }
            found[name] = Sampled(calls, **values, seconds_per_image=round(sum(seconds[name]) / images, 5))
        error, plain = errors(session, w, steps, prompts[:states])
        line = Line(
            w,
            found["guided"],
            found["adapter"],
            round(found["adapter"].frechet / found["guided"].frechet, 4),
            round(float(np.median(np.divide(seconds["adapter"], seconds["guided"]))), 4),
            error,
            plain,
        )
        lines.append(line)
        print(
            f"w {w:g}: Frechet {line.adapter.frechet:.3f} / {line.guided.frechet:.3f} = {line.frechet_ratio:.3f}, time x "
            f"{line.time_ratio:.2f}, error {plain:.4f} -> {error:.4f} ({plain / error:.1f} x less)",
            flush=True,
        )
    return lines


@torch.no_grad()
def errors(session: Session, w: float, steps: int, prompts: Sequence[str]) -> tuple[float, float]:
    """Mean relative error of the adapter and of the prompt alone, over all states of guided walks of these prompts."""
    setup, triple = session.setup, session.triple
    sizes = [MicroConditioning.plain(*setup.problem.size)] * len(prompts)
    cond, null = session.encoder.text(list(prompts), sizes), session.encoder.null(sizes)
    noise = torch.randn(len(prompts), *setup.problem.latent_shape, generator=torch.Generator().manual_seed(1))
    noise = noise.to(session.device)
    times = [
        noise.new_full((len(prompts),), t, dtype=torch.float64) for t in trailing_timesteps(triple.schedule, steps)
    ]
    scale, student = noise.new_full((len(prompts),), w), triple.denoiser(session.student)
    found, plain = [], []
    for state in guided_trajectory(triple.real_score, cond, null, noise, times, scale):
        raw = student.raw(state.x_t, state.t, cond.told(w))
        found.append(relative_error(raw, state.target).mean())
        plain.append(state.plain.mean())
    return round(float(torch.stack(found).mean()), 6), round(float(torch.stack(plain).mean()), 6)


def _named(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of a run of method agd on the embedded teacher")
    parser.add_argument("--scales", type=float, nargs="*", default=[1.5, 3.0, 5.0, 7.5])
    parser.add_argument("--images", type=int, default=NUM_IMAGES, help="a multiple of 12")
    parser.add_argument("--states", type=int, default=64, help="walks for the relative errors")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--products",
        choices=("float32", "bfloat16", "float16"),
        default=None,
        help="precision of the adapters' products; the network's, float32",
    )
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    products = None if arguments.products is None else DTYPES[arguments.products]
    session, iteration = open_run(arguments.run, arguments.device)
    trained = sum(p.numel() for p in session.triple.network_parameters(session.student).values())
    whole = sum(p.numel() for p in session.triple.base.parameters())
    print(f"{trained:,} parameters beside {whole:,} ({trained / whole:.1%}), iteration {iteration}")
    with TemporaryDirectory() as scratch:
        folder = api.export(arguments.run, "guidance-adapter", Path(scratch) / "adapter", device=arguments.device)
        lines = measure(folder, session, arguments.scales, arguments.images, arguments.states, products)
    error = float(np.mean([line.error for line in lines]))
    alone = float(np.mean([line.error_unguided for line in lines]))
    print(f"all of them: error {alone:.4f} -> {error:.4f} ({alone / error:.2f} x less)")
    if arguments.json is not None:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        record = {
            "commit": commit, "iteration": iteration, "images": arguments.images, "device": _named(session.device),
            "adapter_parameters": trained, "base_parameters": whole, "threads": arguments.threads,
            "products": arguments.products or "float32",
            "error": round(error, 6), "error_unguided": round(alone, 6),
            "lines": [asdict(line) for line in lines],
        }  # fmt: skip
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(arguments.json, (json.dumps(record, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
