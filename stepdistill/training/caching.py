"""Fills the caches of a run from its config, and opens them for training.

    filled = fill(prepare(load_config("configs/sdxl_dmd2.yaml")))      # stepdistill cache CONFIG
    session = open_session(plan, device, warm(plan, device))           # stepdistill train CONFIG

Only the encoders are in memory while a cache is filled, and nothing of them is once it is warm: a session that is opened
with warm caches does not load them.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState
from tqdm import tqdm

from stepdistill.config import CacheConfig
from stepdistill.data.cache import (
    EncoderIdentity,
    EntryFolder,
    EntryWriter,
    FileHashes,
    image_key,
    null_key,
    text_key,
)
from stepdistill.data.folder import ImageFolder
from stepdistill.data.images import Framing
from stepdistill.data.indexed import IndexedImages
from stepdistill.errors import Refusal
from stepdistill.models.conditioning import Conditioning, ImageSize
from stepdistill.models.families.base import PARTS, Checkpoint, Part, Posterior
from stepdistill.models.loading import fetch_weights, load_checkpoint
from stepdistill.training.encoding import CachedImages, Warm, image_entry, text_entry
from stepdistill.training.session import DTYPES, Plan, best_device

logger = logging.getLogger(__name__)
PLAIN, MIRRORED = (1.0, 0.5, 0.5), (0.0, 0.5, 0.5)
"""Draws of `Framing.cut`."""


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

    text: EntryFolder | None
    latents: EntryFolder | None
    keys: tuple[tuple[str, ...], ...]
    """Keys of every image, as it is and mirrored; () where the file cannot be read at all."""


def estimate(plan: Plan) -> int:
    """Bytes that the plan's caches take once they are full, shards' headers left out; 0 without a `cache` section."""
    section = plan.config.cache
    if section is None:
        return 0
    text = (len(_texts(plan)) + 1) * _text_bytes(plan) if section.text else 0
    if not isinstance(plan.images, ImageFolder) or not section.latents:
        return text
    return text + len(plan.images) * (2 if plan.images.framing.flip else 1) * _latent_bytes(plan)


def fill(plan: Plan, device: torch.device | str | None = None) -> Filled:
    """Encode what the plan's caches lack. Safe to stop and to start again; several processes take turns.

    Raises:
        Refusal: no `cache` section, too little room on the disk (before anything is loaded), more unreadable images than
            data.max_bad_share, or an encoding that is not finite.
    """
    section = _section(plan)
    where = torch.device(device or plan.config.training.device or best_device())
    caches = _caches(plan, section)
    _check_room(plan, section, caches)
    encoded = entries = 0
    if caches.text is not None:
        encoded += _fill_text(plan, caches.text, where)
        entries += len(_texts(plan)) + 1
    if caches.latents is not None and isinstance(plan.images, ImageFolder):
        encoded += _fill_latents(plan, plan.images, caches, caches.latents, where)
        entries += sum(key in caches.latents for own in caches.keys for key in own)
    folder = Path(section.folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Filled(encoded, entries, folder, size)


def warm(plan: Plan, device: torch.device | str | None = None) -> Warm | None:
    """The plan's caches, filled first where they are cold; None without a `cache` section.

    The main process fills while all others wait for it; then everyone reads. Raises Refusal as `fill` does.
    """
    if plan.config.cache is None:
        return None
    state = PartialState()
    if state.is_main_process:
        fill(plan, device)
    state.wait_for_everyone()
    caches = _caches(plan, plan.config.cache)
    images = None
    if caches.latents is not None and isinstance(plan.images, ImageFolder):
        images = CachedImages(plan.images, caches.latents, caches.keys)
    parts: set[Part] = set(PARTS)
    # an evaluation asks for prompts of its own
    if caches.text is not None and plan.config.evaluation is None:
        parts.remove("text")
    if images is not None or plan.images is None:
        parts.remove("images")
    return Warm(caches.text, images, frozenset(parts))


# ---------------------------------------------------------------- what there is to encode


def _section(plan: Plan) -> CacheConfig:
    if plan.config.cache is None:
        raise Refusal("the config has no cache section: add, say, cache: {folder: caches}")
    return plan.config.cache


def _texts(plan: Plan) -> dict[str, str]:
    """Key -> text of all that a run may ask of the text encoders but the unconditional branch."""
    captions = plan.images.readable_captions() if isinstance(plan.images, IndexedImages) else ()
    return {text_key(text): text for text in (*plan.prompts.texts, *captions)}


def _caches(plan: Plan, section: CacheConfig) -> _Caches:
    root = Path(section.folder)
    hashes = FileHashes(root)
    fetch_weights(plan.info)
    text = EntryFolder(root, _identity(plan, "text", hashes)) if section.text else None
    latents, keys = None, []
    if section.latents and isinstance(plan.images, ImageFolder):
        latents = EntryFolder(root, _identity(plan, "images", hashes))
        keys = [_image_keys(plan.images, path, hashes) for path in plan.images.paths]
    hashes.save()
    return _Caches(text, latents, tuple(keys))


def _identity(plan: Plan, part: Literal["text", "images"], hashes: FileHashes) -> EncoderIdentity:
    files = {name: hashes.of(path) for name, path in plan.family.encoder_files(plan.info, part).items()}
    if part == "text":
        return EncoderIdentity("text", plan.info.family, plan.config.model.dtype, files)
    return EncoderIdentity("latents", plan.info.family, _latents_dtype(plan), files)


def _image_keys(images: ImageFolder, path: Path, hashes: FileHashes) -> tuple[str, ...]:
    try:
        content = hashes.of(path)
    except OSError:
        return ()
    return tuple(
        image_key(content, images.framing.size, mirrored)
        for mirrored in ((False, True) if images.framing.flip else (False,))
    )


# ---------------------------------------------------------------- room


def _text_bytes(plan: Plan) -> int:
    return plan.family.encoding_bytes(plan.info, DTYPES[plan.config.model.dtype])


def _latent_bytes(plan: Plan) -> int:
    """Mean and std."""
    return 2 * DTYPES[_latents_dtype(plan)].itemsize * prod(plan.setting.latent_shape)


def _latents_dtype(plan: Plan) -> str:
    """The autoencoder runs in float32 whatever the base is in, or in float64 along with it."""
    return "float64" if plan.config.model.dtype == "float64" else "float32"


def _check_room(plan: Plan, section: CacheConfig, caches: _Caches) -> None:
    needed = 0
    if caches.text is not None:
        needed += sum(key not in caches.text for key in _texts(plan)) * _text_bytes(plan)
    if caches.latents is not None:
        needed += sum(key not in caches.latents for own in caches.keys for key in own) * _latent_bytes(plan)
    place = Path(section.folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise Refusal(
            f"the caches need {needed / 1e9:.2f} GB more in {section.folder!r} and {free / 1e9:.2f} GB are free there: "
            "set cache.folder to a larger disk, or cache.text or cache.latents to false"
        )


# ---------------------------------------------------------------- filling


def _fill_text(plan: Plan, entries: EntryFolder, device: torch.device) -> int:
    texts, negative = _texts(plan), plan.config.model.negative_prompt
    null = null_key(negative)

    def missing() -> dict[str, str]:
        return {key: text for key, text in (*texts.items(), (null, negative)) if key not in entries}

    if not missing():
        return 0
    with EntryWriter(entries) as writer, torch.no_grad():
        todo = missing()
        if not todo:  # another process has encoded them in the meantime
            return 0
        _announce(entries, len(todo), len(texts) + 1, "texts")
        checkpoint = _load(plan, "text", device)
        sizes = [ImageSize.plain(*plan.setting.size)]
        for key, text in tqdm(todo.items(), desc="text", unit="prompt", dynamic_ncols=True):
            is_null, family = key == null, plan.family
            cond = family.null(checkpoint, sizes, text) if is_null else family.encode(checkpoint, [text], sizes)
            _check_text(cond, text, plan)
            writer.add(key, text_entry(cond))
    return len(todo)


def _fill_latents(plan: Plan, images: ImageFolder, caches: _Caches, entries: EntryFolder, device: torch.device) -> int:
    def missing() -> dict[str, tuple[int, bool]]:
        """Key -> (position, mirrored)."""
        return {
            key: (position, bool(mirrored))
            for position, own in enumerate(caches.keys)
            for mirrored, key in enumerate(own)
            if key not in entries
        }

    if not missing():
        return 0
    encoded = 0
    centred = Framing(images.framing.size, "center", flip=True)
    checkpoint: Checkpoint | None = None
    with EntryWriter(entries) as writer, torch.no_grad():
        todo = missing()
        _announce(entries, len(todo), sum(map(len, caches.keys)), "images")
        for key, (position, mirrored) in tqdm(todo.items(), desc="latents", unit="image", dynamic_ncols=True):
            item = images.item(position, MIRRORED if mirrored else PLAIN, centred)
            if item is None:  # a run reads the next image in its place
                continue
            # no earlier than this: a folder with an unreadable file lacks an entry even when it is warm
            checkpoint = checkpoint or _load(plan, "images", device)
            posterior = plan.family.posterior(checkpoint, item.image[None].to(device))
            _check_latents(posterior, item.name)
            writer.add(key, image_entry(posterior, item.crop))
            encoded += 1
    return encoded


def _announce(entries: EntryFolder, count: int, total: int, unit: str) -> None:
    """Say what is going to be encoded, and why."""
    before = entries.predecessor() if len(entries) == 0 else None
    if before is not None:
        logger.info("%s is made anew: %s", entries.path, entries.identity.difference(before))
    logger.info("%s: %d of %d %s are not in it yet", entries.path, count, total, unit)


def _load(plan: Plan, part: Part, device: torch.device) -> Checkpoint:
    return load_checkpoint(plan.info, DTYPES[plan.config.model.dtype], device, frozenset({part}))


def _check_text(cond: Conditioning, text: str, plan: Plan) -> None:
    if not all(bool(part.isfinite().all()) for part in (cond.text, cond.pooled) if part is not None):
        raise Refusal(
            f"the embedding of the prompt {text!r} is not finite in {plan.config.model.dtype}: set model.dtype to bfloat16 or "
            "float32"
        )


def _check_latents(posterior: Posterior, name: str) -> None:
    if not bool(posterior.mean.isfinite().all() and posterior.std.isfinite().all()):
        raise Refusal(
            f"the latents of {name!r} are not finite: replace the autoencoder's weights, which may be damaged, or "
            "remove that image"
        )
