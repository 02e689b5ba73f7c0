"""Exports: what stock diffusers loads draws what the trained generator drew, or nothing is written."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.method_cases import CASES, Bench
from support.proofs import reproduced

import stepdistill
from stepdistill.config.reading import parse
from stepdistill.config.schema import RunConfig
from stepdistill.errors import UserError
from stepdistill.exporting.export import export_student
from stepdistill.families.checkpoints.schedulers import scheduler_class
from stepdistill.families.recipe import Recipe
from stepdistill.inference.artifact import SCHEDULERS, draw, load_artifact
from stepdistill.inference.pipeline_calls import seeded_scheduler_steps
from stepdistill.training.run import open_run, train


@pytest.fixture(scope="module")
def run(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A short run: alpha and ranks of its own for some modules, convolutions and attention."""
    root, made = tmp_path_factory.mktemp("runs"), {}

    def make(family: str = "sd", variant: str = "default", mode: str = "lora", transition: str = "renoise") -> Path:
        name = f"{family}-{variant}-{mode}-{transition}"
        if name not in made:
            role = {
                "mode": mode,
                "rank": 8,
                "alpha": 4,
                "rank_pattern": {"to_q": 4},
                "alpha_pattern": {"to_q": 16, "conv1": 2},
            }
            data = {
                "model": {"path": str(tiny(family, variant))},
                "method": {"name": "dmd2", "guidance": 2.0, "steps": 2, "ratio": 1, "transition": transition},
                "roles": {"generator": role, "fake_score": {"mode": mode, "rank": 4}},
                "optimizers": {"generator": {"lr": 1e-2}, "fake_score": {"lr": 1e-3}},
                "data": {"prompts": "builtin:general"},
                "training": {"max_steps": 2, "batch_size": 2, "grid_prompts": 1, "device": "cpu"},
            }
            train(parse(RunConfig, data, "test"), root / name)
            made[name] = root / name
        return made[name]

    return make


@pytest.mark.parametrize("form", ["diffusers-lora", "kohya-lora", "pipeline"])
def test_plain_diffusers_reproduces_the_proof(run: Callable[..., Path], tmp_path: Path, form: str) -> None:
    folder = stepdistill.export(run(), form, tmp_path / "export")
    assert reproduced(folder)
    card = (folder / "README.md").read_text()
    assert "baked in" in card
    assert "from_pretrained" in card


@pytest.mark.ci
@pytest.mark.parametrize(("family", "variant"), [("sd", "v"), ("sdxl", "default")])
@pytest.mark.parametrize("form", ["diffusers-lora", "kohya-lora"])
def test_other_families(run: Callable[..., Path], tmp_path: Path, family: str, variant: str, form: str) -> None:
    stepdistill.export(run(family, variant), form, tmp_path / "export")  # verifies itself to 1e-4


