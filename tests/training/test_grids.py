"""Pictures of a run and the signals they give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.method_cases import CASES, Bench

from stepdistill.diffusion.prediction import guide
from stepdistill.methods.parts import score_gap
from stepdistill.training.monitoring.grids import SCORE_LEVELS, Grid, diversity, to_pixel_array
from stepdistill.training.session import Session, open_session
from stepdistill.training.setup import prepare


@pytest.fixture
def bench(tiny: Callable[..., Path], tmp_path: Path) -> Bench:
    return Bench(tiny, tmp_path)


def session(bench: Bench, family: str) -> Session:
    return open_session(prepare(bench.config(CASES["dmd2"], 1, family=family)))


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_diversity_is_distance_in_units_of_spread() -> None:
    """Independent samples are 1 apart whatever their contrast; a shared half of the variance leaves 1/sqrt 2; equal ones 0."""
    a, b, shared = normal(0, 5, 4, 64, 64), normal(1, 5, 4, 64, 64), normal(2, 5, 4, 64, 64)
    assert diversity([a, b]) == pytest.approx(1, abs=0.01)
    assert diversity([3 * a, 3 * b]) == pytest.approx(diversity([a, b]))
    assert diversity([a + shared, b + shared]) == pytest.approx(0.5**0.5, abs=0.01)
    assert diversity([a, a, b]) == pytest.approx(2 / 3 * diversity([a, b]))
    assert diversity([a, a]) == diversity([a]) == 0


def test_the_score_gap_is_that_of_each_sample() -> None:
    x, real = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 2)
    fake = torch.tensor([[0.0, 1.0], [3.0, 0.0]])
    assert float(score_gap(x, real, fake)) == pytest.approx((1 / 2 + 3) / 2)
    assert float(score_gap(x, real, real)) == 0


def test_pixels_are_not_rounded() -> None:
    pixels = to_pixel_array(torch.tensor([0.1, 0.5, 2.0]).reshape(1, 3, 1, 1))
    assert pixels.shape == (1, 1, 1, 3)
    assert pixels.flatten().tolist() == pytest.approx([25.5, 127.5, 255.0], abs=1e-5)


def test_rows_of_the_scores_are_what_both_say_of_the_same_noised_samples(bench: Bench, tmp_path: Path) -> None:
    """On the analytic family: the real score is guided, the fake score not, at each level; 7 rows in all."""
    opened = session(bench, "analytic")
    grid = Grid(opened, None, 3, 4.0, seeds=2)
    x = normal(0, 3, *opened.setup.problem.latent_shape)
    with torch.no_grad():
        for parameter in opened.triple.parameters("fake_score").values():
            parameter += 0.1
        rows, shift = grid._scores(x)
        gaps = []
        for k, level in enumerate(SCORE_LEVELS):
            t = opened.triple.schedule.time_at_fraction(level).expand(3)
            x_t = opened.triple.schedule.add_noise(x, grid.draws[0].normal(f"scores{level}", x.shape[1:]), t)
            uncond, base = opened.triple.real_score.uncond_and_cond_x0(x_t, t, grid.cond, grid.null)
            assert torch.allclose(rows[1 + 2 * k], guide(uncond, base, 4.0))
            assert torch.allclose(rows[2 + 2 * k], opened.triple.fake_score.x0(x_t, t, grid.cond))
            gaps.append(float(score_gap(x, base, rows[2 + 2 * k])))
    assert len(rows) == 7
    assert torch.equal(rows[0], x)
    assert shift == pytest.approx(sum(gaps) / 3)
    assert shift > 0.01


def test_a_fake_score_that_is_the_base_still_has_not_moved(bench: Bench, tmp_path: Path) -> None:
    """And nobody draws pictures where there are none to draw."""
    opened = session(bench, "analytic")
    grid = Grid(opened, tmp_path, 2, 2.0, seeds=2)
    values = grid.draw(1)
    assert values["signals/fake_shift"] == pytest.approx(0, abs=1e-9)
    assert set(values) == {"signals/fake_shift", "signals/diversity_ratio"}
    assert not (tmp_path / "grids").exists()


def test_pictures_of_a_family_that_decodes(bench: Bench, tmp_path: Path) -> None:
    opened = session(bench, "sd")
    grid = Grid(opened, tmp_path, 2, 2.0, seeds=1)
    values = grid.draw(7)
    assert set(values) == {
        f"signals/{name}" for name in ("brightness", "brightness_drift", "saturation_drift", "fake_shift")
    }
    height, width = opened.setup.problem.size
    sizes = [Image.open(tmp_path / f"grids/{kind}-00000007.png").size for kind in ("step", "scores")]
    assert sizes == [(2 * width + 2, rows * height + 2 * (rows - 1)) for rows in (2, 7)]


def test_a_disk_that_refuses_a_picture_is_named(bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/grids").write_text("in the way")
    assert Grid(session(bench, "sd"), tmp_path / "run", 1, 2.0).draw(1)["signals/fake_shift"] < 1e-6
    assert caplog.text.count("could not be written") == 2
