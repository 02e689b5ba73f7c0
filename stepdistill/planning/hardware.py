"""What graphics cards can do, by their makers' data sheets; dense rates, float32 accumulation."""

from __future__ import annotations

import re
from dataclasses import dataclass

from stepdistill.config.registry import suggestion_for
from stepdistill.errors import UserError

UTILISATION = 0.4
"""Assumed share of the published rate that a training step reaches; runs of U-Nets are commonly between 0.3 and 0.5."""
RUNTIME_BYTES = 800_000_000
"""Assumed bytes of the CUDA context and the libraries' work spaces."""


@dataclass(frozen=True)
class Gpu:
    """One kind of card.

    Attributes:
        name: as in `--gpu`.
        memory_gb: GB; the makers count 2^30 bytes, and taking 10^9 here leaves 7 % for what lies unused between blocks.
        half: TFLOP/s in bfloat16 or float16.
        tf32: TFLOP/s of float32 products in TensorFloat-32.
        full: TFLOP/s in float32.
    """

    name: str
    memory_gb: int
    half: float
    tf32: float
    full: float


GPUS = (
    Gpu("h200", 141, 989.4, 494.7, 66.9),
    Gpu("h100", 80, 989.4, 494.7, 66.9),
    Gpu("a100", 80, 312.0, 156.0, 19.5),
    Gpu("a100-40gb", 40, 312.0, 156.0, 19.5),
    Gpu("l40s", 48, 362.0, 183.0, 91.6),
    Gpu("a6000", 48, 154.8, 77.4, 38.7),
    Gpu("5090", 32, 209.5, 104.8, 104.8),
    Gpu("4090", 24, 165.2, 82.6, 82.6),
    Gpu("4080", 16, 97.5, 48.7, 48.7),
    Gpu("4070", 12, 58.3, 29.1, 29.1),
    Gpu("3090", 24, 71.0, 35.6, 35.6),
    Gpu("3060", 12, 25.5, 12.7, 12.7),
    Gpu("a10", 24, 125.0, 62.5, 31.2),
    Gpu("l4", 24, 121.0, 60.0, 30.3),
    Gpu("t4", 16, 65.0, 8.1, 8.1),
)


def find_gpu(name: str) -> Gpu:
    """Returns the card of a name as in `GPUS`, or as people write it: `RTX 4090`, `NVIDIA GeForce RTX 3060`, `Tesla T4`.

    Raises:
        UserError: the card is not in the list.
    """
    known = {gpu.name: gpu for gpu in GPUS}
    words = re.sub(r"\b(nvidia|geforce|tesla|quadro|gpu)\b|\brtx(?=\b|\d|a\d)", " ", name.lower()).replace("_", " ")
    found = known.get("-".join(words.replace("-", " ").split()))
    if found is None:
        raise UserError(f"there are no figures for the card {name!r}: {suggestion_for(name, tuple(known))}")
    return found
