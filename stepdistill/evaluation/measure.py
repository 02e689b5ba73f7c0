"""Measures sets of images on any number of processes: feature statistics, feature vectors if a metric needs them, metrics."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from numpy.typing import NDArray

from stepdistill.assets import FOLDER
from stepdistill.data import appearance
from stepdistill.errors import UserError
from stepdistill.evaluation.images import ImageArray, PixelChain, indices_of_rank, list_images, read_images
from stepdistill.evaluation.metrics import diversity
from stepdistill.evaluation.metrics import mmd as kernels
from stepdistill.evaluation.metrics.frechet import (
    frechet_between,
    frechet_infinity,
    frechet_of_features,
    frechet_standard_error,
    noise_floor,
)
from stepdistill.evaluation.metrics.prdc import compute_prdc
from stepdistill.evaluation.metrics.statistics import FeatureStatistics, load_statistics_file
from stepdistill.evaluation.networks.features import FeatureExtractor
from stepdistill.evaluation.protocols import Metric
from stepdistill.files.atomic import file_hash

logger = logging.getLogger(__name__)
METRICS_NEEDING_FEATURES: frozenset[Metric] = frozenset(
    {
        "fd_infinity",
        "fid_error",
        "kid",
        "precision",
        "recall",
        "density",
        "coverage",
        "cmmd",
        "diversity",
        "prompt_accuracy",
    }
)
"""Metrics that need every feature vector. The others need mean and covariance only, whose size does not grow with the images."""
METRICS_WITHOUT_NETWORK: frozenset[Metric] = frozenset({"prompt_accuracy", "saturation", "brightness", "sharpness"})
"""Metrics that need neither a feature network nor a reference."""
PRDC_METRICS: frozenset[Metric] = frozenset({"precision", "recall", "density", "coverage"})
_APPEARANCE_FUNCTIONS = {
    "saturation": appearance.saturation,
    "brightness": appearance.brightness,
    "sharpness": appearance.sharpness,
}


@dataclass
class ImageSetFeatures:
    """What was measured of a set of images.

    Attributes:
        statistics: mean and covariance of the features; None if no feature network was used.
        features: (N, D) in the order of the images; None if only statistics were kept.
        appearance_sums: sums over images of saturation, brightness and squared sharpness.
        content_hash: identifies a reference set: hash of the statistics file, or of the names and sizes in a folder.
        images: number of images, used if there are no statistics.
    """

    statistics: FeatureStatistics | None
    features: NDArray[np.float32] | None = None
    appearance_sums: dict[str, float] = field(default_factory=dict)
    content_hash: str = ""
    images: int = 0

    @property
    def count(self) -> int:
        """Number of images; 0 for statistics files that do not say it."""
        return self.images if self.statistics is None else self.statistics.count


def measure_images(
    images: Iterable[ImageArray],
    extractor: FeatureExtractor | None,
    *,
    keep_features: bool,
    appearance_sums: bool = True,
) -> ImageSetFeatures:
    """Measures this process's images in one pass; memory does not grow with their number unless `keep_features`.

    Args:
        images: uint8 (H, W, 3).
        extractor: the feature network; None measures appearance only.
        keep_features: keep all feature vectors, not only their statistics.
        appearance_sums: measure saturation, brightness and sharpness.

    Raises:
        UserError: no image at all.
    """
    sums = dict.fromkeys(_APPEARANCE_FUNCTIONS, 0.0)

    count = 0

    def with_appearance() -> Iterable[ImageArray]:
        nonlocal count
        for image in images:
            count += 1
            if appearance_sums:
                for name, function in _APPEARANCE_FUNCTIONS.items():
                    value = function(image[None])
                    sums[name] += value * value if name == "sharpness" else value
            yield image

    if extractor is None:
        for _ in with_appearance():
            pass
        return ImageSetFeatures(None, None, sums, images=count)
    kept: list[NDArray[np.float32]] = []

    def features() -> Iterable[NDArray[np.float32]]:
        for part in extractor.stream(with_appearance()):
            if keep_features:
                kept.append(part)
            yield part

    statistics = FeatureStatistics.from_batches(features())
    if statistics is None:
        raise UserError("there is no image to measure: give at least two")
    return ImageSetFeatures(
        statistics, np.concatenate(kept) if keep_features else None, sums if appearance_sums else {}
    )


def measure_files(
    paths: Sequence[Path], extractor: FeatureExtractor | None, *, keep_features: bool, chain: PixelChain | None = None
) -> ImageSetFeatures:
    """Measures image files, distributed over all processes without duplicates; every process gets the whole result.

    Raises:
        UserError: fewer images than two or than processes, or a corrupt one.
    """
    state = PartialState()
    if len(paths) < max(2, state.num_processes):
        raise UserError(f"{len(paths)} images came in and at least {max(2, state.num_processes)} are needed: give more")
    indices = indices_of_rank(len(paths), state.process_index, state.num_processes)
    own = measure_images(read_images([paths[i] for i in indices], chain), extractor, keep_features=keep_features)
    return merge(own, len(paths))


def merge(own: ImageSetFeatures, total: int) -> ImageSetFeatures:
    """Combines all processes' shards, with features in global order. This is a collective: every process must call it.

    Raises:
        RuntimeError: the shards do not add up to `total`.
    """
    state = PartialState()
    parts: list[ImageSetFeatures] = gather_object([own])
    if (measured := sum(part.count for part in parts)) != total:
        raise RuntimeError(f"{measured} images were measured and {total} were distributed")
    statistics = None
    if own.statistics is not None:
        statistics = FeatureStatistics(len(own.statistics.mean))
        for part in parts:
            if part.statistics is not None:
                statistics.merge(part.statistics)
    features = None
    if own.features is not None:
        features = np.empty((total, own.features.shape[1]), dtype=np.float32)
        for rank, part in enumerate(parts):
            features[indices_of_rank(total, rank, state.num_processes)] = part.features
    appearance_sums = {name: sum(part.appearance_sums[name] for part in parts) for name in own.appearance_sums}
    return ImageSetFeatures(statistics, features, appearance_sums, images=total)


def read_reference(
    source: str | Path,
    extractor: FeatureExtractor,
    *,
    keep_features: bool,
    chain: PixelChain | None = None,
    recursive: bool = False,
    lossy: bool = False,
) -> ImageSetFeatures:
    """Measures a folder of images, or reads statistics from an .npz of this program, clean-fid or pytorch-fid.

    Args:
        source: the folder or file.
        extractor: the feature network.
        keep_features: keep all feature vectors, for metrics that need them.
        chain: crop and size of the images.
        recursive: search sub-folders too.
        lossy: allow JPEG and WebP.

    Raises:
        UserError: statistics that were made with another network, or a folder that cannot be measured.
    """
    path = Path(source)
    if path.suffix in (".npz", ".npy"):
        stored = load_statistics_file(path)
        record = stored.record
        here = feature_provenance(extractor, chain)
        for key, now in here.items():
            if key in record and record[key] != now:
                raise UserError(
                    f"the statistics {str(path)!r} were made with {key} {record[key][:24]!r} and the features now have "
                    f"{now[:24]!r}: measure the reference again, or choose its network"
                )
        if not set(here) <= set(record) and path.parent != FOLDER:
            logger.warning(
                "%s does not record how it was made: make sure that network, resizing and crop are the same as here",
                path,
            )
        return ImageSetFeatures(stored.statistics, stored.features if keep_features else None, {}, file_hash(path))
    paths = list_images(path, recursive=recursive, allow_lossy=lossy)
    listing = "\n".join(f"{file.relative_to(path).as_posix()} {file.stat().st_size}" for file in paths)
    measured = measure_files(paths, extractor, keep_features=keep_features, chain=chain)
    return replace(measured, content_hash=hashlib.sha256(listing.encode()).hexdigest())


def feature_provenance(extractor: FeatureExtractor, chain: PixelChain | None) -> dict[str, str]:
    """Returns how features are made (network, preprocessing, crop), which statistics files record and readers check."""
    pixels = str(chain or PixelChain())
    return {"weights": extractor.record.weights, "preprocessing": extractor.record.preprocessing, "chain": pixels}


# ---------------------------------------------------------------- metrics


@dataclass(frozen=True)
class MetricValues:
    """Metrics by name, and the noise floor of the Fréchet distance (None if the reference's number of images is unknown)."""

    metrics: dict[str, float]
    noise_floor: float | None = None


def compute_metrics(
    measured: ImageSetFeatures,
    reference: ImageSetFeatures | None,
    metrics: Sequence[Metric],
    rng: np.random.Generator,
    prompts: Sequence[str] = (),
) -> MetricValues:
    """Computes metrics of a set of images against a reference, except `prompt_accuracy`, which needs the images themselves.

    Args:
        measured: the set.
        reference: what it is compared with; None if no metric needs it (`METRICS_WITHOUT_NETWORK`).
        metrics: what to compute.
        rng: for bootstrap and subsets.
        prompts: of the images in order, for `diversity`.

    Raises:
        UserError: as `check_metrics`; features of another size; features from which no distance can be computed.
    """
    check_metrics(metrics, reference, measured.count)
    mine, theirs = measured.statistics, None if reference is None else reference.statistics
    if mine is not None and theirs is not None and len(mine.mean) != len(theirs.mean):
        raise UserError(
            f"the images have {len(mine.mean)} features and the reference {len(theirs.mean)}: measure both with one network"
        )
    try:
        return _compute(measured, reference, metrics, rng, prompts)
    except (ValueError, np.linalg.LinAlgError) as error:
        raise UserError(f"the metrics cannot be computed ({error}): check the images and the reference") from None


def check_metrics(metrics: Sequence[Metric], reference: ImageSetFeatures | None, images: int) -> None:
    """Checks the number of images and the reference before anything is drawn.

    Args:
        metrics: what will be computed.
        reference: None if there is none, or if the teacher's images will be the reference.
        images: number of images that will be measured.

    Raises:
        UserError: too few images, or a metric that needs feature vectors of a reference that has statistics only.
    """
    least = 20 if "fd_infinity" in metrics else 6 if PRDC_METRICS & set(metrics) else 2
    if images < least:
        raise UserError(
            f"{images} images came in and {', '.join(metrics)} need at least {least}: give more, or leave metrics out"
        )
    pairwise = (PRDC_METRICS | {"kid", "cmmd"}) & set(metrics)
    if pairwise and reference is not None and reference.features is None:
        raise UserError(
            f"{', '.join(sorted(pairwise))} need the reference's feature vectors and it holds mean and covariance only: "
            "give the folder of images, or leave them out"
        )


def _compute(
    measured: ImageSetFeatures,
    reference: ImageSetFeatures | None,
    metrics: Sequence[Metric],
    rng: np.random.Generator,
    prompts: Sequence[str],
) -> MetricValues:
    mine, theirs = measured.statistics, None if reference is None else reference.statistics
    found: dict[str, float] = {}
    floor = None
    if "fid" in metrics and mine is not None and theirs is not None:
        found["fid"] = _frechet(mine, theirs, measured.features, None if reference is None else reference.features)
        if theirs.count > 0:
            floor = noise_floor(theirs.covariance, mine.count, theirs.count)
    if measured.features is not None and reference is not None and theirs is not None:
        found |= _with_features(measured.features, reference.features, theirs, metrics, rng, prompts)
    for name in ("saturation", "brightness", "sharpness"):
        if name in metrics and name in measured.appearance_sums:
            mean = measured.appearance_sums[name] / measured.count
            found[name] = float(np.sqrt(mean)) if name == "sharpness" else mean
    return MetricValues(found, floor)


def _frechet(
    mine: FeatureStatistics,
    theirs: FeatureStatistics,
    features: NDArray[np.float32] | None,
    other: NDArray[np.float32] | None,
) -> float:
    """Computes the Fréchet distance: from the features themselves if there are few, which is faster and more accurate."""
    few = min(mine.count, theirs.count) <= len(mine.mean)
    if few and features is not None and other is not None and theirs.count == len(other):
        return frechet_of_features(features, other)
    return frechet_between(mine, theirs)


def _with_features(
    features: NDArray[np.float32],
    other: NDArray[np.float32] | None,
    reference: FeatureStatistics,
    metrics: Sequence[Metric],
    rng: np.random.Generator,
    prompts: Sequence[str],
) -> dict[str, float]:
    found: dict[str, float] = {}
    if "fd_infinity" in metrics:
        extrapolated = frechet_infinity(features, reference, rng)
        if extrapolated.value is not None:
            found["fd_infinity"] = extrapolated.value
    if "fid_error" in metrics and len(features) > 3:
        found["fid_error"] = frechet_standard_error(features, reference, rng)
    if "kid" in metrics and other is not None:
        kid = kernels.kernel_inception_distance(features, other, rng)
        found |= {"kid": 1000.0 * kid.mean, "kid_std": 1000.0 * kid.std}
    wanted = PRDC_METRICS & set(metrics)
    if wanted and other is not None:
        count = min(
            len(features), len(other)
        )  # equally many on both sides, chosen at random because folders are sorted by name
        a, b = (x[rng.permutation(len(x))[:count]] for x in (features, other))
        found |= {name: value for name, value in vars(compute_prdc(a, b)).items() if name in wanted}
    if "cmmd" in metrics and other is not None:
        found["cmmd"] = kernels.cmmd(features, other)
    if "diversity" in metrics and (groups := diversity.prompt_groups(prompts)):
        found["diversity"] = diversity.pairwise_diversity(features[np.array(groups)], reference.mean)
    return found
