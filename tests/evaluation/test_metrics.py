"""Metrics against closed forms, statistics files of three libraries, and what users reported of others' metrics."""

from __future__ import annotations

import gc
import hashlib
import logging
import re
import subprocess
import sys
import tracemalloc
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from stepdistill.data.appearance import brightness, sharpness
from stepdistill.errors import UserError
from stepdistill.evaluation.fashion import evaluation_set
from stepdistill.evaluation.images import ImageArray
from stepdistill.evaluation.measure import ImageSetFeatures, compute_metrics, measure_images, read_reference
from stepdistill.evaluation.metrics.diversity import pairwise_diversity
from stepdistill.evaluation.metrics.frechet import (
    frechet_between,
    frechet_distance,
    frechet_infinity,
    frechet_of_features,
    frechet_standard_error,
)
from stepdistill.evaluation.metrics.mmd import cmmd, kernel_inception_distance
from stepdistill.evaluation.metrics.prdc import compute_prdc, pairwise_distances
from stepdistill.evaluation.metrics.statistics import FeatureStatistics
from stepdistill.evaluation.networks import inception
from stepdistill.evaluation.networks.features import FeatureExtractor, FeatureRecord, cache_folder, load_extractor
from stepdistill.evaluation.networks.inception import find_inception


def pictures(count: int, seed: int = 0, tint: int = 0) -> Iterator[ImageArray]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        base = rng.integers(0, 200, (1, 1, 3)) + np.array([tint, 0, 0])
        yield (base + rng.integers(0, 50, (16, 16, 3))).clip(0, 255).astype(np.uint8)


def write(folder: Path, images: Iterator[ImageArray]) -> Path:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:04d}.png")
    return folder


def means(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(2).mean(2)


def extractor(network: object = means) -> FeatureExtractor:
    def prepare(image: ImageArray) -> torch.Tensor:
        return torch.from_numpy(image.copy()).permute(2, 0, 1).float()

    return FeatureExtractor(FeatureRecord("means", "0", "none"), prepare, network)  # type: ignore[arg-type]


# ---------------------------------------------------------------- Fréchet


def test_frechet_against_gaussians_and_its_symmetries() -> None:
    """N(0, I) and N(m, I): |m|^2. A joint rotation and an exchange change nothing."""
    rng = np.random.default_rng(0)
    m, basis = rng.normal(size=5), np.linalg.qr(rng.normal(size=(5, 5)))[0]
    assert frechet_distance(np.zeros(5), np.eye(5), m, np.eye(5)) == pytest.approx(m @ m, rel=1e-12)
    roots = [rng.normal(size=(5, 5)) for _ in range(2)]
    c1, c2 = (root @ root.T for root in roots)
    plain = frechet_distance(m, c1, -m, c2)
    assert frechet_distance(-m, c2, m, c1) == pytest.approx(plain, rel=1e-9)
    turned = frechet_distance(basis @ m, basis @ c1 @ basis.T, -basis @ m, basis @ c2 @ basis.T)
    assert turned == pytest.approx(plain, rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(40, 40), (40, 300), (300, 400)])
