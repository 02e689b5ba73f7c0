"""The embedded flow-matching teacher: what it is made of, what it draws, how it is distilled; the zeros that stand for T5."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline, StableDiffusionPipeline
from torch import Tensor

from stepdistill.api import training as api
from stepdistill.assets import FLOW_TEACHER, FOLDER, TEACHER, resolve
from stepdistill.config.reading import parse
from stepdistill.config.registry import load_family
from stepdistill.config.schema import RunConfig
from stepdistill.evaluation.fashion import FashionScorer, evaluation_set
from stepdistill.families.checkpoints.loading import inspect_checkpoint, load_checkpoint
from stepdistill.families.conditioning import MicroConditioning
from stepdistill.families.sd3 import T5_TOKENS
from stepdistill.inference.artifact import draw, load_artifact
from stepdistill.roles.denoiser import Denoiser
from stepdistill.roles.sampler import teacher_sample
from stepdistill.training.run import train

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "teacher"))
import countedzeros


@pytest.mark.parametrize("source", [FLOW_TEACHER, "no_t5"])
def test_one_zero_counted_256_times_is_256_zeros(tiny: Callable[..., Path], source: str) -> None:
    folder = resolve(source) if source == FLOW_TEACHER else str(tiny("sd3", source))
    network = load_checkpoint(inspect_checkpoint(folder), torch.float64, "cpu").network
    config, noise = network.config, torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=noise, dtype=torch.float64)

    text = torch.cat(
        [normal(2, 7, config.joint_attention_dim), torch.zeros(2, T5_TOKENS, config.joint_attention_dim)], 1
    )
    given = {
        "hidden_states": normal(2, config.in_channels, 8, 8),
        "encoder_hidden_states": text,
        "pooled_projections": normal(2, config.pooled_projection_dim),
        "timestep": torch.tensor([100.0, 900.0]),
        "return_dict": False,
    }
    with torch.no_grad():
        whole = network(**given)[0]
        unlike = network(**{**given, "encoder_hidden_states": text[:, : 7 + 1]})[0]
        countedzeros.count_zeros(network, T5_TOKENS)
        counted = network(**given)[0]
    assert float((counted - whole).abs().max()) < 1e-6 * float(whole.std())  # the time embedding is float32
    assert float((unlike - whole).abs().max()) > 1e-3 * float(whole.std())
    with pytest.raises(ValueError, match="not zero"):
        countedzeros.without_repeats(text, T5_TOKENS + 1)


def test_its_parts_are_the_embedded_teachers() -> None:
    """Autoencoder, and the text as the UNet hears it before the last norm; the package grows by less than 20 MB."""
    flow = StableDiffusion3Pipeline.from_pretrained(resolve(FLOW_TEACHER), text_encoder_3=None, tokenizer_3=None)
    teacher = StableDiffusionPipeline.from_pretrained(resolve(TEACHER), safety_checker=None)
    assert isinstance(flow.scheduler, FlowMatchEulerDiscreteScheduler)
    for ours, theirs in zip(flow.vae.parameters(), teacher.vae.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    ids = teacher.tokenizer("a photo of a red dress on a blue background", return_tensors="pt").input_ids
    with torch.no_grad():
        heard = flow.text_encoder(ids, output_hidden_states=True)
        told = teacher.text_encoder(ids, output_hidden_states=True)
    torch.testing.assert_close(heard.hidden_states[-2], told.hidden_states[-1])
    torch.testing.assert_close(heard.text_embeds, told.pooler_output)
    size = sum(path.stat().st_size for path in Path(resolve(FLOW_TEACHER)).rglob("*") if path.is_file())
    assert size < 20e6


@pytest.mark.ci
@pytest.mark.parametrize("source", [TEACHER, FLOW_TEACHER])
def test_latents_are_known_again_under_noise(source: str) -> None:
    """x0 of a noised sample, far nearer than the best linear guess: a wrong sign, time or scale would not be."""
    info = inspect_checkpoint(resolve(source))
    family, checkpoint = load_family(info.family), load_checkpoint(info, torch.float32, "cpu")
    denoiser = Denoiser(checkpoint.network, family, info.schedule)
    prompts, sizes = evaluation_set(12)[0], [MicroConditioning.plain(32, 32)] * 12
    cond, null = family.encode(checkpoint, prompts, sizes), family.null(checkpoint, sizes)
    stream = torch.Generator().manual_seed(0)
    noise, eps = (torch.randn(12, 8, 8, 8, generator=stream) for _ in range(2))
    x0 = teacher_sample(denoiser, cond, null, noise, 8, 1.5)
    t = info.schedule.time_at_fraction(torch.tensor(0.3, dtype=torch.float64)).expand(12)
    alpha, sigma = info.schedule.levels(t, x0)
    x_t = alpha * x0 + sigma * eps
    with torch.no_grad():
        found = denoiser.x0(x_t, t, cond)
    power = float(x0.square().mean())
    linear = x_t * alpha * power / (alpha**2 * power + sigma**2)
    ours, theirs = (float((guess - x0).square().mean()) / power for guess in (found, linear))
    assert ours < 0.6 * theirs, (ours, theirs)


def test_it_draws_what_it_is_told() -> None:
    pipeline = load_artifact(resolve(FLOW_TEACHER), None, torch.float32, "cpu").pipeline
    countedzeros.count_zeros(pipeline.transformer, T5_TOKENS)
    prompts, seeds = evaluation_set(60)
    drawn = np.concatenate(list(draw(pipeline, prompts, seeds, steps=8, guidance=1.5, batch_size=60)))
    row = json.loads((FOLDER / "flow_teacher_row.json").read_text())["1.5"]
    scores = FashionScorer().score(drawn, prompts)
    assert scores.prompt_accuracy == pytest.approx(row["prompt_accuracy"], abs=0.08)
    assert scores.prompt_accuracy > 0.85


def test_the_readme_says_its_row() -> None:
    row = json.loads((FOLDER / "flow_teacher_row.json").read_text())["1.5"]
    said = f"Fréchet {row['frechet']:.3f} and accuracy {row['prompt_accuracy']:.3f} in {row['steps']} Euler steps"
    assert row["num_images"] == 1536
    assert said in (Path(__file__).parents[2] / "README.md").read_text()


@pytest.mark.ci
def test_it_is_distilled_and_exported(tmp_path: Path) -> None:
    """A few iterations by its name in a config, and the LoRA in stock diffusers."""
    config = parse(
        RunConfig,
        {
            "model": {"path": FLOW_TEACHER},
            "method": {"name": "dmd2", "guidance": 1.5, "steps": 2, "transition": "deterministic", "ratio": 1},
            "roles": {name: {"mode": "lora", "rank": 4} for name in ("generator", "fake_score")},
            "data": {"prompts": "builtin:fashion_train"},
            "training": {"max_steps": 2, "batch_size": 2, "device": "cpu", "grid_every": 0},
        },
        "config",
    )
    train(config, tmp_path / "run")
    folder = api.export(tmp_path / "run", "diffusers-lora", tmp_path / "lora", device="cpu")
    recipe = json.loads((folder / "recipe.json").read_text())
    assert recipe["scheduler"]["class_name"] == "FlowMatchEulerDiscreteScheduler"
    assert recipe["base"] == FLOW_TEACHER
