"""From what a user names (a folder, a hub id, one file) to a checkpoint: first what it says of itself, then its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from stepdistill.config.registry import family_names, load_family, suggestion_for
from stepdistill.errors import UserError
from stepdistill.families.base import ALL_PARTS, Checkpoint, CheckpointInfo, CheckpointPart, Family
from stepdistill.families.checkpoints.files import (
    FALLBACK_VARIANTS,
    PICKLES,
    check_component_libraries,
    components,
    raise_if_pickled,
    raise_pickle_error,
    read_header,
    read_json,
    weights,
)
from stepdistill.families.checkpoints.single_file import CONFIGS, FAMILY_OF, detect_architecture
from stepdistill.files.sources import is_hub_id
from stepdistill.runtime.quantization import QuantizationKind, quantize

_CONFIGS = ("model_index.json", "README.md", "*/*.json", "*/*.txt", "*/spiece.model")


def inspect_checkpoint(
    source: str | Path, family: str | None = None, config_dir: str | Path | None = None
) -> CheckpointInfo:
    """What a checkpoint says of itself, from its JSON files and safetensors headers; no weight is read.

    Args:
        source: a diffusers folder, a hub id (from the cache where `HF_HUB_OFFLINE` is set), or a `.safetensors` file in
            the original key format.
        family: registered name; found from the checkpoint where None.
        config_dir: for a single file, a diffusers folder of its architecture, in place of the packaged configs.

    Raises:
        UserError: nothing there, a pickle, a pipeline or an architecture of no family, or configs that do not fit together.
    """
    source = str(source)
    path = Path(source).expanduser()
    if path.suffix in PICKLES and not path.is_dir():
        raise_pickle_error(path)
    if path.is_file():
        return _inspect_file(source, path, family, config_dir)
    if config_dir is not None:
        raise UserError(
            f"config_dir is {str(config_dir)!r}, but {source!r} is no single file and has its own configs: remove it"
        )
    if path.is_dir():
        folder = path
    elif is_hub_id(source):
        folder = _download(source, None, _CONFIGS)
    else:
        raise UserError(
            f"there is no file or folder {source!r}: give a path that exists, or a hub id like 'owner/name'"
        )
    _raise_if_no_pipeline_folder(folder)
    found = load_family(family) if family is not None else _family_of(folder)
    raise_if_pickled(folder)
    return found.inspect(source, folder, None)


def load_checkpoint(
    info: CheckpointInfo,
    dtype: torch.dtype,
    device: torch.device | str,
    parts: frozenset[CheckpointPart] = ALL_PARTS,
    quantization: QuantizationKind | Literal["none"] = "none",
) -> Checkpoint:
    """Load what `inspect_checkpoint` described; network and text encoders in `dtype`, the VAE in float32.

    parts: what is wanted in memory; see `Family.load`.
    quantization: of the network alone; see `models/quantization.py`.

    Raises:
        UserError: weights are absent, pickled, or do not fit the configs; found before any of them is read.
    """
    fetch_weights(info)
    family: Family = load_family(info.family)
    if quantization == "none":
        return family.load(info, dtype, device, parts)
    checkpoint = family.load(info, dtype, "cpu", parts)
    quantize(checkpoint.network, quantization, device)
    if checkpoint.pipeline is not None:
        checkpoint.pipeline.to(device)
    return checkpoint


def fetch_weights(info: CheckpointInfo) -> None:
    """Have the weight files of a hub id on this disk; nothing to do for a folder or a file. Raises UserError."""
    if info.single_file is None and not Path(info.source).expanduser().exists():
        _download_weights(info)


def _inspect_file(source: str, path: Path, family: str | None, config_dir: str | Path | None) -> CheckpointInfo:
    if path.suffix != ".safetensors":
        raise UserError(f"{source!r} is a file of type {path.suffix!r}: give a .safetensors file or a diffusers folder")
    kind = detect_architecture(path, read_header(path))
    found: Family = load_family(family or FAMILY_OF[kind])
    if found.name != FAMILY_OF[kind]:
        raise UserError(
            f"{source!r} holds the tensors of family {FAMILY_OF[kind]!r}, not {family!r}: change or remove the family"
        )
    if config_dir is None:
        return found.inspect(source, CONFIGS / kind, path)
    folder = Path(config_dir).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"config_dir {str(config_dir)!r} is no folder: give a diffusers folder of the same architecture"
        )
    _raise_if_no_pipeline_folder(folder)
    if _family_of(folder).name != found.name:
        raise UserError(
            f"config_dir {str(config_dir)!r} is a folder of family {_family_of(folder).name!r}, while {source!r} holds the tensors "
            f"of {found.name!r}: give a folder of the file's own architecture"
        )
    return found.inspect(source, folder, path)


def _raise_if_no_pipeline_folder(folder: Path) -> None:
    if (folder / "model_index.json").is_file():
        check_component_libraries(folder)
        return
    files = sorted(path.name for path in folder.iterdir() if path.suffix == ".safetensors")
    advice = f"give the file {files[0]!r} itself, or such a folder" if files else "give the folder that holds this file"
    raise UserError(f"{str(folder)!r} is not a diffusers pipeline, as it has no model_index.json: {advice}")


def _family_of(folder: Path) -> Family:
    """The family whose pipeline `model_index.json` names."""
    name = str(read_json(folder / "model_index.json").get("_class_name"))
    known: dict[str, Family] = {}
    for family_name in family_names():
        family: Family = load_family(family_name)
        known[family.pipeline_name] = family
        if name in (family.pipeline_name, *family.other_pipelines):
            return family
    raise UserError(
        f"{str(folder / 'model_index.json')!r} names the pipeline {name!r}, which no family reads, so change the checkpoint or "
        f"set the family: {suggestion_for(name, tuple(known))}"
    )


# ---------------------------------------------------------------- the hub


def _download_weights(info: CheckpointInfo) -> None:
    """Fetch the safetensors files of every component at the revision whose configs were read; one variant each."""
    revision = info.folder.name
    names = components(info.folder)
    _download(info.source, revision, [p for name in names for p in _weight_patterns(name, "")])
    for variant in FALLBACK_VARIANTS:
        # a component without a config of its own (tokenizer, scheduler) has no weights to wait for
        absent = [
            name for name in names if (info.folder / name / "config.json").is_file() and not weights(info.folder, name)
        ]
        if absent:
            _download(info.source, revision, [p for name in absent for p in _weight_patterns(name, variant)])


def _weight_patterns(component: str, variant: str) -> list[str]:
    dotted = f".{variant}" if variant else ""
    stems = [f"{component}/{stem}" for stem in ("model", "diffusion_pytorch_model")]
    return [f"{stem}{tail}" for stem in stems for tail in (
        f"{dotted}.safetensors", f"-*-of-*{dotted}.safetensors", f"{dotted}-*-of-*.safetensors",
    )]  # fmt: skip


def _download(repository: str, revision: str | None, patterns: list[str] | tuple[str, ...]) -> Path:
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).split("\n", 1)[0].split(". ", 1)[0].rstrip(".")
        raise UserError(
            f"{repository!r} is no folder here and could not be had from the hub or its cache ({type(error).__name__}: {reason}): "
            "check the name, your access and connection, or download it first and give the folder"
        ) from error
