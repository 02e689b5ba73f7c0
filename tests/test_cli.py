"""The command line as a tired user meets it: one clear sentence before any weight is loaded, nothing half-written."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from support.method_cases import CASES, FULLEST

import stepdistill
from stepdistill import cli
from stepdistill.config.listing import option_lines
from stepdistill.config.registry import METHODS, load_method
from stepdistill.config.schema import RunConfig
from stepdistill.methods.consistency.tscd import ScoreConfig


@pytest.fixture
def config(tiny: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Writes a YAML config on tiny SD; `changes` are section.key=value pairs, None removes a key."""

    def write(**changes: object) -> Path:
        data: dict[str, Any] = {
            "model": {"path": str(tiny("sd", "default"))},
            "method": {"name": "dmd2", "guidance": 2.0},
            "data": {"prompts": "builtin:general"},
            "training": {"max_steps": 1, "device": "cpu"},
            "roles": {},
        }
        for key, value in changes.items():
            section, _, name = key.partition("__")
            data[section] = {**data[section], name: value} if name else value
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(data))
        return path

    return write


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run the command line; it must fail with exactly one sentence, which is returned."""

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a weight was loaded before the refusal")

    monkeypatch.setattr("stepdistill.training.session.load_checkpoint", forbidden)
    monkeypatch.setattr(sys, "argv", ["stepdistill", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    assert "Traceback" not in message
    return message


def test_help_is_fast() -> None:
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "stepdistill.cli", "--help"], capture_output=True, text=True, check=True
    )
    assert "quickstart" in done.stdout
    probe = "import sys, stepdistill.cli; print(any(m in sys.modules for m in ('torch', 'diffusers', 'pydantic')))"
    heavy = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout.strip()
    assert heavy == "False"
    assert time.perf_counter() - started < 300  # a hang, not a benchmark


MISTAKES = {
    "a config key": (["train", "CONFIG", "--set", "training.max_step=5"], "did you mean 'max_steps'"),
    "a section": (["cache", "CONFIG", "--set", "trainig.max_steps=5"], "did you mean 'training'"),
    "an option of the method": (["train", "CONFIG", "--set", "method.guidence=2"], "did you mean 'guidance'"),
    "a method": (["plan", "CONFIG", "--set", "method.name=dmd3"], "did you mean 'dmd'"),
    "a card": (["plan", "CONFIG", "--gpu", "4091"], "4090"),
    "a model": (["train", "CONFIG", "--set", "model.path=no.safetensors"], "no.safetensors"),
    "a prompt file": (["cache", "CONFIG", "--set", "data.prompts=no.txt"], "no prompt file 'no.txt'"),
    "a missing config": (["collect", "pairs", "no.yaml", "--output", "out"], "no config file 'no.yaml'"),
    "a model as config": (["train", "base.safetensors"], "--set model.path=base.safetensors"),
    "a key of a collection": (["collect", "pairs", "CONFIG", "--output", "out"], "unknown key 'method'"),
    "an option of a command": (["quickstart", "--ouput", "out"], "--output"),
    "an infinite number": (["train", "CONFIG", "--set", "optimizers.generator.lr=.inf"], "finite"),
}


@pytest.mark.parametrize(("arguments", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_answered_before_heavy_libraries_are_imported(
    tmp_path: Path, arguments: list[str], said: str
) -> None:
    (tmp_path / "config.yaml").write_text(
        "model: {path: builtin:teacher}\nmethod: {name: dmd2, guidance: 2.0}\n"
        "data: {prompts: builtin:fashion}\ntraining: {max_steps: 1}\n"
    )
    script = (
        "import sys, time, stepdistill.cli as cli\n"
        "try:\n    cli.main()\n"
        "finally:\n"
        "    heavy = [name for name in ('torch', 'diffusers', 'transformers', 'accelerate') if name in sys.modules]\n"
        "    print('heavy', heavy, 'seconds', time.process_time())\n"
    )
    words = [word.replace("CONFIG", "config.yaml") for word in arguments]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert "heavy [] seconds" in done.stdout
    assert float(done.stdout.split()[-1]) < 1


def test_the_version_is_printed() -> None:
    done = subprocess.run([sys.executable, "-m", "stepdistill.cli", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"stepdistill {stepdistill.__version__}\n")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training__max_step": 5}, "did you mean 'max_steps'"),
        ({"method__guidence": 2.0}, "did you mean 'guidance'"),
        ({"method__name": "dmd3"}, "dmd2"),
        ({"training__batch_size": 0}, "training.batch_size"),
        ({"model__path": "/no/such/folder"}, "/no/such/folder"),
        ({"method__gan": {"weight": 0.01}}, "GAN"),
        ({"data__prompts": "/no/prompts.txt"}, "/no/prompts.txt"),
        ({"data__prompts": "builtin:generl"}, "general"),
        ({"data__prompts": None}, "data.prompts"),
        ({"method__timesteps": [100, 200]}, "falls strictly"),
        ({"model__size": [33, 32]}, "multiples"),
        ({"method__name": "dmd"}, "collect pairs"),
        ({"method__guidance": 0.0}, "greater than or equal to 1"),
        ({"method__gan": {"features": "real_score"}}, "it has no weight, which leaves it off"),
        ({"method__moments": {"std": 0.9}}, "it has no weight, which leaves it off"),
        ({"method__reward": {"name": "critic:colour"}}, "it has no weight, which leaves it off"),
        ({"method__reward": {"weight": 0.1}}, "a weight and no name"),
        ({"optimizers": {"generator": {"lr": 1e-4, "schedule": "cosine"}}}, "over which it falls to 0"),
        ({"optimizers": {"generator": {"lr": 1e-4, "hold": 10}}}, "which has no effect without a decay"),
        ({"roles__generator": {"rank_pattern": {"to_q": 0}}}, "greater than 0"),
        ({"roles__generator": {"alpha_pattern": {"*.to_q": 4}}}, "not a regular expression"),
    ],
)
def test_bad_configs(
    config: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, object],
    said: str,
) -> None:
    message = refused(monkeypatch, capsys, "train", config(**changes), "--output", tmp_path / "run")
    assert said in message
    assert not (tmp_path / "run").exists()


def test_bad_files(
    config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    (tmp_path / "empty.txt").write_text("\n\n")
    assert "empty.txt" in refused(
        monkeypatch, capsys, "train", config(data__prompts=str(tmp_path / "empty.txt")), "--output", output
    )
    (tmp_path / "not_diffusers").mkdir()
    assert "model_index.json" in refused(
        monkeypatch, capsys, "train", config(model__path=str(tmp_path / "not_diffusers")), "--output", output
    )
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x02")
    assert "safetensors" in refused(
        monkeypatch, capsys, "train", config(model__path=str(tmp_path / "model.ckpt")), "--output", output
    )
    assert "no config file" in refused(monkeypatch, capsys, "train", tmp_path / "none.yaml", "--output", output)
    assert "section.key=value" in refused(
        monkeypatch, capsys, "train", config(), "--set", "training.max_steps", "--output", output
    )
    assert "not valid YAML" in refused(
        monkeypatch, capsys, "train", config(), "--set", "method.exit_odds=[4, 3", "--output", output
    )
    assert not output.exists()


def test_outputs_that_cannot_be_made(
    config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file where a folder should be, and a folder where a file should be: said first, and both left as they were."""
    file = tmp_path / "thesis.txt"
    file.write_text("mine")
    pairs = tmp_path / "pairs.yaml"
    pairs.write_text("model: {path: builtin:teacher}\nprompts: builtin:fashion_train\ncount: 4\n")
    for output in (file, file / "deeper" / "run"):
        for command in (
            ["train", config()],
            ["export", tmp_path],
            ["sample", "builtin:teacher", "--prompt", "a bag"],
            ["evaluate", "builtin:teacher", "--prompts", "builtin:fashion", "--reference", tmp_path],
            ["collect", "pairs", pairs],
            ["quickstart"],
        ):
            assert f"{str(file)!r} is a file" in refused(monkeypatch, capsys, *command, "--output", output)
    assert "is a folder" in refused(monkeypatch, capsys, "plan", config(), "--json", tmp_path)
    assert "does not exist" in refused(monkeypatch, capsys, "plan", config(), "--json", tmp_path / "no" / "plan.json")
    assert file.read_text() == "mine"


