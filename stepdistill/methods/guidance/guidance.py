"""Guidance distillation of a whole network or a LoRA (Meng et al., CVPR 2023, arXiv 2210.03142, stage one).

The student is told w by an embedding that its time features take in (`time_cond_proj_dim`, which stock pipelines feed with
guidance_scale - 1), zero at first; with `guidance_range: null` it is told nothing and learns one scale.
"""

from __future__ import annotations

from dataclasses import replace

from stepdistill.families.recipe import Recipe
from stepdistill.methods.guidance.guidance_distillation import GuidanceDistillation, GuidanceDistillationConfig


class Guidance(GuidanceDistillation[GuidanceDistillationConfig]):
    Config = GuidanceDistillationConfig
    name = "guidance"

    @classmethod
    def network_guidance_range(cls, config: GuidanceDistillationConfig) -> tuple[float, float] | None:
        return config.guidance_range

    def recipe(self) -> Recipe:
        """As the base's, but for the guidance scale, which the pipeline tells the network where it is told one."""
        plain, told = super().recipe(), self.config.guidance_range is not None
        w = self.config.guidance
        return replace(plain, guidance_scale=w if told else 1.0, told_guidance=w if told else None)
