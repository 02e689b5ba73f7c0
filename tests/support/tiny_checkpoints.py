"""What tests of checkpoints share: loading, equality of two of them, and the form that every refusal has."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stepdistill.config.registry import load_family
from stepdistill.errors import UserError
from stepdistill.families.base import Checkpoint
from stepdistill.families.checkpoints.loading import inspect_checkpoint, load_checkpoint
from stepdistill.families.conditioning import MicroConditioning


def refusal(call: Callable[[], object], *parts: str) -> None:
    """Refused in one sentence that holds the given parts and, after a colon, what to change."""
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text, text
    assert not re.search(r"[.!?] +[A-Z]", text), text
    assert re.search(r": \w", text), text
    for part in parts:
        assert part in text, text


def load(source: str | Path, **options: Any) -> Checkpoint:
    return load_checkpoint(inspect_checkpoint(source, **options), torch.float32, "cpu")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def same(one: Checkpoint, other: Checkpoint) -> bool:
    """Equal weights of every component, equal ids, and outputs equal but for the memory layout that kernels see."""
    family, components = load_family(one.info.family), [_components(checkpoint) for checkpoint in (one, other)]
    for name, module in components[0].items():
        if isinstance(module, torch.nn.Module):
            ours, theirs = module.state_dict(), components[1][name].state_dict()
            if ours.keys() != theirs.keys() or not all(torch.equal(ours[key], theirs[key]) for key in ours):
                return False
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    outputs = []
    for checkpoint in (one, other):
        cond = family.encode(checkpoint, ["a red cat"], [MicroConditioning.plain(16, 16)])
        out = family.call(checkpoint.network, x, torch.tensor([499.0]), cond)
        outputs.append((cond.text, out, family.decode(checkpoint, out)))
    return all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*outputs, strict=True))


def _components(checkpoint: Checkpoint) -> dict[str, Any]:
    assert checkpoint.pipeline is not None
    return dict(checkpoint.pipeline.components)
