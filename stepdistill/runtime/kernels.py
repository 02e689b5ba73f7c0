"""How a network runs, at equal results: attention kernel, memory layout, compiled blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Literal

import torch
from diffusers import ModelMixin
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stepdistill.errors import UserError

RECOMPILE_LIMIT = 128
"""Compiled forms of one block class: one for each role, each role that is trained meanwhile, and each shape."""


def check_xformers(device: str | None = None) -> None:
    """Raises UserError where xformers is missing or has nothing to run on; cheap, imports nothing heavy.

    device: that the config asks for; None for the best there is.
    """
    if find_spec("xformers") is None:
        raise UserError(
            "model.attention is 'xformers', which is not installed: run pip install 'stepdistill[xformers]', "
            "or set model.attention to sdpa"
        )
    if not torch.cuda.is_available() or not (device or "cuda").startswith("cuda"):
        raise UserError(
            f"model.attention is 'xformers', which runs on CUDA only, and the device is {device or 'cpu'!r}: "
            "set model.attention to sdpa"
        )


def set_attention_and_memory_format(
    network: nn.Module, attention: Literal["sdpa", "xformers"], channels_last: bool
) -> None:
    """Choose attention kernel and memory layout, in place; copies of the network inherit both.

    sdpa is what diffusers chooses by itself (`AttnProcessor2_0`).

    Raises:
        UserError: xformers is missing or has no device.
    """
    if attention == "xformers":
        check_xformers()
        _as_model_mixin(network).enable_xformers_memory_efficient_attention()
    if channels_last:
        # convolutions alone have such a layout, and a quantised weight is no tensor to be asked for it
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)


@contextmanager
def math_sdpa() -> Iterator[None]:
    """Inside, scaled dot products run in their plain form, the only one with derivatives in forward mode.

    The values are the same but for rounding. What processors of attention outside torch do is not changed.
    """
    with sdpa_kernel(SDPBackend.MATH):
        yield


def compile_blocks(network: nn.Module, backend: str = "inductor") -> None:
    """Compile the network's repeated blocks (diffusers names their classes), in place: keys of the state stay as they are.

    A block is compiled once for each role that runs through it: which adapter is active, and which parameters take
    gradients, are guards of the compiled code, so a switch of roles picks the right form, or makes it.

    Raises:
        UserError: the network names no repeated blocks, or torch is too old to be told how often it may compile again.
    """
    try:
        _as_model_mixin(network).compile_repeated_blocks(backend=backend, recompile_limit=RECOMPILE_LIMIT)
    except ValueError:
        raise UserError(
            f"model.compile is true, and {type(network).__name__} names no repeated blocks to compile: set model.compile to false"
        ) from None
    except TypeError:
        raise UserError(
            f"model.compile is true, and torch {torch.__version__} does not take a recompile limit: upgrade torch, "
            "or set model.compile to false"
        ) from None


def _as_model_mixin(network: nn.Module) -> ModelMixin:
    if not isinstance(network, ModelMixin):
        raise TypeError(f"a model of diffusers was expected, not {type(network).__name__}")
    return network
