"""From global sample numbers to what a method is given: the same batch whatever the layout of the work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from stepdistill.data.images.buckets import BucketOrder, BucketSamples
from stepdistill.data.images.indexed import IndexedImages
from stepdistill.data.images.source import ImageItem
from stepdistill.data.latents.trajectories import TrajectoryState
from stepdistill.data.loader import EpochOrder, IndexedItems, Prefetcher, SampledDataset, SequentialOrder
from stepdistill.diffusion.draws import Draws, derive_seed
from stepdistill.families.conditioning import MicroConditioning
from stepdistill.methods.base import Batch
from stepdistill.roles.sampler import GuidedState
from stepdistill.training.inputs.encoding import CachedImages, TrainingImage, image_size_of
from stepdistill.training.session import Session


class BatchSource:
    """Micro-batches of a run, in order, from any iteration on.

    Args:
        session: its plan names the data, its encoder encodes them.
        seed: of the data order.
        processes: that share an iteration; with buckets all of them see one size.
    """

    def __init__(self, session: Session, seed: int, processes: int) -> None:
        self.session = session
        setup, training = session.setup, session.setup.config.training
        self.bucket_order: BucketOrder | None = None
        if setup.buckets is not None:
            per_iteration = training.batch_size * training.accumulation * processes
            self.bucket_order = BucketOrder(setup.buckets.weights, derive_seed(seed, "buckets"), per_iteration)
        self.prompts = EpochOrder(len(setup.prompts), derive_seed(seed, "prompts"))
        self.pairs = EpochOrder(len(setup.pairs), derive_seed(seed, "pairs")) if setup.pairs is not None else None
        self.states = None
        if setup.trajectories is not None:
            self.states = EpochOrder(len(setup.trajectories), derive_seed(seed, "trajectories"))
        self.images = self._image_samples(seed)

    def batches(self, numbers: Iterator[Sequence[int]]) -> Iterator[tuple[Sequence[int], Batch]]:
        """(sample numbers, batch) for every micro-batch; images are read ahead by `data.workers` threads."""
        if self.images is None:
            for samples in numbers:
                yield samples, self._batch(samples, None)
            return
        ahead: list[Sequence[int]] = []

        def record_sample_numbers() -> Iterator[Sequence[int]]:
            for samples in numbers:
                ahead.append(samples)
                yield samples

        for items in Prefetcher(self.images, record_sample_numbers(), self.session.setup.config.data.workers):
            samples = ahead.pop(0)
            yield samples, self._batch(samples, items)

    def _image_samples(self, seed: int) -> IndexedItems[TrainingImage] | None:
        buckets, images = self.session.setup.buckets, self.session.encoder.images
        if images is None:
            return None
        if buckets is not None and self.bucket_order is not None and isinstance(images, IndexedImages | CachedImages):
            return BucketSamples[TrainingImage](images, buckets, self.bucket_order, seed)
        order = SequentialOrder() if images.count is None else EpochOrder(images.count, derive_seed(seed, "images"))
        return SampledDataset[TrainingImage](images, order, seed)

    def _size(self, samples: Sequence[int]) -> tuple[int, int]:
        """(height, width) in pixels of a micro-batch, which lies in one iteration."""
        setup = self.session.setup
        if setup.buckets is None or self.bucket_order is None:
            return setup.problem.size
        return setup.buckets.sizes[self.bucket_order.place(samples[0]).bucket]

    @torch.no_grad()
    def _batch(self, samples: Sequence[int], items: list[TrainingImage] | None) -> Batch:
        encoder, setup = self.session.encoder, self.session.setup
        states = self._states(samples)
        own = [self.prompts.index(g) for g in samples] if states is None else [state.prompt for state in states]
        prompts = [setup.prompts[index] for index in own]
        size = self._size(samples)
        sizes = [MicroConditioning.plain(*size)] * len(samples)
        cond, null = encoder.text(prompts, sizes), encoder.null(sizes)
        batch = Batch(cond, null, latent_shape=setup.info.latent_shape(size), prompts=tuple(prompts))
        if items is not None:
            batch = self._with_images(batch, items, samples)
        if setup.pairs is not None and self.pairs is not None:
            batch = self._with_pairs(batch, samples, sizes)
        return batch if states is None else self._with_states(batch, states)

    def _with_images(self, batch: Batch, images: Sequence[TrainingImage], samples: Sequence[int]) -> Batch:
        session, setup = self.session, self.session.setup
        draws = Draws(setup.config.training.seed, 0, "data", samples, session.device)
        noise = draws.normal("posterior", setup.info.latent_shape(images[0].crop.target))
        latents = session.encoder.latents(images, noise)
        cond = session.encoder.text([item.caption for item in images], [image_size_of(item.crop) for item in images])
        batch = replace(batch, images=latents.to(session.dtype), image_cond=cond)
        losers = [
            replace(item, image=item.loser) for item in images if isinstance(item, ImageItem) and item.loser is not None
        ]
        if losers:  # with their winners' noise, so that two equal images have equal latents
            batch = replace(batch, losers=session.encoder.latents(losers, noise).to(session.dtype))
        return batch

    def _with_pairs(self, batch: Batch, samples: Sequence[int], sizes: Sequence[MicroConditioning]) -> Batch:
        session, setup = self.session, self.session.setup
        if setup.pairs is None or self.pairs is None:
            raise ValueError("a run without pairs asked for them")
        items = [setup.pairs[self.pairs.index(g)] for g in samples]
        noise = torch.stack([item.noise for item in items]).to(session.device, session.dtype)
        latents = torch.stack([item.latents for item in items]).to(session.device, session.dtype)
        cond = session.encoder.text([setup.prompts[item.prompt] for item in items], sizes)
        return replace(batch, pair_noise=noise, pair_latents=latents, pair_cond=cond)

    def _states(self, samples: Sequence[int]) -> list[TrajectoryState] | None:
        """States of collected walks, whose prompts are the batch's then; None of a run without."""
        folder, order = self.session.setup.trajectories, self.states
        return None if folder is None or order is None else [folder[order.index(g)] for g in samples]

    def _with_states(self, batch: Batch, states: Sequence[TrajectoryState]) -> Batch:
        session = self.session
        x_t, target = (
            torch.stack(tensors).to(session.device, session.dtype)
            for tensors in ([state.x_t for state in states], [state.target for state in states])
        )
        t, plain, w = (
            torch.tensor(values, dtype=torch.float64, device=session.device)
            for values in ([s.t for s in states], [s.plain for s in states], [s.w for s in states])
        )
        guided = GuidedState(x_t, t, target, plain.to(session.dtype))
        return replace(batch, states=guided, states_cond=batch.cond.told(w))


def sample_numbers(
    start: int, stop: int, *, batch: int, accumulation: int, process: int = 0, processes: int = 1
) -> Iterator[Sequence[int]]:
    """Sample numbers of this process's micro-batches for iterations start..stop - 1.

    Iteration i owns the numbers [i G, (i + 1) G) with G = batch x accumulation x processes, so 4 x 1 and 1 x 4 see the
    same samples.
    """
    per_iteration = batch * accumulation * processes
    for iteration in range(start, stop):
        for micro in range(accumulation):
            first = iteration * per_iteration + (micro * processes + process) * batch
            yield range(first, first + batch)
