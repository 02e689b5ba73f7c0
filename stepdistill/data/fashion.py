"""Coloured photographs of clothes: the vocabulary, the captions and the renderer behind the embedded teacher.

A photograph is a 28x28 gray image of one garment (Fashion-MNIST); colour and background are rendered onto it, so that
a caption such as ``a photo of a red ankle boot on a blue background`` can be checked attribute by attribute.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IMAGE_SIZE = 32

GARMENTS = (
    "t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
"""Prompt nouns in the order of the dataset's labels 0..9."""

# Saturations stay well below 1: a guided model that over-saturates must have room to show it.
GARMENT_HSV: dict[str, tuple[float, float, float]] = {
    "red": (0.00, 0.72, 0.85), "orange": (0.075, 0.72, 0.92), "yellow": (0.15, 0.62, 0.92), "green": (0.36, 0.58, 0.68),
    "blue": (0.60, 0.65, 0.82), "purple": (0.76, 0.52, 0.70), "pink": (0.93, 0.38, 0.94), "white": (0.0, 0.04, 0.96),
}  # fmt: skip
BACKGROUND_HSV: dict[str, tuple[float, float, float]] = {
    "white": (0.0, 0.02, 0.95), "black": (0.0, 0.05, 0.10), "gray": (0.0, 0.03, 0.50), "red": (0.99, 0.60, 0.70),
    "green": (0.36, 0.50, 0.55), "blue": (0.60, 0.55, 0.65), "yellow": (0.145, 0.55, 0.88),
}  # fmt: skip
COLOURS = tuple(GARMENT_HSV)
BACKGROUNDS = tuple(BACKGROUND_HSV)

HELD_OUT_PAIRS = (
    ("dress", "green"), ("bag", "purple"), ("sneaker", "orange"), ("coat", "pink"),
    ("t-shirt", "yellow"), ("trousers", "red"), ("ankle boot", "blue"), ("sandal", "white"),
)  # fmt: skip
"""(garment, colour) pairs that no training image of the teacher shows: they test composition."""

_OPENINGS = ("a photo of {}", "a picture of {}", "{}")
_SETTINGS = (" on a {} background", " against a {} background")
WORDING_COUNT = len(_OPENINGS) * len(_SETTINGS)
_PLURAL = frozenset({"trousers"})
_THING = re.compile(
    rf"\b(?:({'|'.join(COLOURS)}) )?({'|'.join(sorted(GARMENTS, key=len, reverse=True))})\b", re.IGNORECASE
)
_BACKGROUND = re.compile(rf"\b({'|'.join(BACKGROUNDS)}) background\b", re.IGNORECASE)


@dataclass(frozen=True)
class Attributes:
    """What a caption says; ``None`` means that it does not say."""

    garment: str
    colour: str | None = None
    background: str | None = None


def caption(attributes: Attributes, rng: np.random.Generator | None = None, wording: int = 0) -> str:
    """The caption of ``attributes`` in one of WORDINGS wordings: number ``wording``, or one that ``rng`` picks."""
    chosen = wording if rng is None else int(rng.integers(WORDING_COUNT))
    opening, setting = _OPENINGS[chosen // len(_SETTINGS)], _SETTINGS[chosen % len(_SETTINGS)]
    thing = " ".join(word for word in (attributes.colour, attributes.garment) if word is not None)
    if attributes.garment not in _PLURAL:
        thing = f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"
    return opening.format(thing) + (setting.format(attributes.background) if attributes.background else "")


def parse_caption(text: str) -> Attributes:
    """The attributes that ``text`` says: the inverse of :func:`caption` for every wording."""
    thing, background = _THING.search(text), _BACKGROUND.search(text)
    if thing is None:
        raise ValueError(f"no garment in the caption {text!r}; expected one of {', '.join(GARMENTS)}")
    colour = thing.group(1)
    return Attributes(
        thing.group(2).lower(), colour.lower() if colour else None, background.group(1).lower() if background else None
    )


def draw_attributes(
    labels: NDArray[np.integer], rng: np.random.Generator, *, held_out_pairs: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Uniform colour and background indices, each (B,), for garments ``labels`` (B,).

    A garment never has the colour name of its background; ``held_out_pairs`` admits the pairs of HELD_OUT_PAIRS.
    """
    allowed = np.ones((len(GARMENTS), len(COLOURS), len(BACKGROUNDS)), dtype=bool)
    for name in set(COLOURS) & set(BACKGROUNDS):
        allowed[:, COLOURS.index(name), BACKGROUNDS.index(name)] = False
    if not held_out_pairs:
        for garment, colour in HELD_OUT_PAIRS:
            allowed[GARMENTS.index(garment), COLOURS.index(colour)] = False
    flat = allowed.reshape(len(GARMENTS), -1)[labels]
    chosen = np.argmax(np.where(flat, rng.random(flat.shape), -1.0), axis=1)
    return chosen // len(BACKGROUNDS), chosen % len(BACKGROUNDS)


def hsv_to_rgb(hsv: NDArray[np.floating]) -> NDArray[np.float32]:
    """RGB in [0, 1] of (..., 3) hue, saturation, value in [0, 1]; hue is taken modulo 1."""
    hue, saturation, value = hsv[..., 0:1], hsv[..., 1:2], hsv[..., 2:3]
    phase = (hue * 6.0 + np.array([5.0, 3.0, 1.0])) % 6.0
    return (value - value * saturation * np.clip(np.minimum(phase, 4.0 - phase), 0.0, 1.0)).astype(np.float32)  # type: ignore[no-any-return]


def jittered_rgb(
    palette: dict[str, tuple[float, float, float]], indices: NDArray[np.integer], rng: np.random.Generator
) -> NDArray[np.float32]:
    """RGB (B, 3) in [0, 1]: the palette's colours at ``indices`` (B,), hue, saturation and value moved at random."""
    hsv = np.array(list(palette.values()))[indices]
    hue = hsv[:, 0] + rng.uniform(-0.018, 0.018, len(hsv))
    saturation = hsv[:, 1] * rng.uniform(0.78, 1.12, len(hsv))
    value = hsv[:, 2] * rng.uniform(0.86, 1.04, len(hsv))
    return hsv_to_rgb(np.stack([hue, saturation, np.minimum(value, 1.0)], axis=1))


def render(
    gray: NDArray[np.uint8], garment_rgb: NDArray[np.floating], background_rgb: NDArray[np.floating]
) -> NDArray[np.uint8]:
    """Photographs (B, 32, 32, 3) uint8 from ``gray`` (B, 28, 28) uint8 and two RGB (B, 3) in [0, 1]."""
    pad = (IMAGE_SIZE - gray.shape[1]) // 2
    intensity = np.pad(gray, ((0, 0), (pad, pad), (pad, pad))).astype(np.float32)[..., None] / 255.0
    edge = np.clip((intensity - 0.02) / 0.18, 0.0, 1.0)
    mask = edge * edge * (3.0 - 2.0 * edge)
    shading = 0.30 + 0.70 * intensity  # never fully black, or a dark garment would lose its colour
    garment = garment_rgb.astype(np.float32)[:, None, None, :] * shading
    image = mask * garment + (1.0 - mask) * background_rgb.astype(np.float32)[:, None, None, :]
    return np.round(image * 255.0).astype(np.uint8)  # type: ignore[no-any-return]
