"""What lies in a checkpoint's folder or file, read without loading a weight: JSON, safetensors headers, file names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from stepdistill.config.yaml_text import parse_yaml
from stepdistill.errors import UserError

PICKLES = frozenset({".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle"})
FALLBACK_VARIANTS = ("fp16", "bf16")
LIBRARIES = frozenset({"diffusers", "transformers", "stable_diffusion"})
"""Libraries that `model_index.json` may name; the last is a module of diffusers, where the safety checker lives."""

# model.safetensors, model.fp16.safetensors, model-00001-of-00002.fp16.safetensors, model.fp16-00001-of-00002.safetensors
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_)?model(?:\.(?P<variant>\w+))?(?:-\d+-of-\d+)?(?:\.(?P<legacy>\w+))?\.safetensors"
)

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class SafetensorsHeader:
    """The header of a safetensors file."""

    shapes: Shapes
    metadata: Mapping[str, str]


def read_header(path: Path) -> SafetensorsHeader:
    """Names and shapes of a file's tensors; no tensor is read. Raises UserError where it is not a safetensors file."""
    try:
        with safe_open(str(path), framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            return SafetensorsHeader(shapes, file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{str(path)!r} is not a readable safetensors file ({error}): download or write it again"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError where the file is missing or broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{str(path)!r} is missing: complete the folder with the file of the original checkpoint"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{str(path)!r} is not readable JSON ({error}): download or write it again") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{str(path)!r} holds a JSON {type(content).__name__} where an object is expected: write it again"
        )
    return content


def components(folder: Path) -> tuple[str, ...]:
    """Components that `model_index.json` names and does not null, in its order."""
    index = read_json(folder / "model_index.json")
    return tuple(name for name, entry in index.items() if isinstance(entry, list) and entry[:1] != [None])


def check_component_libraries(folder: Path) -> None:
    """Checks that `model_index.json` asks for classes of diffusers and transformers alone.

    The index names the library of each component, and diffusers imports what is named there. A model folder must not decide
    which code runs.

    Raises:
        UserError: a component is of another library, or an entry is malformed.
    """
    for name, entry in read_json(folder / "model_index.json").items():
        if not isinstance(entry, list):
            continue
        if len(entry) != 2 or not all(part is None or isinstance(part, str) for part in entry):
            raise UserError(
                f"the entry {name!r} of {str(folder / 'model_index.json')!r} is {entry!r}, and a library and a class are wanted: "
                "download the file again"
            )
        if entry[0] is not None and entry[0] not in LIBRARIES:
            raise UserError(
                f"the component {name!r} of {str(folder)!r} is of the library {entry[0]!r}, which is not imported, because a model "
                "folder must not choose the code that runs: give a checkpoint whose components are of diffusers and transformers"
            )


def weights(folder: Path, component: str) -> dict[str, tuple[Path, ...]]:
    """Safetensors files of a component by variant; "" is the variant without a name."""
    found: dict[str, list[Path]] = {}
    for path in sorted((folder / component).glob("*.safetensors")):
        if match := _WEIGHTS.fullmatch(path.name):
            found.setdefault(match["variant"] or match["legacy"] or "", []).append(path)
    return {variant: tuple(paths) for variant, paths in found.items()}


def variant_of(folder: Path, component: str) -> str:
    """The variant to load of a component: the one without a name, else fp16, else bf16. Raises UserError."""
    found = weights(folder, component)
    for variant in ("", *FALLBACK_VARIANTS):
        if variant in found:
            return variant
    seen = f"only the variants {sorted(found)}" if found else "none"
    raise UserError(
        f"safetensors weights are wanted in {str(folder / component)!r} and there are {seen}: "
        "download the weights of this component"
    )


def raise_if_pickled(folder: Path) -> None:
    """Raises UserError where a component has pickled weights only: unpickling runs whatever code they carry."""
    for component in components(folder):
        pickles = sorted(path for path in (folder / component).glob("*") if path.suffix in PICKLES)
        if pickles and not weights(folder, component):
            raise_pickle_error(pickles[0])


def raise_pickle_error(path: Path) -> None:
    """Raises UserError."""
    raise UserError(
        f"{str(path)!r} is a pickle, which can run code when it is opened, and safetensors files alone are loaded: "
        "convert it on a machine that you can spare, or find the same weights as .safetensors"
    )


def raise_if_keys_differ(where: str, found: Shapes, wanted: Shapes, advice: str) -> None:
    """Raises UserError, naming the first few keys, unless both have the same keys and shapes."""
    differences = {
        "missing": [key for key in wanted if key not in found],
        "unexpected": [key for key in found if key not in wanted],
        "of another shape": [
            f"{key} {found[key]} instead of {wanted[key]}"
            for key in wanted
            if key in found and found[key] != wanted[key]
        ],
    }
    told = [f"{len(keys)} {kind} ({_first_names(keys)})" for kind, keys in differences.items() if keys]
    if told:
        raise UserError(f"the weights of {where} do not fit their config, with tensors {' and '.join(told)}: {advice}")


def licence(folder: Path) -> str | None:
    """The licence in the front matter of `README.md`; None where the folder does not tell."""
    readme = folder / "README.md"
    if not readme.is_file():
        return None
    parts = readme.read_text(encoding="utf-8", errors="replace").split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        card = parse_yaml(parts[1], str(readme))
    except UserError:  # a card that cannot be read says nothing; the checkpoint is none the worse for it
        return None
    if not isinstance(card, dict) or card.get("license") is None:
        return None
    named = card.get("license_name") if card["license"] == "other" else None
    return str(named or card["license"])


def _first_names(keys: Iterable[str], limit: int = 3) -> str:
    listed = list(keys)
    return ", ".join(listed[:limit]) + (", ..." if len(listed) > limit else "")