def test_feature_path_equals_statistics_path_and_is_exact_for_few_images(n: int, m: int) -> None:
    """pytorch-fid 13 and others: n < 2048 gave imaginary parts of 1e100."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(n, 64)), 0.5 + rng.normal(size=(m, 64)) @ np.diag(np.linspace(0.5, 2, 64))
    slow = frechet_between(FeatureStatistics.of(a), FeatureStatistics.of(b))
    assert frechet_of_features(a, b) == pytest.approx(slow, rel=1e-6)
    traces = np.trace(np.cov(a, rowvar=False))
    assert abs(frechet_of_features(a, a)) < 1e-10 * traces
    assert abs(frechet_between(FeatureStatistics.of(a), FeatureStatistics.of(a))) < 1e-6 * traces


def test_few_images_warn_and_one_image_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    """torchmetrics 1652: one image gave 'array must not contain infs or NaNs'."""
    few = FeatureStatistics.of(np.random.default_rng(0).normal(size=(8, 16)))
    with caplog.at_level(logging.WARNING):
        assert np.isfinite(frechet_between(few, few))
    assert "8 images for 16 features" in caplog.text
    with pytest.raises(ValueError, match="two feature vectors or more; 1 came in"):
        frechet_between(few, FeatureStatistics.of(np.zeros((1, 16))))


def test_an_impossible_distance_is_an_error() -> None:
    with pytest.raises(ValueError, match="positive semi-definite"):
        frechet_distance(np.zeros(3), -np.eye(3), np.zeros(3), np.eye(3) * 0.1)
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(np.full(3, np.nan), np.eye(3), np.zeros(3), np.eye(3))
    with pytest.raises(ValueError, match=r"\(D,\)"):  # nano-world-model 19: features flattened to one dimension
        frechet_distance(np.zeros(3), np.eye(4), np.zeros(3), np.eye(3))


def test_covariance_runs_over_images_not_over_features() -> None:
    """denoising-diffusion-pytorch 213: variables taken for observations gave distances within 0 and 1."""
    rng, scales = np.random.default_rng(0), np.array([30.0, 3.0, 0.3])
    statistics = FeatureStatistics.of(rng.normal(size=(4000, 3)) * scales)
    np.testing.assert_allclose(np.diag(statistics.covariance), scales**2, rtol=0.1)


def test_float32_features_far_from_zero_keep_their_covariance() -> None:
    """torcheval 192: sums in float32 turned a trace of 0.0032 into -0.022."""
    rng = np.random.default_rng(0)
    features = (50.0 + 0.01 * rng.normal(size=(2000, 32))).astype(np.float32)
    statistics = FeatureStatistics(32)
    for part in np.array_split(features, 13):
        statistics.update(part)
    expected = np.cov(features.astype(np.float64), rowvar=False)
    assert np.trace(statistics.covariance) == pytest.approx(np.trace(expected), rel=1e-9)


def test_the_extrapolated_distance_is_nearer_to_the_truth_than_finite_counts() -> None:
    rng, scales = np.random.default_rng(0), np.linspace(0.5, 2.0, 32)
    truth = FeatureStatistics.of(rng.normal(size=(200_000, 32)) * scales)
    features = (0.05 + rng.normal(size=(4000, 32))) * scales
    exact = float(np.square(0.05 * scales).sum())
    found = frechet_infinity(features, truth, rng)
    assert found.value is not None
    assert found.r_squared > 0.9
    assert abs(found.value - exact) < 0.5 * abs(frechet_between(FeatureStatistics.of(features), truth) - exact)


def test_the_standard_error_is_the_spread_over_fresh_samples() -> None:
    rng = np.random.default_rng(0)
    truth = FeatureStatistics.of(rng.normal(size=(50_000, 6)))
    draws = [0.3 + rng.normal(size=(600, 6)) for _ in range(40)]
    spread = np.std([frechet_between(FeatureStatistics.of(draw), truth) for draw in draws], ddof=1)
    claimed = np.mean([frechet_standard_error(draw, truth, rng) for draw in draws[:10]])
    assert claimed == pytest.approx(spread, rel=0.3)


# ---------------------------------------------------------------- kernels, manifolds, drift


def test_kid_is_unbiased_and_refuses_large_subsets() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(400, 8)), rng.normal(size=(400, 8))
    same = kernel_inception_distance(x, y, rng, subsets=50, subset_size=100)
    assert abs(same.mean) < 3 * same.std
    assert (
        min(kernel_inception_distance(x, y, rng, subsets=1, subset_size=50).mean for _ in range(20)) < 0
    )  # never clamped
    with pytest.raises(ValueError, match=r"subsets of 500 .* 400 and 400"):
        kernel_inception_distance(x, y, rng, subset_size=500)
    assert kernel_inception_distance(x, y, rng, subsets=1).subset_size == 400


def test_kid_of_a_shift_by_hand() -> None:
    """Two points a side: every term of the unbiased estimate written out."""
    x, y = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[1.0, 1.0], [2.0, 0.0]])
    k = lambda a, b: (a @ b / 2 + 1) ** 3  # noqa: E731
    expected = k(x[0], x[1]) + k(y[0], y[1]) - 0.5 * sum(k(a, b) for a in x for b in y)
    found = kernel_inception_distance(x, y, np.random.default_rng(0), subsets=1, subset_size=2)
    assert found.mean == pytest.approx(expected, rel=1e-12)


def test_cmmd_of_two_unit_vectors_and_of_others() -> None:
    a, b = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    assert cmmd(a, b) == pytest.approx(1000 * (2 - 2 * np.exp(-2 / 200)), rel=1e-12)
    many = np.random.default_rng(0).normal(size=(3000, 4))
    many /= np.linalg.norm(many, axis=1, keepdims=True)
    assert cmmd(many, many) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="unit length"):
        cmmd(2 * a, b)


def test_precision_and_recall_are_not_swapped() -> None:
    """torch-fidelity 58: a generator collapsed on one real image is precise and recalls nothing."""
    rng = np.random.default_rng(0)
    real = rng.normal(size=(300, 4))
    collapsed = compute_prdc(real[:1] + 1e-4 * rng.normal(size=(300, 4)), real)
    assert collapsed.precision == 1.0
    assert collapsed.recall < 0.02
    assert collapsed.coverage < 0.05
    assert collapsed.density > 0.9
    same = compute_prdc(rng.normal(size=(3000, 2)), rng.normal(size=(3000, 2)))
    assert same.density == pytest.approx(1.0, abs=0.1)
    assert same.coverage == pytest.approx(1 - 0.5**5, abs=0.02)  # Naeem et al.: 1 - (1/2)^k at equal counts
    with pytest.raises(ValueError, match="5 images came in"):
        compute_prdc(real[:5], real)


def test_distances_of_features_with_a_large_mean_keep_their_digits() -> None:
    x = 1e4 + np.random.default_rng(0).normal(size=(40, 8))
    exact = np.sqrt(np.square(x[:, None] - x[None]).sum(2))
    np.testing.assert_allclose(pairwise_distances(x, x), exact, rtol=1e-6, atol=1e-6)


def test_saturation_brightness_and_sharpness_of_known_images() -> None:
    grey = np.full((2, 8, 8, 3), 51, np.uint8)
    assert brightness(grey) == pytest.approx(0.2)
    assert sharpness(grey) == pytest.approx(0.0, abs=1e-6)
    dot = np.zeros((1, 5, 5, 3), np.uint8)
    dot[0, 2, 2] = 255
    assert sharpness(dot) == pytest.approx(np.sqrt((16 + 4) / 9))


# ---------------------------------------------------------------- extractors


def test_features_do_not_depend_on_the_callers_batches() -> None:
    """torchmetrics 1620, torch-fidelity 43: batch 2 gave 10 where batch 64 gave 1.9."""
    network = load_extractor("random")
    reference = FeatureStatistics.of(network(list(pictures(120, 1, 40))))
    found = []
    for size in (1, 7, 64):
        images, statistics = list(pictures(90)), FeatureStatistics(64)
        for start in range(0, len(images), size):
            statistics.update(network(images[start : start + size]))
        found.append(frechet_between(statistics, reference))
    assert found == pytest.approx([found[0]] * 3, rel=1e-6)


def test_any_network_is_a_feature_network_and_its_width_is_found() -> None:
    """torchmetrics 2266: a custom extractor was probed with a fixed image on the wrong device."""
    network = extractor(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()).double().float())
    assert network(list(pictures(5))).shape == (5, 12)
    assert not isinstance(network, nn.Module)  # torchmetrics 1959: nothing to find its way into a state_dict
    for wrong, words in ((lambda x: x.flatten(), "D >= 2"), (lambda x: x.mean((2, 3)) * np.nan, "NaN")):
        with pytest.raises(UserError, match=words):
            extractor(wrong)(list(pictures(3)))


def test_a_closed_network_is_freed_and_the_named_device_is_used() -> None:
    """torchmetrics 1959, clean-fid 60: memory that stayed with the metric; a network that went to cuda:0 whatever was asked."""
    network = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    gone, closing = weakref.ref(network), extractor(network)
    closing(list(pictures(2)))
    closing.close()
    del network
    gc.collect()
    assert gone() is None
    with pytest.raises(RuntimeError, match="'means' has been closed"):
        closing(list(pictures(2)))
    seen: list[torch.device] = []
    asked = FeatureExtractor(
        FeatureRecord("x", "", ""), lambda image: torch.from_numpy(image).float(), lambda x: (seen.append(x.device), x.mean((2, 3)))[1],
        device="cpu",
    )  # fmt: skip
    asked(list(pictures(2)))
    assert seen == [torch.device("cpu")]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("inceptoin", "not known"),
        ("inception:/absent.pth", "no Inception weight file"),
        ("dinov2", "without a checkpoint"),
        ("clip:/absent", "cannot be loaded"),
        ("no_such_module:make", "cannot be loaded"),
        ("math:sqrt2", "cannot be loaded"),
    ],
)
def test_unknown_networks_are_refused(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_extractor(name)


def test_nothing_is_downloaded_unless_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """img2img-turbo 108: a fixed file in /tmp, another user's. The cache is the user's own and can be named."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("fetched"))
    with pytest.raises(UserError, match="downloading is off"):
        find_inception(tmp_path / "cache", download=False)
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    file = tmp_path / "hub/checkpoints/pt_inception-2015-12-05-6726825d.pth"
    file.write_bytes(b"")
    assert find_inception(tmp_path / "cache", download=False) == file
    assert cache_folder().is_relative_to(Path.home())
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "mine"))
    file.unlink()
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "mine"))):
        load_extractor("inception")


