"""Guidance adapters with random weights, and as a file."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from stepdistill.roles.guidance_adapter import GuidanceAdapter, settings_metadata


def grown(adapter: GuidanceAdapter, scale: float = 0.3) -> GuidanceAdapter:
    """Adapters that do something: all last layers random."""
    stream = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if not parameter.any():
                parameter.copy_(scale * torch.randn(parameter.shape, generator=stream))
    return adapter


def written(adapter: GuidanceAdapter, folder: Path) -> Path:
    file = folder / "guidance_adapter.safetensors"
    save_file(adapter.state_dict(), file, settings_metadata(adapter.settings))
    return file
