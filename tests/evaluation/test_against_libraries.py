"""FID, KID, precision and recall equal what torchmetrics, torch-fidelity and clean-fid say on the same weight file."""

from __future__ import annotations

from pathlib import Path

import cleanfid.features
import cleanfid.inception_pytorch
import numpy as np
import pytest
import torch
import torch_fidelity
from cleanfid import fid as cleanfid_fid
from PIL import Image
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

import stepdistill
from stepdistill.errors import UserError
from stepdistill.evaluation.images import read_images
from stepdistill.evaluation.metrics.mmd import kernel_inception_distance
from stepdistill.evaluation.metrics.prdc import compute_prdc
from stepdistill.evaluation.networks.features import load_extractor
from stepdistill.evaluation.networks.inception import inception_layers, load_inception
from stepdistill.evaluation.networks.resize import RESIZE_MODES, ResizeMode

COUNT = 20


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An Inception of random weights whose features differ between images, in torch-fidelity's format."""
    network = inception_layers()
    stream = torch.Generator().manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            fan = layer.weight[0].numel()
            layer.weight.data = torch.randn(layer.weight.shape, generator=stream) * (2.0 / fan) ** 0.5
        if isinstance(layer, nn.BatchNorm2d):
            layer.bias.data = 0.1 * torch.randn(layer.bias.shape, generator=stream)
    state = network.state_dict() | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    path = tmp_path_factory.mktemp("weights") / "weights-inception-2015-12-05-6726825d.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders of pictures, not square, of blobs and noise; the second brighter and redder."""
    rng = np.random.default_rng(0)
    made = []
    for index in range(2):
        folder = tmp_path_factory.mktemp(f"set{index}")
        for i in range(COUNT):
            coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
            image = np.asarray(Image.fromarray(coarse).resize((56, 40), Image.Resampling.BICUBIC), dtype=np.float64)
            image = image + rng.normal(0, 8, image.shape) + index * np.array([30.0, 5.0, -10.0])
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03d}.png")
        made.append(folder)
    return made[0], made[1]


def torchscript(weights: Path, folder: Path) -> Path:
    """The same network as NVIDIA's TorchScript file: `layers`, and a forward that resizes as TensorFlow 1 did."""
    layers = torch.jit.trace(load_inception(weights), torch.rand(2, 3, 299, 299))

    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: torch.Tensor, return_features: bool = True) -> torch.Tensor:
            x = x.to(torch.float32)
            y = torch.arange(299) * (x.shape[2] / 299.0)
            top = y.floor().to(torch.long)
            x = torch.lerp(x[:, :, top], x[:, :, (top + 1).clamp(max=x.shape[2] - 1)], (y - top)[:, None])
            z = torch.arange(299) * (x.shape[3] / 299.0)
            left = z.floor().to(torch.long)
            x = torch.lerp(x[:, :, :, left], x[:, :, :, (left + 1).clamp(max=x.shape[3] - 1)], z - left)
            return self.layers((x - 128) / 128)

    path = folder / "inception-2015-12-05.pt"
    torch.jit.script(Base().eval()).save(path)
    return path


def ours(
    folders: tuple[Path, Path], weights: Path, mode: ResizeMode, output: Path, metrics: tuple[str, ...] = ("fid",)
) -> dict[str, float]:
    report = stepdistill.evaluate_images(
        *folders, output, features=f"inception:{weights}", resize=mode, metrics=metrics, device="cpu"
    )
    return report.rows[0].metrics


