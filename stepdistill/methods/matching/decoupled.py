"""Decoupled DMD (Liu et al., ICLR 2026, arXiv 2511.22677): the guided gradient is two, with noise levels of their own.

    s_T^w - s_F = (s_T^c - s_F) + (w - 1) (s_T^c - s_T^u)
                  matching        CFG augmentation

CFG augmentation (CA) is the engine that turns many guided steps into few; alone it has no fixed point. Distribution
matching (DM), a moment penalty or a GAN is the shield that bounds it. At the k-th call what is noisier than the
generator's own input is decided already, so CA is drawn below that level, while DM needs the whole range (`hybrid`,
the paper's best schedule). The paper's tau runs the other way: its tau_CA > tau_gen is t_CA < t_gen here.

The two losses are added; each is divided by its own mean|x - mu_T^c| with a floor. The paper leaves its normaliser open;
`coupled`, with one level, one noise and one normaliser for both, is DMD2.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.schedule import broadcast
from stepdistill.errors import UserError
from stepdistill.methods import parts
from stepdistill.methods.base import Problem, Progress, Rollout, Terms
from stepdistill.methods.matching.few_step import FewStep, FewStepConfig
from stepdistill.roles.triple import GENERATOR, Triple


class DecoupledConfig(FewStepConfig):
    schedule: Literal["coupled", "independent", "restricted", "hybrid"] = Field(
        "hybrid",
        description="noise levels: one for both terms; one each; both below the generator's own; CA alone below it",
    )
    matching: bool = Field(True, description="the matching term; without it a GAN or the moments must be the shield")
    dm_levels: parts.NoiseLevelConfig = parts.NoiseLevelConfig()
    ca_low: float = Field(
        0.02, ge=0, lt=1, description="least noisy level of CA, on the fraction axis before the shift"
    )
    floor: float = Field(1e-6, gt=0, description="least value of the normalisers")
    ramp: int = Field(0, ge=0, description="generator updates over which w - 1 grows from 0; 0 is none, as published")


class Decoupled(FewStep[DecoupledConfig]):
    Config = DecoupledConfig
    name = "decoupled"

    def __init__(self, config: DecoupledConfig, problem: Problem) -> None:
        super().__init__(config, problem)
        if not config.matching and config.gan.weight == 0 and config.moments.weight == 0:
            raise UserError(
                "method.matching is false and neither method.gan.weight nor method.moments.weight is set, so nothing bounds "
                "CFG augmentation: turn one of the three on"
            )

        last = float(self.schedule.fraction_at(torch.tensor(self.timesteps[-1], dtype=torch.float64)))
        if config.schedule in ("hybrid", "restricted") and last <= config.ca_low:
            raise UserError(
                f"the last step of the ladder is at {last:.3g} of the noise axis and method.ca_low is {config.ca_low:g}, so CFG "
                "augmentation would be asked for more noise than the sample had: lower ca_low, or take fewer steps"
            )

    def generator_loss(self, rollout: Rollout, triple: Triple, progress: Progress, draws: Draws) -> Terms:
        """L_G = 1/2 mean(x - sg(x + (w - 1) dCA/n_CA))^2 + 1/2 mean(x - sg(x + dDM/n_DM))^2 + shields."""
        x, w = rollout.x0, self._guidance(progress)
        statistics: dict[str, Tensor] = {}
        augmentation, matching, gap = self._directions(rollout, triple, w, draws, statistics)
        total = parts.surrogate_loss(x, augmentation)
        logged = {"ca": 0.5 * augmentation.square().mean(), "guidance": x.new_tensor(w)}
        if self.config.matching:
            total = total + parts.surrogate_loss(x, matching)
            logged |= {"dm": 0.5 * matching.square().mean(), "score_gap": gap}
        return Terms(total, logged, statistics)

    def _directions(
        self, rollout: Rollout, triple: Triple, w: float, draws: Draws, statistics: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Descent directions (CA, DM) at x, without graph, and the gap of the scores that match."""
        x, t_gen = rollout.x0.detach(), rollout.t
        cond, null = rollout.batch.cond, rollout.batch.null
        with torch.no_grad():
            t_dm = self._dm_times(t_gen, draws)
            x_dm = self.schedule.add_noise(x, draws.normal("dm.eps", x.shape[1:]), t_dm)
            h = broadcast(self.weights(rollout, x_dm, t_dm, triple, statistics), x)
            if self.config.schedule == "coupled":
                real, guidance_delta = triple.real_score.guidance_delta(x_dm, t_dm, cond, null, w)
                fake = triple.fake_score.x0(x_dm, t_dm, cond)
                norm = parts.dmd_normalizer(x, real + guidance_delta, self.config.floor)
                # both terms by the divergence's weight, as DMD2 weighs their sum
                return (
                    -h * guidance_delta / norm,
                    h * (fake - real) / norm,
                    parts.score_gap(x, real + guidance_delta, fake),
                )
            t_ca = parts.draw_times_below(
                self.schedule, draws.uniform("ca.t"), self.config.ca_low, self._ca_bound(t_gen)
            )
            x_ca = self.schedule.add_noise(x, draws.normal("ca.eps", x.shape[1:]), t_ca)
            conditional, guidance_delta = triple.real_score.guidance_delta(x_ca, t_ca, cond, null, w)
            augmentation = -guidance_delta / parts.dmd_normalizer(x, conditional, self.config.floor)
            if not self.config.matching:
                return augmentation, torch.zeros_like(augmentation), x.new_zeros(())
            real, fake = triple.real_score.x0(x_dm, t_dm, cond), triple.fake_score.x0(x_dm, t_dm, cond)
            matching = h * (fake - real) / parts.dmd_normalizer(x, real, self.config.floor)
            return augmentation, matching, parts.score_gap(x, real, fake)

    def _dm_times(self, t_gen: Tensor, draws: Draws) -> Tensor:
        if self.config.schedule == "restricted":
            levels = self.config.dm_levels
            high = self._generator_level(t_gen).clamp_max(levels.high)
            return parts.draw_times_below(self.schedule, draws.uniform("dm.t"), levels.low, high)
        return self.config.dm_levels.levels().times(self.schedule, draws.uniform("dm.t"))

    def _ca_bound(self, t_gen: Tensor) -> Tensor:
        """Noisiest level of CA, before the shift: the generator's own, or that of DM where they are independent."""
        if self.config.schedule == "independent":
            return torch.full_like(t_gen, self.config.dm_levels.high)
        return self._generator_level(t_gen)

    def _generator_level(self, t_gen: Tensor) -> Tensor:
        """Fraction of the noise axis that the generator's input was at: all of it at the first step, whatever it is told there."""
        return torch.where(t_gen == self.timesteps[0], torch.ones_like(t_gen), self.schedule.fraction_at(t_gen))

    def _guidance(self, progress: Progress) -> float:
        return parts.ramped_guidance(self.config.guidance, progress.updates.get(GENERATOR, 0), self.config.ramp)
