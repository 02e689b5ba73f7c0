"""The options of `stepdistill evaluate`: one definition for Python and the command line; errors before anything is loaded."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.main import get_command

import stepdistill
from stepdistill.api.evaluation_options import (
    FolderOptions,
    ModelOptions,
    command_of,
    field_names,
    flag_of,
    parse_options,
)
from stepdistill.cli import app, main
from stepdistill.errors import UserError


def test_every_option_is_on_the_command_line_once() -> None:
    command = get_command(app).commands["evaluate"]  # type: ignore[attr-defined]
    flags = [flag for parameter in command.params for flag in parameter.opts]
    wanted = {flag_of(name) for section in (ModelOptions, FolderOptions) for name in field_names(section)}
    assert wanted | {"--output", "--images"} == {flag for flag in flags if flag.startswith("--")} - {"--help"}
    assert len(flags) == len(set(flags))


def test_the_recorded_command_gives_the_same_options_again() -> None:
    options = parse_options(
        ModelOptions,
        {
            "steps": [1, 4],
            "rewards": ["0.5*clip + critic:colour", "aesthetic:a,b"],
            "size": (64, 96),
            "keep_images": False,
            "download": True,
        },
    )
    words = command_of(options, "model", "--output", "out")
    assert words == (
        "stepdistill evaluate model --output out --rewards '0.5*clip + critic:colour,aesthetic:a,b' --download --steps 1,4 "
        "--no-keep-images --width 96 --height 64"
    )
    typed: dict[str, object] = {
        "steps": "1,4",
        "rewards": "0.5*clip + critic:colour,aesthetic:a,b",
        "width": 96,
        "height": 64,
        "keep_images": False,
        "download": True,
    }
    assert parse_options(ModelOptions, typed) == options


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"step": [1]}, "no option 'step': did you mean 'steps'"),
        ({"guidance": float("nan")}, "--guidance is nan: give a finite"),
        ({"batch_size": 0}, "--batch-size is 0, but"),
        ({"num_images": 1}, "--num-images is 1, but"),
        ({"width": 64}, "--width and --height go together"),
        ({"resize": "bilinear"}, "--resize is 'bilinear', but"),
        ({"steps": "1,two"}, "write, say, 1,2,4"),
        ({"steps": [0]}, "--steps is 0, but"),
    ],
)
def test_a_wrong_option_is_one_sentence(given: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parse_options(ModelOptions, given)


def test_options_are_checked_before_heavy_imports(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["stepdistill", "evaluate", "builtin:teacher", "--steps", "x", "--output", "/absent/out"]
    )
    monkeypatch.setitem(sys.modules, "stepdistill.api.evaluating", None)
    with pytest.raises(SystemExit):
        main()
    assert "a list of step counts is wanted" in capsys.readouterr().err


def test_a_hub_id_is_not_requested_without_download(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a folder here nor in the hub's cache, and downloading is off"):
        stepdistill.evaluate("someone/absent-model", tmp_path / "out", protocol="fashion", num_images=12)
    assert not (tmp_path / "out").exists()
