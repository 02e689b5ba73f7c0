"""Metrics against closed forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stepdistill.data.appearance import saturation
from stepdistill.evaluation.metrics.diversity import pairwise_diversity
from stepdistill.evaluation.metrics.frechet import frechet_distance, noise_floor
from stepdistill.evaluation.metrics.prdc import compute_prdc
from stepdistill.evaluation.metrics.statistics import FeatureStatistics


def test_merge_and_updates_equal_one_pass(tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(50.0, 2.0, (301, 5)) @ np.diag([1.0, 2.0, 3.0, 0.1, 5.0])
    joint, streamed, other = FeatureStatistics.of(features), FeatureStatistics(5), FeatureStatistics(5)
    streamed.update(features[:7])
    streamed.update(features[7:120].astype(np.float64))
    other.update(features[120:])
    streamed.merge(other)
    streamed.save(tmp_path / "s.npz")
    for statistics in (streamed, FeatureStatistics.load(tmp_path / "s.npz")):
        assert statistics.count == joint.count == 301
        np.testing.assert_allclose(statistics.mean, features.mean(0), rtol=1e-12)
        np.testing.assert_allclose(statistics.covariance, np.cov(features, rowvar=False), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 40, 1000])
def test_a_stream_gathered_by_the_hundred_is_one_pass(rows: int) -> None:
    features = np.random.default_rng(1).normal(3.0, 2.0, (301, 5))
    gathered = FeatureStatistics.from_batches(iter(np.array_split(features, 17)), rows)
    assert gathered is not None
    assert gathered.count == 301
    np.testing.assert_allclose(gathered.covariance, np.cov(features, rowvar=False), rtol=1e-10)
    assert FeatureStatistics.from_batches(iter([])) is None


def test_frechet_of_commuting_covariances() -> None:
    """Same eigenvectors: |mu1 - mu2|^2 + sum (sqrt l1 - sqrt l2)^2."""
    rng = np.random.default_rng(1)
    basis, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    l1, l2, shift = rng.uniform(0.1, 3.0, 6), rng.uniform(0.1, 3.0, 6), rng.normal(size=6)
    expected = shift @ shift + np.square(np.sqrt(l1) - np.sqrt(l2)).sum()
    actual = frechet_distance(np.zeros(6), (basis * l1) @ basis.T, shift, (basis * l2) @ basis.T)
    assert actual == pytest.approx(expected, abs=1e-6)


def test_frechet_in_two_dimensions() -> None:
    """tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)) for 2 x 2, here with covariances that do not commute."""
    c1, c2 = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[0.5, -0.2], [-0.2, 1.5]])
    product = c1 @ c2
    root = np.sqrt(np.trace(product) + 2.0 * np.sqrt(np.linalg.det(product)))
    expected = np.trace(c1) + np.trace(c2) - 2.0 * root
    assert frechet_distance(np.zeros(2), c1, np.zeros(2), c2) == pytest.approx(expected, abs=1e-9)
    assert frechet_distance(np.ones(2), c1, np.ones(2), c1) == pytest.approx(0.0, abs=1e-9)


def test_frechet_of_rank_deficient_covariance_is_real() -> None:
    thin = np.diag([1.0, 0.0, 0.0])
    assert frechet_distance(np.zeros(3), thin, np.zeros(3), np.eye(3)) == pytest.approx(2.0, abs=1e-9)


def test_noise_floor_is_the_mean_distance_of_two_samples() -> None:
    rng, scales = np.random.default_rng(2), np.array([3.0, 1.0, 0.5, 0.1])
    draws = []
    for _ in range(200):
        a, b = (FeatureStatistics.of(rng.normal(size=(n, 4)) * scales) for n in (400, 800))
        draws.append(frechet_distance(a.mean, a.covariance, b.mean, b.covariance))
    assert noise_floor(np.diag(scales**2), 400, 800) == pytest.approx(np.mean(draws), rel=0.1)


def test_diversity_of_copies_and_of_opposites() -> None:
    copies = np.tile(np.array([[1.0, 2.0, 3.0]]), (4, 5, 1))
    assert pairwise_diversity(copies, np.zeros(3)) == pytest.approx(0.0, abs=1e-12)
    opposites = np.array([[[1.0, 0.0], [-1.0, 0.0]]])
    assert pairwise_diversity(opposites + 7.0, np.full(2, 7.0)) == pytest.approx(2.0)
    with pytest.raises(ValueError, match=">= 2"):
        pairwise_diversity(np.zeros((3, 1, 2)), np.zeros(2))


def test_precision_and_recall_extremes() -> None:
    x = np.random.default_rng(3).normal(size=(200, 3))
    same, far = compute_prdc(x, x), compute_prdc(x, x + 100.0)
    assert (same.precision, same.recall) == (1.0, 1.0)
    assert (far.precision, far.recall) == (0.0, 0.0)
    collapsed = compute_prdc(x[:1] + 1e-3 * x, x)
    assert collapsed.precision > 0.9
    assert collapsed.recall < 0.1


def test_saturation_of_known_colours() -> None:
    colours = np.array([[255, 0, 0], [128, 128, 128], [0, 0, 0], [200, 100, 100]], dtype=np.uint8).reshape(1, 2, 2, 3)
    assert saturation(colours) == pytest.approx((1.0 + 0.0 + 0.0 + 0.5) / 4.0)


def test_statistics_refuse_the_wrong_shape() -> None:
    with pytest.raises(ValueError, match=r"\(N, 4\)"):
        FeatureStatistics(4).update(np.zeros((2, 3)))
