"""The model card of an export, and its upload."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from stepdistill.assets import resolve
from stepdistill.errors import UserError
from stepdistill.exporting.base_loading import BASE_CONFIGS, base_location, loading_code
from stepdistill.families.base import CheckpointInfo, Family
from stepdistill.families.recipe import Recipe
from stepdistill.inference.lora_files import expert_files

HUB_LICENCES = frozenset(
    """
    apache-2.0 mit openrail openrail++ creativeml-openrail-m bigscience-openrail-m bigcode-openrail-m bsd bsd-2-clause bsd-3-clause
    cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0
    cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 agpl-3.0 gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1
    lgpl-3.0 mpl-2.0 unlicense wtfpl gemma other unknown
    """.split()  # noqa: SIM905
)
"""Licence ids that the hub accepts in a card; a licence outside of this list is `other` with a name of its own."""


def write_model_card(
    info: CheckpointInfo,
    family: Family,
    recipe: Recipe,
    format: str,
    file: str,
    folder: Path,
    target: Path,
    notes: Sequence[str] = (),
) -> None:
    """Write the card to `target`: base and its licence, method, recipe, further sentences (`notes`), and usage code that
    works when pasted."""
    kinds = {"guidance-adapter": ["guidance-adapter"], "pipeline": []}
    tags = ["text-to-image", "diffusers", "stepdistill", recipe.method, *kinds.get(format, ["lora"])]
    data = ModelCardData(
        base_model=None if Path(resolve(recipe.base)).expanduser().exists() else recipe.base,
        **_licence_entries(info.licence),
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=tags,
    )
    others = (
        "; for ComfyUI, A1111 and kohya tools export `--format kohya-lora`"
        if family.has_kohya_layout
        else " and ComfyUI"
    )
    files = ", ".join(f"`{name}`" for name in expert_files(file, len(recipe.experts)))
    verb, them = ("are", "them") if recipe.experts else ("is", "it")
    programs = {
        "diffusers-lora": f"{files} {verb} for diffusers{others}.",
        "kohya-lora": f"{files} {verb} for ComfyUI, A1111 and kohya tools; diffusers loads {them} too.",
        "guidance-adapter": f"{files} and `guidance_adapter.py` stand beside the network of any diffusers pipeline of this base.",
        "pipeline": "The folder is a diffusers pipeline.",
    }
    if recipe.experts:
        shares = " + ".join(str(calls) for calls in recipe.experts)
        turns = f"The student is {len(recipe.experts)} experts, which make {shares} of the calls, in this order; `experts.py` hands over "
        turns += "in diffusers, and other programs want a sampler of its own for each expert's steps."
        notes = [turns, *notes]
    height, width = recipe.resolution
    pipeline, is_pipeline = family.pipeline_class_name(info), format == "pipeline"
    load = loading_code(
        pipeline,
        repr(str(folder.resolve()) if is_pipeline else base_location(recipe.base)),
        repr(str(folder.resolve() / BASE_CONFIGS)) if info.single_file is not None and not is_pipeline else None,
        omitted=family.omitted_components(info),
    )
    told = "sample with guidance off (`guidance_scale=1`)"
    if recipe.guidance_scale != 1:
        told = f"the network is told `guidance_scale={recipe.guidance_scale:g}`, as in training"
    guided = f"Guidance w = {recipe.baked_guidance:g} is baked in: {told}. Negative prompts do nothing."
    if format == "guidance-adapter":
        guided = f"Guidance is what the adapter is told: w = {recipe.w:g} in the proof, others by `adapter.w`, one a row if wanted. "
        guided += "Call the pipeline with `guidance_scale=1`; `adapter.w = None` gives the untouched base back. Negative prompts do "
        guided += "nothing. LoRAs, IP-Adapters and ControlNets of this base go with it."
    more = "".join(f"* {note}\n" for note in notes)
    text = f"""# {recipe.num_inference_steps}-step {Path(recipe.base).name}

Distilled from `{recipe.base}` with {recipe.method} to {recipe.num_inference_steps} network calls an image.
{programs[format]}

* Scheduler `{recipe.scheduler_class}`, timesteps {list(recipe.times)}, {height}x{width} pixels.
* {guided}
* The licence is the base model's ({info.licence or "the base states none"}).
{more}
```python
{usage_snippet(pipeline, load, recipe, format, file, folder.resolve())}
```

`reproduce.py` redraws `proof.safetensors` with stock diffusers and compares.
"""
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(target)


def usage_snippet(pipeline: str, load: str, recipe: Recipe, format: str, file: str, folder: Path) -> str:
    """Python that draws one image with stock diffusers.

    Args:
        pipeline: class of the base's pipeline.
        load: an expression that loads it, of `loading_code`.
        format, file: of the export, and its weight file.
        folder: where the export lies.
    """
    ladder = "".join(
        f" {key}={list(times)}," for key, times in (("timesteps", recipe.timesteps), ("sigmas", recipe.sigmas)) if times
    )
    lines = [f"from diffusers import {recipe.scheduler_class}, {pipeline}", "", f"pipe = {load}"]
    if recipe.experts:
        lines = [
            "import sys",
            f"sys.path.insert(0, {str(folder)!r})",
            lines[0],
            "from experts import load_experts",
            *lines[1:],
        ]
        lines.append(f"experts = load_experts(pipe, {str(folder)!r})")
    elif format == "guidance-adapter":
        lines = [
            "import sys",
            f"sys.path.insert(0, {str(folder)!r})",
            lines[0],
            "from guidance_adapter import load_guidance_adapter",
            *lines[1:],
        ]
        lines.append(f"adapter = load_guidance_adapter(pipe, {str(folder)!r}, w={recipe.w})")
    elif format != "pipeline":
        lines.append(f"pipe.load_lora_weights({str(folder)!r}, weight_name={file!r})")
    switching = ", callback_on_step_end=experts" if recipe.experts else ""
    height, width = recipe.resolution
    changes, call = (
        "".join(f", {key}={value!r}" for key, value in settings.items())
        for settings in (recipe.scheduler_config, recipe.call)
    )
    lines += [
        f"pipe.scheduler = {recipe.scheduler_class}.from_config(pipe.scheduler.config{changes})",
        f'image = pipe("a photo", num_inference_steps={recipe.num_inference_steps},{ladder}',
        f"             height={height}, width={width}, guidance_scale={recipe.guidance_scale}{call}{switching}).images[0]",
    ]
    return "\n".join(lines)


def push_to_hub(folder: Path, repository: str) -> None:
    """Uploads an exported folder; in the card, the repository takes the place of the folder on this machine.

    Raises:
        UserError: the hub refuses the name, the token, or the upload. The exported folder stays as it is.
    """
    card = (folder / "README.md").read_text(encoding="utf-8").replace(str(folder.resolve()), repository)
    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository, ignore_patterns=["README.md"])
        api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=repository)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"the export is complete in {str(folder)!r}, but it could not be uploaded to {repository!r} ({reason}): check the name, "
            "your token and the connection, and upload that folder with 'hf upload'"
        ) from None


def _licence_entries(licence: str | None) -> dict[str, str]:
    """The licence of a card: an id of the hub's list as it is, anything else as `other` with its name."""
    if licence is None:
        return {"license": "other"}
    if licence.lower() in HUB_LICENCES:
        return {"license": licence.lower()}
    return {"license": "other", "license_name": licence}
