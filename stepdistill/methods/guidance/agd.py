"""AGD: Adapter Guidance Distillation (Jensen & Sadat, TMLR 2025).

The network stays as it is; small adapters beside its attention, which are told w, t and prompt, learn what guidance adds.
Half the network calls of guided sampling at any w of the range, with any sampler; see `models/guidance_adapter.py`.
"""

from __future__ import annotations

from typing import ClassVar

from stepdistill.methods.guidance.guidance_distillation import GuidanceDistillation, GuidanceDistillationConfig
from stepdistill.roles.triple import RoleMode


class AGD(GuidanceDistillation[GuidanceDistillationConfig]):
    Config = GuidanceDistillationConfig
    name = "agd"
    modes: ClassVar[tuple[RoleMode, ...]] = ("adapter",)
