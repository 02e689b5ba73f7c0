"""Feature networks behind one interface: one float32 vector per image.

A network is named as NAME or NAME:WEIGHTS. Its record (name, hash of the weights, preprocessing) is written to every report,
because features of two networks, or of one network after two ways of resizing, cannot be compared.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from torch.nn import functional as F

from stepdistill.assets import FOLDER
from stepdistill.errors import UserError
from stepdistill.evaluation.images import ImageArray
from stepdistill.evaluation.networks.inception import find_inception, load_inception
from stepdistill.evaluation.networks.judge import Judge
from stepdistill.evaluation.networks.resize import ResizeMode, normalize_for_inception, resize_for_inception
from stepdistill.files.atomic import file_hash
from stepdistill.frozen import vision

Features = NDArray[np.float32]
CACHE_ENV_VARIABLE = "STEPDISTILL_CACHE"
FEATURE_BATCH_SIZE = 32
"""Rows of every network call; the last batch is padded, because convolutions round differently at other batch sizes."""


@dataclass(frozen=True)
class FeatureRecord:
    """Identifies a feature space: two equal records give comparable features."""

    name: str
    weights: str
    preprocessing: str


def cache_folder() -> Path:
    """Returns the folder for downloaded weights: ~/.cache/stepdistill, or $STEPDISTILL_CACHE."""
    return Path(os.environ.get(CACHE_ENV_VARIABLE) or Path.home() / ".cache" / "stepdistill")


class FeatureExtractor:
    """A frozen network with its preprocessing.

    Args:
        record: name, hash of the weights, preprocessing.
        prepare: uint8 (H, W, 3) -> (3, h, w), the same size for all images.
        network: (B, 3, h, w) -> (B, D).
        device: where the network is.
    """

    def __init__(
        self,
        record: FeatureRecord,
        prepare: Callable[[ImageArray], torch.Tensor],
        network: Callable[[torch.Tensor], torch.Tensor],
        device: torch.device | str = "cpu",
    ) -> None:
        self.record, self._prepare, self._network, self.device = record, prepare, network, torch.device(device)

    def check_size(self, height: int, width: int) -> None:
        """Raises UserError if the network cannot read images of this size."""
        self._prepare(np.zeros((height, width, 3), np.uint8))

    @torch.inference_mode()
    def stream(self, images: Iterable[ImageArray]) -> Iterator[Features]:
        """Computes features (n, D) of a stream of images.

        Raises:
            UserError: the network returns another shape than (B, D), or non-finite numbers.
        """
        waiting = iter(images)
        while chunk := list(islice(waiting, FEATURE_BATCH_SIZE)):
            rows = torch.stack([self._prepare(image) for image in chunk])
            padded = torch.cat([rows, rows[-1:].expand(FEATURE_BATCH_SIZE - len(rows), *rows.shape[1:])])
            with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
                answer = self._network(padded.to(self.device))
            if answer.ndim != 2 or len(answer) != FEATURE_BATCH_SIZE or answer.shape[1] < 2:
                raise UserError(
                    f"the feature network {self.record.name!r} returned the shape {tuple(answer.shape)}; "
                    f"({FEATURE_BATCH_SIZE}, D) with D >= 2 is wanted: change the network"
                )
            features = answer[: len(chunk)].float().cpu().numpy()
            if not np.isfinite(features).all():
                raise UserError(f"the feature network {self.record.name!r} returned NaN or infinity: check its weights")
            yield features

    def close(self) -> None:
        """Frees the network and its memory on the device; the extractor cannot be used afterwards."""

        def closed(x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError(f"the feature network {self.record.name!r} has been closed")

        self._network = closed

    def __call__(self, images: Iterable[ImageArray]) -> Features:
        """Computes the features (N, D) of all images."""
        return np.concatenate(list(self.stream(images)))


def load_extractor(
    name: str, *, resize: ResizeMode = "clean", device: torch.device | str = "cpu", download: bool = False
) -> FeatureExtractor:
    """Loads the extractor of a NAME[:WEIGHTS].

    Args:
        name: inception[:FILE], dinov2:FOLDER or hub id, clip:FOLDER or hub id, judge, random, or MODULE:FUNCTION, which
            is called without arguments and returns a FeatureExtractor.
        resize: how images are resized for the Inception.
        download: allow fetching what is not on this machine.

    Raises:
        UserError: unknown name, missing or wrong weights.
    """
    kind, _, weights = name.partition(":")
    if kind == "inception":
        return _inception(
            Path(weights) if weights else find_inception(cache_folder(), download=download), resize, device
        )
    if kind == "judge":
        return _judge(device)
    if kind == "random":
        return _random(device)
    if kind in ("dinov2", "clip"):
        if not weights:
            raise UserError(f"the features {kind!r} come without a checkpoint: write {kind}:FOLDER, or {kind}:HUB_ID")
        return (_dinov2 if kind == "dinov2" else _clip)(weights, device, download)
    if kind and weights:
        return _custom_extractor(kind, weights)
    raise UserError(
        f"the feature network {name!r} is not known: use inception, dinov2:PATH, clip:PATH, judge, random or MODULE:FUNCTION"
    )


# ---------------------------------------------------------------- the networks


def _inception(path: Path, resize: ResizeMode, device: torch.device | str) -> FeatureExtractor:
    network = load_inception(path).to(device)
    record = FeatureRecord("inception-2015", weights_hash(network), f"{resize} to 299")
    return FeatureExtractor(
        record, lambda image: normalize_for_inception(resize_for_inception(image, resize), resize), network, device
    )


def _judge(device: torch.device | str) -> FeatureExtractor:
    path = FOLDER / "judge.safetensors"
    judge = Judge.load(path).to(device)

    def prepare(image: ImageArray) -> torch.Tensor:
        if image.shape[:2] != (32, 32):
            raise UserError(
                f"the judge reads 32 x 32 images and got {image.shape[1]} x {image.shape[0]}: use another network"
            )
        return torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 127.5 - 1.0

    return FeatureExtractor(FeatureRecord("judge", file_hash(path), "none"), prepare, judge.trunk, device)


def _random(device: torch.device | str, seed: int = 0, width: int = 64) -> FeatureExtractor:
    """Makes a network with seeded random weights: useless as a measure, but it needs no file, which tests use."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, 1), nn.SiLU(), nn.Conv2d(32, width, 3, 2, 1), nn.SiLU(), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(width, width),
        )  # fmt: skip
    network = network.eval().requires_grad_(False).to(device)

    def prepare(image: ImageArray) -> torch.Tensor:
        x = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1.0
        return F.interpolate(x, size=(32, 32), mode="bilinear", antialias=True, align_corners=False)[0]

    record = FeatureRecord("random", weights_hash(network), "bilinear with antialias to 32")
    return FeatureExtractor(record, prepare, network, device)


