"""The architecture that a config names, found without a network and without weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from stepdistill.assets import resolve
from stepdistill.config.registry import load_family
from stepdistill.config.schema import ModelConfig
from stepdistill.errors import UserError
from stepdistill.families.base import CheckpointInfo
from stepdistill.families.checkpoints.loading import inspect_checkpoint
from stepdistill.families.checkpoints.public import PACKAGED_CONFIG_FOLDERS
from stepdistill.families.checkpoints.single_file import CONFIGS, FAMILY_OF
from stepdistill.files.sources import is_hub_id


@dataclass(frozen=True)
class ArchitectureSource:
    """A checkpoint's configs, and in words where they came from."""

    info: CheckpointInfo
    origin: str


def find_architecture(model: ModelConfig) -> ArchitectureSource:
    """The configs of a folder or file, of the hub's local cache, or those that are packaged for public checkpoints.

    Raises:
        UserError: a hub id that is neither cached nor known, with no family to go by; else as `inspect_checkpoint`.
    """
    path = resolve(model.path)
    if Path(path).expanduser().exists() or not is_hub_id(path):
        return ArchitectureSource(
            inspect_checkpoint(path, model.family, model.config_dir), "the checkpoint's own configs"
        )
    if model.config_dir is not None:
        return _in_folder(path, Path(model.config_dir).expanduser(), model.family, f"configs of {model.config_dir}")
    cached = try_to_load_from_cache(path, "model_index.json")
    if isinstance(cached, str):
        try:
            return _in_folder(path, Path(cached).parent, model.family, "configs in the hub's cache")
        except UserError:
            if path not in PACKAGED_CONFIG_FOLDERS:
                raise
    if path in PACKAGED_CONFIG_FOLDERS:
        name = PACKAGED_CONFIG_FOLDERS[path]
        return _packaged(path, name, f"packaged configs {name!r} of this checkpoint, which is not on this machine")
    fitting = [name for name, family in FAMILY_OF.items() if family == model.family]
    if model.family is None:
        raise UserError(
            f"{path!r} is not on this machine and its architecture is not known: set model.family to "
            f"{' or '.join(dict.fromkeys(FAMILY_OF.values()))}, whose public configs are then used"
        )
    if not fitting:
        raise UserError(
            f"{path!r} is not on this machine and no configs are packaged for family {model.family!r}: give a folder "
            "with its configs as model.config_dir"
        )
    return _packaged(path, fitting[0], f"assumed to be built as the packaged configs {fitting[0]!r}, by model.family")


def _packaged(source: str, name: str, origin: str) -> ArchitectureSource:
    return _in_folder(source, CONFIGS / name, FAMILY_OF[name], origin)


def _in_folder(source: str, folder: Path, family: str | None, origin: str) -> ArchitectureSource:
    info = inspect_checkpoint(folder, family)
    return ArchitectureSource(load_family(info.family).inspect(source, folder, None), origin)
