"""Trains the UNet and the text encoder on encoded latents; keeps an EMA of both.

PYTHONPATH=. python tools/teacher/train_unet.py --data fashion-mnist.npz --runs runs --steps 9000

The loss is the epsilon regression with min-SNR-5 weights (Hang et al. 2023); one caption in ten is dropped to "".
"""

from __future__ import annotations

import copy
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import common
import networks
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from stepdistill.data import fashion

NOT_SAID = -1
SAID_SHARES = (0.70, 0.10, 0.10, 0.10)  # all | garment + colour | garment + background | garment


@dataclass(frozen=True)
class Latents:
    """Posterior means and standard deviations (N, 8, 8, 8) in float16 and attribute indices (N, 3)."""

    mean: torch.Tensor
    std: torch.Tensor
    attributes: NDArray[np.int64]
    scaling_factor: float

    def batch(self, rows: NDArray[np.int64], noise: torch.Generator) -> torch.Tensor:
        """Scaled posterior samples x0 (B, 8, 8, 8)."""
        mean, std = self.mean[rows].float(), self.std[rows].float()
        return self.scaling_factor * (mean + std * torch.randn(mean.shape, generator=noise))


@dataclass(frozen=True)
class CaptionTable:
    """Token ids of every caption, indexed by garment, colour + 1, background + 1 (0 = not said) and wording."""

    ids: torch.Tensor  # (10, 9, 8, 6, 16)
    empty: torch.Tensor  # (16,)

    def batch(self, attributes: NDArray[np.int64], rng: np.random.Generator, dropout: float) -> torch.Tensor:
        """Token ids (B, 16) of random wordings, some attributes left unsaid, some captions dropped to ""."""
        said = rng.choice(len(SAID_SHARES), size=len(attributes), p=SAID_SHARES)
        colour = np.where(said <= 1, attributes[:, 1], NOT_SAID) + 1
        background = np.where((said == 0) | (said == 2), attributes[:, 2], NOT_SAID) + 1
        ids = self.ids[attributes[:, 0], colour, background, rng.integers(fashion.WORDING_COUNT, size=len(attributes))]
        dropped = torch.from_numpy(rng.random(len(attributes)) < dropout)
        return torch.where(dropped[:, None], self.empty, ids)


def load_latents(runs: Path) -> Latents:
    """What ``encode_latents.py`` wrote."""
    tensors, _ = common.load_tensors(runs / "latents.safetensors")
    scaling_factor = json.loads((runs / "latents.json").read_text())["scaling_factor"]
    return Latents(tensors["mean"], tensors["std"], tensors["attributes"].numpy().astype(np.int64), scaling_factor)


def build_caption_table() -> CaptionTable:
    """All 10 x 9 x 8 x 6 captions, tokenized once."""
    tokenizer = networks.build_tokenizer()
    captions = []
    for garment in fashion.GARMENTS:
        for colour in (None, *fashion.COLOURS):
            for background in (None, *fashion.BACKGROUNDS):
                attributes = fashion.Attributes(garment, colour, background)
                captions += [fashion.caption(attributes, wording=wording) for wording in range(fashion.WORDING_COUNT)]
    shape = (len(fashion.GARMENTS), len(fashion.COLOURS) + 1, len(fashion.BACKGROUNDS) + 1, fashion.WORDING_COUNT, -1)
    return CaptionTable(networks.tokenize(tokenizer, captions).view(shape), networks.tokenize(tokenizer, [""])[0])


def diffusion_loss(
    unet: nn.Module, text: torch.Tensor, x0: torch.Tensor, alphas_cumprod: torch.Tensor, noise: torch.Generator
) -> torch.Tensor:
    """min(SNR, 5) / SNR * |eps - eps_theta(alpha x0 + sigma eps, t)|^2, with t stratified over the batch."""
    offsets = (torch.arange(len(x0)) + torch.rand(len(x0), generator=noise)) / len(x0)
    t = (offsets * len(alphas_cumprod)).long().clamp_max(len(alphas_cumprod) - 1)
    alpha2 = alphas_cumprod[t].view(-1, 1, 1, 1)
    eps = torch.randn(x0.shape, generator=noise)
    predicted = unet(alpha2.sqrt() * x0 + (1.0 - alpha2).sqrt() * eps, t, text, return_dict=False)[0]
    snr = alpha2.flatten() / (1.0 - alpha2.flatten())
    return (snr.clamp_max(5.0) / snr * (predicted - eps).square().mean((1, 2, 3))).mean()


def learning_rate(peak: float, step: int, steps: int, warmup: int = 200) -> float:
    """Linear warmup, then a cosine to 1 % of the peak."""
    return peak * min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * step / steps)))


def main() -> None:
    parser = common.arguments(__doc__, seed=505)
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet; needs a C++ compiler")
    options = parser.parse_args()
    common.begin(options)
    torch.manual_seed(options.seed)
    latents, captions = load_latents(options.runs), build_caption_table()
    alphas_cumprod = networks.build_scheduler().alphas_cumprod
    unet, text_encoder = networks.build_unet(), networks.build_text_encoder(networks.build_tokenizer())
    student = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    average = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=options.rate, betas=(0.9, 0.99), weight_decay=0.01)
    checkpoint = options.runs / "unet.safetensors"
    state = {"student": student, "average": average}
    step, saved, losses = common.load_checkpoint(checkpoint, state, {"adamw": optimizer}), time.monotonic(), []
    network = torch.compile(unet) if options.compile else unet

    def save() -> None:
        common.save_checkpoint(checkpoint, state, {"adamw": optimizer}, step)
        halves = {"unet": average["unet"], "text_encoder": average["text_encoder"]}
        common.save_checkpoint(options.runs / "unet_ema.safetensors", halves, {}, step)

    while step < options.steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options.rate, step, options.steps)
        rng, noise = common.step_rng(options.seed, step), common.step_torch_rng(options.seed, step)
        rows = rng.integers(len(latents.mean), size=options.batch)
        ids = captions.batch(latents.attributes[rows], rng, dropout=0.1)
        text = text_encoder(ids).last_hidden_state
        loss = diffusion_loss(network, text, latents.batch(rows, noise), alphas_cumprod, noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        step += 1
        common.update_ema(average, student, min(options.ema, (1 + step) / (10 + step)))
        losses.append(loss.item())
        if step % 100 == 0:
            common.log.info("step %d loss %.4f", step, np.mean(losses[-100:]))
        if time.monotonic() - saved > 180.0:
            saved = time.monotonic()
            save()
    save()


if __name__ == "__main__":
    main()
