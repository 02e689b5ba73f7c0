"""A protocol is everything about a measurement except the model: prompts, reference, pixels, network, number of images.

Protocols are YAML files (`assets/protocols/*.yaml`), so that a published number can name its protocol. Every report contains the
resolved protocol, and numbers of different protocols are never put into one table.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from stepdistill.assets import FOLDER
from stepdistill.config.reading import Settings, read_settings
from stepdistill.data.prompts import read_prompts
from stepdistill.errors import UserError
from stepdistill.evaluation.fashion import FIRST_SEED, evaluation_set
from stepdistill.evaluation.images import PixelChain, Quantize
from stepdistill.evaluation.networks.resize import ResizeMode

PROTOCOLS = FOLDER / "protocols"

Metric = Literal[
    "fid", "fid_error", "fd_infinity", "kid", "precision", "recall", "density", "coverage", "cmmd", "prompt_accuracy", "diversity",
    "saturation", "brightness", "sharpness",
]  # fmt: skip
METRIC_GROUPS: dict[str, tuple[Metric, ...]] = {"prdc": ("precision", "recall", "density", "coverage")}
"""Group name -> its metrics."""


class ChainConfig(Settings):
    crop: Literal["none", "square", "patch"] = "none"
    size: int | None = Field(None, gt=0)

    def chain(self) -> PixelChain:
        return PixelChain(self.crop, self.size)

    def text(self) -> str:
        """Describes the crop and size for records."""
        return f"crop {self.crop}, size {self.size or 'as is'}"


class PromptConfig(Settings):
    count: int | None = Field(None, gt=0, description="images of the full protocol; None takes one for each prompt")
    builtin: Literal["fashion"] | None = None
    hint: str = ""


class ReferenceConfig(Settings):
    kind: Literal["images", "teacher", "builtin"] = "images"
    builtin: str | None = None
    count: int | None = Field(None, gt=0)
    lossy: bool = Field(False, description="the reference's originals are JPEG; samples never may be")
    hint: str = ""


class Protocol(Settings):
    description: str
    prompts: PromptConfig
    reference: ReferenceConfig = ReferenceConfig()
    chain: ChainConfig = ChainConfig()
    quantize: Quantize = "round"
    features: str = "inception"
    resize: ResizeMode = "clean"
    metrics: tuple[Metric, ...] = ("fid",)


@dataclass(frozen=True)
class PromptSet:
    """Prompt and seed of each image by global index, and the hash of all prompts."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    sha256: str

    def __len__(self) -> int:
        return len(self.prompts)


def protocol_names() -> list[str]:
    """Returns the names of the shipped protocols."""
    return sorted(path.stem for path in PROTOCOLS.glob("*.yaml"))


def load_protocol(name: str) -> Protocol:
    """Loads a shipped protocol, or a user's YAML file.

    Raises:
        UserError: unknown name, or a file that is not a protocol.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else PROTOCOLS / f"{name}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(name, protocol_names(), n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}" if near else f"known are {', '.join(protocol_names())}"
        raise UserError(f"the protocol {name!r} is not known: {hint}")
    return read_settings(Protocol, path)


def prompt_set(protocol: Protocol, source: str | None, images: int | None, seeds_per_prompt: int = 1) -> PromptSet:
    """Returns the prompts and seeds of a protocol.

    Args:
        source: the user's prompt file; an error for protocols that have their own prompts.
        images: fewer images than the protocol's, which changes the metrics' names.
        seeds_per_prompt: images per prompt, for protocols without their own number of images.

    Raises:
        UserError: no prompts, or fewer than needed.
    """
    if protocol.prompts.builtin is not None:
        if source is not None:
            raise UserError(f"the protocol brings its own prompts ({protocol.prompts.builtin}): leave --prompts out")
        texts, seeds = evaluation_set(images or protocol.prompts.count or 0)
        return PromptSet(tuple(texts), tuple(seeds), text_hash(texts))
    if source is None:
        raise UserError(f"the protocol needs a prompt file: give --prompts FILE with {protocol.prompts.hint}")
    listed = read_prompts(source)
    expanded = [text for text in listed.texts for _ in range(seeds_per_prompt)]
    wanted = images or protocol.prompts.count or len(expanded)
    if len(expanded) < wanted:
        raise UserError(
            f"{source!r} gives {len(expanded)} images and {wanted} are wanted ({protocol.prompts.hint}): "
            f"give the full list, or --num-images {len(expanded)}, which renames the numbers"
        )
    # the hash is over the prompts as drawn, so that it depends on the seeds per prompt and on where the list was cut
    return PromptSet(
        tuple(expanded[:wanted]), tuple(FIRST_SEED + i for i in range(wanted)), text_hash(expanded[:wanted])
    )


def text_hash(texts: Sequence[str]) -> str:
    """Computes the SHA-256 of a list of texts, in hex."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def expand_metric_names(names: Sequence[str]) -> list[Metric]:
    """Replaces groups by their metrics; keeps the order and removes duplicates.

    Raises:
        UserError: unknown name.
    """
    known: tuple[Metric, ...] = Metric.__args__  # type: ignore[attr-defined]
    found: list[Metric] = []
    for name in names:
        if name not in known and name not in METRIC_GROUPS:
            near = difflib.get_close_matches(name, [*known, *METRIC_GROUPS], n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}" if near else f"known are {', '.join([*known, *METRIC_GROUPS])}"
            raise UserError(f"the metric {name!r} is not known: {hint}")
        for metric in METRIC_GROUPS.get(name, tuple(m for m in known if m == name)):
            if metric not in found:
                found.append(metric)
    return found


def metric_label(metric: str, images: int, wanted: int | None) -> str:
    """Returns `fid` at the protocol's own number of images, `fid@N` at another."""
    return metric if wanted is None or images == wanted else f"{metric}@{images}"
