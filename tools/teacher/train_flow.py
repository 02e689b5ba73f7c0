"""Trains the flow-matching twin of the embedded teacher: SD3's transformer on the same latents and captions; keeps an EMA.

PYTHONPATH=. python tools/teacher/train_flow.py --data fashion-mnist.npz --runs runs --steps 6000

Autoencoder and text encoder are the embedded teacher's own and stay as they are. The regression is on its velocity rather
than on that of single photographs: x_t = (1 - t) x0 + t eps is, scaled, a state of its process of the same ratio of noise to
signal, and its eps gives u = eps - x0 without the spread of the photographs that could lie behind x_t. Where the flow is
noisier than the noisiest state of that process (t > 0.936), the photograph's own velocity is the target. Times are
logit-normal (Esser et al. 2024, section 3.1); one caption in ten is dropped to "".
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import common
import flow_networks
import numpy as np
import torch
from countedzeros import count_zeros
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn
from train_unet import Latents, build_caption_table, learning_rate, load_latents

from stepdistill.families.sd3 import T5_TOKENS


@dataclass(frozen=True)
class Said:
    """What the two networks hear of a caption: (B, 16, 128) for the UNet, (B, 272, 160) and (B, 160) for the transformer."""

    unet: Tensor
    text: Tensor
    pooled: Tensor


class Captions:
    """Every caption encoded once, by row of its token ids."""

    @torch.no_grad()
    def __init__(self, teacher: StableDiffusionPipeline) -> None:
        self.table = build_caption_table()
        ids = torch.cat([self.table.ids.flatten(0, 3), self.table.empty[None]])
        first, second = flow_networks.build_text_encoders(teacher)
        unet, text, pooled = [], [], []
        for part in ids.split(512):
            unet.append(teacher.text_encoder(part).last_hidden_state)
            heard = [encoder(part, output_hidden_states=True) for encoder in (first, second)]
            text.append(torch.cat([one.hidden_states[-2] for one in heard], dim=-1))
            pooled.append(torch.cat([one.text_embeds for one in heard], dim=-1))
        self.said = Said(torch.cat(unet), torch.cat(text), torch.cat(pooled))
        self.rows = {tuple(row): index for index, row in enumerate(ids.tolist())}

    def batch(self, attributes: np.ndarray, rng: np.random.Generator) -> Said:
        ids = self.table.batch(attributes, rng, dropout=0.1)
        rows = torch.tensor([self.rows[tuple(row)] for row in ids.tolist()])
        text = self.said.text[rows]
        zeros = text.new_zeros(len(text), T5_TOKENS, text.shape[2])
        return Said(self.said.unet[rows], torch.cat([text, zeros], dim=1), self.said.pooled[rows])


class Target:
    """The embedded teacher's velocity at a state of the flow."""

    def __init__(self, teacher: StableDiffusionPipeline) -> None:
        self.unet = teacher.unet.eval().requires_grad_(False)
        cumulative = teacher.scheduler.alphas_cumprod.double()
        self.log_ratios = (0.5 * ((1.0 - cumulative) / cumulative).log()).numpy()  # log(sigma / alpha), ascending

    @torch.no_grad()
    def velocity(self, x0: Tensor, eps: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """u (B, C, H, W) at x_t = (1 - t) x0 + t eps."""
        log_ratio = (t.double() / (1.0 - t.double())).log().numpy()
        timestep = torch.from_numpy(np.interp(log_ratio, self.log_ratios, np.arange(len(self.log_ratios)))).float()
        wide = t.view(-1, 1, 1, 1)
        x_t = (1.0 - wide) * x0 + wide * eps
        norm = ((1.0 - wide).square() + wide.square()).sqrt()
        found = self.unet(x_t / norm, timestep, text, return_dict=False)[0]
        taught = (found - x_t) / (1.0 - wide).clamp_min(1e-2)  # u = (eps - x_t) / (1 - t)
        return torch.where((torch.from_numpy(log_ratio) > self.log_ratios[-1]).view(-1, 1, 1, 1), eps - x0, taught)


def draw(latents: Latents, rows: np.ndarray, noise: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """x0, eps and times t in (0, 1), stratified over the batch before the logistic function."""
    x0 = latents.batch(rows, noise)
    eps = torch.randn(x0.shape, generator=noise)
    share = (torch.arange(len(x0)) + torch.rand(len(x0), generator=noise)) / len(x0)
    t = torch.special.ndtri(share.double().clamp(1e-4, 1 - 1e-4)).sigmoid().float()
    return x0, eps, t


def main() -> None:
    parser = common.arguments(__doc__, seed=707)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop, saved, after so long")
    options = parser.parse_args()
    common.begin(options)
    torch.manual_seed(options.seed)
    teacher = StableDiffusionPipeline.from_pretrained(common.ASSETS / "teacher", safety_checker=None)
    latents, captions, target = load_latents(options.runs), Captions(teacher), Target(teacher)
    network = flow_networks.build_transformer()
    count_zeros(network, T5_TOKENS)
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.rate, betas=(0.9, 0.99), weight_decay=0.01)
    checkpoint = options.runs / "flow.safetensors"
    state: dict[str, nn.Module] = {"student": network, "average": average}
    step, losses = common.load_checkpoint(checkpoint, state, {"adamw": optimizer}), []
    begun = saved = time.monotonic()

    def save() -> None:
        common.save_checkpoint(checkpoint, state, {"adamw": optimizer}, step)
        common.save_checkpoint(options.runs / "flow_ema.safetensors", {"transformer": average}, {}, step)

    while step < options.steps and time.monotonic() - begun < 60.0 * options.minutes:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options.rate, step, options.steps)
        rng, noise = common.step_rng(options.seed, step), common.step_torch_rng(options.seed, step)
        rows = rng.integers(len(latents.mean), size=options.batch)
        said = captions.batch(latents.attributes[rows], rng)
        x0, eps, t = draw(latents, rows, noise)
        wanted = target.velocity(x0, eps, t, said.unet)
        wide = t.view(-1, 1, 1, 1)
        found = network(
            (1.0 - wide) * x0 + wide * eps,
            encoder_hidden_states=said.text,
            pooled_projections=said.pooled,
            timestep=1000.0 * t,
            return_dict=False,
        )[0]
        loss = (found - wanted).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        step += 1
        common.update_ema(average, network, min(options.ema, (1 + step) / (10 + step)))
        losses.append(loss.item())
        if step % 50 == 0:
            common.log.info("step %d loss %.4f", step, np.mean(losses[-50:]))
        if time.monotonic() - saved > 180.0:
            saved = time.monotonic()
            save()
    save()


if __name__ == "__main__":
    main()
