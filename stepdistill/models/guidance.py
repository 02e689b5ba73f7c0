"""How a role's network is told its guidance scale: by adapters beside its attention, or by an embedding beside its time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn

from stepdistill.errors import Refusal
from stepdistill.models.guidance_adapter import AdapterSettings, GuidanceAdapter, Told, read_guidance_adapter

Guide = GuidanceAdapter
GuideSettings = AdapterSettings
Heard = Mapping[Guide, Told | None]


def make_guide(network: nn.Module, settings: GuideSettings, seed: int) -> Guide:
    """A guide that leaves the network as it is until it is trained, attached to it; float32 or better, on its device.

    Raises:
        Refusal: the network has no place for it.
    """
    try:
        guide = GuidanceAdapter(network, settings, seed)
    except ValueError as error:
        raise Refusal(str(error)) from None
    first = next(network.parameters())
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    return guide.to(first.device, dtype).eval().attach(network)


def read_guide(network: nn.Module, path: str | Path) -> GuidanceAdapter:
    """The adapters of an exported file, frozen and attached to a network.

    Raises:
        Refusal: there is no such file, it is no guidance adapter, or one of another base.
    """
    try:
        adapter = read_guidance_adapter(network, path)
    except (ValueError, OSError) as error:
        raise Refusal(f"model.guidance_adapter cannot be used: {' '.join(str(error).split())}") from None
    first = next(network.parameters())
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    return adapter.to(first.device, dtype).attach(network)


@contextmanager
def hearing(heard: Heard) -> Iterator[None]:
    """Inside, every guide hears what it heard when `heard` was noted down."""
    with ExitStack() as stack:
        for guide, told in heard.items():
            stack.enter_context(guide.hearing(told))
        yield
