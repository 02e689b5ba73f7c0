"""Fills the caches of a run from its config, and opens them for training.

    filled = fill(prepare(load_config("configs/sdxl_dmd2.yaml")))      # stepdistill cache CONFIG
    session = open_session(plan, device, warm(plan, device))           # stepdistill train CONFIG

Only the encoders are in memory while a cache is filled, and nothing of them is once it is warm: a session that is opened
with warm caches does not load them.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState
from tqdm import tqdm

from stepdistill.config.schema import CacheConfig
from stepdistill.data.images.crops import CropVariant, content_hashes, crop_variants
from stepdistill.data.images.indexed import IndexedImages
from stepdistill.data.latents.encoding_cache import (
    EncoderIdentity,
    EncodingCache,
    EncodingCacheWriter,
    FileHashes,
    image_key,
    null_key,
    text_key,
)
from stepdistill.errors import UserError
from stepdistill.families.base import PARTS, Checkpoint, Part, Posterior
from stepdistill.families.checkpoints.loading import fetch_weights, load_checkpoint
from stepdistill.families.conditioning import Conditioning, ImageSize
from stepdistill.training.inputs.encoding import CachedImages, Warm, image_entry, text_entry
from stepdistill.training.options import products
from stepdistill.training.session import DTYPES, device_of
from stepdistill.training.setup import RunSetup

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Filled:
    """What a fill did: entries that were encoded, entries that the plan has in all, and the folder's size in bytes."""

    encoded: int
    entries: int
    folder: Path
    size: int


@dataclass(frozen=True)
class _Caches:
    """The folders that a plan's caches are in; None where that kind is not cached."""

    text: EncodingCache | None
    latents: EncodingCache | None
    texts: Mapping[str, str]
    """Key -> prompt or caption."""
    contents: tuple[str | None, ...] = ()
    """Hash of every image; None where its file cannot be read."""
    wanted: Mapping[str, CropVariant] = field(default_factory=dict)
    """Key -> image that is encoded under it."""


def estimate(plan: RunSetup) -> int:
    """Bytes that the plan's caches take once they are full, shards' headers left out; 0 without a `cache` section."""
    section = plan.config.cache
    if section is None:
        return 0
    text = (len(_texts(plan)) + 1) * prompt_bytes(plan) if section.text else 0
    if not isinstance(plan.images, IndexedImages) or not section.latents:
        return text
    return text + sum(image_bytes(plan, cut.size) for cut in crop_variants(plan.images, plan.buckets))


def fill(plan: RunSetup, device: torch.device | str | None = None) -> Filled:
    """Encode what the plan's caches lack. Safe to stop and to start again; several processes take turns.

    Raises:
        UserError: no `cache` section, too little room on the disk (before anything is loaded), more unreadable images than
            data.max_bad_share, or an encoding that is not finite.
    """
    section = _section(plan)
    return _fill(plan, section, _caches(plan, section), device)


def _fill(plan: RunSetup, section: CacheConfig, caches: _Caches, device: torch.device | str | None) -> Filled:
    where = device if isinstance(device, torch.device) else device_of(device or plan.config.training.device)
    with products(tf32=False):
        return _filled(plan, section, caches, where)


