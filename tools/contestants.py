"""What the step bench runs: a registered method on a Triple, or three whole networks, as iterations to time and look at."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from benchlib import CONFIGS, GAN_WEIGHT, MODELS, ROLES, assemble, iterate, lora, random_unet
from diffusers import DDPMScheduler
from plain_dmd2 import PlainDMD2
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from stepdistill.config.registry import load_family
from stepdistill.diffusion.draws import Draws, derive_seed
from stepdistill.families.common.clip_tokenizer import tokenizer_of
from stepdistill.families.common.tiny import seeded
from stepdistill.families.conditioning import Conditioning
from stepdistill.methods.base import Progress
from stepdistill.roles.heads import seeded_head
from stepdistill.roles.triple import FAKE_SCORE, GENERATOR, RoleLayout

PLAIN = "three networks"
LAYOUTS = ("lora/lora", "lora/full", "full/full")
"""Generator / fake score."""
GUIDANCE = 7.0
PROMPT = "a photograph of a red house by the sea"


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured: `method` is a registered one with a layout of `LAYOUTS`, or PLAIN."""

    method: str
    layout: str
    model: str
    resolution: int
    rank: int
    targets: str
    steps: int
    ratio: int
    turns: int
    threads: int
    checkpointing: bool
    device: str = "cpu"
    dtype: str = "float32"
    batch: int = 1

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the base, and of all that is computed."""
        return torch.float32 if self.dtype == "float32" else torch.bfloat16

    @property
    def whole_networks(self) -> int:
        """Trained networks that are held whole."""
        return 2 if self.method == PLAIN else self.layout.split("/").count("full")


class Seconds(NamedTuple):
    """By the clock, and of processor time, which other work on the machine hardly changes."""

    wall: float
    cpu: float


class Contestant:
    """An iteration that can be run, timed and looked at.

    Args:
        run: number of the iteration -> losses by role.
        weights: what each role trains.
    """

    def __init__(
        self, case: Case, run: Callable[[int], Mapping[str, Tensor]], weights: Mapping[str, Sequence[Tensor]]
    ) -> None:
        self.case, self.run, self.weights = case, run, weights
        self.done = 0
        self.first_losses: dict[str, float] = {}
        self.before = self.norms()

    def turn(self) -> Seconds:
        """Of an iteration, as the mean over `ratio` of them."""
        self.finalize_placement()
        began, busy = time.perf_counter(), time.process_time()
        for _ in range(self.case.ratio):
            losses = self.run(self.done)
            if self.done == 0:
                self.first_losses = {role: float(loss) for role, loss in losses.items()}
            self.done += 1
        self.finalize_placement()
        wall, cpu = time.perf_counter() - began, time.process_time() - busy
        return Seconds(round(wall / self.case.ratio, 4), round(cpu / self.case.ratio, 4))

    def finalize_placement(self) -> None:
        """Wait for what a GPU was told."""
        if self.case.device == "cuda":
            torch.cuda.synchronize()

    def norms(self) -> dict[str, float]:
        return {
            role: sum(float(w.detach().double().square().sum()) for w in owned) for role, owned in self.weights.items()
        }

    def trained(self) -> dict[str, bool]:
        return {role: norm != self.before[role] for role, norm in self.norms().items()}


def text_encoder(model: str) -> CLIPTextModel:
    """CLIP-L with random weights; two layers of it for the tiny model."""
    config = json.loads((CONFIGS / MODELS[model][1] / "text_encoder" / "config.json").read_text())
    with seeded(0):
        return CLIPTextModel(CLIPTextConfig(**config | ({"num_hidden_layers": 2} if model == "tiny" else {})))


def draws_of(case: Case, iteration: int) -> Draws:
    first = iteration * case.batch
    return Draws(0, iteration, GENERATOR, range(first, first + case.batch), case.device)


def plain(case: Case) -> Contestant:
    """Three whole networks and text encoders."""
    teacher = random_unet(case.model, torch.float32).to(case.device)
    channels, folder = teacher.config.block_out_channels, CONFIGS / MODELS[case.model][1]
    side = case.resolution // 8 // 2 ** (len(channels) - 1)
    iteration = PlainDMD2(
        teacher,
        tokenizer_of(folder / "tokenizer"),
        text_encoder(case.model).to(case.device),
        seeded_head(channels[-1], (side, side), derive_seed(0, "head")).to(case.device),
        DDPMScheduler.from_pretrained(folder / "scheduler"),
        steps=case.steps,
        ratio=case.ratio,
        guidance=GUIDANCE,
        gan_weight=GAN_WEIGHT,
        checkpointing=case.checkpointing,
        dtype=case.torch_dtype,
    )
    images = torch.zeros(case.batch, 4, case.resolution // 8, case.resolution // 8, device=case.device)
    weights = {GENERATOR: [*iteration.generator.parameters()], FAKE_SCORE: iteration.critic_parameters}
    return Contestant(
        case, lambda number: iteration.iteration(number, [PROMPT] * case.batch, images, draws_of(case, number)), weights
    )


def ours(case: Case) -> Contestant:
    """A registered method on a Triple, with text embeddings that are there already."""
    family_name, folder, _ = MODELS[case.model]
    layouts = {}
    for role, mode in zip(ROLES, case.layout.split("/"), strict=True):
        layouts[role] = (
            RoleLayout("full") if mode == "full" else lora(load_family(family_name), case.rank, case.targets)
        )
    options: dict[str, Any] = {"guidance": GUIDANCE}
    if case.method == "dmd2":
        options |= {"steps": case.steps, "ratio": case.ratio, "gan": {"weight": GAN_WEIGHT}}
    prompt = None
    if family_name == "sd":
        encode = text_encoder(case.model)
        tokens = tokenizer_of(CONFIGS / folder / "tokenizer")(
            [PROMPT, ""], padding="max_length", truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            cond, null = encode(tokens.input_ids)[0].split(1)
        prompt = Conditioning(cond), Conditioning(null)
    network = random_unet(case.model, case.torch_dtype).to(case.device)
    run = assemble(
        case.model, case.resolution, network, case.method, options, layouts, prompt=prompt,
        checkpointing=case.checkpointing, rows=case.batch,
    )  # fmt: skip

    def iteration(number: int) -> Mapping[str, Tensor]:
        progress = Progress(number, {role: number for role in run.optimizers}, 0, number)
        return iterate(run, draws_of(case, number), progress)

    return Contestant(case, iteration, {role: [*run.triple.parameters(role).values()] for role in run.optimizers})
