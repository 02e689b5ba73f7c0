"""YAML that may come from somebody else: aliases, duplicates, absurd values, other files."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from stepdistill.config.collection import CollectConfig
from stepdistill.config.reading import parse
from stepdistill.config.schema import RunConfig, load_config
from stepdistill.config.yaml_text import parse_yaml, read_yaml
from stepdistill.errors import UserError

VALID = {
    "model": {"path": "builtin:teacher"},
    "method": {"name": "dmd2"},
    "training": {"max_steps": 1},
}


def refused(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        parse_yaml(text, "this text")
    assert "\n" not in str(caught.value)


def test_nested_aliases_are_refused_before_they_are_expanded() -> None:
    bomb = "[&a0 [" + ",".join("x" * 10) + "]"
    for level in range(1, 9):
        bomb += f", &a{level} [" + ",".join([f"*a{level - 1}"] * 10) + "]"
    started = time.process_time()
    refused(bomb + "]", "more than 100,000 values")
    assert time.process_time() - started < 1
    refused("a: &a [*a]", "contains itself")
    assert parse_yaml("a: &a {b: 1}\nc: *a", "this text") == {"a": {"b": 1}, "c": {"b": 1}}


def test_a_key_that_is_written_twice_is_an_error() -> None:
    refused("lr: 1\nlr: 2", "'lr' is written twice, line 2")
    refused("a:\n  lr: 1\n  lr: 2", "'lr' is written twice, line 3")
    merged = parse_yaml("base: &base {lr: 1, eps: 2}\nown: {<<: *base, lr: 3}", "this text")
    assert merged["own"] == {"lr": 3, "eps": 2}


@pytest.mark.parametrize("text", ["2024-13-45", "[1, 2", "9" * 5000, "[" * 5000, "!!python/object:os.system {}"])
def test_odd_texts_are_one_sentence(text: str) -> None:
    refused(text, "this text is")


def test_other_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "utf16.yaml").write_text("a: 1", encoding="utf-16")
    (tmp_path / "large.yaml").write_text("a: 1 #" + "x" * 5_000_000)
    for path, said in (
        ("base.safetensors", "model.path"),
        (str(tmp_path), "is a folder"),
        ("none.yaml", "no config file"),
        (str(tmp_path / "utf16.yaml"), "UTF-8"),
        (str(tmp_path / "large.yaml"), "4,000,000 bytes"),
    ):
        with pytest.raises(UserError, match=said):
            read_yaml(path)


@pytest.mark.parametrize(
    "override",
    [
        "optimizers.generator.lr=.inf",
        "optimizers.generator.lr=.nan",
        "optimizers.generator.lr=1e300",
        "optimizers.generator.eps=.inf",
        "optimizers.generator.betas=[1.0, 0.9]",
        "optimizers.generator.betas=[-0.1, 0.9]",
        "optimizers.generator.weight_decay=.inf",
        "roles.generator.alpha=.inf",
        "roles.generator.rank=100000000",
        "training.seed=-1",
        "training.seed=18446744073709551616",
        "training.max_steps=1000000000000",
        "training.batch_size=1099511627776",
        "model.size=[1099511627776, 8]",
        "data.buckets=[[1099511627776, 8]]",
        "data.max_bad_share=.nan",
        "training.alarms.logits=.inf",
    ],
)
def test_absurd_numbers_are_errors(tmp_path: Path, override: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("model: {path: builtin:teacher}\nmethod: {name: dmd2}\ntraining: {max_steps: 1}\n")
    load_config(file)
    with pytest.raises(UserError, match=override.partition("=")[0].split("=")[0].replace(".", r"\.")):
        load_config(file, [*(["optimizers.generator.lr=1e-5"] if "optimizers" in override else []), override])


def test_a_long_wrong_value_is_quoted_in_part() -> None:
    with pytest.raises(UserError) as caught:
        parse(RunConfig, {**VALID, "training": {"max_steps": "x" * 100_000}}, "config.yaml")
    assert len(str(caught.value)) < 500
    with pytest.raises(UserError, match="guidance"):
        parse(CollectConfig, {"prompts": "builtin:general", "count": 1, "guidance": float("inf")}, "config.yaml")
