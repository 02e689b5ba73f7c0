"""What the teacher's scripts share: the data's splits, batches of rendered photographs, checkpoints, picture grids."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from stepdistill.data import fashion

log = logging.getLogger("teacher")
ASSETS = Path(__file__).resolve().parents[2] / "stepdistill" / "assets"

TRAINING = slice(0, 60_000)
JUDGE_HALF = slice(0, 30_000)
CRITIC_HALF = slice(30_000, 60_000)
HELD_OUT = slice(60_000, 70_000)


@dataclass(frozen=True)
class Photographs:
    """Gray photographs (N, 28, 28) uint8 and their garment labels (N,)."""

    gray: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class RenderedBatch:
    """Photographs in colour, with everything that was drawn to make them."""

    images: NDArray[np.uint8]  # (B, 32, 32, 3)
    garment: NDArray[np.int64]  # (B,)
    colour: NDArray[np.int64]  # (B,)
    background: NDArray[np.int64]  # (B,)
    garment_rgb: NDArray[np.float32]  # (B, 3)
    background_rgb: NDArray[np.float32]  # (B, 3)

    def attributes(self, i: int) -> fashion.Attributes:
        return fashion.Attributes(
            fashion.GARMENTS[self.garment[i]],
            fashion.COLOURS[self.colour[i]],
            fashion.BACKGROUNDS[self.background[i]],
        )


def load_photographs(path: Path, part: slice) -> Photographs:
    """The photographs of one split of ``fashion-mnist.npz`` (arrays ``x`` and ``y``, 70,000 long)."""
    with np.load(path, allow_pickle=False) as data:
        return Photographs(data["x"][part], data["y"][part].astype(np.int64))


def render_random(
    photographs: Photographs,
    rows: NDArray[np.integer],
    rng: np.random.Generator,
    *,
    held_out_pairs: bool = False,
    mirror: bool = False,
) -> RenderedBatch:
    """The photographs at ``rows`` with freshly drawn colours; ``mirror`` flips half of them left to right."""
    gray, garment = photographs.gray[rows], photographs.labels[rows]
    if mirror:
        gray = np.where(rng.random(len(gray))[:, None, None] < 0.5, gray[:, :, ::-1], gray)
    colour, background = fashion.draw_attributes(garment, rng, held_out_pairs=held_out_pairs)
    garment_rgb = fashion.jittered_rgb(fashion.GARMENT_HSV, colour, rng)
    background_rgb = fashion.jittered_rgb(fashion.BACKGROUND_HSV, background, rng)
    images = fashion.render(gray, garment_rgb, background_rgb)
    return RenderedBatch(images, garment, colour, background, garment_rgb, background_rgb)


def to_tensor(images: NDArray[np.uint8]) -> torch.Tensor:
    """Float (B, 3, H, W) in [-1, 1] from uint8 (B, H, W, 3)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


def to_uint8(images: torch.Tensor) -> NDArray[np.uint8]:
    """uint8 (B, H, W, 3) from float (B, 3, H, W) in [-1, 1]."""
    return images.add(1.0).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def step_rng(seed: int, step: int) -> np.random.Generator:
    """The generator of one step: a function of (seed, step), so that a resumed run draws what it would have drawn."""
    return np.random.default_rng((seed, step))


def step_torch_rng(seed: int, step: int) -> torch.Generator:
    """The torch generator of one step, likewise."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, written beside and renamed, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, temporary, metadata)
    os.replace(temporary, path)


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})


def save_checkpoint(
    path: Path, networks: dict[str, torch.nn.Module], optimizers: dict[str, torch.optim.Optimizer], step: int
) -> None:
    """Networks, AdamW moments and the step in one safetensors file."""
    tensors = {f"{name}/{key}": value for name, net in networks.items() for key, value in net.state_dict().items()}
    for name, optimizer in optimizers.items():
        for index, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{name}/{index}/{key}": torch.as_tensor(value) for key, value in moments.items()}
    save_tensors(path, tensors, {"step": str(step)})


def load_checkpoint(
    path: Path, networks: dict[str, torch.nn.Module], optimizers: dict[str, torch.optim.Optimizer]
) -> int:
    """Restores what :func:`save_checkpoint` wrote and returns the step; 0 where there is no file."""
    if not path.exists():
        return 0
    tensors, metadata = load_tensors(path)
    for name, net in networks.items():
        net.load_state_dict({k.partition("/")[2]: v for k, v in tensors.items() if k.startswith(f"{name}/")})
    for name, optimizer in optimizers.items():
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(f"optimizer.{name}/"):
                _, index, moment = key.split("/")
                state.setdefault(int(index), {})[moment] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    log.info("resumed %s at step %s", path, metadata["step"])
    return int(metadata["step"])


@torch.no_grad()
def update_ema(average: torch.nn.Module, network: torch.nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * network."""
    for slow, fast in zip(average.parameters(), network.parameters(), strict=True):
        slow.lerp_(fast, 1.0 - decay)


def save_grid(path: Path, images: NDArray[np.uint8], columns: int, zoom: int = 3) -> None:
    """A PNG of uint8 (N, H, W, 3) images in rows of ``columns``."""
    rows = [np.concatenate(list(images[i : i + columns]), axis=1) for i in range(0, len(images), columns)]
    rows = [row for row in rows if row.shape == rows[0].shape]
    picture = Image.fromarray(np.concatenate(rows, axis=0))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(path)


def write_json(path: Path, value: object) -> None:
    """Indented JSON with a final newline."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def fit(
    network: torch.nn.Module,
    name: str,
    options: argparse.Namespace,
    loss_of: Callable[[np.random.Generator, torch.Generator], torch.Tensor],
    accuracy: Callable[[], dict[str, float]],
) -> None:
    """Train a classifier from its last checkpoint to ``options.steps`` and write it to the assets as NAME.safetensors."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.02)
    checkpoint = options.runs / f"{name}.safetensors"
    start = load_checkpoint(checkpoint, {name: network}, {"adamw": optimizer})
    for step in range(start, options.steps):
        rate = 2e-3 * min(1.0, (step + 1) / 100) * 0.5 * (1.0 + np.cos(np.pi * step / options.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(step_rng(options.seed, step), step_torch_rng(options.seed, step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (step + 1) % 400 == 0 or step + 1 == options.steps:
            network.eval()
            log.info("step %d loss %.4f held-out %s", step + 1, loss.item(), accuracy())
            network.train()
            save_checkpoint(checkpoint, {name: network}, {"adamw": optimizer}, step + 1)
    save_tensors(ASSETS / f"{name}.safetensors", network.eval().state_dict())


def arguments(description: str, *, seed: int) -> argparse.ArgumentParser:
    """The options every script has."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="fashion-mnist.npz")
    parser.add_argument("--runs", type=Path, required=True, help="folder of checkpoints, logs and grids")
    parser.add_argument("--seed", type=int, default=seed)
    parser.add_argument("--threads", type=int, default=2)
    return parser


def begin(options: argparse.Namespace) -> None:
    """Logging, threads and denormals for one script."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    options.runs.mkdir(parents=True, exist_ok=True)
