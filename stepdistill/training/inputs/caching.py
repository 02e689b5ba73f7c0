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
from stepdistill.families.base import ALL_PARTS, Checkpoint, CheckpointPart, Posterior
from stepdistill.families.checkpoints.loading import fetch_weights, load_checkpoint
from stepdistill.families.conditioning import Conditioning, MicroConditioning
from stepdistill.training.inputs.encoding import CachedImages, RunCaches, conditioning_to_entry, posterior_to_entry
from stepdistill.training.option_checks import float32_precision
from stepdistill.training.session import DTYPES, resolve_device
from stepdistill.training.setup import RunSetup

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheSummary:
    """What a fill did: entries that were encoded, entries that the plan has in all, and the folder's size in bytes."""

    encoded: int
    entries: int
    folder: Path
    size: int


@dataclass(frozen=True)
class _CacheFolders:
    """The folders that a plan's caches are in; None where that kind is not cached."""

    text: EncodingCache | None
    latents: EncodingCache | None
    texts: Mapping[str, str]
    """Key -> prompt or caption."""
    contents: tuple[str | None, ...] = ()
    """Hash of every image; None where its file cannot be read."""
    crops_by_key: Mapping[str, CropVariant] = field(default_factory=dict)
    """Key -> image that is encoded under it."""


def estimate_cache_bytes(setup: RunSetup) -> int:
    """Bytes that the plan's caches take once they are full, shards' headers left out; 0 without a `cache` section."""
    section = setup.config.cache
    if section is None:
        return 0
    text = (len(_texts(setup)) + 1) * bytes_per_prompt(setup) if section.text else 0
    if not isinstance(setup.images, IndexedImages) or not section.latents:
        return text
    return text + sum(bytes_per_image(setup, cut.size) for cut in crop_variants(setup.images, setup.buckets))


def fill_caches(setup: RunSetup, device: torch.device | str | None = None) -> CacheSummary:
    """Encode what the plan's caches lack. Safe to stop and to start again; several processes take turns.

    Raises:
        UserError: no `cache` section, too little room on the disk (before anything is loaded), more unreadable images than
            data.max_bad_share, or an encoding that is not finite.
    """
    section = _cache_section(setup)
    return _fill_on_device(setup, section, _caches(setup, section), device)


def _fill_on_device(
    setup: RunSetup, section: CacheConfig, caches: _CacheFolders, device: torch.device | str | None
) -> CacheSummary:
    where = device if isinstance(device, torch.device) else resolve_device(device or setup.config.training.device)
    with float32_precision(tf32=False):
        return _fill_folders(setup, section, caches, where)


