"""Guidance adapters as files: what stock diffusers and the one module draw is what the trained generator drew."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from support.method_cases import CASES, Bench
from support.proofs import reproduced

import stepdistill
from stepdistill.config.schema import RunConfig
from stepdistill.data.prompts import read_prompts
from stepdistill.errors import UserError
from stepdistill.families.recipe import Recipe
from stepdistill.inference.artifact import draw, load_artifact
from stepdistill.training.collect import CollectConfig, collect
from stepdistill.training.run import open_run, train

FAMILIES = ["sd", "sdxl", "sd3", "sana"]


@pytest.fixture(scope="module")
def run(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A short run of adapters on a tiny checkpoint."""
    root = tmp_path_factory.mktemp("agd")

    def make(family: str = "sd") -> Path:
        if not (root / family).exists():
            # the matrix has adapters as published, and these are not
            case = replace(CASES["agd"], generator={"kind": "perceptron", "rising": True})
            config = Bench(tiny, root).config(case, 2, family=family, dtype="float32", ema=0.0, batch_size=2)
            faster = config.optimizers.model_copy(
                update={"generator": config.optimizers.generator.model_copy(update={"lr": 2e-2, "warmup": 0})}
            )
            train(config.model_copy(update={"optimizers": faster}), root / family)
        return root / family

    return make


@pytest.mark.ci
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_diffusers_and_one_module_reproduce_the_proof(
    run: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    folder = stepdistill.export(run(family), "guidance-adapter", tmp_path / "export")
    found = {path.name for path in folder.iterdir()}
    assert {"guidance_adapter.safetensors", "guidance_adapter.py", "recipe.json", "README.md", "reproduce.py"} <= found
    with safe_open(folder / "guidance_adapter.safetensors", "pt") as file:
        assert {"guidance_adapter", "stepdistill_recipe"} <= set(file.metadata())
    recipe = Recipe.read(folder)
    assert recipe is not None
    assert (recipe.guidance_scale, recipe.told_guidance) == (1.0, 3.0)
    if family == "sd":
        assert reproduced(folder)
        card = (folder / "README.md").read_text()
        code = card.split("```python\n")[1].split("```")[0]
        assert "baked in" not in card
        blocked = f"import sys; sys.modules['stepdistill'] = None\n{code}\nassert image.size == (16, 16)"
        subprocess.run([sys.executable, "-c", blocked], check=True, capture_output=True)


def test_what_cannot_be_exported(run: Callable[..., Path], tmp_path: Path, tiny: Callable[..., Path]) -> None:
    for form in ("diffusers-lora", "kohya-lora", "pipeline"):
        with pytest.raises(UserError, match="--format guidance-adapter"):
            stepdistill.export(run(), form, tmp_path / form)
    config = Bench(tiny, tmp_path).config(CASES["dmd2"], 1, family="sd", dtype="float32", batch_size=1)
    train(config, tmp_path / "lora")
    with pytest.raises(UserError, match=r"no guidance adapter .* --format diffusers-lora"):
        stepdistill.export(tmp_path / "lora", "guidance-adapter", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_samples_at_another_w(run: Callable[..., Path], tmp_path: Path, tiny: Callable[..., Path]) -> None:
    """`--guidance` is what the adapter is told, in as many network calls."""
    folder = stepdistill.export(run(), "guidance-adapter", tmp_path / "export")
    artifact = load_artifact(str(tiny("sd")), folder, torch.float32, "cpu")
    calls: list[int] = []
    artifact.pipeline.unet.register_forward_pre_hook(lambda _module, args: calls.append(len(args[0])))
    drawn = [
        next(draw(artifact.pipeline, ["a cat"], [0], recipe=artifact.recipe, adapter=artifact.adapter, guidance=w))
        for w in (None, 3.0, 5.0)
    ]
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] != drawn[2]).any()
    assert calls == [1] * 6
    with pytest.raises(UserError, match="lacks"):
        load_artifact(str(tiny("sdxl")), folder, torch.float32, "cpu")


def test_an_adapted_teacher_for_another_method(
    run: Callable[..., Path], tmp_path: Path, tiny: Callable[..., Path]
) -> None:
    """Its guided calls have B rows, not 2 B; a collection draws with it too; its own distillation is refused."""
    folder = stepdistill.export(run(), "guidance-adapter", tmp_path / "export")
    bench = Bench(tiny, tmp_path)

    def adapted(case: str, **training: object) -> RunConfig:
        config = bench.config(CASES[case], 2, family="sd", dtype="float32", batch_size=2, **training)
        return config.model_copy(update={"model": config.model.model_copy(update={"guidance_adapter": str(folder)})})

    train(adapted("dmd2"), tmp_path / "student")
    session, _ = open_run(tmp_path / "student")
    calls: list[int] = []
    session.triple.base.register_forward_pre_hook(lambda _module, args: calls.append(len(args[0])))
    cond, null = session.encoder.text(["a cat"], [size_of(session)]), session.encoder.null([size_of(session)])
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = (session.triple.real_score.guided(x, 500.0, cond, null, w) for w in (2.0, 5.0))
    assert calls == [1, 1]
    assert not torch.equal(first, second)
    with pytest.raises(UserError, match="told its guidance, in one call"):
        train(adapted("agd"), tmp_path / "again")
    wanted = {
        "model": {"path": str(tiny("sd")), "guidance_adapter": str(folder)}, "prompts": "builtin:general", "count": 1,
        "guidance": 2.0, "steps": 2, "device": "cpu",
    }  # fmt: skip
    assert collect("pairs", CollectConfig.model_validate(wanted), tmp_path / "pairs") == 1
    with pytest.raises(UserError, match=r"remove model\.guidance_adapter"):
        collect("trajectories", CollectConfig.model_validate(wanted), tmp_path / "trajectories")


def size_of(session: stepdistill.training.session.Session) -> object:
    from stepdistill.families.conditioning import MicroConditioning

    return MicroConditioning.plain(*session.setup.problem.size)


def test_adapters_of_a_quantised_base_are_proved_on_the_whole_one(tiny: Callable[..., Path], tmp_path: Path) -> None:
    config = Bench(tiny, tmp_path).config(CASES["agd"], 2, dtype="float32", ema=0.0, batch_size=2)
    held = config.model.model_copy(update={"quantization": "int8"})
    train(config.model_copy(update={"model": held}), tmp_path / "run")
    folder = stepdistill.export(tmp_path / "run", "guidance-adapter", tmp_path / "export")
    assert "trained on a base in int8" in (folder / "README.md").read_text()


def test_the_module_is_the_package_s_own(run: Callable[..., Path], tmp_path: Path) -> None:
    """And the file loads onto a pipeline that has a LoRA, with one w a row."""
    folder = stepdistill.export(run(), "guidance-adapter", tmp_path / "export", half=True)
    text = (folder / "guidance_adapter.py").read_text()
    assert "import stepdistill" not in text
    assert "from stepdistill" not in text
    from stepdistill.roles.guidance_adapter import load_guidance_adapter

    recipe, config = Recipe.read(folder), read_prompts("builtin:general")
    assert recipe is not None
    pipe = DiffusionPipeline.from_pretrained(recipe.base)
    pipe.set_progress_bar_config(disable=True)
    adapter = load_guidance_adapter(pipe, folder, torch.tensor([1.5, 4.5]))
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    images = pipe(
        [config[0]] * 2, num_inference_steps=2, guidance_scale=1.0, generator=generators, output_type="pt"
    ).images
    assert not torch.equal(images[0], images[1])
    assert adapter.settings.w_high == 5.0
