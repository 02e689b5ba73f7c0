"""Alarms: one warning with the right remedy for every way to leave a band, none for a healthy run, neither repeated nor forgotten."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.method_cases import CASES, Bench

from stepdistill.assets import FOLDER
from stepdistill.config.reading import parse
from stepdistill.config.schema import AlarmsConfig, RunConfig, load_config
from stepdistill.errors import UserError
from stepdistill.training.monitoring.alarms import ALARMS, Alarms, Oscillation, oscillation_amplitude
from stepdistill.training.monitoring.monitor import LatentReference
from stepdistill.training.run import train

Line = Mapping[str, float]
STEADY: Line = {
    "signals/latent_std_ratio": 1.0, "signals/latent_mean_shift": 0.0, "generator/score_gap": 0.8, "fake_score/denoising": 0.2,
    "signals/fake_shift": 0.2, "generator/grad_norm": 1.0, "fake_score/grad_norm": 1.0, "fake_score/d_real": 1.0,
    "fake_score/d_fake": -1.0, "signals/diversity_ratio": 0.95, "signals/saturation_drift": 0.01, "generator/clipped": 0.0,
    "fake_score/clipped": 0.0, "signals/skipped": 0.0,
}  # fmt: skip
DRAWN = {alarm.signal for alarm in ALARMS if alarm.measured_at_grids}
"""Of fixed prompts and noise: they have no sampling noise."""


def noise(count: int, scale: float, seed: int = 0) -> list[float]:
    return (scale * torch.randn(count, generator=torch.Generator().manual_seed(seed))).tolist()


def healthy(count: int) -> list[dict[str, float]]:
    """Lines as of a small batch: everything in its band, with sampling noise."""
    columns = {
        name: [value + e for e in noise(count, 0.01 if name in DRAWN else 0.1 if value else 0.2, seed)]
        for seed, (name, value) in enumerate(STEADY.items())
        if "clipped" not in name and "skipped" not in name
    }
    columns["generator/clipped"] = [float(k % 3 == 0) for k in range(count)]
    return [{name: column[k] for name, column in columns.items()} for k in range(count)]


def said(lines: Iterable[Line], alarms: Alarms | None = None, start: int = 0) -> list[str]:
    alarms = alarms or Alarms(AlarmsConfig())
    return [text for k, line in enumerate(lines) for text in alarms.judge(start + k, line)]


def of(signal: str, values: Sequence[float]) -> list[Line]:
    return [{signal: value} for value in values]


def ramp(start: float, stop: float, count: int = 60) -> list[float]:
    return [
        min(start + (stop - start) * k / 30, stop) if stop > start else max(start + (stop - start) * k / 30, stop)
        for k in range(count)
    ]


WAYS: Mapping[str, tuple[str, list[float], str]] = {
    "latent_std": ("signals/latent_std_ratio", ramp(0.9, 1.3), "lower method.guidance"),
    "latent_mean": (
        "signals/latent_mean_shift", [0.4 * math.sin(k / 5) + e for k, e in enumerate(noise(120, 0.05))], "raise method.ratio",
    ),
    "score_gap": ("generator/score_gap", [1.4] * 10 + [1.8] * 40, "raise method.ratio"),
    "score_gap_rise": ("generator/score_gap", ramp(0.4, 1.2), "optimizers.generator.lr"),
    "fake_loss": ("fake_score/denoising", [0.3 + e for e in noise(80, 1e-4)], "raise optimizers.fake_score.lr"),
    "fake_shift": ("signals/fake_shift", [1e-4] * 3, "raise optimizers.fake_score.lr"),
    "gradient": ("generator/grad_norm", [0.0] * 40, "look at roles.generator"),
    "logits": ("fake_score/d_fake", ramp(0.0, -12.0), "lower method.gan.critic_weight"),
    "diversity": ("signals/diversity_ratio", [0.95, 0.7, 0.5, 0.45, 0.4], "lower method.guidance"),
    "saturation": ("signals/saturation_drift", [0.02, 0.12, 0.15, 0.15], "lower method.guidance"),
    "clipped": ("fake_score/clipped", [1.0] * 40, "lower optimizers.fake_score.lr"),
    "skipped": ("signals/skipped", [0.0] * 5 + [0.015] * 40, "model.dtype"),
}  # fmt: skip


# ---------------------------------------------------------------- series


def test_every_band_has_a_way_out_of_it() -> None:
    thresholds = set(AlarmsConfig.model_fields) - {"enabled", "window"}
    assert set(WAYS) == thresholds == {alarm.threshold for alarm in ALARMS}
    assert {alarm.signal for alarm in ALARMS} == set(STEADY)


@pytest.mark.parametrize("threshold", WAYS)
def test_one_warning_names_signal_band_and_remedy(threshold: str) -> None:
    signal, values, remedy = WAYS[threshold]
    (text,) = said(of(signal, values))
    assert signal in text
    assert f"training.alarms.{threshold} = " in text
    assert remedy in text
    assert not said(of(signal, values), Alarms(AlarmsConfig.model_validate({threshold: None})))
    assert not said(of(signal, values), Alarms(AlarmsConfig(enabled=False)))


def test_a_healthy_run_is_left_alone() -> None:
    assert said(healthy(3000)) == []


def test_what_is_not_a_number_is_passed_over() -> None:
    signal, values, _ = WAYS["score_gap"]
    broken = [value for pair in zip(values, [math.nan] * len(values), strict=True) for value in pair]
    assert len(said(of(signal, broken))) == 1


def test_an_excursion_shorter_than_the_window_is_not_said() -> None:
    assert not said(of("generator/score_gap", [1.0] * 20 + [2.0] * 9 + [1.0] * 30))


def test_said_again_only_anew_or_twice_as_far_out() -> None:
    """Healthy is 0 and the band 1.5: hovering below it is no return, 1 is one; from 1.6 on, twice as far is 3.2."""
    hovering = [1.6] * 25 + ([1.45] * 15 + [1.6] * 25) * 3
    assert len(said(of("generator/score_gap", hovering))) == 1
    returning = [1.6] * 25 + [1.0] * 15 + [1.6] * 25
    assert len(said(of("generator/score_gap", returning))) == 2
    off = Alarms(AlarmsConfig(score_gap_rise=None))
    assert len(said(of("generator/score_gap", [1.6] * 25 + [3.0] * 20), off)) == 1
    off = Alarms(AlarmsConfig(score_gap_rise=None))
    assert len(said(of("generator/score_gap", [1.6] * 25 + [3.3] * 20), off)) == 2


def test_a_bad_reference_is_no_rise() -> None:
    assert not said(of("signals/latent_std_ratio", [1.3] * 100))


def test_a_ratio_that_came_back_is_said_anew() -> None:
    out, back = [1.0] * 12 + [1.3] * 30, [0.98] * 30
    assert len(said(of("signals/latent_std_ratio", out + back + out))) == 2


def test_a_stage_is_held_against_its_own_start() -> None:
    """A fake score that moved in one stage and stands still in the next; a gap that starts elsewhere."""
    moved = [0.3 + 0.01 * k for k in range(60)] + [0.5 + e for e in noise(120, 1e-5)]
    lines = of("fake_score/denoising", moved)
    assert not said(lines)
    (text,) = said(lines, Alarms(AlarmsConfig(), stage_starts=[59]))
    assert "has not moved from its start" in text
    gap = of("generator/score_gap", [0.02] * 60 + [1.2] * 60)
    assert any("score_gap_rise" in text for text in said(gap))
    assert not any("score_gap_rise" in text for text in said(gap, Alarms(AlarmsConfig(), stage_starts=[59])))


@pytest.mark.parametrize("cut", [5, 30, 45, 59])
def test_state_is_a_function_of_the_lines(cut: int) -> None:
    """Whoever reads the first lines again says of the others what he would have said, and no more."""
    lines = [{signal: value for signal, values, _ in WAYS.values() for value in values[k : k + 1]} for k in range(60)]
    whole, first = said(lines), said(lines[:cut])
    resumed = Alarms(AlarmsConfig())
    said(lines[:cut], resumed)
    assert first + said(lines[cut:], resumed, cut) == whole
    assert len(whole) >= 8


def test_to_and_fro() -> None:
    assert oscillation_amplitude([0, 1, 2, 3]) == 0
    assert oscillation_amplitude([0, 3, 0]) == 0
    assert oscillation_amplitude([0, 3, 1, 4]) == 2
    assert oscillation_amplitude([0, 1, 5, 4, 4.5, 0.5, 9]) == 4.5


def test_sampling_noise_is_no_swing() -> None:
    """However long it lasts; a swing that stands out of it is found at any time."""
    still, moving = Oscillation(10), Oscillation(10)
    for k, e in enumerate(noise(3000, 1.0)):
        assert not still(e)
        found = moving(2 * math.sin(k / 5) + 0.3 * e)
        assert k < 100 or found is None or found > 2


# ---------------------------------------------------------------- signals


def test_the_reference_is_the_teacher_until_real_latents_are_seen() -> None:
    reference = LatentReference((1.0, 2.0))
    assert reference.signals({"fake_score/loss": 1.0}) == {}
    ours = {"generator/latent_mean": 2.0, "generator/latent_std": 3.0}
    assert reference.signals(ours) == {"signals/latent_std_ratio": 1.5, "signals/latent_mean_shift": 0.5}
    real = {"generator/real_mean": 0.0, "generator/real_std": 1.0}
    assert reference.signals({**ours, **real})["signals/latent_std_ratio"] == 3.0
    real = {"generator/real_mean": 2.0, "generator/real_std": 3.0}
    # the mean of the two lines: 1 and 2
    found = reference.signals({**ours, **real})
    assert found == {"signals/latent_std_ratio": 1.5, "signals/latent_mean_shift": 0.5}
    assert reference.signals({**ours, "generator/real_mean": math.nan, "generator/real_std": math.nan}) == found


# ---------------------------------------------------------------- runs


@pytest.fixture
def bench(tiny: Callable[..., Path], tmp_path: Path) -> Bench:
    return Bench(tiny, tmp_path)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records if "training.alarms." in record.getMessage()]
    caplog.clear()
    return found


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("cut", [3, 6, 8])
def test_a_resumed_run_neither_repeats_nor_forgets(
    bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture, cut: int
) -> None:
    """Bands that this run leaves at its start, and the gap at iteration 4: before, at and after the cuts."""
    config: Callable[[int], RunConfig] = lambda steps: bench.config(  # noqa: E731
        CASES["dmd2-deterministic"], steps, alarms={"window": 2, "score_gap": 1e-9, "fake_loss": 100.0}
    )
    train(config(12), tmp_path / "whole")
    whole = warnings(caplog)
    assert any("score_gap" in text for text in whole)
    assert any("fake_loss" in text for text in whole)
    train(config(cut), tmp_path / "broken")
    train(config(12), tmp_path / "broken", resume="latest")
    assert warnings(caplog) == whole
    assert (tmp_path / "whole/stats.jsonl").read_text() == (tmp_path / "broken/stats.jsonl").read_text()


def test_values_of_rare_updates_reach_the_log(bench: Bench, tmp_path: Path) -> None:
    """Ratio 2 and a line every 2: no line falls on a generator's update. Broken between an update and its line, too."""
    make = lambda steps: bench.config(CASES["dmd2"], steps, log_every=2)  # noqa: E731
    train(make(6), tmp_path / "whole")
    assert all(
        "generator/score_gap" in line and "signals/latent_std_ratio" in line for line in lines(tmp_path / "whole")
    )
    every = bench.config(CASES["dmd2"], 6)
    train(every, tmp_path / "every")
    gaps = [line["generator/score_gap"] for line in lines(tmp_path / "every") if "generator/score_gap" in line]
    assert [line["generator/score_gap"] for line in lines(tmp_path / "whole")] == gaps
    train(make(3), tmp_path / "broken")
    train(make(6), tmp_path / "broken", resume="latest")
    # the line of the broken run's end is one more
    assert [line for line in lines(tmp_path / "broken") if line["iteration"] != 3] == lines(tmp_path / "whole")


