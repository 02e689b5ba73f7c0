"""The options of `stepdistill evaluate`, once: as typed settings, from which the command line's options are generated.

The Python functions `evaluate` and `evaluate_images` take the same names as keywords.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

from stepdistill.config.reading import Settings
from stepdistill.config.registry import nearest
from stepdistill.errors import UserError


class MeasuringOptions(Settings):
    """Options of every evaluation, of a model or of a folder of images."""

    reference: str | None = Field(None, description="Folder of images, or statistics (.npz), to compare with.")
    prompts: str | None = Field(
        None,
        description="Prompt file, or builtin:NAME. For a folder of images: one prompt per image in the order of the file names; "
        "captions beside the images by default.",
    )
    features: str | None = Field(
        None,
        description="Feature network: inception[:FILE], dinov2:PATH, clip:PATH, judge, random or MODULE:FUNCTION; "
        "the protocol's by default.",
    )
    resize: Literal["clean", "legacy_pytorch", "legacy_tensorflow"] | None = Field(
        None, description="How images are resized to the Inception's 299 pixels; the protocol's by default."
    )
    metrics: tuple[str, ...] | None = Field(
        None, description="Metrics, as fid,fd_infinity,kid,prdc,cmmd; the protocol's by default."
    )
    clip: str | None = Field(None, description="CLIP checkpoint for the CLIP score.")
    clip_conventions: tuple[str, ...] = Field(
        ("gigagan",), description="Conventions of the CLIP score: hessel, gigagan, torchmetrics or raw."
    )
    rewards: tuple[str, ...] = Field(
        (),
        description="Rewards by their names in training configs, as pickscore,hps:FOLDER,'0.1*clip + critic:colour'.",
    )
    lpips: str | None = Field(
        None, description="Backbone (alex, vgg, squeeze) of the LPIPS between images of one prompt."
    )
    recursive: bool = Field(False, description="Search sub-folders of --images and --reference.")
    allow_lossy: bool = Field(False, description="Take JPEG and WebP files.")
    device: str | None = Field(None, description="cuda, cpu or mps.")
    download: bool = Field(False, description="Allow fetching weights that are not on this machine.")

    @model_validator(mode="before")
    @classmethod
    def _paths_are_texts(cls, data: dict[str, Any]) -> dict[str, Any]:
        texts = ("reference", "prompts", "lora", "save_statistics")
        return {key: str(value) if key in texts and value is not None else value for key, value in data.items()}

    @field_validator("metrics", "clip_conventions", mode="before")
    @classmethod
    def _comma_separated(cls, value: Any) -> Any:
        """Splits `a,b` as it is typed on the command line."""
        if isinstance(value, str):
            value = value.split(",")
        return (
            tuple(str(name).strip() for name in value if str(name).strip())
            if isinstance(value, list | tuple)
            else value
        )

    @field_validator("rewards", mode="before")
    @classmethod
    def _reward_names(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        from stepdistill.rewards.naming import split_reward_names  # late: it imports torch

        return tuple(split_reward_names(value))


class ModelOptions(MeasuringOptions):
    """Options of `evaluate MODEL`."""

    protocol: str | None = Field(
        None,
        description="Protocol name, or a YAML file. By default `prompts`; a run is measured on its own prompts against its teacher.",
    )
    lora: str | None = Field(None, description="Exported LoRA or guidance adapter, folder or file.")
    steps: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        (), description="Step counts, as 1,2,4; the recipe's own, or 50, by default."
    )
    guidance: float | None = Field(None, description="Guidance scale w; 1 is off.", allow_inf_nan=False)
    scheduler: str | None = Field(None, description="ddim, euler, dpm++2m, lcm, tcd or unipc.")
    teacher_steps: int | None = Field(None, ge=1, description="Draw the base too, at this many steps.")
    teacher_guidance: float | None = Field(None, description="Guidance scale w of the teacher.", allow_inf_nan=False)
    num_images: int | None = Field(None, ge=2, description="Fewer images than the protocol's; renames the numbers.")
    seeds_per_prompt: int = Field(1, ge=1, description="Images per prompt; diversity needs two.")
    keep_images: bool = Field(True, description="Write the images, from which a stopped evaluation continues.")
    width: int | None = Field(None, ge=8, description="Width of the images in pixels; the trained size by default.")
    height: int | None = Field(None, ge=8, description="Height of the images in pixels.")
    batch_size: int = Field(8, ge=1, description="Images drawn at once.")
    dtype: str = Field("float32", description="float32, bfloat16 or float16.")

    @field_validator("steps", mode="before")
    @classmethod
    def _step_counts(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        words = [word.strip() for word in value.split(",") if word.strip()]
        if not all(word.isdigit() and int(word) > 0 for word in words):
            raise ValueError(f"it is {value!r}, but a list of step counts is wanted; write, say, 1,2,4")
        return tuple(int(word) for word in words)

    @model_validator(mode="before")
    @classmethod
    def _size(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Takes `size=(height, width)`, the keyword of the Python function, as height and width."""
        data = dict(data)
        size = data.pop("size", None)
        if size is not None:
            data["height"], data["width"] = size
        return data

    @model_validator(mode="after")
    def _consistent(self) -> ModelOptions:
        if (self.width is None) != (self.height is None):
            raise ValueError("--width and --height go together; give both or neither")
        if self.teacher_guidance is not None and self.teacher_steps is None and self.protocol is not None:
            raise ValueError("--teacher-guidance needs a teacher that is drawn; give --teacher-steps too")
        return self

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) in pixels; None for the trained size."""
        return None if self.height is None or self.width is None else (self.height, self.width)


class FolderOptions(MeasuringOptions):
    """Options of `evaluate --images FOLDER`."""

    save_statistics: str | None = Field(
        None, description="With --images: write the statistics of the images to this .npz, a reference for later."
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
    for name in type(options).model_fields:
        value: object = vars(options)[name]
        if value == type(options).model_fields[name].default:
            continue
        if isinstance(value, bool):
            words.append(flag_of(name) if value else flag_of(name).replace("--", "--no-", 1))
        else:
            text = ",".join(str(item) for item in value) if isinstance(value, tuple) else str(value)
            words += [flag_of(name), text]
    return shlex.join(words)


S = TypeVar("S", bound=MeasuringOptions)


def parse_options(section: type[S], given: Mapping[str, object]) -> S:
    """Validates options.

    Args:
        section: the kind of options.
        given: options by field name.

    Raises:
        UserError: an unknown option, a wrong type or range, or options that contradict each other.
    """
    if odd := next((name for name in given if name not in section.model_fields and name != "size"), None):
        raise UserError(f"the evaluation has no option {odd!r}: {nearest(odd, tuple(section.model_fields))}")
    try:
        return section.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        said = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:  # a check of several options together
            raise UserError(said.replace("; ", ": ", 1)) from None
        name = str(first["loc"][0])
        message = (
            said if first["type"] == "value_error" else f"it is {first['input']!r}, but {said[0].lower()}{said[1:]}"
        )
        raise UserError(f"{flag_of(name)} cannot be used: {message}") from None
