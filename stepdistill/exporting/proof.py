"""The proof of an export: samples of the live generator, which a stock pipeline must reproduce from the files alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.exporting.base_loading import BASE_CONFIGS, loading_code
from stepdistill.families.base import Checkpoint, Family
from stepdistill.families.conditioning import MicroConditioning
from stepdistill.families.recipe import Recipe
from stepdistill.inference.experts import Experts
from stepdistill.inference.pipeline_calls import seeded_scheduler_steps
from stepdistill.roles.sampler import student_sample
from stepdistill.roles.triple import REAL_SCORE, Triple

PROOF_FILE = "proof.safetensors"
TOLERANCE = 1e-4
HALF_TOLERANCE = 2e-2


@dataclass(frozen=True)
class QuantizedStudent:
    """What the student drew on the base that it was trained on.

    Attributes:
        base: how that base was held, in words.
        latents: final latents, (N, C, h, w), of the proof's prompts and seeds.
    """

    base: str
    latents: Tensor

    def difference(self, proof: Proof) -> float:
        """Relative rms: how far the exported student's final latents are from these, over the rms of these."""
        mine = self.latents.float().cpu()
        return float((proof.latents.float() - mine).square().mean().sqrt() / mine.square().mean().sqrt())


@dataclass(frozen=True)
class Proof:
    """What the live generator drew.

    Attributes:
        prompts, seeds: of the N samples.
        noise: initial noise, (N, C, h, w).
        fresh: noise of every later step, (steps - 1, N, C, h, w), as a pipeline draws it from the seeds' generators.
        latents: final latents, (N, C, h, w).
        images: (N, 3, H, W) in [0, 1].
        base_latents: where the untouched base ends up with the same recipe.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    noise: Tensor
    fresh: Tensor
    latents: Tensor
    images: Tensor
    base_latents: Tensor

    def write(self, folder: Path, recipe: Recipe) -> None:
        """Write `proof.safetensors`; prompts, seeds and recipe are in its metadata."""
        tensors = {"noise": self.noise, "fresh": self.fresh, "latents": self.latents, "images": self.images}
        metadata = {"prompts": json.dumps(self.prompts), "seeds": json.dumps(self.seeds), "recipe": recipe.to_json()}
        save_file(
            {key: value.float().cpu().contiguous() for key, value in tensors.items()}, folder / PROOF_FILE, metadata
        )


@torch.no_grad()
def make_proof(
    checkpoint: Checkpoint,
    triple: Triple,
    experts: Sequence[str],
    recipe: Recipe,
    prompts: Sequence[str],
    seeds: Sequence[int],
) -> Proof:
    """Sample the live roles with our own sampler, drawing noise in the order of diffusers' pipelines."""
    draws = _noise(checkpoint, recipe, seeds)
    latents = final_latents(checkpoint, triple, experts, recipe, prompts, seeds)
    base_latents = final_latents(checkpoint, triple, [REAL_SCORE] * len(experts), recipe, prompts, seeds)
    images = torch.cat([triple.family.decode(checkpoint, latent[None]) for latent in latents])
    fresh = torch.stack(draws[1:]) if len(draws) > 1 else torch.zeros(0, *draws[0].shape)
    return Proof(tuple(prompts), tuple(seeds), draws[0], fresh, latents.cpu(), images.cpu(), base_latents.cpu())


@torch.no_grad()
def final_latents(
    checkpoint: Checkpoint,
    triple: Triple,
    experts: Sequence[str],
    recipe: Recipe,
    prompts: Sequence[str],
    seeds: Sequence[int],
) -> Tensor:
    """Where a student's roles end up from the noise of these seeds, (N, C, h, w), on the checkpoint's device."""
    device = next(checkpoint.network.parameters()).device
    draws = [noise.to(device) for noise in _noise(checkpoint, recipe, seeds)]
    cond = triple.family.encode(checkpoint, prompts, [MicroConditioning.plain(*recipe.resolution)] * len(prompts))
    return student_sample(triple, experts, recipe, cond, draws[0], lambda index: draws[index + 1])


def _noise(checkpoint: Checkpoint, recipe: Recipe, seeds: Sequence[int]) -> list[Tensor]:
    """Noise of every step, each (N, C, h, w), as a pipeline draws it from the seeds' generators."""
    shape = checkpoint.info.latent_shape(recipe.resolution)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return [
        torch.stack([torch.randn(shape, generator=g) for g in generators]) for _ in range(recipe.num_inference_steps)
    ]


