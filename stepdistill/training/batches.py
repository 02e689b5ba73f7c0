"""From global sample numbers to what a method is given: the same batch whatever the layout of the work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from stepdistill.data.loader import IndexStream, Prefetcher, Samples
from stepdistill.diffusion.draws import Draws, derive_seed
from stepdistill.methods.base import Batch
from stepdistill.models.conditioning import ImageSize
from stepdistill.training.encoding import TrainingImage, size_of
from stepdistill.training.session import Session


class BatchSource:
    """Micro-batches of a run, in order, from any iteration on.

    Args:
        session: its plan names the data, its encoder encodes them.
        seed: of the data order.
    """

    def __init__(self, session: Session, seed: int) -> None:
        self.session = session
        plan = session.plan
        self.size = ImageSize.plain(*plan.setting.size)
        self.prompts = IndexStream(len(plan.prompts), derive_seed(seed, "prompts"))
        self.pairs = IndexStream(len(plan.pairs), derive_seed(seed, "pairs")) if plan.pairs is not None else None
        self.images: Samples[TrainingImage] | None = None
        if plan.images is not None and session.encoder.images is not None:
            stream = IndexStream(len(plan.images), derive_seed(seed, "images"))
            self.images = Samples(session.encoder.images, stream, seed)

    def batches(self, numbers: Iterator[Sequence[int]]) -> Iterator[tuple[Sequence[int], Batch]]:
        """(sample numbers, batch) for every micro-batch; images are read ahead by `data.workers` threads."""
        if self.images is None:
            for samples in numbers:
                yield samples, self._batch(samples, None)
            return
        ahead: list[Sequence[int]] = []

        def remembered() -> Iterator[Sequence[int]]:
            for samples in numbers:
                ahead.append(samples)
                yield samples

        for items in Prefetcher(self.images, remembered(), self.session.plan.config.data.workers):
            samples = ahead.pop(0)
            yield samples, self._batch(samples, items)

    @torch.no_grad()
    def _batch(self, samples: Sequence[int], items: list[TrainingImage] | None) -> Batch:
        encoder, plan = self.session.encoder, self.session.plan
        prompts = [plan.prompts[self.prompts.index(g)] for g in samples]
        sizes = [self.size] * len(samples)
        batch = Batch(encoder.text(prompts, sizes), encoder.null(sizes))
        if items is not None:
            batch = self._with_images(batch, items, samples)
        if plan.pairs is not None and self.pairs is not None:
            batch = self._with_pairs(batch, samples, sizes)
        return batch

    def _with_images(self, batch: Batch, images: Sequence[TrainingImage], samples: Sequence[int]) -> Batch:
        session, plan = self.session, self.session.plan
        draws = Draws(plan.config.training.seed, 0, "data", samples, session.device)
        noise = draws.normal("posterior", plan.setting.latent_shape)
        latents = session.encoder.latents(images, noise)
        cond = session.encoder.text([item.caption for item in images], [size_of(item.crop) for item in images])
        return Batch(batch.cond, batch.null, latents.to(session.dtype), cond)

    def _with_pairs(self, batch: Batch, samples: Sequence[int], sizes: Sequence[ImageSize]) -> Batch:
        session, plan = self.session, self.session.plan
        if plan.pairs is None or self.pairs is None:
            raise ValueError("a run without pairs asked for them")
        items = [plan.pairs[self.pairs.index(g)] for g in samples]
        noise = torch.stack([item.noise for item in items]).to(session.device, session.dtype)
        latents = torch.stack([item.latents for item in items]).to(session.device, session.dtype)
        cond = session.encoder.text([plan.prompts[item.prompt] for item in items], sizes)
        return Batch(batch.cond, batch.null, batch.images, batch.image_cond, noise, latents, cond)


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