def test_bands_belong_to_the_config_and_change_no_run(
    bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(bench.config(CASES["dmd2"], 2), tmp_path / "run")
    train(bench.config(CASES["dmd2"], 3, alarms={"diversity": 0.5}, grid_seeds=3), tmp_path / "run", resume="latest")
    assert "not bit for bit" not in caplog.text
    with pytest.raises(UserError, match="did you mean 'diversity'"):
        parse(AlarmsConfig, {"diversty": 0.5}, "test")


def embedded(**changes: Any) -> RunConfig:
    settings = {
        "max_steps": 24, "batch_size": 4, "log_every": 1, "grid_every": 12, "grid_prompts": 2, "threads": 1, "ema": 0.0,
    }  # fmt: skip
    overrides = [f"training.{key}={value}" for key, value in settings.items()]
    return load_config(FOLDER / "quickstart.yaml", [*overrides, *(f"{key}={value}" for key, value in changes.items())])


@pytest.mark.ci
def test_a_healthy_run_of_the_embedded_teacher_raises_no_alarm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(embedded(), tmp_path / "run")
    assert warnings(caplog) == []
    last = lines(tmp_path / "run")[-1]
    assert 0.8 < last["signals/latent_std_ratio"] < 1.15
    assert last["signals/diversity_ratio"] > 0.6
    assert last["signals/fake_shift"] > 0.01


@pytest.mark.ci
def test_a_run_that_must_fail_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Guidance 12, one fake-score update a generator update, and a rate that no fake score can follow."""
    changes = {"method.guidance": 12, "method.ratio": 1, "optimizers.generator.lr": 3e-3}
    train(embedded(**changes), tmp_path / "run")
    assert any("signals/latent_std_ratio" in text and "lower method.guidance" in text for text in warnings(caplog))