def _fill_folders(setup: RunSetup, section: CacheConfig, caches: _CacheFolders, where: torch.device) -> CacheSummary:
    _check_disk_space(setup, section, caches)
    encoded = entries = 0
    if caches.text is not None:
        encoded += _fill_text(setup, caches.texts, caches.text, where)
        entries += len(caches.texts) + 1
    if caches.latents is not None and isinstance(setup.images, IndexedImages):
        encoded += _fill_latents(setup, setup.images, caches.crops_by_key, caches.latents, where)
        entries += sum(key in caches.latents for key in caches.crops_by_key)
    folder = Path(section.folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return CacheSummary(encoded, entries, folder, size)


def open_caches(setup: RunSetup, device: torch.device | str | None = None) -> RunCaches | None:
    """The plan's caches, filled first where they are cold; None without a `cache` section.

    The main process fills while all others wait for it; then everyone reads. Raises UserError as `fill` does.
    """
    section = setup.config.cache
    if section is None:
        return None
    state = PartialState()
    caches = _caches(setup, section) if state.is_main_process else None
    if caches is not None:
        _fill_on_device(setup, section, caches, device)
    state.wait_for_everyone()
    caches = caches or _caches(setup, section)
    if caches.text is not None and null_key(setup.config.model.negative_prompt) not in caches.text:
        raise UserError(
            f"the cache in {section.folder!r} was filled by another process and is not seen by this one: set cache.folder to a "
            "folder that all machines share"
        )
    images = None
    if caches.latents is not None and isinstance(setup.images, IndexedImages):
        images = CachedImages(setup.images, caches.latents, caches.contents)
    parts: set[CheckpointPart] = set(ALL_PARTS)
    # an evaluation asks for prompts of its own
    if caches.text is not None and setup.config.evaluation is None:
        parts.remove("text")
    if images is not None or setup.images is None:
        parts.remove("images")
    return RunCaches(caches.text, images, frozenset(parts))


# ---------------------------------------------------------------- what there is to encode


def _cache_section(setup: RunSetup) -> CacheConfig:
    if setup.config.cache is None:
        raise UserError("the config has no cache section: add, say, cache: {folder: caches}")
    return setup.config.cache


def _texts(setup: RunSetup) -> dict[str, str]:
    """Key -> text of all that a run may ask of the text encoders but the unconditional branch."""
    captions = setup.images.iterate_captions() if isinstance(setup.images, IndexedImages) else ()
    return {text_key(text): text for text in (*setup.prompts.texts, *captions)}


def _caches(setup: RunSetup, section: CacheConfig) -> _CacheFolders:
    root = Path(section.folder)
    hashes = FileHashes(root)
    fetch_weights(setup.info)
    text = EncodingCache(root, _encoder_identity(setup, "text", hashes)) if section.text else None
    caches = _CacheFolders(text, None, _texts(setup))
    if section.latents and isinstance(setup.images, IndexedImages):
        contents = content_hashes(setup.images, hashes)
        crops_by_key = {
            image_key(content, cut.size, cut.flipped): cut
            for cut in crop_variants(setup.images, setup.buckets)
            if (content := contents[cut.position]) is not None
        }
        latents = EncodingCache(root, _encoder_identity(setup, "images", hashes))
        caches = replace(caches, latents=latents, contents=contents, crops_by_key=crops_by_key)
    hashes.save()
    return caches


def _encoder_identity(setup: RunSetup, part: Literal["text", "images"], hashes: FileHashes) -> EncoderIdentity:
    files = {name: hashes.hash_of(path) for name, path in setup.family.encoder_files(setup.info, part).items()}
    if part == "text":
        return EncoderIdentity("text", setup.info.family, setup.config.model.dtype, files)
    return EncoderIdentity("latents", setup.info.family, _latents_dtype(setup), files)


# ---------------------------------------------------------------- room


def bytes_per_prompt(setup: RunSetup) -> int:
    """Of one prompt in a text cache."""
    return setup.family.encoding_bytes(setup.info, DTYPES[setup.config.model.dtype])


def bytes_per_image(setup: RunSetup, size: tuple[int, int]) -> int:
    """Mean and std of an image of (height, width) pixels."""
    return 2 * DTYPES[_latents_dtype(setup)].itemsize * prod(setup.info.latent_shape(size))


def _latents_dtype(setup: RunSetup) -> str:
    """The autoencoder runs in float32 whatever the base is in, or in float64 along with it."""
    return "float64" if setup.config.model.dtype == "float64" else "float32"


def _check_disk_space(setup: RunSetup, section: CacheConfig, caches: _CacheFolders) -> None:
    needed = 0
    if caches.text is not None:
        needed += sum(key not in caches.text for key in caches.texts) * bytes_per_prompt(setup)
    if caches.latents is not None:
        missing = (cut for key, cut in caches.crops_by_key.items() if key not in caches.latents)
        needed += sum(bytes_per_image(setup, cut.size) for cut in missing)
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


def _fill_text(setup: RunSetup, texts: Mapping[str, str], entries: EncodingCache, device: torch.device) -> int:
    negative = setup.config.model.negative_prompt
    null = null_key(negative)

    def missing() -> dict[str, str]:
        return {key: text for key, text in (*texts.items(), (null, negative)) if key not in entries}

    if not missing():
        return 0
    with EncodingCacheWriter(entries) as writer, torch.no_grad():
        todo = missing()
        if not todo:  # another process has encoded them in the meantime
            return 0
        _log_missing(entries, len(todo), len(texts) + 1, "texts")
        checkpoint = _load(setup, "text", device)
        sizes = [MicroConditioning.plain(*setup.problem.size)]
        for key, text in tqdm(todo.items(), desc="text", unit="prompt", dynamic_ncols=True):
            is_null, family = key == null, setup.family
            cond = family.null(checkpoint, sizes, text) if is_null else family.encode(checkpoint, [text], sizes)
            _check_text(cond, text, setup)
            writer.add(key, conditioning_to_entry(cond))
    return len(todo)


def _fill_latents(
    setup: RunSetup,
    images: IndexedImages,
    crops_by_key: Mapping[str, CropVariant],
    entries: EncodingCache,
    device: torch.device,
) -> int:
    def missing() -> dict[str, CropVariant]:
        return {key: cut for key, cut in crops_by_key.items() if key not in entries}

    if not missing():
        return 0
    encoded = 0
    checkpoint: Checkpoint | None = None
    with EncodingCacheWriter(entries) as writer, torch.no_grad():
        todo = missing()
        _log_missing(entries, len(todo), len(crops_by_key), "images")
        for key, cut in tqdm(todo.items(), desc="latents", unit="image", dynamic_ncols=True):
            item = cut.item(images)
            if item is None:  # a run reads the next image in its place
                continue
            # no earlier than this: a folder with an unreadable file lacks an entry even when it is warm
            checkpoint = checkpoint or _load(setup, "images", device)
            posterior = setup.family.posterior(checkpoint, item.image[None].to(device))
            _check_latents(posterior, item.name)
            writer.add(key, posterior_to_entry(posterior, item.crop))
            encoded += 1
    return encoded


def _log_missing(entries: EncodingCache, count: int, total: int, unit: str) -> None:
    """Say what is going to be encoded, and why."""
    before = entries.previous_identity() if len(entries) == 0 else None
    if before is not None:
        logger.info("%s is made anew: %s", entries.path, entries.identity.difference(before))
    logger.info("%s: %d of %d %s are not in it yet", entries.path, count, total, unit)


def _load(setup: RunSetup, part: CheckpointPart, device: torch.device) -> Checkpoint:
    return load_checkpoint(setup.info, DTYPES[setup.config.model.dtype], device, frozenset({part}))


def _check_text(cond: Conditioning, text: str, setup: RunSetup) -> None:
    if not all(bool(part.isfinite().all()) for part in (cond.text, cond.pooled) if part is not None):
        raise UserError(
            f"the embedding of the prompt {text!r} is not finite in {setup.config.model.dtype}: set model.dtype to bfloat16 or "
            "float32"
        )


def _check_latents(posterior: Posterior, name: str) -> None:
    if not bool(posterior.mean.isfinite().all() and posterior.std.isfinite().all()):
        raise UserError(
            f"the latents of {name!r} are not finite: replace the autoencoder's weights, which may be damaged, or "
            "remove that image"
        )
