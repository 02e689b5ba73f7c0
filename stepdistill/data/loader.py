"""Which item a sample is, and fetching items ahead of their use.

A run counts samples: global sample number g is the same picture with the same crop however the work is cut into
micro-batches, processes and restarts, so a resumed run needs no state of a loader.

    stream = IndexStream(len(folder), seed)
    samples = Samples(folder, stream, seed)
    for items in Prefetcher(samples, batches_of_sample_numbers, workers=4): ...
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from stepdistill.diffusion.draws import generator
from stepdistill.errors import UserError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class EpochOrder:
    """The item of every global sample number: epoch g // length, shuffled anew in each, every item once an epoch.

    A pure function of (length, seed, shuffle, g). Only the permutation of the epoch last asked for is kept,
    8 bytes an item.

    Raises:
        UserError: `length` is not positive.
    """

    def __init__(self, length: int, seed: int, shuffle: bool = True) -> None:
        if length < 1:
            raise UserError(
                f"a data set of {length} items was given to draw from: give one that holds at least one item"
            )
        self.length = length
        self.seed = seed
        self.shuffle = shuffle
        # one tuple, replaced as a whole, so that threads never see the order of another epoch
        self._cached: tuple[int, Tensor] | None = None

    def index(self, sample: int) -> int:
        """The item of global sample number `sample`, in [0, length)."""
        if sample < 0:
            raise ValueError(f"sample numbers count from 0, got {sample}")
        epoch, position = divmod(sample, self.length)
        return int(self._order(epoch)[position]) if self.shuffle else position

    def indices(self, start: int, count: int) -> list[int]:
        """The items of samples start, ..., start + count - 1."""
        return [self.index(sample) for sample in range(start, start + count)]

    def _order(self, epoch: int) -> Tensor:
        cached = self._cached
        if cached is None or cached[0] != epoch:
            cached = (epoch, torch.randperm(self.length, generator=generator(self.seed, "data order", epoch)))
            self._cached = cached
        return cached[1]


class SequentialOrder:
    """The order of a stream, which shuffles itself: sample g is its position g."""

    def index(self, sample: int) -> int:
        """The position of global sample number `sample`."""
        return sample


class SampleOrder(Protocol):
    """Which item a sample is: `IndexStream`, `InOrder`."""

    def index(self, sample: int) -> int: ...


class IndexedItems(Protocol[T_co]):
    """Anything with an item for an integer: `Samples`, `ImageFolder`, `TensorFolder`."""

    def __getitem__(self, index: int) -> T_co: ...


class ReadableDataset(Protocol[T_co]):
    """A data set whose items depend on random draws, such as an image source."""

    def read(self, index: int, draws: torch.Generator) -> T_co: ...


@dataclass(frozen=True)
class SampledDataset(Generic[T]):
    """A data set addressed by global sample number; an item's random draws are a function of (seed, number)."""

    data: ReadableDataset[T]
    order: SampleOrder
    seed: int

    def __getitem__(self, sample: int) -> T:
        return self.data.read(self.order.index(sample), sample_generator(self.seed, sample))


def sample_generator(seed: int, sample: int) -> torch.Generator:
    """The stream that the item of a global sample number is cropped and flipped by."""
    return generator(seed, "data", sample)


@dataclass(frozen=True)
class Prefetcher(Generic[T]):
    """Batches of items in the order of `batches`, read by threads ahead of their use.

    Threads, not processes: decoding and resizing release the interpreter lock, all know of an unreadable file that one
    has met, an error arrives as it was raised, and nothing is forked beside a GPU.

    Attributes:
        items: asked for single items, from several threads at once.
        batches: the numbers of every batch's items; may be endless.
        workers: threads; 0 reads in the caller's thread when a batch is asked for.
        ahead: batches in flight beyond the one being used.
    """

    items: IndexedItems[T]
    batches: Iterable[Sequence[int]]
    workers: int = 0
    prefetch_batches: int = 2

    def __iter__(self) -> Iterator[list[T]]:
        """Items batch by batch; closing the iterator stops the threads, an error of an item is raised at its batch."""
        if self.workers < 1:
            yield from ([self.items[number] for number in batch] for batch in self.batches)
            return
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="stepdistill-data")
        flying: deque[list[Future[T]]] = deque()
        submitted = ([pool.submit(self.items.__getitem__, number) for number in batch] for batch in self.batches)
        try:
            flying.extend(islice(submitted, max(1, self.prefetch_batches)))
            while flying:
                # the next batch enters before this one is waited for, so that no thread idles meanwhile
                flying.extend(islice(submitted, 1))
                yield [future.result() for future in flying.popleft()]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
