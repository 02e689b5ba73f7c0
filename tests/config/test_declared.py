"""Option names that are read from source code, against the classes themselves."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import BaseModel

from stepdistill.config.declared import ClassSource, check_option_names, config_source
from stepdistill.config.reading import Settings, nested_section
from stepdistill.config.registry import METHODS, load_method
from stepdistill.errors import UserError


def _compare(source: ClassSource, section: type[BaseModel]) -> None:
    fields = source.fields()
    assert fields is not None
    assert set(fields) == set(section.model_fields)
    for name, field in section.model_fields.items():
        inside: type[Settings] | None = nested_section(field.annotation)
        below = fields[name]
        assert (below is None) == (inside is None), name
        if below is not None and inside is not None:
            _compare(below, inside)


@pytest.mark.parametrize("name", METHODS)
def test_names_in_the_source_are_those_of_the_class(name: str) -> None:
    module, _, attribute = METHODS[name].partition(":")
    source = config_source(ClassSource(module, attribute))
    assert source is not None
    _compare(source, load_method(name).Config)


def test_a_misspelt_option_is_found_in_every_section() -> None:
    for options, said in (
        ({"guidence": 2.0}, "unknown key 'guidence': did you mean 'guidance'"),
        ({"gan": {"wieght": 1.0}}, "unknown key 'gan.wieght': did you mean 'weight'"),
    ):
        with pytest.raises(UserError, match=said):
            check_option_names("dmd2", options)
    with pytest.raises(UserError, match=r"unknown key 'stages.1.segmets': did you mean 'segments'"):
        check_option_names("tscd", {"stages": [{"segments": 2}, {"segmets": 1}]})
    check_option_names("dmd2", {"guidance": 2.0, "gan": {"weight": 1.0}, "timesteps": [1]})
    check_option_names("mine", {"anything": 1})


def test_it_imports_no_torch() -> None:
    probe = (
        "import sys; from stepdistill.config.declared import check_option_names; check_option_names('dmd2', {'guidance': 2});"
        "print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout == "[]\n"