def _dinov2(path: str, device: torch.device | str, download: bool) -> FeatureExtractor:
    """Loads DINOv2's class token as in dgm-eval (Stein et al., NeurIPS 2023): bicubic to 224, ImageNet's mean and deviation."""
    from transformers import AutoModel

    model = _pretrained(AutoModel, path, download).to(device)
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])

    def network(x: torch.Tensor) -> torch.Tensor:
        return model(pixel_values=x).last_hidden_state[:, 0]  # type: ignore[no-any-return]

    record = FeatureRecord("dinov2", weights_hash(model), "bicubic to 224")
    return FeatureExtractor(record, lambda image: resize_and_normalize(image, 224, mean, deviation), network, device)


def _clip(path: str, device: torch.device | str, download: bool) -> FeatureExtractor:
    """Loads normalised CLIP image embeddings, as CMMD uses them: bicubic with antialiasing to the network's input size."""
    from transformers import CLIPModel

    model = _pretrained(CLIPModel, path, download).to(device)
    side = int(model.config.vision_config.image_size)

    def network(x: torch.Tensor) -> torch.Tensor:
        return F.normalize(pooled_embedding(model.get_image_features(pixel_values=x)), dim=1)

    record = FeatureRecord("clip", weights_hash(model), f"bicubic with antialias to {side}, L2-normalised")
    return FeatureExtractor(
        record, lambda image: resize_and_normalize(image, side, CLIP_MEAN, CLIP_STD), network, device
    )


CLIP_MEAN = np.array(vision.CLIP_MEAN)
CLIP_STD = np.array(vision.CLIP_STD)


def _custom_extractor(module: str, function: str) -> FeatureExtractor:
    try:
        made = vars(importlib.import_module(module))[function]()
    except Exception as error:
        # a user's module may raise anything
        raise UserError(
            f"the feature network {module}:{function} cannot be loaded ({error}): check the module's name and path"
        ) from None
    if not isinstance(made, FeatureExtractor):
        raise UserError(
            f"{module}:{function}() returned a {type(made).__name__} and a FeatureExtractor is wanted: return one"
        )
    return made


# ---------------------------------------------------------------- shared with the scores


def resize_and_normalize(
    image: ImageArray, side: int, mean: NDArray[np.floating], deviation: NDArray[np.floating]
) -> torch.Tensor:
    """Resizes with PIL's bicubic filter (which antialiases) to a square, then (x / 255 - mean) / deviation; (3, side, side)."""
    resized = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC), dtype=np.float64)
    return torch.from_numpy(((resized / 255.0 - mean) / deviation).transpose(2, 0, 1)).float()


def pooled_embedding(answer: object) -> torch.Tensor:
    """Returns the projected embedding of `get_image_features` or `get_text_features`, which is inside an object since transformers 5."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    if isinstance(answer, torch.Tensor):
        return answer
    if isinstance(answer, BaseModelOutputWithPooling) and answer.pooler_output is not None:
        pooled: torch.Tensor = answer.pooler_output
        return pooled
    raise TypeError(f"a CLIP model answered with a {type(answer).__name__}; a tensor or a pooled output is wanted")


def weights_hash(network: nn.Module) -> str:
    """Computes the SHA-256 over names and values of all parameters and buffers, independent of their file's format."""
    digest = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _pretrained(cls: Any, path: str, download: bool) -> Any:
    """Loads a transformers model from a local folder or the hub's cache, or from the hub if `download` is set."""
    try:
        model, loaded = cls.from_pretrained(
            path, local_files_only=not download, output_loading_info=True, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        first = " ".join(str(error).split())[:160]
        raise UserError(
            f"the checkpoint {path!r} cannot be loaded ({first}): give a local folder, or --download"
        ) from None
    if loaded["missing_keys"]:
        missing = sorted(loaded["missing_keys"])[0]
        raise UserError(f"the checkpoint {path!r} is of another kind (it lacks {missing!r}): give one of this network")
    return model.eval().requires_grad_(False)
