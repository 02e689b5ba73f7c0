"""Drawing the images of an evaluation: shared out over processes, kept as PNG by global index, never drawn twice."""

from __future__ import annotations

import json
import os
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

from stepdistill.errors import Refusal
from stepdistill.evaluation.images import shard
from stepdistill.evaluation.protocols import PromptSet

Draw = Callable[[Sequence[str], Sequence[int]], Iterator[NDArray[np.uint8]]]
"""(prompts, seeds) -> batches of uint8 images (B, H, W, 3), in order."""


@dataclass(frozen=True)
class Sampler:
    """A model at one setting. The row named "teacher" is what others are compared with."""

    name: str
    steps: int
    network_calls: int
    guidance: float
    description: str
    draw: Draw


def draw_missing(
    sampler: Sampler, prompts: PromptSet, folder: Path, batch_size: int
) -> tuple[list[Path], float | None]:
    """Draw this process's share of the images that are not in `folder` yet; returns all paths and seconds an image."""
    state = PartialState()
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:05d}.png" for i in range(len(prompts))]
    missing = [i for i in shard(len(prompts), state.process_index, state.num_processes) if not paths[i].is_file()]
    began = time.perf_counter()
    images = (
        sampler.draw([prompts.prompts[i] for i in missing], [prompts.seeds[i] for i in missing])
        if missing
        else iter(())
    )
    with tqdm(
        total=len(missing), desc=sampler.name, unit="img", disable=not state.is_main_process or not missing
    ) as bar:
        waiting = iter(missing)
        for batch in images:
            for image, index in zip(batch, islice(waiting, len(batch)), strict=True):
                temporary = paths[index].with_suffix(".tmp")
                Image.fromarray(image).save(temporary, format="PNG")
                os.replace(temporary, paths[index])
            bar.update(len(batch))
    spent = (time.perf_counter() - began, len(missing))
    state.wait_for_everyone()
    total = [part for part in gather_object([spent]) if part[1] > 0]
    if not total:
        return paths, None
    return paths, max(part[0] for part in total) / sum(part[1] for part in total)


def claim(output: Path, marker: dict[str, object], samplers: Sequence[tuple[str, str]]) -> None:
    """Mark a folder as this evaluation's, or refuse one that holds something else."""
    state = PartialState()
    file = output / "evaluation.json"
    content = {**marker, "samplers": {name: description for name, description in samplers}}
    if file.is_file():
        before = json.loads(file.read_text())
        drawn = {name: text for name, text in before.pop("samplers").items() if name in dict(samplers)}
        changed = next((k for k in marker if before.get(k) != marker[k]), None)
        if changed is not None or any(dict(samplers)[name] != text for name, text in drawn.items()):
            raise Refusal(
                f"the output folder {str(output)!r} holds an evaluation with different {changed or 'models'}: choose another --output"
            )
        content["samplers"] = {**drawn, **dict(samplers)}
    elif output.exists() and any(output.iterdir()):
        raise Refusal(f"the output folder {str(output)!r} holds something else: choose another --output")
    state.wait_for_everyone()
    if state.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content, indent=2))
    state.wait_for_everyone()


def describe(values: dict[str, object]) -> str:
    """Arguments of a sampler as one line, for reports and for telling one model from another."""
    return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)
