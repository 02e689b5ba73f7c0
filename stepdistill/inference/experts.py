"""A few-step student of several experts in diffusers: each makes its own stretch of the steps, from noise to image.

    from experts import load_experts
    experts = load_experts(pipe, FOLDER)
    image = pipe("a photo", ..., callback_on_step_end=experts).images[0]

LoRA experts become the pipeline's adapters expert_1, expert_2, ...; full ones lie in unet_2, ... beside unet. Load them when
the pipeline is where it stays, and start from pure noise: the first step is always the first expert's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn


class Experts:
    """`callback_on_step_end` that hands a pipeline from expert to expert and, after the last step, back to the first.

    Args:
        calls: network calls of each expert in the student's own number of steps; other numbers are shared out alike.
        select: puts expert i, from 0, into the pipeline.
        networks: full experts after the first.
    """

    def __init__(self, calls: Sequence[int], select: Callable[[int], None], networks: Sequence[nn.Module] = ()) -> None:
        self.expert_of_call = [expert for expert, share in enumerate(calls) for _ in range(share)]
        self.select, self.networks = select, tuple(networks)
        self.start()

    def start(self) -> None:
        """Hand the pipeline to the first expert: needed where a call broke off midway."""
        self.select(0)

    def __call__(self, pipe: DiffusionPipeline, step: int, timestep: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        # diffusers calls back after a step: what is chosen now makes the next one
        following = (step + 1) % pipe.num_timesteps
        self.select(self.expert_of_call[following * len(self.expert_of_call) // pipe.num_timesteps])
        return kwargs


def load_experts(
    pipe: DiffusionPipeline, folder: str | Path, other_adapters: Mapping[str, float] | None = None
) -> Experts:
    """Load the experts of an exported folder into its base's pipeline, or its own.

    beside: adapter -> weight of other LoRAs of the pipeline, which stay active through all steps.
    """
    folder = Path(folder)
    calls = json.loads((folder / "recipe.json").read_text())["experts"]
    names = [f"expert_{k}" for k in range(1, len(calls) + 1)]
    if not list(folder.glob("*_expert_1.safetensors")):
        return network_experts(pipe, folder, calls)
    for name in names:
        (file,) = folder.glob(f"*_{name}.safetensors")
        pipe.load_lora_weights(str(folder), weight_name=file.name, adapter_name=name)
    return adapter_experts(pipe, names, calls, other_adapters)


def adapter_experts(
    pipe: DiffusionPipeline,
    names: Sequence[str],
    calls: Sequence[int],
    other_adapters: Mapping[str, float] | None = None,
) -> Experts:
    """Experts that are loaded already, as adapters of these names."""
    others = dict(other_adapters or {})
    return Experts(calls, lambda i: pipe.set_adapters([names[i], *others], [1.0, *others.values()]))


def network_experts(pipe: DiffusionPipeline, folder: Path, calls: Sequence[int]) -> Experts:
    """Full experts: the first is the pipeline's own network, the others are read from folders beside it."""
    component = "unet" if "unet" in pipe.components else "transformer"
    first = pipe.components[component]
    others = [
        type(first).from_pretrained(folder / f"{component}_{k}", torch_dtype=first.dtype).to(first.device)
        for k in range(2, len(calls) + 1)
    ]
    networks = [first, *others]
    return Experts(calls, lambda i: setattr(pipe, component, networks[i]), others)