def _filled(plan: RunSetup, section: CacheConfig, caches: _Caches, where: torch.device) -> Filled:
    _check_room(plan, section, caches)
    encoded = entries = 0
    if caches.text is not None:
        encoded += _fill_text(plan, caches.texts, caches.text, where)
        entries += len(caches.texts) + 1
    if caches.latents is not None and isinstance(plan.images, IndexedImages):
        encoded += _fill_latents(plan, plan.images, caches.wanted, caches.latents, where)
        entries += sum(key in caches.latents for key in caches.wanted)
    folder = Path(section.folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Filled(encoded, entries, folder, size)


def warm(plan: RunSetup, device: torch.device | str | None = None) -> Warm | None:
    """The plan's caches, filled first where they are cold; None without a `cache` section.

    The main process fills while all others wait for it; then everyone reads. Raises UserError as `fill` does.
    """
    section = plan.config.cache
    if section is None:
        return None
    state = PartialState()
    caches = _caches(plan, section) if state.is_main_process else None
    if caches is not None:
        _fill(plan, section, caches, device)
    state.wait_for_everyone()
    caches = caches or _caches(plan, section)
    if caches.text is not None and null_key(plan.config.model.negative_prompt) not in caches.text:
        raise UserError(
            f"the cache in {section.folder!r} was filled by another process and is not seen by this one: set cache.folder to a "
            "folder that all machines share"
        )
    images = None
    if caches.latents is not None and isinstance(plan.images, IndexedImages):
        images = CachedImages(plan.images, caches.latents, caches.contents)
    parts: set[Part] = set(PARTS)
    # an evaluation asks for prompts of its own
    if caches.text is not None and plan.config.evaluation is None:
        parts.remove("text")
    if images is not None or plan.images is None:
        parts.remove("images")
    return Warm(caches.text, images, frozenset(parts))


# ---------------------------------------------------------------- what there is to encode


def _section(plan: RunSetup) -> CacheConfig:
    if plan.config.cache is None:
        raise UserError("the config has no cache section: add, say, cache: {folder: caches}")
    return plan.config.cache


def _texts(plan: RunSetup) -> dict[str, str]:
    """Key -> text of all that a run may ask of the text encoders but the unconditional branch."""
    captions = plan.images.iterate_captions() if isinstance(plan.images, IndexedImages) else ()
    return {text_key(text): text for text in (*plan.prompts.texts, *captions)}


def _caches(plan: RunSetup, section: CacheConfig) -> _Caches:
    root = Path(section.folder)
    hashes = FileHashes(root)
    fetch_weights(plan.info)
    text = EncodingCache(root, _identity(plan, "text", hashes)) if section.text else None
    caches = _Caches(text, None, _texts(plan))
    if section.latents and isinstance(plan.images, IndexedImages):
        contents = content_hashes(plan.images, hashes)
        wanted = {
            image_key(content, cut.size, cut.flipped): cut
            for cut in crop_variants(plan.images, plan.buckets)
            if (content := contents[cut.position]) is not None
        }
        latents = EncodingCache(root, _identity(plan, "images", hashes))
        caches = replace(caches, latents=latents, contents=contents, wanted=wanted)
    hashes.save()
    return caches


def _identity(plan: RunSetup, part: Literal["text", "images"], hashes: FileHashes) -> EncoderIdentity:
    files = {name: hashes.hash_of(path) for name, path in plan.family.encoder_files(plan.info, part).items()}
    if part == "text":
        return EncoderIdentity("text", plan.info.family, plan.config.model.dtype, files)
    return EncoderIdentity("latents", plan.info.family, _latents_dtype(plan), files)


# ---------------------------------------------------------------- room


def prompt_bytes(plan: RunSetup) -> int:
    """Of one prompt in a text cache."""
    return plan.family.encoding_bytes(plan.info, DTYPES[plan.config.model.dtype])


def image_bytes(plan: RunSetup, size: tuple[int, int]) -> int:
    """Mean and std of an image of (height, width) pixels."""
    return 2 * DTYPES[_latents_dtype(plan)].itemsize * prod(plan.info.latent_shape(size))


def _latents_dtype(plan: RunSetup) -> str:
    """The autoencoder runs in float32 whatever the base is in, or in float64 along with it."""
    return "float64" if plan.config.model.dtype == "float64" else "float32"


def _check_room(plan: RunSetup, section: CacheConfig, caches: _Caches) -> None:
    needed = 0
    if caches.text is not None:
        needed += sum(key not in caches.text for key in caches.texts) * prompt_bytes(plan)
    if caches.latents is not None:
        missing = (cut for key, cut in caches.wanted.items() if key not in caches.latents)
        needed += sum(image_bytes(plan, cut.size) for cut in missing)
    place = Path(section.folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"the caches need {needed / 1e9:.2f} GB more in {section.folder!r} and {free / 1e9:.2f} GB are free there: "
            "set cache.folder to a larger disk, or cache.text or cache.latents to false"
        )


# ---------------------------------------------------------------- filling


def _fill_text(plan: RunSetup, texts: Mapping[str, str], entries: EncodingCache, device: torch.device) -> int:
    negative = plan.config.model.negative_prompt
    null = null_key(negative)

    def missing() -> dict[str, str]:
        return {key: text for key, text in (*texts.items(), (null, negative)) if key not in entries}

    if not missing():
        return 0
    with EncodingCacheWriter(entries) as writer, torch.no_grad():
        todo = missing()
        if not todo:  # another process has encoded them in the meantime
            return 0
        _announce(entries, len(todo), len(texts) + 1, "texts")
        checkpoint = _load(plan, "text", device)
        sizes = [ImageSize.plain(*plan.problem.size)]
        for key, text in tqdm(todo.items(), desc="text", unit="prompt", dynamic_ncols=True):
            is_null, family = key == null, plan.family
            cond = family.null(checkpoint, sizes, text) if is_null else family.encode(checkpoint, [text], sizes)
            _check_text(cond, text, plan)
            writer.add(key, text_entry(cond))
    return len(todo)


def _fill_latents(
    plan: RunSetup,
    images: IndexedImages,
    wanted: Mapping[str, CropVariant],
    entries: EncodingCache,
    device: torch.device,
) -> int:
    def missing() -> dict[str, CropVariant]:
        return {key: cut for key, cut in wanted.items() if key not in entries}

    if not missing():
        return 0
    encoded = 0
    checkpoint: Checkpoint | None = None
    with EncodingCacheWriter(entries) as writer, torch.no_grad():
        todo = missing()
        _announce(entries, len(todo), len(wanted), "images")
        for key, cut in tqdm(todo.items(), desc="latents", unit="image", dynamic_ncols=True):
            item = cut.item(images)
            if item is None:  # a run reads the next image in its place
                continue
            # no earlier than this: a folder with an unreadable file lacks an entry even when it is warm
            checkpoint = checkpoint or _load(plan, "images", device)
            posterior = plan.family.posterior(checkpoint, item.image[None].to(device))
            _check_latents(posterior, item.name)
            writer.add(key, image_entry(posterior, item.crop))
            encoded += 1
    return encoded


def _announce(entries: EncodingCache, count: int, total: int, unit: str) -> None:
    """Say what is going to be encoded, and why."""
    before = entries.previous_identity() if len(entries) == 0 else None
    if before is not None:
        logger.info("%s is made anew: %s", entries.path, entries.identity.difference(before))
    logger.info("%s: %d of %d %s are not in it yet", entries.path, count, total, unit)


def _load(plan: RunSetup, part: Part, device: torch.device) -> Checkpoint:
    return load_checkpoint(plan.info, DTYPES[plan.config.model.dtype], device, frozenset({part}))


def _check_text(cond: Conditioning, text: str, plan: RunSetup) -> None:
    if not all(bool(part.isfinite().all()) for part in (cond.text, cond.pooled) if part is not None):
        raise UserError(
            f"the embedding of the prompt {text!r} is not finite in {plan.config.model.dtype}: set model.dtype to bfloat16 or "
            "float32"
        )


def _check_latents(posterior: Posterior, name: str) -> None:
    if not bool(posterior.mean.isfinite().all() and posterior.std.isfinite().all()):
        raise UserError(
            f"the latents of {name!r} are not finite: replace the autoencoder's weights, which may be damaged, or "
            "remove that image"
        )