@pytest.mark.ci
def test_fid_kid_and_recall_equal_torchmetrics_and_torch_fidelity(
    folders: tuple[Path, Path], weights: Path, tmp_path: Path
) -> None:
    measured = ours(folders, weights, "legacy_tensorflow", tmp_path / "out", ("fid", "kid", "precision", "recall"))
    metric = FrechetInceptionDistance(
        feature=2048, feature_extractor_weights_path=str(weights), antialias=False, normalize=False
    )
    for folder, real in zip(folders, (False, True), strict=True):
        pictures = [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]
        metric.update(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), real=real)
    assert measured["fid"] == pytest.approx(float(metric.compute()), rel=1e-3)

    theirs = torch_fidelity.calculate_metrics(
        input1=str(folders[0]), input2=str(folders[1]), cuda=False, fid=True, kid=True, prc=True, cache=False, verbose=False,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(weights), kid_subset_size=COUNT, kid_subsets=2,
    )  # fmt: skip
    assert measured["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    # subsets as large as the sets leave nothing to chance
    assert measured["kid"] == pytest.approx(1000 * theirs["kernel_inception_distance_mean"], rel=1e-3)
    assert measured["precision"] == pytest.approx(theirs["precision"], abs=1e-6)
    assert measured["recall"] == pytest.approx(theirs["recall"], abs=1e-6)


@pytest.mark.ci
def test_two_resizes_are_two_protocols(folders: tuple[Path, Path], weights: Path, tmp_path: Path) -> None:
    """torchmetrics 3130, clean-fid 27: the resize and the weights are part of the number, and of a statistics file."""
    quick = ("coverage",)  # no Fréchet distance, hence no eigenvalues of 2048 x 2048
    for mode in ("clean", "legacy_pytorch"):
        ours(folders, weights, mode, tmp_path / mode, quick)
    with pytest.raises(UserError, match=r"features_preprocessing: 'clean to 299' and 'legacy_pytorch to 299'"):
        stepdistill.compare(tmp_path / "clean", tmp_path / "legacy_pytorch")
    told = {"features": f"inception:{weights}", "device": "cpu", "metrics": quick}
    saved = tmp_path / "reference.npz"
    first = stepdistill.evaluate_images(*folders, tmp_path / "saving", save_statistics=saved, **told)
    assert len(first.record.features_weights) == 64
    with pytest.raises(UserError, match="'clean to 299' and the features now have 'legacy_tensorflow to 299'"):
        stepdistill.evaluate_images(folders[1], saved, tmp_path / "wrong", resize="legacy_tensorflow", **told)


@pytest.fixture
def offline_clean_fid(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """clean-fid finds these weights instead of fetching its own; returns the TorchScript file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cleanfid.features.platform, "system", lambda: "Windows")  # the current folder, not /tmp
    monkeypatch.setattr(
        cleanfid.inception_pytorch, "load_state_dict_from_url", lambda *_, **__: torch.load(weights, weights_only=True)
    )
    return torchscript(weights, tmp_path)


@pytest.mark.ci
@pytest.mark.parametrize("mode", RESIZE_MODES)
def test_features_equal_clean_fid_in_each_mode(
    mode: ResizeMode, folders: tuple[Path, Path], weights: Path, offline_clean_fid: Path
) -> None:
    model = cleanfid.features.build_feature_extractor(mode, torch.device("cpu"), use_dataparallel=False)
    theirs = cleanfid_fid.get_folder_features(
        str(folders[0]), model, num_workers=0, batch_size=COUNT, device=torch.device("cpu"), mode=mode, verbose=False
    )
    pictures = list(read_images(sorted(folders[0].glob("*.png"))))
    features = load_extractor(f"inception:{weights}", resize=mode)(pictures)
    np.testing.assert_allclose(features, theirs, rtol=1e-3, atol=1e-4 * np.abs(theirs).max())
    with pytest.raises(UserError, match="is a TorchScript file, which is a program"):
        load_inception(offline_clean_fid)


@pytest.mark.slow
@pytest.mark.parametrize("mode", RESIZE_MODES)
def test_fid_equals_clean_fid_in_each_mode(
    mode: ResizeMode, folders: tuple[Path, Path], weights: Path, tmp_path: Path, offline_clean_fid: Path
) -> None:
    """Most of the minute goes into SciPy's square root of a singular 2048 x 2048 matrix."""
    theirs = cleanfid_fid.compute_fid(
        str(folders[0]), str(folders[1]), mode=mode, num_workers=0, batch_size=COUNT, device=torch.device("cpu"), verbose=False,
        use_dataparallel=False,
    )  # fmt: skip
    assert ours(folders, weights, mode, tmp_path / "out")["fid"] == pytest.approx(float(theirs), rel=1e-3)


def test_kernel_and_manifold_equal_torch_fidelity_on_features() -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(150, 24)), 0.3 + 1.2 * rng.normal(size=(150, 24))
    theirs = kid_features_to_metric(torch.from_numpy(a), torch.from_numpy(b), kid_subset_size=150, kid_subsets=1)
    assert kernel_inception_distance(a, b, rng, subsets=1, subset_size=150).mean == pytest.approx(
        theirs["kernel_inception_distance_mean"], rel=1e-9
    )
    both = prc_features_to_metric(torch.from_numpy(a), torch.from_numpy(b))
    measured = compute_prdc(a, b)
    assert (measured.precision, measured.recall) == pytest.approx((both["precision"], both["recall"]), abs=1e-6)


@pytest.mark.parametrize("kind", ["truncated", "torchvision", "missing"])
def test_wrong_inception_weights_are_refused(kind: str, weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    if kind == "truncated":
        path.write_bytes(weights.read_bytes()[:100_000])
    if kind == "torchvision":
        torch.save({"Conv2d_1a_3x3.conv.weight": torch.zeros(32, 3, 3, 3)}, path)
    words = {"truncated": "cannot be read", "torchvision": "not torchvision's", "missing": "no Inception weight file"}
    with pytest.raises(UserError, match=words[kind]):
        load_inception(path)