def test_scipys_matrix_square_root_is_not_used() -> None:
    """scipy 22427: sqrtm lost an argument in 1.18 and took clean-fid and pytorch-fid with it."""
    code = "import sys, stepdistill.evaluation.metrics.frechet; sys.exit('scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_download_with_a_wrong_hash_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pytorch-fid 99: a truncated download was used until its storage size failed to fit."""
    wrong = tmp_path / "served.pth"
    wrong.write_bytes(b"half a file")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(inception, "WEIGHTS_URL", wrong.as_uri())
    with pytest.raises(UserError, match="could not be fetched"):
        find_inception(tmp_path / "cache", download=True)
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr(inception, "SHA256_PREFIX", hashlib.sha256(wrong.read_bytes()).hexdigest()[:8])
    assert find_inception(tmp_path / "cache", download=True).read_bytes() == b"half a file"


def test_memory_of_the_streaming_path_does_not_grow() -> None:
    """torchmetrics 468."""

    def peak(count: int) -> int:
        tracemalloc.start()
        measure_images(pictures(count), extractor(), keep_features=False, appearance_sums=False)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(64)
    assert peak(3200) < 1.2 * peak(320)


# ---------------------------------------------------------------- statistics files


def test_statistics_files_are_exchanged_with_other_libraries(tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(size=(500, 6))
    own = FeatureStatistics.of(features)
    own.save(tmp_path / "ours.npz", {"weights": "abc"})
    with np.load(tmp_path / "ours.npz") as data:  # the two keys that clean-fid and pytorch-fid read
        np.testing.assert_allclose(data["mu"], features.mean(0))
        np.testing.assert_allclose(data["sigma"], np.cov(features, rowvar=False))
    np.savez(tmp_path / "theirs.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    theirs = FeatureStatistics.load(tmp_path / "theirs.npz")
    other = FeatureStatistics.of(features + 1.0)
    assert frechet_between(theirs, other) == pytest.approx(frechet_between(own, other), rel=1e-9)
    with pytest.raises(ValueError, match="without a count"):
        theirs.update(features)


def test_statistics_of_another_network_are_refused(tmp_path: Path) -> None:
    """clean-fid 27: own statistics against published ones of another mode."""
    FeatureStatistics.of(np.random.default_rng(0).normal(size=(20, 3))).save(
        tmp_path / "s.npz", {"preprocessing": "clean to 299"}
    )
    with pytest.raises(UserError, match="preprocessing 'clean to 299'"):
        read_reference(tmp_path / "s.npz", extractor(), keep_features=False)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("absent", "no statistics"),
        ("bare", "one bare array"),
        ("keys", "'mu' and 'sigma'"),
        ("cut", "cannot be read"),
        ("shape", "do not fit"),
        ("pickle", "cannot be read"),
    ],
)
def test_files_that_are_not_statistics_are_errors(kind: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    if kind == "bare":
        np.save(path.with_suffix(".npy"), np.zeros(3))
        path = path.with_suffix(".npy")
    if kind == "pickle":  # a dictionary in an .npy would be unpickled
        np.save(path.with_suffix(".npy"), {"mu": 1}, allow_pickle=True)  # type: ignore[arg-type]
        path = path.with_suffix(".npy")
    if kind == "keys":
        np.savez(path, mean=np.zeros(3))
    if kind == "cut":
        path.write_bytes(b"PK\x03\x04 not a zip")
    if kind == "shape":
        np.savez(path, mu=np.zeros(3), sigma=np.zeros((2, 2)))
    with pytest.raises(UserError, match=words):
        FeatureStatistics.load(path)


# ---------------------------------------------------------------- together


def test_diversity_equals_the_quickstarts_if_prompts_repeat() -> None:
    """Groups are runs of one prompt: a caption that comes back later in the list does not shrink them to pairs."""
    prompts, _ = evaluation_set(1536)
    assert len(set(prompts)) < 128 + 1024  # the list does repeat itself
    rng = np.random.default_rng(0)
    own = ImageSetFeatures(FeatureStatistics.of(features := rng.normal(size=(1536, 64)).astype(np.float32)), features)
    reference = ImageSetFeatures(FeatureStatistics.of(rng.normal(size=(200, 64))))
    found = compute_metrics(own, reference, ["diversity"], rng, prompts).metrics["diversity"]
    expected = pairwise_diversity(features[:512].reshape(128, 4, 64), reference.statistics.mean)
    assert found == pytest.approx(expected, rel=1e-12)


def test_metrics_that_need_features_are_errors_with_statistics_only() -> None:
    own = measure_images(pictures(30), extractor(), keep_features=True)
    bare = ImageSetFeatures(FeatureStatistics.of(np.random.default_rng(0).normal(size=(30, 3))))
    with pytest.raises(UserError, match="kid, precision need the reference's feature vectors"):
        compute_metrics(own, bare, ["fid", "kid", "precision"], np.random.default_rng(0))
    wide = ImageSetFeatures(FeatureStatistics.of(np.random.default_rng(0).normal(size=(30, 4))))
    with pytest.raises(UserError, match="3 features and the reference 4"):
        compute_metrics(own, wide, ["fid"], np.random.default_rng(0))
