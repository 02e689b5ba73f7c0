"""The model card of an export, and its upload."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData

from stepdistill.assets import resolve
from stepdistill.models.families.base import CheckpointInfo
from stepdistill.models.recipe import Recipe


def write_card(
    info: CheckpointInfo,
    pipeline_name: str,
    recipe: Recipe,
    format: str,
    file: str,
    folder: Path,
    target: Path,
    notes: Sequence[str] = (),
) -> None:
    """Write the card to `target`: base and its licence, method, recipe, further sentences (`notes`), and usage code that
    works when pasted."""
    tags = ["text-to-image", "diffusers", "stepdistill", recipe.method] + (["lora"] if format != "pipeline" else [])
    data = ModelCardData(
        base_model=recipe.base,
        license=info.licence or "other",
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=tags,
    )
    programs = {
        "diffusers-lora": f"`{file}` is for diffusers; for ComfyUI, A1111 and kohya tools export `--format kohya-lora`.",
        "kohya-lora": f"`{file}` is for ComfyUI, A1111 and kohya tools; diffusers loads it too.",
        "pipeline": "The folder is a diffusers pipeline.",
    }
    height, width = recipe.resolution
    more = "".join(f"* {note}\n" for note in notes)
    text = f"""# {recipe.num_inference_steps}-step {Path(recipe.base).name}

Distilled from `{recipe.base}` with {recipe.method} to {recipe.num_inference_steps} network calls an image.
{programs[format]}

* Scheduler `{recipe.scheduler_class}`, timesteps {list(recipe.timesteps or recipe.sigmas)}, {height}x{width} pixels.
* Guidance w = {recipe.baked_guidance:g} is baked in: sample with guidance off (`guidance_scale=1`). Negative prompts do nothing.
* The licence is the base model's ({info.licence or "the base states none"}).
{more}
```python
{usage(pipeline_name, recipe, format, file, folder.resolve())}
```

`reproduce.py` redraws `proof.safetensors` with stock diffusers and compares.
"""
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(target)


def usage(pipeline_name: str, recipe: Recipe, format: str, file: str, folder: Path) -> str:
    """Python that draws one image with stock diffusers."""
    ladder = f"timesteps={list(recipe.timesteps)}" if recipe.timesteps else f"sigmas={list(recipe.sigmas)}"
    source = str(folder) if format == "pipeline" else resolve(recipe.base)
    lines = [
        f"from diffusers import {recipe.scheduler_class}, {pipeline_name}",
        "",
        f'pipe = {pipeline_name}.from_pretrained("{source}")',
    ]
    if format != "pipeline":
        lines.append(f'pipe.load_lora_weights("{folder}", weight_name="{file}")')
    extra = "".join(f", {key}={value!r}" for key, value in recipe.extra().items())
    changes = "".join(f", {key}={value!r}" for key, value in recipe.scheduler_config.items())
    lines += [
        f"pipe.scheduler = {recipe.scheduler_class}.from_config(pipe.scheduler.config{changes})",
        f'image = pipe("a photo", num_inference_steps={recipe.num_inference_steps}, {ladder},',
        f"             guidance_scale={recipe.guidance_scale}{extra}).images[0]",
    ]
    return "\n".join(lines)


def push_to_hub(folder: Path, repository: str) -> None:
    """Upload an exported folder as it is."""
    api = HfApi()
    api.create_repo(repository, exist_ok=True)
    api.upload_folder(folder_path=folder, repo_id=repository)
