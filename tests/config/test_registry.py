"""Names of methods and families, this package's and others'."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from stepdistill.config import registry
from stepdistill.config.registry import METHODS, check_method_name, load_method
from stepdistill.errors import UserError
from stepdistill.families.sdxl import SDXL


def test_the_registry_imports_no_torch() -> None:
    code = "import sys, stepdistill.config.registry as r; r.method_names(); r.family_names(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_names_load_and_unknown_ones_are_told_the_nearest() -> None:
    assert {"dmd", "dmd2"} <= set(registry.method_names())
    assert {"sd", "sdxl", "analytic"} <= set(registry.family_names())
    assert registry.load_method("dmd2").__name__ == "DMD2"
    with pytest.raises(UserError, match="no method named 'dmd3': did you mean 'dmd"):
        registry.load_method("dmd3")
    with pytest.raises(UserError, match="no family named 'sdlx': did you mean 'sdxl'"):
        registry.load_family("sdlx")


def test_other_packages_add_names(monkeypatch: pytest.MonkeyPatch) -> None:
    group = "stepdistill.families"
    points = [
        EntryPoint("mine", "stepdistill.families.sdxl:SDXL", group),
        EntryPoint("sd", "nowhere:Thief", group),
        EntryPoint("broken", "nowhere.at.all:Lost", group),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: [p for p in points if p.group == group])
    assert registry.family_names()[-2:] == ("mine", "broken")
    assert isinstance(registry.load_family("mine"), SDXL)
    assert registry.load_family("sd").name == "sd"
    with pytest.raises(UserError, match="check the module's name"):
        registry.load_family("broken")


def test_a_method_may_be_named_by_module_and_class() -> None:
    target = METHODS["dmd2"]
    check_method_name(target)
    assert load_method(target) is load_method("dmd2")
    for name, said in (
        ("no.such:Mine", "cannot be imported"),
        ("json:loads", "not a class of a method"),
        ("a b:c", "no method"),
    ):
        with pytest.raises(UserError, match=said):
            load_method(name)
