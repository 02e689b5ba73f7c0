"""`stepdistill evaluate` and `compare`: rows, records, resumption, several processes, refusals."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import stepdistill
from stepdistill.cli import main
from stepdistill.errors import UserError
from stepdistill.evaluation.protocols import load_protocol, metric_label, prompt_set, protocol_names
from stepdistill.evaluation.reports.report import Report


def evaluate(output: Path, **changes: object) -> Report:
    arguments: dict = {
        "protocol": "fashion", "steps": [1, 2], "guidance": 1.5, "scheduler": "ddim", "num_images": 24, "device": "cpu",
        "batch_size": 24,
    }  # fmt: skip
    return stepdistill.evaluate("builtin:teacher", output, **(arguments | changes))


def test_evaluate_writes_rows_record_and_page(tmp_path: Path) -> None:
    report = evaluate(tmp_path / "out", teacher_steps=3, teacher_guidance=2.0)
    assert [(row.name, row.steps, row.network_calls, row.guidance) for row in report.rows] == [
        ("teacher", 3, 6, 2.0), ("model-1", 1, 2, 1.5), ("model-2", 2, 4, 1.5),
    ]  # fmt: skip
    assert {"fid@24", "prompt_accuracy@24", "diversity@24", "saturation@24"} <= set(report.row("teacher").metrics)
    assert report.row("model-2").metrics["fid@24"] < report.row("model-1").metrics["fid@24"]
    written = json.loads((tmp_path / "out/report.json").read_text())
    assert written["protocol"]["features"] == "judge"
    assert written["protocol"]["images"] == 24
    assert Report.read(tmp_path / "out") == report
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("data:image/png;base64,") >= 1 + 3 * 8  # the curves, and a row of pictures for each sampler
    assert not re.search(r"src=['\"](?!data:)", page)  # the page loads nothing
    links = re.findall(r"href='([^']*)'", page)
    assert len(links) == 3 * 8
    assert all((tmp_path / "out" / link).is_file() for link in links)
    assert page.index("<h2>Images") < page.index("<h2>Metrics over steps")
    assert written["units"] == {"kid": "x 1000", "kid_std": "x 1000"}
    assert "| kid@24 x 1000 |" in (tmp_path / "out/report.md").read_text()
    assert written["source"]["model"] == "builtin:teacher"
    assert "--steps 1,2 --guidance 1.5" in written["source"]["command"]
    assert re.match(r"\d{4}-\d\d-\d\dT", written["source"]["date"])
    assert "| teacher | 3 | 6 | 2 |" in (tmp_path / "out/report.md").read_text()


def test_a_stopped_evaluation_continues_and_another_model_is_an_error(tmp_path: Path) -> None:
    first = evaluate(tmp_path / "out")
    gone = tmp_path / "out/images/model-2/00007.png"
    before = gone.read_bytes()
    gone.unlink()
    kept = tmp_path / "out/images/model-2/00008.png"
    stamp = kept.stat().st_mtime_ns
    second = evaluate(tmp_path / "out", batch_size=5)
    assert kept.stat().st_mtime_ns == stamp
    assert gone.read_bytes() == before  # alone in its batch now, and still the same picture
    assert second.row("model-2").metrics == first.row("model-2").metrics
    with pytest.raises(UserError, match="an evaluation with different models"):
        evaluate(tmp_path / "out", guidance=3.0)
    with pytest.raises(UserError, match="an evaluation with different prompts"):
        evaluate(tmp_path / "out", num_images=36)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("x")
    with pytest.raises(UserError, match="something else"):
        evaluate(tmp_path / "other")


def test_images_in_memory_give_the_same_metrics(tmp_path: Path) -> None:
    kept, passing = evaluate(tmp_path / "a"), evaluate(tmp_path / "b", keep_images=False)
    assert [row.metrics for row in passing.rows] == [row.metrics for row in kept.rows]
    assert not (tmp_path / "b/images").exists()


def test_a_row_name_never_refers_to_two_models(tmp_path: Path) -> None:
    """Three calls into one folder: what the first drew is remembered by the third; a teacher's steps count too."""
    evaluate(tmp_path / "out", steps=[1], num_images=12)
    evaluate(tmp_path / "out", steps=[2], num_images=12, teacher_steps=2)
    with pytest.raises(UserError, match="different models"):
        evaluate(tmp_path / "out", steps=[1], num_images=12, guidance=3.0)
    with pytest.raises(UserError, match="different models"):
        evaluate(tmp_path / "out", steps=[1], num_images=12, teacher_steps=3)
    (tmp_path / "out/evaluation.json").write_text('{"half')
    with pytest.raises(UserError, match="cut short"):
        evaluate(tmp_path / "out", steps=[1], num_images=12)


