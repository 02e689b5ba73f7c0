"""The one place where a run's prompts and images become conditioning and latents: live, or from a cache.

Both encode row by row, and with whole float32 products whatever the training's are. What a sample is told is then the same
to the bit whatever its neighbours in a batch, and so whether it was encoded now or when the cache was filled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from stepdistill.data.images.indexed import IndexedImages
from stepdistill.data.images.source import Crop, CropTransform, ImageItem, draw_transform_numbers
from stepdistill.data.latents.encoding_cache import EncodingCache, image_key, null_key, text_key
from stepdistill.errors import UserError
from stepdistill.families.base import Checkpoint, CheckpointPart, Family, Posterior
from stepdistill.families.conditioning import Conditioning, MicroConditioning
from stepdistill.training.option_checks import float32_precision


@dataclass(frozen=True)
class LatentItem:
    """One image as the autoencoder sees it: the posterior's mean and std, (C, h, w) each; caption and crop."""

    mean: Tensor
    std: Tensor
    caption: str
    crop: Crop


TrainingImage: TypeAlias = ImageItem | LatentItem


class TrainingImages(Protocol):
    """Images of a run: an `ImageSource`, or its latents from a cache."""

    @property
    def count(self) -> int | None:
        """Images; None of a stream."""

    def read(self, index: int, draws: torch.Generator) -> TrainingImage:
        """Item at a position, cropped and flipped by `draws`."""