@pytest.mark.ci
def test_ancestral_students_are_euler_ancestral_students(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Its scheduler takes no ladder: plain diffusers gets by with the number of steps."""
    train(Bench(tiny, tmp_path).config(CASES["pso-ancestral"], 2, dtype="float32"), tmp_path / "run")
    folder = stepdistill.export(tmp_path / "run", "diffusers-lora", tmp_path / "export")
    assert reproduced(folder)
    recipe = Recipe.read(folder)
    assert recipe is not None
    assert (recipe.scheduler_class, recipe.spaced) == ("EulerAncestralDiscreteScheduler", (999, 666, 333))
    card = (folder / "README.md").read_text()
    assert "timesteps [999, 666, 333]" in card
    assert "timesteps=" not in card


@pytest.mark.parametrize("variant", ["default", "v"])
def test_deterministic_students_are_euler_students(run: Callable[..., Path], tmp_path: Path, variant: str) -> None:
    folder = stepdistill.export(run("sd", variant, transition="deterministic"), "diffusers-lora", tmp_path / "export")
    recipe = Recipe.read(folder)
    assert recipe is not None
    assert recipe.scheduler_class == "EulerDiscreteScheduler"


@pytest.mark.ci
def test_a_run_on_a_bf16_base_is_proved_in_float32(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """The precision of most configs: the proof must hold to 1e-4, not to what bf16 rounds away."""
    data = {
        "model": {"path": str(tiny("sd", "default")), "dtype": "bfloat16"},
        "method": {"name": "dmd2", "guidance": 2.0, "steps": 2, "ratio": 1},
        "optimizers": {"generator": {"lr": 1e-2}, "fake_score": {"lr": 1e-3}},
        "data": {"prompts": "builtin:general"},
        "training": {"max_steps": 2, "batch_size": 2, "grid_prompts": 1, "device": "cpu"},
    }
    train(parse(RunConfig, data, "test"), tmp_path / "run")
    folder = stepdistill.export(tmp_path / "run", "diffusers-lora", tmp_path / "export")
    assert reproduced(folder)
    assert "sys.exit(difference > 0.0001)" in (folder / "reproduce.py").read_text()


@pytest.mark.ci
def test_a_proof_has_all_bits(run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU torch's convolutions have 10 bits of mantissa by default, and proofs differed from stock diffusers by 4e-4."""
    seen: list[tuple[bool, str]] = []

    def watched(*args: Any, **more: Any) -> Path:
        seen.append((torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()))
        return export_student(*args, **more)

    monkeypatch.setattr("stepdistill.api.training.export_student", watched)
    before = torch.backends.cudnn.allow_tf32
    assert reproduced(stepdistill.export(run(), "diffusers-lora", tmp_path / "export"))
    assert seen == [(False, "highest")]
    assert torch.backends.cudnn.allow_tf32 == before


@pytest.mark.gpu
def test_a_run_on_a_gpu_is_proved_on_the_processor(run: Callable[..., Path], tmp_path: Path) -> None:
    assert reproduced(stepdistill.export(run(), "diffusers-lora", tmp_path / "export", device="cuda"))


def test_half_precision_file(run: Callable[..., Path], tmp_path: Path) -> None:
    folder = stepdistill.export(run(), "diffusers-lora", tmp_path / "half", half=True)
    assert {value.dtype for value in load_file(folder / "pytorch_lora_weights.safetensors").values()} == {torch.float16}


@pytest.mark.ci
def test_full_students_are_pipelines(run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--format pipeline"):
        stepdistill.export(run(mode="full"), "diffusers-lora", tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []
    assert reproduced(stepdistill.export(run(mode="full"), "pipeline", tmp_path / "pipeline"))


def test_non_finite_and_untrained_roles_are_refused(run: Callable[..., Path], tmp_path: Path) -> None:
    session, _ = open_run(run(), "cpu")
    recipe = session.method.recipe()

    def attempt() -> None:
        export_student(
            session.checkpoint, session.triple, ["generator"], recipe, "diffusers-lora", tmp_path / "out",
            prompts=["a"], seeds=[0],
        )  # fmt: skip

    session.triple.reset_role("generator")
    with pytest.raises(UserError, match="nothing to export"):
        attempt()
    next(iter(session.triple.parameters("generator").values())).data[0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        attempt()
    assert list(tmp_path.iterdir()) == []


def test_a_lora_that_does_not_fit_is_named(run: Callable[..., Path], tmp_path: Path, tiny: Callable[..., Path]) -> None:
    folder = stepdistill.export(run(), "diffusers-lora", tmp_path / "export")
    file = folder / "pytorch_lora_weights.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if "lora_A" in key)
    tensors[key.replace("unet.", "unet.nowhere.")] = tensors.pop(key)
    (tmp_path / "bad").mkdir()
    save_file(tensors, tmp_path / "bad" / file.name)
    with pytest.raises(UserError, match="LoRA"):
        load_artifact(str(tiny("sd", "default")), tmp_path / "bad", torch.float32, "cpu")
    with pytest.raises(UserError, match="no LoRA"):
        load_artifact(str(tiny("sd", "default")), tmp_path / "nothing", torch.float32, "cpu")


def test_a_second_lora_beside_and_unloading(
    run: Callable[..., Path], tmp_path: Path, tiny: Callable[..., Path]
) -> None:
    folder = stepdistill.export(run(), "diffusers-lora", tmp_path / "export")

    def digest(pipe: StableDiffusionPipeline) -> str:
        state = pipe.unet.state_dict()
        return hashlib.sha256(b"".join(state[key].numpy().tobytes() for key in sorted(state))).hexdigest()

    pipe = StableDiffusionPipeline.from_pretrained(tiny("sd", "default"), safety_checker=None)
    before = digest(pipe)
    pipe.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors", adapter_name="few")
    pipe.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors", adapter_name="style")
    pipe.set_adapters(["few", "style"], [1.0, 0.5])
    assert pipe.get_active_adapters() == ["few", "style"]
    pipe.unload_lora_weights()
    assert digest(pipe) == before


def test_seeds_do_not_depend_on_the_batch_and_calls_are_counted(
    run: Callable[..., Path], tmp_path: Path, tiny: Callable[..., Path]
) -> None:
    folder = stepdistill.export(run(), "diffusers-lora", tmp_path / "export")
    artifact = load_artifact(str(tiny("sd", "default")), folder, torch.float32, "cpu")
    pipe, recipe = artifact.pipeline, artifact.recipe
    rows: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    prompts, seeds = ["a", "b", "c"], [5, 6, 7]
    whole = torch.cat([torch.from_numpy(part) for part in draw(pipe, prompts, seeds, recipe=recipe, batch_size=3)])
    assert rows == [3, 3]  # two steps, one call each, guidance off
    split = torch.cat([torch.from_numpy(part) for part in draw(pipe, prompts, seeds, recipe=recipe, batch_size=2)])
    assert int((whole.int() - split.int()).abs().max()) <= 1


def test_one_scheduler_leaves_no_trace_in_the_next(tiny: Callable[..., Path]) -> None:
    """A recipe or a name starts from the checkpoint's scheduler config, whatever was drawn before."""

    def drawn(pipe: StableDiffusionPipeline, name: str) -> np.ndarray:
        return next(draw(pipe, ["a"], [5], steps=3, guidance=2.0, scheduler=name))

    pipe = load_artifact(str(tiny("sd", "default")), None, torch.float32, "cpu").pipeline
    own = pipe.scheduler
    fresh = {name: drawn(pipe, name) for name in ("lcm", "dpm++2m", "euler")}
    assert pipe.scheduler is own
    for name in ("euler", "lcm", "dpm++2m"):
        other = load_artifact(str(tiny("sd", "default")), None, torch.float32, "cpu").pipeline
        assert (drawn(other, name) == fresh[name]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_draws_what_full_precision_draws(tiny: Callable[..., Path], dtype: torch.dtype) -> None:
    """The autoencoder stays in float32, where stock pipelines would hand it half-precision latents."""
    half, whole = (
        np.concatenate(
            list(
                draw(load_artifact(str(tiny("sd")), None, kind, "cpu").pipeline, ["a cat"], [3], steps=2, guidance=1.0)
            )
        ).astype(float)
        for kind in (dtype, torch.float32)
    )
    assert float(np.abs(half - whole).mean()) < 4 < float(whole.std())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_is_told_what_its_pipeline_tells(tiny: Callable[..., Path], name: str) -> None:
    """Seeding a scheduler's steps hides none of its parameters: not each of them takes a generator, TCD takes an eta."""
    pipe = load_artifact(str(tiny("sd")), None, torch.float32, "cpu").pipeline
    class_name, changes = SCHEDULERS[name]
    pipe.scheduler = scheduler_class(class_name).from_config({**pipe.scheduler.config, **changes})

    def drawn(seeded: bool) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        with seeded_scheduler_steps(pipe, generators) if seeded else nullcontext():
            call = {"num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "latent"}
            latents: torch.Tensor = pipe(["a", "b"], generator=generators, **call).images
            return latents

    assert torch.equal(drawn(seeded=True), drawn(seeded=False))


PUBLISHED_SD15_SCHEDULER = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "trained_betas": None, "clip_sample": False,
}  # fmt: skip
"""`scheduler_config.json` of Stable Diffusion 1.5 as published: it does not state `timestep_spacing`."""


@pytest.mark.parametrize("transition", ["deterministic", "renoise"])
def test_a_student_of_sd15s_published_scheduler_is_exported(
    copied: Callable[..., Path], tmp_path: Path, transition: str
) -> None:
    base = copied("sd")
    (base / "scheduler/scheduler_config.json").write_text(json.dumps(PUBLISHED_SD15_SCHEDULER))
    data = {
        "model": {"path": str(base)},
        "method": {"name": "dmd2", "guidance": 2.0, "steps": 2, "ratio": 1, "transition": transition},
        "roles": {"generator": {"rank": 4}, "fake_score": {"rank": 4}},
        "optimizers": {"generator": {"lr": 1e-2}},
        "data": {"prompts": "builtin:general"},
        "training": {"max_steps": 2, "batch_size": 2, "grid_prompts": 1, "device": "cpu"},
    }
    train(parse(RunConfig, data, "test"), tmp_path / "run")
    assert reproduced(stepdistill.export(tmp_path / "run", "diffusers-lora", tmp_path / "lora"))


def test_sample_walks_the_same_timesteps_whether_a_default_is_stated_or_not(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    drawn = []
    for name, stated in (("unstated", {}), ("stated", {"timestep_spacing": "leading"})):
        base = Path(shutil.copytree(tiny("sd"), tmp_path / name))
        (base / "scheduler/scheduler_config.json").write_text(json.dumps({**PUBLISHED_SD15_SCHEDULER, **stated}))
        artifact = load_artifact(str(base), None, torch.float32, "cpu")
        images = draw(artifact.pipeline, ["a red cat"], [0], steps=4, guidance=2.0)
        drawn.append(next(iter(images)))
    np.testing.assert_array_equal(*drawn)


def test_a_lora_has_its_strength_without_its_metadata(run: Callable[..., Path], tmp_path: Path) -> None:
    """ComfyUI, and diffusers' `load_lora_weights` of a state dict, take alpha to be the rank of each module."""
    folder = stepdistill.export(run(), "diffusers-lora", tmp_path / "export")
    file = folder / "pytorch_lora_weights.safetensors"
    with_metadata, without = (
        load_artifact(str(run_base(run())), None, torch.float32, "cpu").pipeline for _ in range(2)
    )
    with_metadata.load_lora_weights(str(folder), weight_name=file.name)
    without.load_lora_weights(load_file(file))
    sample = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, 5, with_metadata.unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(1))
    predictions = [pipe.unet(sample, 500, text).sample for pipe in (with_metadata, without)]
    torch.testing.assert_close(*predictions, rtol=0, atol=1e-6)


def run_base(folder: Path) -> str:
    return stepdistill.load_config(folder / "config.yaml").model.path


def test_a_lora_with_a_nan_is_refused(run: Callable[..., Path], tmp_path: Path) -> None:
    folder = stepdistill.export(run(), "diffusers-lora", tmp_path / "export")
    file = folder / "pytorch_lora_weights.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if "lora_B" in key)
    save_file({**tensors, key: tensors[key] * float("nan")}, tmp_path / "nan.safetensors")
    with pytest.raises(
        UserError, match=f"the tensor '{re.escape(key)}' of the LoRA .* holds a NaN or an infinite value"
    ):
        load_artifact(run_base(run()), tmp_path / "nan.safetensors", torch.float32, "cpu")


def test_the_name_of_a_base_is_no_code(copied: Callable[..., Path], tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    hostile = tmp_path / f"m\"+str(open('{ran.name}','w'))+\""
    copied("sd").rename(hostile)
    data = {
        "model": {"path": str(hostile)},
        "method": {"name": "dmd2", "guidance": 2.0, "steps": 2, "ratio": 1},
        "roles": {"generator": {"rank": 4}, "fake_score": {"rank": 4}},
        "optimizers": {"generator": {"lr": 1e-2}},
        "data": {"prompts": "builtin:general"},
        "training": {"max_steps": 1, "batch_size": 2, "grid_prompts": 1, "device": "cpu"},
    }
    train(parse(RunConfig, data, "test"), tmp_path / "run")
    folder = stepdistill.export(tmp_path / "run", "diffusers-lora", tmp_path / "lora")
    assert reproduced(folder)
    assert not ran.exists()
    assert not Path(ran.name).exists()


def test_sdxls_kohya_file_is_recognised_by_a1111_and_forge(run: Callable[..., Path], tmp_path: Path) -> None:
    """Without `ss_base_model_version` A1111 takes it for SD 1.5; Forge looks at `modelspec.architecture`."""
    folder = stepdistill.export(run("sdxl"), "kohya-lora", tmp_path / "export")  # diffusers reads it back: proved
    with safe_open(folder / "lora_kohya.safetensors", "pt") as file:
        metadata, keys = file.metadata(), list(file.keys())
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert all(key.startswith(("lora_unet_input_", "lora_unet_middle_", "lora_unet_output_")) for key in keys)