def test_reports_are_compared_only_under_one_protocol(tmp_path: Path) -> None:
    evaluate(tmp_path / "a", steps=[1])
    evaluate(tmp_path / "b", steps=[2])
    both = stepdistill.compare(tmp_path / "a", tmp_path / "b/report.json")
    assert "model-1" in both
    assert "model-2" in both
    stepdistill.compare(tmp_path / "a", tmp_path / "b", tmp_path / "both")
    page = (tmp_path / "both/comparison.html").read_text()
    links = re.findall(r"href='([^']*)'", page)
    assert len(links) == 2 * 8
    assert all((tmp_path / "both" / link).is_file() for link in links)
    assert (tmp_path / "both/comparison.md").read_text() == both
    evaluate(tmp_path / "c", steps=[1], metrics=["fid"], features="random")
    with pytest.raises(UserError, match=r"protocols differ \(.*features: 'judge' and 'random'"):
        stepdistill.compare(tmp_path / "a", tmp_path / "c")
    with pytest.raises(UserError, match="no report"):
        stepdistill.compare(tmp_path / "a", tmp_path / "absent")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/report.json").write_text("{}")
    with pytest.raises(UserError, match="not a report"):
        stepdistill.compare(tmp_path / "a", tmp_path / "d")


def test_the_teacher_is_the_reference_of_the_prompts_protocol(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red bag\na blue coat\na white dress\na green shirt\n")
    common = {
        "protocol": "prompts",
        "prompts": str(prompts),
        "features": "random",
        "num_images": None,
        "seeds_per_prompt": 3,
    }
    report = evaluate(tmp_path / "out", teacher_steps=4, metrics=["fid", "diversity"], **common)
    assert "fid" not in report.row("teacher").metrics
    assert report.row("model-1").metrics["fid"] > 0
    assert report.row("teacher").metrics["diversity"] > 0
    with pytest.raises(UserError, match="--teacher-steps"):
        evaluate(tmp_path / "none", **common)
    assert not (tmp_path / "none").exists()


def test_a_run_is_measured_by_its_own_recipe(tmp_path: Path) -> None:
    short = [
        "training.max_steps=2", "training.batch_size=2", "training.grid_prompts=1", "training.threads=1", "training.log_every=1",
    ]  # fmt: skip
    config = stepdistill.load_config(Path(__file__).parents[2] / "configs/quickstart.yaml", short)
    stepdistill.distill(config, tmp_path / "run")
    report = stepdistill.evaluate(
        str(tmp_path / "run"), tmp_path / "out", protocol="fashion", num_images=12, device="cpu"
    )
    (row,) = report.rows
    assert (row.name, row.steps, row.network_calls, row.guidance) == ("student-4", 4, 4, 1.0)
    assert "<h2>Training</h2>" in (tmp_path / "out/report.html").read_text()
    with pytest.raises(UserError, match="leave --lora out"):
        stepdistill.evaluate(str(tmp_path / "run"), tmp_path / "x", protocol="fashion", lora="lora")


def test_a_run_without_arguments_is_measured_on_its_own_prompts_against_its_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepdistill.api.run_evaluation.MAX_IMAGES", 24)
    monkeypatch.setattr("stepdistill.api.run_evaluation.TEACHER_STEPS", 2)
    short = [
        "training.max_steps=1", "training.batch_size=2", "training.grid_prompts=1", "training.threads=1", "training.device=cpu",
    ]  # fmt: skip
    config = stepdistill.load_config(Path(__file__).parents[2] / "configs/quickstart.yaml", short)
    stepdistill.distill(config, tmp_path / "run")
    report = stepdistill.evaluate(str(tmp_path / "run"), tmp_path / "out")
    assert [row.name for row in report.rows] == ["teacher", "student-4"]
    assert report.row("student-4").metrics["fid"] > 0
    assert (report.record.images, report.record.features) == (24, "judge")
    expected = prompt_set(load_protocol("prompts"), config.data.prompts, 24)
    assert report.record.prompts_sha256 == expected.sha256


@pytest.mark.ci
def test_a_full_networks_teacher_is_its_base(tmp_path: Path) -> None:
    """An exported pipeline has its own weights everywhere: the teacher's row must come from what it was distilled from."""
    short = [
        "training.max_steps=2", "training.batch_size=2", "training.grid_prompts=1", "training.threads=1", "training.ema=0.0",
        "roles.generator={mode: full}", "optimizers.generator.lr=1e-2",
    ]  # fmt: skip
    config = stepdistill.load_config(Path(__file__).parents[2] / "configs/quickstart.yaml", short)
    stepdistill.distill(config, tmp_path / "run")
    told = {
        "teacher_steps": 2,
        "teacher_guidance": 1.5,
        "num_images": 12,
        "steps": [4],
        "guidance": None,
        "scheduler": None,
    }
    report = stepdistill.evaluate(
        str(tmp_path / "run"), tmp_path / "full", protocol="fashion", **(told | {"device": "cpu"})
    )
    plain = evaluate(tmp_path / "base", steps=[2], num_images=12)
    assert report.row("teacher").metrics == pytest.approx(plain.row("model-2").metrics, rel=1e-3)
    assert report.row("student-4").sampler.split(",")[0] != report.row("teacher").sampler.split(",")[0]
    again = stepdistill.evaluate(
        str(tmp_path / "run"), tmp_path / "full", protocol="fashion", **(told | {"device": "cpu"})
    )
    assert again.row("student-4").metrics == report.row("student-4").metrics
    assert again.row("student-4").seconds_per_image is None  # nothing was drawn again


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["builtin:teacher", "--protocol", "fashoin"], "did you mean 'fashion'"),
        (["builtin:teacher", "--protocol", "fashion", "--num-images", "13"], "multiple of 12"),
        (["builtin:teacher", "--protocol", "fashion", "--num-images", "12000"], "too few for 12000 images"),
        (["builtin:teacher", "--protocol", "fashion", "--scheduler", "ddmi"], "'ddmi' is not known"),
        (["builtin:teacher", "--protocol", "fashion", "--device", "cuda:99"], "cannot be used"),
        (["builtin:teacher", "--protocol", "fashion", "--steps", "1,two"], "1,2,4"),
        (["builtin:teacher", "--protocol", "fashion", "--metrics", "cmmd"], "defined on CLIP embeddings"),
        (["builtin:teacher", "--protocol", "fashion", "--clip", "/absent"], "cannot be loaded"),
        (
            [
                "builtin:teacher",
                "--protocol",
                "prompts",
                "--prompts",
                "PROMPTS",
                "--features",
                "random",
                "--teacher-steps",
                "2",
            ],
            "need at least 6",
        ),
        (["builtin:teacher", "--protocol", "prompts"], "give --prompts FILE"),
        (["--images", "FOLDER", "--reference", "FOLDER", "--steps", "4"], "--steps means nothing"),
        (["--images", "FOLDER", "--reference", "STATS", "--features", "random", "--metrics", "kid"], "feature vectors"),
        (["--images", "FOLDER", "--reference", "FOLDER", "--features", ":x"], "not known"),
        (["builtin:teacher", "--protocol", "fashion", "--save-statistics", "x.npz"], "goes with --images"),
        ([], "nothing to measure"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a red bag\na blue coat\n")
    (tmp_path / "folder").mkdir()
    for i in range(8):
        Image.new("RGB", (32, 32), (i, 2 * i, 0)).save(tmp_path / f"folder/{i}.png")
    np.savez(tmp_path / "stats.npz", mu=np.zeros(64), sigma=np.eye(64))
    places = {"PROMPTS": "prompts.txt", "FOLDER": "folder", "STATS": "stats.npz"}
    words = [str(tmp_path / places[word]) if word in places else word for word in words]
    monkeypatch.setattr(sys, "argv", ["stepdistill", "evaluate", *words, "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert sentence in lines[0]
    assert not (tmp_path / "out").exists()


def red(pixels: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    return pixels[:, 0].mean((1, 2))


def broken(pixels: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    raise RuntimeError("out of memory")


def test_a_reward_that_fails_while_scoring_is_noted_and_the_others_are_measured(tmp_path: Path) -> None:
    rewards = f"{__name__}:broken,{__name__}:red,0.5*critic:colour + critic:brightness"
    report = evaluate(tmp_path / "out", steps=[1], num_images=36, rewards=rewards, teacher_steps=2)
    assert any(f"{__name__}:broken: not available (RuntimeError: out of memory" in note for note in report.notes)
    assert report.row("model-1").metrics[f"{__name__}:red@36"] > 0
    assert "0.5*critic:colour + critic:brightness@36" in report.row("model-1").metrics
    assert set(report.wins[f"{__name__}:red"]) == {"model-1"}
    with pytest.raises(UserError, match="given twice"):
        evaluate(tmp_path / "twice", rewards=["critic:colour", "critic:colour"])


def test_fewer_images_change_the_metrics_name() -> None:
    """Reports of 'FID on COCO' with 259 images: the count belongs to the name."""
    assert metric_label("fid", 30_000, 30_000) == "fid"
    assert metric_label("fid", 259, 30_000) == "fid@259"
    assert metric_label("fid", 259, None) == "fid"


@pytest.mark.parametrize("name", protocol_names())
def test_every_protocol_loads_and_names_what_it_needs(name: str, tmp_path: Path) -> None:
    protocol = load_protocol(name)
    assert protocol.description
    if protocol.prompts.builtin is not None:
        assert len(prompt_set(protocol, None, None)) == protocol.prompts.count
        with pytest.raises(UserError, match="leave --prompts out"):
            prompt_set(protocol, "x.txt", None)
        return
    with pytest.raises(UserError, match="give --prompts FILE with"):
        prompt_set(protocol, None, None)
    few = tmp_path / "few.txt"
    few.write_text("one\ntwo\nthree\n")
    if protocol.prompts.count is not None:
        with pytest.raises(UserError, match=f"gives 3 images and {protocol.prompts.count} are wanted.*--num-images 3"):
            prompt_set(protocol, str(few), None)
    chosen = prompt_set(protocol, str(few), 2)
    assert chosen.prompts == ("one", "two")
    assert chosen.seeds == (1_000_000, 1_000_001)


def test_a_users_protocol_and_feature_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What CONTRIBUTING.md says: a YAML file, and a function in a module."""
    (tmp_path / "corners.py").write_text(
        "import torch\n"
        "from stepdistill.evaluation.networks.features import FeatureExtractor, FeatureRecord\n"
        "def make():\n"
        "    prepare = lambda image: torch.from_numpy(image[:2, :2].copy()).permute(2, 0, 1).float()\n"
        "    return FeatureExtractor(FeatureRecord('corners', '-', '2 x 2 corner'), prepare, lambda x: x.flatten(1))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "prompts.txt").write_text("a red bag\na blue coat\na white dress\na green shirt\n")
    (tmp_path / "mine.yaml").write_text(
        "description: my own\nprompts: {}\nreference: {kind: teacher}\nfeatures: corners:make\nmetrics: [fid, brightness]\n"
    )
    report = evaluate(
        tmp_path / "out", protocol=str(tmp_path / "mine.yaml"), prompts=str(tmp_path / "prompts.txt"), num_images=None,
        teacher_steps=2, steps=[1],
    )  # fmt: skip
    assert report.record.features == "corners"
    assert set(report.row("model-1").metrics) == {"fid", "brightness"}
    (tmp_path / "wrong.yaml").write_text("description: x\nprompts: {}\nmetric: [fid]\n")
    with pytest.raises(UserError, match="unknown key 'metric': did you mean 'metrics'"):
        load_protocol(str(tmp_path / "wrong.yaml"))


def test_an_unknown_protocol_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'mjhq-30k'"):
        load_protocol("mjhq30k")


def test_the_reference_must_have_the_protocols_count(tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    reference.mkdir()
    for i in range(3):
        Image.new("RGB", (32, 32), (i, i, i)).save(reference / f"{i}.png")
    prompts = tmp_path / "p.txt"
    prompts.write_text("a\nb\nc\nd\n")
    with pytest.raises(UserError, match="has 3 images and the protocol wants 5000"):
        evaluate(
            tmp_path / "out", protocol="coco2017-5k", prompts=str(prompts), num_images=4, features="random", metrics=["fid"],
            reference=reference, steps=[1],
        )  # fmt: skip
    assert not (tmp_path / "out").exists()  # before hours of drawing


@pytest.mark.ci
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_work_and_agree(processes: int, tmp_path: Path) -> None:
    """accelerate 575, torchmetrics 2684: padded tails counted twice; a hang where one process computes alone."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"a {colour} bag" for colour in ("red", "blue", "green") * 16 + ("pink",)) + "\n")
    shared = {
        "protocol": "prompts",
        "prompts": str(prompts),
        "features": "random",
        "teacher_steps": 2,
        "num_images": None,
    }
    metrics = ["fid", "kid", "diversity", "prompt_accuracy"]
    alone = evaluate(tmp_path / "one", steps=[1], batch_size=7, metrics=metrics, **shared)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m", "stepdistill.cli",
        "evaluate", "builtin:teacher", "--protocol", "prompts", "--prompts", str(prompts), "--features", "random",
        "--steps", "1", "--guidance", "1.5", "--scheduler", "ddim", "--teacher-steps", "2", "--metrics", ",".join(metrics),
        "--batch-size", "5", "--device", "cpu", "--output", str(tmp_path / "many"),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    many = Report.read(tmp_path / "many")
    assert many.record == alone.record
    for name, value in alone.row("model-1").metrics.items():
        # distances near zero are differences of numbers of the order of 1 to 10, made of float32 features whose last
        # bits follow the batch size: what holds to 1e-6 is the terms, and so the difference to 1e-6 of them
        assert many.row("model-1").metrics[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name
    assert len(list((tmp_path / "many/images/model-1").glob("*.png"))) == 49
