"""A model folder does not choose the code that runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from stepdistill.errors import UserError
from stepdistill.families.checkpoints.loading import inspect_checkpoint
from stepdistill.frozen.vision import load_transformers_config


def change_index(folder: Path, **entries: object) -> None:
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **entries}))


@pytest.mark.parametrize("library", ["os", "own_code", "diffusers.utils", "transformers_modules.x"])
def test_a_component_of_another_library_is_refused(copied: Callable[..., Path], library: str) -> None:
    folder = copied("sd")
    change_index(folder, scheduler=[library, "Anything"])
    with pytest.raises(
        UserError, match=f"the component 'scheduler' of .* is of the library '{library}', which is not imported"
    ):
        inspect_checkpoint(folder)


@pytest.mark.parametrize("entry", [["diffusers"], ["diffusers", 3], [["diffusers"], "X"]])
def test_a_malformed_entry_is_refused(copied: Callable[..., Path], entry: list[object]) -> None:
    folder = copied("sd")
    change_index(folder, scheduler=entry)
    with pytest.raises(UserError, match="a library and a class are wanted"):
        inspect_checkpoint(folder)


def test_code_of_a_transformers_folder_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}))
    (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError):
        load_transformers_config(str(tmp_path))
    assert not ran.exists()


BOMB = (
    "[&a0 ["
    + ",".join("x" * 10)
    + "]"
    + "".join(f", &a{i} [" + ",".join([f"*a{i - 1}"] * 10) + "]" for i in range(1, 9))
    + "]"
)


@pytest.mark.parametrize(
    "licence", ["2024-99-99", "9" * 6000, "[" * 4000, BOMB], ids=["date", "digits", "nesting", "aliases"]
)
def test_a_model_card_that_cannot_be_read_tells_no_licence(copied: Callable[..., Path], licence: str) -> None:
    folder = copied("sd")
    (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    assert inspect_checkpoint(folder).licence in (None, licence)
