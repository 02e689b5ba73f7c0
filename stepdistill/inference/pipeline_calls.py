"""What a stock pipeline's call needs around it to be seeded by sample, and to decode in its autoencoder's precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from inspect import signature
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor


@contextmanager
def seeded_scheduler_steps(pipeline: DiffusionPipeline, generators: Sequence[torch.Generator]) -> Iterator[None]:
    """Inside, a scheduler that draws noise draws it from these generators, one a sample.

    The pipeline of SD3 does not hand on the generators that it was called with, and leaves its scheduler to the global one.
    """
    step = pipeline.scheduler.step
    given = {"generator": generators} if "generator" in signature(step).parameters else {}

    @wraps(step)  # pipelines look at its parameters
    def seeded(*args: Any, **more: Any) -> Any:
        return step(*args, **{**given, **more})

    vars(pipeline.scheduler)["step"] = seeded
    try:
        yield
    finally:
        del vars(pipeline.scheduler)["step"]


@contextmanager
def decode_in_vae_dtype(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Inside, latents are decoded in the autoencoder's own dtype.

    It stays in float32 whatever the network is loaded in (SDXL's overflows in float16), and stock pipelines hand it latents in
    the network's.
    """
    decode = pipeline.vae.decode

    @wraps(decode)
    def widened(latents: Tensor, *args: Any, **more: Any) -> Any:
        return decode(latents.to(pipeline.vae.dtype), *args, **more)

    vars(pipeline.vae)["decode"] = widened
    try:
        yield
    finally:
        del vars(pipeline.vae)["decode"]
