"""One pass over images, on any number of processes: feature statistics, and features where a metric needs them."""

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
from stepdistill.data import appearance as looks
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
"""Metrics that need every feature vector; the others run on statistics alone, whose size does not grow."""
PRDC_METRICS: frozenset[Metric] = frozenset({"precision", "recall", "density", "coverage"})
_APPEARANCE_FUNCTIONS = {
    "saturation": looks.saturation,
    "brightness": looks.brightness,
    "sharpness": looks.sharpness,
}


@dataclass
class ImageSetFeatures:
    """What is known of a set of images.

    Attributes:
        statistics: mean and covariance of the features.
        features: (N, D) in the order of the images; None on the streaming path.
        drift: sums over images of saturation, brightness and squared sharpness.
        identity: tells one reference set from another: hash of the statistics file, or of names and sizes in a folder.
    """

    statistics: FeatureStatistics
    features: NDArray[np.float32] | None = None
    appearance_sums: dict[str, float] = field(default_factory=dict)
    content_hash: str = ""

    @property
    def count(self) -> int:
        return self.statistics.count


def measure_images(
    images: Iterable[ImageArray], extractor: FeatureExtractor, *, keep_features: bool, appearance_sums: bool = True
) -> ImageSetFeatures:
    """One process's pass. Memory does not grow with the number of images unless `keep`.

    Raises:
        UserError: no image at all.
    """
    sums = dict.fromkeys(_APPEARANCE_FUNCTIONS, 0.0)

    def watched() -> Iterable[ImageArray]:
        for image in images:
            if appearance_sums:
                for name, function in _APPEARANCE_FUNCTIONS.items():
                    value = function(image[None])
                    sums[name] += value * value if name == "sharpness" else value
            yield image

    kept: list[NDArray[np.float32]] = []

    def features() -> Iterable[NDArray[np.float32]]:
        for part in extractor.stream(watched()):
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
    paths: Sequence[Path], extractor: FeatureExtractor, *, keep_features: bool, chain: PixelChain | None = None
) -> ImageSetFeatures:
    """The files of a set, shared out over all processes without duplicates; every process gets the whole answer.

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
    """All processes' shards as one, features back in global order. A collective: every process must call it.

    Raises:
        RuntimeError: the shards do not add up to `total`.
    """
    state = PartialState()
    parts: list[ImageSetFeatures] = gather_object([own])
    statistics = FeatureStatistics(len(own.statistics.mean))
    for part in parts:
        statistics.merge(part.statistics)
    if statistics.count != total:
        raise RuntimeError(f"{statistics.count} images were measured and {total} were shared out")
    features = None
    if own.features is not None:
        features = np.empty((total, own.features.shape[1]), dtype=np.float32)
        for rank, part in enumerate(parts):
            features[indices_of_rank(total, rank, state.num_processes)] = part.features
    appearance_sums = {name: sum(part.appearance_sums[name] for part in parts) for name in own.appearance_sums}
    return ImageSetFeatures(statistics, features, appearance_sums)


def read_reference(
    source: str | Path,
    extractor: FeatureExtractor,
    *,
    keep_features: bool,
    chain: PixelChain | None = None,
    recursive: bool = False,
    lossy: bool = False,
) -> ImageSetFeatures:
    """A reference set: a folder of images, or statistics in an .npz of ours, clean-fid's or pytorch-fid's.

    Raises:
        UserError: statistics of another network than the one that measures, or features that they do not hold.
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
            logger.warning("%s does not say how it was made: network, resize and crop are taken on trust", path)
        return ImageSetFeatures(stored.statistics, stored.features if keep_features else None, {}, file_hash(path))
    paths = list_images(path, recursive=recursive, allow_lossy=lossy)
    listing = "\n".join(f"{file.relative_to(path).as_posix()} {file.stat().st_size}" for file in paths)
    measured = measure_files(paths, extractor, keep_features=keep_features, chain=chain)
    return replace(measured, content_hash=hashlib.sha256(listing.encode()).hexdigest())


def feature_provenance(extractor: FeatureExtractor, chain: PixelChain | None) -> dict[str, str]:
    """What a statistics file says of its making, and a reader checks."""
    pixels = str(chain or PixelChain())
    return {"weights": extractor.record.weights, "preprocessing": extractor.record.preprocessing, "chain": pixels}


