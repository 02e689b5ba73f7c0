"""Starting from a LoRA file: the student is what the file's writer had, whatever its layout and alpha."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_checkpoints import refusal
from support.toys import disturb

from stepdistill.config.reading import parse
from stepdistill.config.schema import RunConfig
from stepdistill.exporting.lora import write_diffusers_lora, write_kohya_lora
from stepdistill.methods.preference.losses import REFERENCE
from stepdistill.roles.triple import GENERATOR, Triple
from stepdistill.training.session import EMA, Session, open_session
from stepdistill.training.setup import prepare

ROLE = {"mode": "lora", "rank": 8, "alpha": 4, "rank_pattern": {"to_q": 4}, "alpha_pattern": {"to_q": 16, "conv1": 2}}
WRITERS = {"diffusers": write_diffusers_lora, "kohya": write_kohya_lora}


@pytest.fixture
def opened(tiny: Callable[..., Path]) -> Callable[..., Session]:
    def make(init: Path | None = None, **role: Any) -> Session:
        data = {
            "model": {"path": str(tiny("sd"))},
            "method": {"name": "pso", "form": "online", "reward": "critic:brightness"},
            "roles": {"generator": {**ROLE, **role}},
            "data": {"prompts": "builtin:general"},
            "training": {"max_steps": 1, "device": "cpu", "ema": 0.5},
            "init": str(init) if init is not None else None,
        }
        return open_session(prepare(parse(RunConfig, data, "test")))

    return make


def deltas(triple: Triple, role: str) -> dict[str, torch.Tensor]:
    found = triple.bank.factors(role)
    return {path: own.scale * (own.up.flatten(1) @ own.down.flatten(1)) for path, own in found.items()}


@pytest.mark.parametrize("change", [{}, {"alpha": 11.0, "alpha_pattern": {}}])
@pytest.mark.parametrize("layout", WRITERS)
def test_the_student_is_the_writers(
    opened: Callable[..., Session], tmp_path: Path, layout: str, change: dict[str, Any]
) -> None:
    writer, file = opened(), tmp_path / "lora.safetensors"
    disturb(writer.triple)
    WRITERS[layout](writer.triple, GENERATOR, writer.recipe, file, torch.float32)
    reader = opened(file, **change)
    expected = deltas(writer.triple, GENERATOR)
    for role in (GENERATOR, EMA, REFERENCE):
        found = deltas(reader.triple, role)
        assert found.keys() == expected.keys()
        for path, delta in found.items():
            torch.testing.assert_close(delta, expected[path], rtol=1e-5, atol=1e-6)
    assert max(float(delta.detach().abs().max()) for delta in expected.values()) > 1e-2


def test_a_file_without_metadata_has_alpha_of_its_rank(opened: Callable[..., Session], tmp_path: Path) -> None:
    """As diffusers takes it, unless the file holds alphas."""
    plain: dict[str, Any] = {"alpha": 8, "rank_pattern": {}, "alpha_pattern": {}}
    writer, file = opened(**plain), tmp_path / "lora.safetensors"
    disturb(writer.triple)
    write_diffusers_lora(writer.triple, GENERATOR, writer.recipe, file, torch.float32)
    save_file(load_file(file), file)
    expected, found = deltas(writer.triple, GENERATOR), deltas(opened(file, **plain).triple, GENERATOR)
    assert all(torch.allclose(found[path], expected[path]) for path in expected)


def test_what_does_not_fit_is_refused(opened: Callable[..., Session], tmp_path: Path) -> None:
    writer, file = opened(), tmp_path / "lora.safetensors"
    write_diffusers_lora(writer.triple, GENERATOR, writer.recipe, file, torch.float32)
    refusal(lambda: opened(file, rank=3), "differently shaped", "rank")
    refusal(lambda: opened(file, targets="attention"), "unexpected")
    refusal(lambda: opened(file, mode="full"), "roles.generator.mode is 'full'")
    tensors = load_file(file)
    save_file({**tensors, "lora_te_text_model.lora_down.weight": torch.zeros(1)}, file)
    refusal(lambda: opened(file), "lora_te_text_model")
    file.write_text("nothing")
    refusal(lambda: opened(file), "not a readable safetensors file")
    refusal(lambda: opened(tmp_path / "absent.safetensors"), "init names", "LoRA")
