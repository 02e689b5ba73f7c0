"""DMD2: Improved Distribution Matching Distillation (Yin et al., NeurIPS 2024, arXiv 2405.14867).

The generator follows the difference of the guided teacher's and the fake score's estimates of its own noised sample
(section 4.2: no regression, two time scales). Multi-step students are trained on their own rollouts (section 4.5); a GAN
term on diffused real images lets them pass the teacher (section 4.3).
"""

from __future__ import annotations

from stepdistill.diffusion.draws import Draws
from stepdistill.methods import parts
from stepdistill.methods.base import Progress, Rollout, Terms
from stepdistill.methods.matching.few_step import FewStep, FewStepConfig
from stepdistill.roles.triple import Triple


class DMD2Config(FewStepConfig):
    dm_weight: parts.DmWeight = "code"
    dm_levels: parts.NoiseLevelConfig = parts.NoiseLevelConfig()


class DMD2(FewStep[DMD2Config]):
    """L_G = L_DM + w_gan softplus(-D(x_t))   (section 4)."""

    Config = DMD2Config
    name = "dmd2"

    def generator_loss(self, rollout: Rollout, triple: Triple, progress: Progress, draws: Draws) -> Terms:
        return self.matching(rollout, triple, draws, self.config.dm_levels, self.config.dm_weight)
