"""How a role's network is told its guidance scale: by adapters beside its attention, or by an embedding beside its time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn

from stepdistill.errors import UserError
from stepdistill.families.common.guidance_embedding import (
    GuidanceEmbedding,
    GuidanceEmbeddingSettings,
    GuidanceEmbeddingTarget,
)
from stepdistill.roles.guidance_adapter import GuidanceAdapter, read_guidance_adapter
from stepdistill.roles.guidance_modules import GuidanceAdapterSettings, GuidanceInputs

GuidanceConditioner: TypeAlias = GuidanceAdapter | GuidanceEmbedding
GuidanceConditionerSettings: TypeAlias = GuidanceAdapterSettings | GuidanceEmbeddingSettings
RecordedGuidance: TypeAlias = Mapping[GuidanceConditioner, GuidanceInputs | None]


def attach_new_guidance_adapter(network: nn.Module, settings: GuidanceAdapterSettings, seed: int) -> GuidanceAdapter:
    """Adapters that leave the network as it is until they are trained, attached to it; float32 or better, on its device.

    Raises:
        UserError: the network has no attention that looks at a prompt.
    """
    try:
        adapter = GuidanceAdapter(network, settings, seed)
    except ValueError as error:
        raise UserError(str(error)) from None
    _place(adapter, network)
    return adapter.attach(network)


def attach_new_guidance_embedding(
    network: nn.Module, settings: GuidanceEmbeddingSettings, place: GuidanceEmbeddingTarget
) -> GuidanceEmbedding:
    """An embedding that says nothing until it is trained, attached to the network; float32 or better, on its device."""
    embedding = GuidanceEmbedding(settings, place)
    _place(embedding, network)
    return embedding.attach(network, place)


def attach_guidance_adapter_file(network: nn.Module, path: str | Path) -> GuidanceAdapter:
    """The adapters of an exported file, frozen and attached to a network.

    Raises:
        UserError: there is no such file, it is no guidance adapter, or one of another base.
    """
    try:
        adapter = read_guidance_adapter(network, path)
    except (ValueError, OSError) as error:
        raise UserError(f"model.guidance_adapter cannot be used: {' '.join(str(error).split())}") from None
    _place(adapter, network)
    return adapter.attach(network)


@contextmanager
def restore_guidance(recorded_guidance: RecordedGuidance) -> Iterator[None]:
    """Inside, every guide hears what it heard when `heard` was noted down."""
    with ExitStack() as stack:
        for guide, told in recorded_guidance.items():
            stack.enter_context(guide.restore_guidance(told))
        yield


def _place(guide: nn.Module, network: nn.Module) -> None:
    first = next(network.parameters())
    guide.to(first.device, torch.float64 if first.dtype == torch.float64 else torch.float32).eval()
