"""Draws the images of an evaluation, distributed over processes and kept as PNG named by global index; none is drawn twice."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from numpy.typing import NDArray
from PIL import Image
from tqdm.auto import tqdm

from stepdistill.errors import UserError
from stepdistill.evaluation.images import ImageArray, indices_of_rank, read_images
from stepdistill.evaluation.protocols import PromptSet
from stepdistill.files.atomic import write_atomically
from stepdistill.files.outputs import check_folder_is_writable

GenerateFunction = Callable[[Sequence[str], Sequence[int]], Iterator[NDArray[np.uint8]]]
"""(prompts, seeds) -> batches of uint8 images (B, H, W, 3), in order."""


@dataclass(frozen=True)
class Sampler:
    """A model with its sampling arguments. The others are compared with the one that is named "teacher".

    Attributes:
        name: of its row and its folder.
        steps: sampling steps.
        network_calls: per image.
        guidance: guidance scale w.
        description: distinguishes it from every other model and setting.
        generate: draws images.
        size: (height, width) in pixels, if it is known before drawing.
    """

    name: str
    steps: int
    network_calls: int
    guidance: float
    description: str
    generate: GenerateFunction
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class GeneratedImages:
    """A sampler's images, of which this process drew its share.

    Attributes:
        total: number of images of all processes.
        paths: all files by global index; None if the images stay in memory.
        local_images: this process's share if the images stay in memory, in the order of its indices.
        seconds_per_image: wall time of drawing; None if all files existed already.
    """

    total: int
    paths: tuple[Path, ...] | None
    local_images: tuple[ImageArray, ...]
    seconds_per_image: float | None

    def iter_local_images(self) -> Iterator[ImageArray]:
        """Iterates over this process's images."""
        if self.paths is None:
            return iter(self.local_images)
        state = PartialState()
        return read_images(
            [self.paths[i] for i in indices_of_rank(self.total, state.process_index, state.num_processes)]
        )

    def images_at(self, indices: Sequence[int]) -> list[ImageArray]:
        """Returns the images of these global indices. If the images are in memory, this is a collective."""
        if self.paths is not None:
            return list(read_images([self.paths[i] for i in indices]))
        state = PartialState()
        mine = {
            i: self.local_images[i // state.num_processes]
            for i in indices
            if i % state.num_processes == state.process_index
        }
        found = {index: image for part in gather_object([mine]) for index, image in part.items()}
        return [found[i] for i in indices]


def generate_missing_images(sampler: Sampler, prompts: PromptSet, folder: Path | None) -> GeneratedImages:
    """Draws this process's share into `folder`, where existing images are kept, or into memory if it is None.

    A file is written completely or not at all, so that an evaluation that was killed continues with the missing images.
    """
    state = PartialState()
    mine = list(indices_of_rank(len(prompts), state.process_index, state.num_processes))
    paths = None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        paths = tuple(folder / f"{i:05d}.png" for i in range(len(prompts)))
        mine = [i for i in mine if not paths[i].is_file()]
    began = time.perf_counter()
    local_images: list[ImageArray] = []
    with tqdm(total=len(mine), desc=sampler.name, unit="img", disable=not state.is_main_process or not mine) as bar:
        waiting = iter(mine)
        batches = sampler.generate([prompts.prompts[i] for i in mine], [prompts.seeds[i] for i in mine]) if mine else ()
        for batch in batches:
            for image, index in zip(batch, islice(waiting, len(batch)), strict=True):
                if paths is None:
                    local_images.append(image)
                else:
                    content = io.BytesIO()
                    Image.fromarray(image).save(content, format="PNG")
                    write_atomically(paths[index], content.getvalue())
            bar.update(len(batch))
    spent = (time.perf_counter() - began, len(mine))
    state.wait_for_everyone()
    busy = [part for part in gather_object([spent]) if part[1] > 0]
    seconds = max(part[0] for part in busy) / sum(part[1] for part in busy) if busy else None
    return GeneratedImages(len(prompts), paths, tuple(local_images), seconds)


def claim_output_folder(output: Path, marker: dict[str, object], samplers: Sequence[tuple[str, str]]) -> None:
    """Marks a folder as this evaluation's; raises UserError if it holds something else.

    The samplers of earlier calls stay recorded, so that a row's name never refers to two different models.
    """
    check_folder_is_writable(output)
    state = PartialState()
    file = output / "evaluation.json"
    known = dict(samplers)
    if file.is_file():
        try:
            before = json.loads(file.read_text())
            drawn: dict[str, str] = dict(before.pop("samplers"))
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{str(file)!r} was not written by this program, or was cut short: choose another --output"
            ) from None
        changed = next((key for key in marker if before.get(key) != marker[key]), None)
        if changed is not None or any(known.get(name, text) != text for name, text in drawn.items()):
            raise UserError(
                f"the output folder {str(output)!r} holds an evaluation with different {changed or 'models'}: choose another --output"
            )
        known = drawn | known
    elif output.exists() and any(output.iterdir()):
        raise UserError(f"the output {str(output)!r} holds something else: choose another --output")
    state.wait_for_everyone()
    if state.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps({**marker, "samplers": known}, indent=2).encode())
    state.wait_for_everyone()


def format_arguments(values: dict[str, object]) -> str:
    """Formats the arguments of a sampler as one line, for reports and to distinguish models."""
    return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)
