"""The options of `stepdistill evaluate`, once: typed fields, from which the command line's options are generated.

The Python functions `evaluate` and `evaluate_images` take the same names as keywords.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge

from stepdistill.config.registry import suggestion_for
from stepdistill.errors import UserError

S = TypeVar("S", bound="MeasuringOptions")
LISTS = ("metrics", "clip_conventions", "steps")


def option(default: Any, text: str) -> Any:
    """Makes the field of an option with its default and help text."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class MeasuringOptions:
    """Options of every evaluation, of a model or of a folder of images."""

    reference: str | None = option(None, "Folder of images, or statistics (.npz), to compare with.")
    prompts: str | None = option(
        None,
        "Prompt file, or builtin:NAME. For a folder of images: one prompt per image in the order of the file names; "
        "captions beside the images by default.",
    )
    features: str | None = option(
        None,
        "Feature network: inception[:FILE], dinov2:PATH, clip:PATH, judge, random or MODULE:FUNCTION; "
        "the protocol's by default.",
    )
    resize: Literal["clean", "legacy_pytorch", "legacy_tensorflow"] | None = option(
        None, "How images are resized to the Inception's 299 pixels; the protocol's by default."
    )
    metrics: tuple[str, ...] | None = option(
        None, "Metrics, as fid,fd_infinity,kid,prdc,cmmd; the protocol's by default."
    )
    clip: str | None = option(None, "CLIP checkpoint for the CLIP score.")
    clip_conventions: tuple[str, ...] = option(
        ("gigagan",), "Conventions of the CLIP score: hessel, gigagan, torchmetrics or raw."
    )
    rewards: tuple[str, ...] = option(
        (),
        "Rewards by their names in training configs, as pickscore,hps:FOLDER,'0.1*clip + critic:colour'.",
    )
    lpips: str | None = option(None, "Backbone (alex, vgg, squeeze) of the LPIPS between images of one prompt.")
    recursive: bool = option(False, "Search sub-folders of --images and --reference.")
    allow_lossy: bool = option(False, "Take JPEG and WebP files.")
    device: str | None = option(None, "cuda, cpu or mps.")
    download: bool = option(False, "Allow fetching weights that are not on this machine.")

    def __post_init__(self) -> None:
        for field_ in fields(self):
            value = vars(self)[field_.name]
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{flag_of(field_.name)} is {value}: give a finite number")


@dataclass(frozen=True, kw_only=True)
class ModelOptions(MeasuringOptions):
    """Options of `evaluate MODEL`."""

    protocol: str | None = option(
        None,
        "Protocol name, or a YAML file. By default `prompts`; a run is measured on its own prompts against its teacher.",
    )
    lora: str | None = option(None, "Exported LoRA or guidance adapter, folder or file.")
    steps: tuple[Annotated[int, Ge(1)], ...] = option((), "Step counts, as 1,2,4; the recipe's own, or 50, by default.")
    guidance: float | None = option(None, "Guidance scale w; 1 is off.")
    scheduler: str | None = option(None, "ddim, euler, dpm++2m, lcm, tcd or unipc.")
    teacher_steps: Annotated[int, Ge(1)] | None = option(None, "Draw the base too, at this many steps.")
    teacher_guidance: float | None = option(None, "Guidance scale w of the teacher.")
    num_images: Annotated[int, Ge(2)] | None = option(None, "Fewer images than the protocol's; renames the numbers.")
    seeds_per_prompt: Annotated[int, Ge(1)] = option(1, "Images per prompt; diversity needs two.")
    keep_images: bool = option(True, "Write the images, from which a stopped evaluation continues.")
    width: Annotated[int, Ge(8)] | None = option(None, "Width of the images in pixels; the trained size by default.")
    height: Annotated[int, Ge(8)] | None = option(None, "Height of the images in pixels.")
    batch_size: Annotated[int, Ge(1)] = option(8, "Images drawn at once.")
    dtype: str = option("float32", "float32, bfloat16 or float16.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.width is None) != (self.height is None):
            raise ValueError("--width and --height go together: give both or neither")

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) in pixels; None for the trained size."""
        return None if self.height is None or self.width is None else (self.height, self.width)


@dataclass(frozen=True, kw_only=True)
class FolderOptions(MeasuringOptions):
    """Options of `evaluate --images FOLDER`."""

    save_statistics: str | None = option(
        None, "With --images: write the statistics of the images to this .npz, a reference for later."
    )


def flag_of(field: str) -> str:
    """Returns the command line's flag of a field."""
    return "--" + ("clip-convention" if field == "clip_conventions" else field.replace("_", "-"))


def command_of(options: MeasuringOptions, *leading: str) -> str:
    """Returns a command line that repeats an evaluation.

    Args:
        options: those of the evaluation; defaults are left out.
        leading: model or `--images`, and the output.
    """
    words = ["stepdistill", "evaluate", *leading]
    for field_ in fields(options):
        name, value = field_.name, vars(options)[field_.name]
        if value == field_.default:
            continue
        if isinstance(value, bool):
            words.append(flag_of(name) if value else flag_of(name).replace("--", "--no-", 1))
        else:
            text = ",".join(str(item) for item in value) if isinstance(value, tuple) else str(value)
            words += [flag_of(name), text]
    return shlex.join(words)


def field_names(section: type[MeasuringOptions]) -> tuple[str, ...]:
    """Returns the names of a section's options."""
    return tuple(field_.name for field_ in fields(section))


def parse_options(section: type[S], given: Mapping[str, object]) -> S:
    """Validates options.

    Args:
        section: the kind of options.
        given: options by field name, as values or as typed on the command line (lists with commas); `size` is (height, width).

    Raises:
        UserError: an unknown option, a wrong type or range, or options that contradict each other.
    """
    from pydantic import TypeAdapter, ValidationError  # late, because it takes a while

    values = dict(given)
    if section is ModelOptions and (size := values.pop("size", None)) is not None:
        values["height"], values["width"] = size  # type: ignore[misc]
    if odd := next((name for name in values if name not in field_names(section)), None):
        raise UserError(f"the evaluation has no option {odd!r}: {suggestion_for(odd, field_names(section))}")
    values = {name: _from_text(name, value) for name, value in values.items()}
    try:
        return TypeAdapter(section).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        said = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:  # a check in __post_init__
            raise UserError(said) from None
        flag = flag_of(str(first["loc"][0]))
        raise UserError(f"{flag} is {first['input']!r}, but {said[0].lower()}{said[1:]}: change it") from None


def _from_text(name: str, value: object) -> object:
    """Returns the value of an option that may be a path, or a list that was typed with commas."""
    if isinstance(value, Path):
        return str(value)
    if name == "rewards" and isinstance(value, str):
        from stepdistill.rewards.naming import split_reward_names  # late, because it imports torch

        return tuple(split_reward_names(value))
    if name in LISTS and isinstance(value, str):
        words = [word.strip() for word in value.split(",") if word.strip()]
        if name == "steps" and not all(word.isdigit() for word in words):
            raise UserError(f"--steps is {value!r}, but a list of step counts is wanted: write, say, 1,2,4")
        return tuple(int(word) if name == "steps" else word for word in words)
    return tuple(value) if isinstance(value, list) else value