def test_a_dry_run_refuses_what_the_run_would(
    config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder, the checkpoint to go on from, and the measuring section too."""
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("mine")
    dry = ["train", config(), "--dry-run", "--output"]
    assert "not empty" in refused(monkeypatch, capsys, *dry, taken)
    assert "holds no run" in refused(monkeypatch, capsys, *dry, taken, "--resume", "latest")
    assert "no checkpoint at" in refused(monkeypatch, capsys, *dry, tmp_path / "new", "--resume", "step-5")
    for section, said in (
        ({"every": 5}, "prompts"),
        ({"every": 5, "prompts": "builtin:fashion"}, "evaluation.reference is not set"),
        ({"every": 5, "prompts": "builtin:fashion", "reference": "/no/images"}, "nothing is there"),
        ({"every": 5, "protocol": "coco"}, "coco"),
        ({"every": 5, "protocol": "fashion", "best": "speed"}, "evaluation.best"),
    ):
        assert said in refused(
            monkeypatch, capsys, "train", config(evaluation=section), "--dry-run", "--output", tmp_path / "new"
        )
    assert not (tmp_path / "new").exists()


def test_a_dry_run_says_which_stages_are_never_reached(config: Callable[..., Path]) -> None:
    method = {"name": "phased", "guidance": 2.0, "steps": 2, "phases": 2, "phase_iterations": 10}
    found = {
        steps: next(
            line
            for line in stepdistill.dry_run(
                stepdistill.load_config(config(method=method), [f"training.max_steps={steps}"])
            )
            if line.startswith("stages")
        )
        for steps in (10, 20)
    }
    assert found[10].endswith("phase_1 from 0, phase_2 from 10 (never: training.max_steps ends before)")
    assert found[20].endswith("phase_1 from 0, phase_2 from 10")


def test_a_folder_with_another_run_is_left_alone(
    config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "taken"
    output.mkdir()
    (output / "thesis.txt").write_text("mine")
    for command in (
        ["train", config(), "--output", output],
        ["export", tmp_path, "--output", output],
        ["sample", "builtin:teacher", "--prompt", "a bag", "--output", output],
        ["quickstart", "--output", output],
    ):
        assert "not empty" in refused(monkeypatch, capsys, *command)
    assert [path.name for path in output.iterdir()] == ["thesis.txt"]


def test_too_many_broken_images(
    config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for index in range(3):
        Image.new("RGB", (64, 64), "red").save(images / f"{index}.png")
        (images / f"bad{index}.png").write_bytes((images / f"{index}.png").read_bytes()[:40])
    path = config(method__gan={"weight": 0.01}, data__images=str(images))
    monkeypatch.setattr(sys, "argv", ["stepdistill", "train", str(path), "--output", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    assert "bad" in capsys.readouterr().err


def test_export_needs_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "not a run" in refused(monkeypatch, capsys, "export", tmp_path, "--output", tmp_path / "out")


def test_lists(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["stepdistill", "list", "methods"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 0
    listed = capsys.readouterr().out.split()
    assert {"dmd", "dmd2"} <= set(listed)
    assert len(listed) == len(set(listed)) == len(METHODS)


@pytest.mark.parametrize("name", FULLEST.values())
def test_options_are_what_the_class_says_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """What is printed is YAML; with what is required filled in, it is the configuration that says nothing else."""
    case = CASES[name]
    monkeypatch.setattr(sys, "argv", ["stepdistill", "options", case.method])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    shown, config = yaml.safe_load(capsys.readouterr().out), load_method(case.method).Config
    assert list(shown) == list(config.model_fields)
    required = {key: case.options[key] for key, field in config.model_fields.items() if field.is_required()}
    assert all(shown[key] is None for key in required)
    assert config.model_validate({**shown, **required}) == config.model_validate(required)


def test_sections_that_are_off_may_be_copied_too() -> None:
    lines = list(option_lines(load_method("tscd").Config))
    below = lines[lines.index("score: null  # or a section") + 1 :]
    said = "\n".join(line.removeprefix("# ") for line in takewhile(lambda line: line.startswith("#"), below))
    assert ScoreConfig.model_validate(yaml.safe_load(said)) == ScoreConfig()
    assert any(line.startswith("#   segments:   # int >= 1, required") for line in lines)


def test_options_of_a_config(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["stepdistill", "options"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    shown = yaml.safe_load(text)
    assert list(shown) == list(RunConfig.model_fields)
    shown["model"]["path"], shown["method"] = "builtin:teacher", {"name": "dmd2"}
    shown["training"]["max_steps"] = 7
    said = {"model": {"path": "builtin:teacher"}, "method": {"name": "dmd2"}, "training": {"max_steps": 7}}
    assert RunConfig.model_validate(shown) == RunConfig.model_validate(said)
    assert "  rank: 64  # int > 0 <= 65536; LoRA rank" in text
    assert "#   every:   # int > 0 <= 1000000000, required; iterations between evaluations" in text


@pytest.mark.parametrize(
    "arguments",
    [
        "train nothing.yaml", "cache nothing.yaml", "plan nothing.yaml", "collect pairs nothing.yaml --output x",
        "export nothing --output x", "sample nothing --prompt a --output x", "sample builtin:teacher --output x",
        "evaluate nothing --output x", "compare nothing neither",
    ],
)  # fmt: skip
def test_a_mistake_is_answered_before_torch_is_imported(arguments: str, tmp_path: Path) -> None:
    script = (
        "import sys; from stepdistill import cli\n"
        f"sys.argv = ['stepdistill', *{arguments.split()!r}]\n"
        "try: cli.main()\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules, 'diffusers' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(stepdistill.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["2", "False", "False"]
    assert done.stderr.count("\n") == 1