@torch.no_grad()
def verify(
    pipeline: DiffusionPipeline,
    proof: Proof,
    recipe: Recipe,
    tolerance: float,
    *,
    experts: Experts | None = None,
    allow_base_output: bool = False,
) -> float:
    """Largest difference between the pipeline's images and the proof's.

    Raises:
        UserError: above `tolerance`, or equal to the base although the role was trained.
    """
    arguments = recipe.apply(pipeline)
    if experts is not None:
        arguments["callback_on_step_end"] = experts
    generators = [torch.Generator().manual_seed(seed) for seed in proof.seeds]
    height, width = recipe.resolution
    with seeded_scheduler_steps(pipeline, generators):
        drawn = pipeline(
            list(proof.prompts), generator=generators, output_type="pt", height=height, width=width, **arguments
        ).images
    worst = float((drawn.float().cpu() - proof.images.float()).abs().max())
    if not worst <= tolerance:
        raise UserError(
            f"the exported files do not reproduce the trained generator (largest difference {worst:.2g}, allowed {tolerance:g}): "
            "nothing was written; please report this"
        )
    if not allow_base_output and bool((proof.latents - proof.base_latents).abs().max() < 1e-6):
        raise UserError(
            "the trained generator draws exactly what its base draws, so there is nothing to export: train it first"
        )
    return worst


def reproduction_script(
    checkpoint: Checkpoint,
    base: str,
    format: str,
    file: str,
    tolerance: float,
    *,
    family: Family,
    experts: bool = False,
) -> str:
    """A script that imports torch, safetensors and diffusers alone and reproduces the proof from the exported files."""
    pipeline, place, configs = "DiffusionPipeline", "here", None
    if format != "pipeline":
        place = f"sys.argv[1] if len(sys.argv) > 1 else {base!r}"
        if checkpoint.info.single_file is not None:
            pipeline = f"diffusers.{family.pipeline_class_name(checkpoint.info)}"
            configs = f"os.path.join(here, {BASE_CONFIGS!r})"
    omitted = family.omitted_components(checkpoint.info)
    load = f"pipe = {loading_code(pipeline, place, configs, omitted=omitted, dtype='torch.float32')}"
    if experts:
        load += "\nsys.path.insert(0, here)\nfrom experts import load_experts\nexperts = load_experts(pipe, here)"
    elif format == "guidance-adapter":
        load += "\nsys.path.insert(0, here)\nfrom guidance_adapter import load_guidance_adapter"
        load += '\nload_guidance_adapter(pipe, here, w=recipe["told_guidance"])'
    elif format != "pipeline":
        load += f"\npipe.load_lora_weights(here, weight_name={file!r})"
    switching = "callback_on_step_end=experts, " if experts else ""
    return f'''"""Reproduce proof.safetensors with stock diffusers: python reproduce.py [BASE]"""
import functools, json, os, sys
import diffusers, torch
from diffusers import DiffusionPipeline
from safetensors import safe_open

here = os.path.dirname(os.path.abspath(__file__))
with safe_open(os.path.join(here, "proof.safetensors"), "pt") as proof:
    recipe, prompts, seeds = (json.loads(proof.metadata()[key]) for key in ("recipe", "prompts", "seeds"))
    expected = proof.get_tensor("images")
{load}
pipe.set_progress_bar_config(disable=True)
scheduler = getattr(diffusers, recipe["scheduler"]["class_name"])
pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **recipe["scheduler"]["config"])
ladder = {{key: recipe[key] for key in ("timesteps", "sigmas") if recipe[key]}}
height, width = recipe["resolution"]
generators = [torch.Generator().manual_seed(seed) for seed in seeds]
step = pipe.scheduler.step  # not every pipeline hands its generators on to it
pipe.scheduler.step = functools.wraps(step)(lambda *args, **more: step(*args, **{{"generator": generators, **more}}))
images = pipe(
    prompts, generator=generators, output_type="pt",
    num_inference_steps=recipe["num_inference_steps"], guidance_scale=recipe["guidance_scale"],
    height=height, width=width, {switching}**ladder, **recipe["call"],
).images
difference = float((images.float() - expected).abs().max())
print(f"largest difference from the trained generator: {{difference:.2e}}")
sys.exit(difference > {tolerance!r})
'''
