"""Aspect-ratio buckets: images of several shapes in one run, of one shape in each iteration.

    buckets = sort_images(source, [(1024, 1024), (832, 1216)], workers=4)
    order = BucketOrder(buckets.weights, seed, per_iteration=8)
    place = order.place(17)                       # sample 17: its bucket, and which of that bucket's samples it is

The bucket of an iteration and the images in it are functions of (seed, iteration), so that a resumed run needs no state
and every layout of the global batch sees the same samples. They do depend on the size of the global batch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol

import torch
from torch import Tensor

from stepdistill.data.images.indexed import IndexedImages
from stepdistill.data.images.source import CropTransform
from stepdistill.data.loader import EpochOrder, T_co, sample_generator
from stepdistill.diffusion.draws import derive_seed, generator
from stepdistill.errors import UserError

log = logging.getLogger(__name__)
CHUNK = 4096
"""Iterations whose buckets are drawn at once."""


@dataclass(frozen=True)
class Buckets:
    """Sizes, (height, width) in pixels, and the positions of each one's images in their source; none in a run on prompts."""

    sizes: tuple[tuple[int, int], ...]
    members: tuple[tuple[int, ...], ...] = ()

    @property
    def weights(self) -> tuple[int, ...]:
        """How often a bucket is chosen, relative to the others: by its images, or alike where there are none."""
        return tuple(map(len, self.members)) if self.members else (1,) * len(self.sizes)


@dataclass(frozen=True)
class BucketPosition:
    """Where a sample lies: sample `position` of bucket `bucket`, both from 0; positions count over all epochs."""

    bucket: int
    position: int


def nearest_bucket(shape: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> int:
    """The bucket whose aspect ratio is nearest to that of (height, width), on a logarithmic scale."""
    ratio = math.log(shape[0] / shape[1])
    return min(range(len(sizes)), key=lambda k: abs(math.log(sizes[k][0] / sizes[k][1]) - ratio))


def assign_buckets(source: IndexedImages, sizes: Sequence[tuple[int, int]], workers: int = 1) -> Buckets:
    """Read the size of every image and sort them into buckets; images with an unreadable header are left out.

    Each process of a run does so for itself, once, at its start.

    Raises:
        UserError: more unreadable headers than the source allows, or no readable one.
    """
    members: list[list[int]] = [[] for _ in sizes]
    for index, shape in enumerate(source.image_sizes(workers)):
        if shape is not None:
            members[nearest_bucket(shape, sizes)].append(index)
    if not any(members):
        raise UserError(f"none of the {len(source)} images in {source.source!r} can be read: replace them")
    for size, found in zip(sizes, members, strict=True):
        log.info("bucket %d x %d (height x width): %d images", *size, len(found))
    return Buckets(tuple(sizes), tuple(tuple(found) for found in members))


@dataclass(frozen=True)
class _Chunk:
    """The buckets of CHUNK iterations, (CHUNK,), and how many earlier ones had the same, (CHUNK,); totals (K,) before."""

    number: int
    before: Tensor
    picks: Tensor
    earlier: Tensor


class BucketOrder:
    """The bucket of every iteration and the place of every sample in it, as a pure function.

    Args:
        weights: how often each bucket is chosen, in proportion; not all 0.
        seed: of the order.
        per_iteration: samples of one iteration, over all processes and micro-batches.
    """

    def __init__(self, weights: Sequence[int], seed: int, per_iteration: int) -> None:
        self.cumulative_weights = torch.tensor(weights, dtype=torch.int64).cumsum(0)
        self.seed, self.per_iteration = seed, per_iteration
        # replaced as a whole, so that threads never see half of another chunk
        self._cached = self._draw_chunk(0, torch.zeros(len(weights), dtype=torch.int64))

    def bucket(self, iteration: int) -> int:
        """The bucket of an iteration."""
        number, row = divmod(iteration, CHUNK)
        return int(self._chunk(number).picks[row])

    def place(self, sample: int) -> BucketPosition:
        """Bucket and position of a global sample number."""
        iteration, slot = divmod(sample, self.per_iteration)
        number, row = divmod(iteration, CHUNK)
        chunk = self._chunk(number)
        return BucketPosition(int(chunk.picks[row]), int(chunk.earlier[row]) * self.per_iteration + slot)

    def _chunk(self, number: int) -> _Chunk:
        chunk = self._cached
        if chunk.number > number:
            chunk = self._draw_chunk(0, torch.zeros_like(self.cumulative_weights))
        while chunk.number < number:
            chunk = self._draw_chunk(
                chunk.number + 1, chunk.before + chunk.picks.bincount(minlength=len(self.cumulative_weights))
            )
        self._cached = chunk
        return chunk

    def _draw_chunk(self, number: int, before: Tensor) -> _Chunk:
        draws = torch.randint(
            int(self.cumulative_weights[-1]), (CHUNK,), generator=generator(self.seed, "buckets", number)
        )
        picks = torch.bucketize(draws, self.cumulative_weights, right=True)
        earlier = torch.empty_like(picks)
        for bucket, total in enumerate(before.tolist()):
            rows = picks == bucket
            earlier[rows] = total + torch.arange(int(rows.sum()))
        return _Chunk(number, before, picks, earlier)


class SelectableImages(Protocol[T_co]):
    """Images that are read by their place in a selection, and cut to any size, such as `IndexedImages`."""

    @property
    def crop_transform(self) -> CropTransform: ...

    def read_selected(
        self, order: Sequence[int], place: int, draws: torch.Generator, crop_transform: CropTransform
    ) -> T_co: ...


class BucketSamples(Generic[T_co]):
    """The images of a run with buckets, by global sample number: each bucket shows all of its images once an epoch of its own."""

    def __init__(self, source: SelectableImages[T_co], buckets: Buckets, order: BucketOrder, seed: int) -> None:
        self.source, self.order, self.seed = source, order, seed
        self.members = buckets.members
        self.crop_transforms = [replace(source.crop_transform, size=size) for size in buckets.sizes]
        self.streams = {
            bucket: EpochOrder(len(found), derive_seed(seed, "bucket", bucket))
            for bucket, found in enumerate(buckets.members)
            if found
        }

    def __getitem__(self, sample: int) -> T_co:
        place = self.order.place(sample)
        chosen = self.streams[place.bucket].index(place.position)
        draws = sample_generator(self.seed, sample)
        return self.source.read_selected(self.members[place.bucket], chosen, draws, self.crop_transforms[place.bucket])