class Encoder(Protocol):
    """What a run asks of text encoders and autoencoder.

    Attributes:
        images: the run's images; None where it has none.
    """

    images: TrainingImages | None

    def text(self, prompts: Sequence[str], sizes: Sequence[MicroConditioning]) -> Conditioning:
        """Conditioning of B prompts, on the session's device."""

    def null(self, sizes: Sequence[MicroConditioning]) -> Conditioning:
        """The unconditional branch for the run's negative prompt, one row per size."""

    def latents(self, items: Sequence[TrainingImage], noise: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) of items of `images`, drawn from their posteriors with noise of that shape."""


class LiveEncoder:
    """Asks the checkpoint's own encoders.

    Args:
        family, checkpoint: with the encoders in memory that are going to be asked.
        negative_prompt: of the unconditional branch.
        images: the run's images.
    """

    def __init__(
        self, family: Family, checkpoint: Checkpoint, negative_prompt: str, images: TrainingImages | None
    ) -> None:
        self.family, self.checkpoint, self.negative_prompt, self.images = family, checkpoint, negative_prompt, images
        self._null: Conditioning | None = None

    @torch.no_grad()
    @float32_precision(tf32=False)
    def text(self, prompts: Sequence[str], sizes: Sequence[MicroConditioning]) -> Conditioning:
        rows = zip(prompts, sizes, strict=True)
        encoded = [self.family.encode(self.checkpoint, [prompt], [size]) for prompt, size in rows]
        return Conditioning.cat(encoded).masked()

    @torch.no_grad()
    @float32_precision(tf32=False)
    def null(self, sizes: Sequence[MicroConditioning]) -> Conditioning:
        if self._null is None:
            self._null = self.family.null(self.checkpoint, sizes[:1], self.negative_prompt).masked()
        return with_time_ids(self.family, self._null.expand(len(sizes)), sizes)

    @torch.no_grad()
    @float32_precision(tf32=False)
    def latents(self, items: Sequence[TrainingImage], noise: Tensor) -> Tensor:
        rows = [self._posterior(item, noise.device).draw(eps[None]) for item, eps in zip(items, noise, strict=True)]
        return torch.cat(rows)

    def _posterior(self, item: TrainingImage, device: torch.device) -> Posterior:
        if isinstance(item, LatentItem):
            return Posterior(item.mean[None].to(device), item.std[None].to(device))
        return self.family.posterior(self.checkpoint, item.image[None].to(device))


class CachedEncoder:
    """Reads text conditioning from a cache.

    Args:
        entries: of the run's text encoders; hold all of its prompts, its captions and its unconditional branch.
        live: for latents, and for prompts that are not of the run; asked for the latter only where `keeps_text`.
        keeps_text: the text encoders are in memory.
        device: where conditioning is wanted.
    """

    def __init__(
        self, entries: EncodingCache, live: LiveEncoder, has_text_encoders: bool, device: torch.device
    ) -> None:
        self.entries, self.live, self.has_text_encoders, self.device = entries, live, has_text_encoders, device
        self.images = live.images
        self._null = conditioning_from_entry(entries[null_key(live.negative_prompt)]).to(device)

    def text(self, prompts: Sequence[str], sizes: Sequence[MicroConditioning]) -> Conditioning:
        rows = [self._row(prompt, size) for prompt, size in zip(prompts, sizes, strict=True)]
        return Conditioning.cat(rows)

    def null(self, sizes: Sequence[MicroConditioning]) -> Conditioning:
        return with_time_ids(self.live.family, self._null.expand(len(sizes)), sizes)

    def latents(self, items: Sequence[TrainingImage], noise: Tensor) -> Tensor:
        return self.live.latents(items, noise)

    def _row(self, prompt: str, size: MicroConditioning) -> Conditioning:
        key = text_key(prompt)
        if key in self.entries:
            return with_time_ids(self.live.family, conditioning_from_entry(self.entries[key]).to(self.device), [size])
        if not self.has_text_encoders:
            raise RuntimeError(f"the text encoders have left memory, and the prompt {prompt!r} is not in the cache")
        return self.live.text([prompt], [size])


@dataclass(frozen=True)
class CachedImages:
    """Images whose latents are in a cache: the same items as the source's `read` and `read_among`, encoded.

    Attributes:
        source: the images, cropped at their centres; only their captions are read here.
        entries: of the run's autoencoder.
        contents: hash of every image's file, by position; None where it could not be read.
    """

    source: IndexedImages
    entries: EncodingCache
    contents: Sequence[str | None]

    @property
    def count(self) -> int:
        """Images, readable or not."""
        return len(self.contents)

    @property
    def crop_transform(self) -> CropTransform:
        """Of the source."""
        return self.source.crop_transform

    def read(self, index: int, draws: torch.Generator) -> LatentItem:
        """Item at a position, mirrored by `draws`, of which three numbers are taken."""
        return self.read_selected(range(self.count), index, draws, self.crop_transform)

    def read_selected(
        self, order: Sequence[int], place: int, draws: torch.Generator, crop_transform: CropTransform
    ) -> LatentItem:
        """As `read`, of a selection: the image at order[place], an unreadable one replaced by the next in `order`.

        Raises:
            UserError: none of the selection can be read.
        """
        flipped = crop_transform.flips(draw_transform_numbers(draws))
        for step in range(len(order)):
            index = order[(place + step) % len(order)]
            content = self.contents[index]
            key = None if content is None else image_key(content, crop_transform.size, flipped)
            # a run fills its caches first, so what has no entry could not be read
            if key is not None and key in self.entries:
                return _latent_item(self.entries[key], self.source.caption_of(index))
        raise UserError(f"none of the {len(order)} images in {self.source.source!r} can be read: replace them")


@dataclass(frozen=True)
class RunCaches:
    """Caches that hold all that a run needs.

    Attributes:
        text: text embeddings; None where they are not cached.
        images: latents of the run's images; None where they are not cached, or the run has no images.
        parts: of the checkpoint, what a session still needs in memory.
    """

    text: EncodingCache | None
    images: CachedImages | None
    parts: frozenset[CheckpointPart]


def make_encoder(
    family: Family,
    checkpoint: Checkpoint,
    negative_prompt: str,
    images: TrainingImages | None,
    caches: RunCaches | None,
    device: torch.device,
) -> Encoder:
    """The encoder of a run, with its caches where there are any."""
    cached = caches.images if caches is not None else None
    live = LiveEncoder(family, checkpoint, negative_prompt, cached or images)
    if caches is None or caches.text is None:
        return live
    return CachedEncoder(caches.text, live, "text" in caches.parts, device)


def image_size_of(crop: Crop) -> MicroConditioning:
    """What a crop conditions a network with."""
    return MicroConditioning(crop.original, crop.offset, crop.target)


def with_time_ids(family: Family, cond: Conditioning, sizes: Sequence[MicroConditioning]) -> Conditioning:
    """These rows with the time ids of these sizes."""
    ids = family.time_ids(sizes)
    return replace(cond, time_ids=None if ids is None else ids.to(cond.text.device))


def conditioning_to_entry(cond: Conditioning) -> dict[str, Tensor]:
    """One row of conditioning as an entry; what the mask hides at the end of the text is cut off."""
    cond = cond.masked()
    row = {item.name: value[0] for item in fields(cond) if (value := vars(cond)[item.name]) is not None}
    row.pop("time_ids", None)
    if cond.mask is not None:
        seen = cond.mask[0].nonzero()
        row["text"] = row["text"][: int(seen.max()) + 1 if len(seen) else 0]
    return row


def conditioning_from_entry(entry: Mapping[str, Tensor]) -> Conditioning:
    """The row (B = 1) that `text_entry` took apart, without time ids; zeros stand where the mask hides the text."""
    cond = Conditioning(**{name: tensor[None] for name, tensor in entry.items()})
    if cond.mask is None:
        return cond
    hidden = cond.mask.shape[1] - cond.text.shape[1]
    return replace(cond, text=torch.nn.functional.pad(cond.text, (0, 0, 0, hidden)))


def posterior_to_entry(posterior: Posterior, crop: Crop) -> dict[str, Tensor]:
    """One image as an entry."""
    places = torch.tensor([*crop.offset, *crop.original, *crop.target])
    return {"mean": posterior.mean[0], "std": posterior.std[0], "crop": places}


def _latent_item(entry: Mapping[str, Tensor], caption: str) -> LatentItem:
    top, left, *shape = entry["crop"].tolist()
    crop = Crop((shape[0], shape[1]), (top, left), (shape[2], shape[3]))
    return LatentItem(entry["mean"], entry["std"], caption, crop)