# ---------------------------------------------------------------- metrics


@dataclass(frozen=True)
class MetricValues:
    """Metrics by name, and the noise floor of the Fréchet distance, None where the reference has no count."""

    metrics: dict[str, float]
    noise_floor: float | None = None


def compute_metrics(
    measured: ImageSetFeatures,
    reference: ImageSetFeatures,
    metrics: Sequence[Metric],
    rng: np.random.Generator,
    prompts: Sequence[str] = (),
) -> MetricValues:
    """The asked metrics of a set against a reference. `prompt_accuracy` is not among them: it needs the images.

    Raises:
        UserError: as `check_metrics`, or features of another size, or numbers that no distance can have.
    """
    check_metrics(metrics, reference, measured.count)
    mine, theirs = measured.statistics, reference.statistics
    if len(mine.mean) != len(theirs.mean):
        raise UserError(
            f"the images have {len(mine.mean)} features and the reference {len(theirs.mean)}: measure both with one network"
        )
    try:
        return _compute(measured, reference, metrics, rng, prompts)
    except (ValueError, np.linalg.LinAlgError) as error:
        raise UserError(f"the metrics cannot be computed ({error}): check the images and the reference") from None


def check_metrics(metrics: Sequence[Metric], reference: ImageSetFeatures | None, images: int) -> None:
    """What is known to fail before anything is drawn; `reference` is None where the teacher will be it.

    Raises:
        UserError: too few images, or a metric that needs feature vectors where the reference has statistics only.
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
    reference: ImageSetFeatures,
    metrics: Sequence[Metric],
    rng: np.random.Generator,
    prompts: Sequence[str],
) -> MetricValues:
    mine, theirs = measured.statistics, reference.statistics
    found: dict[str, float] = {}
    features = measured.features
    if "fid" in metrics:
        small = features is not None and reference.features is not None and reference.count == len(reference.features)
        if small and min(mine.count, theirs.count) <= len(mine.mean):
            found["fid"] = frechet_of_features(features, reference.features)  # type: ignore[arg-type]
        else:
            found["fid"] = frechet_between(mine, theirs)
    if features is not None:
        found |= _with_features(features, reference, metrics, rng, prompts)
    for name in ("saturation", "brightness", "sharpness"):
        if name in metrics and name in measured.appearance_sums:
            mean = measured.appearance_sums[name] / measured.count
            found[name] = float(np.sqrt(mean)) if name == "sharpness" else mean
    floor = None
    if "fid" in metrics and theirs.count > 0:
        floor = noise_floor(theirs.covariance, mine.count, theirs.count)
    return MetricValues(found, floor)


def _with_features(
    features: NDArray[np.float32],
    reference: ImageSetFeatures,
    metrics: Sequence[Metric],
    rng: np.random.Generator,
    prompts: Sequence[str],
) -> dict[str, float]:
    found: dict[str, float] = {}
    other = reference.features
    if "fd_infinity" in metrics:
        extrapolated = frechet_infinity(features, reference.statistics, rng)
        if extrapolated.value is not None:
            found["fd_infinity"] = extrapolated.value
    if "fid_error" in metrics and len(features) > 3:
        found["fid_error"] = frechet_standard_error(features, reference.statistics, rng)
    if "kid" in metrics and other is not None:
        kid = kernels.kernel_inception_distance(features, other, rng)
        found |= {"kid": 1000.0 * kid.mean, "kid_std": 1000.0 * kid.std}
    wanted = PRDC_METRICS & set(metrics)
    if wanted and other is not None:
        count = min(len(features), len(other))  # equal numbers on both sides, chosen at random: folders are sorted
        a, b = (x[rng.permutation(len(x))[:count]] for x in (features, other))
        found |= {name: value for name, value in vars(compute_prdc(a, b)).items() if name in wanted}
    if "cmmd" in metrics and other is not None:
        found["cmmd"] = kernels.cmmd(features, other)
    if "diversity" in metrics and (groups := diversity.prompt_groups(prompts)):
        found["diversity"] = diversity.pairwise_diversity(features[np.array(groups)], reference.statistics.mean)
    return found
