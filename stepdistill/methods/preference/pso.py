"""PSO: Pairwise Sample Optimization of few-step models (Miao et al., ICLR 2025, arXiv 2410.03190).

The denoising loss pulls a distilled model back to the posterior mean, which is a blur in few steps. PSO moves only the
*relative* likelihood of two images under the model's own sampler, against the frozen model that it started from, so that
what both images share, the few-step sharpness, cancels:

    L = -log sigmoid(beta (r(win) - kappa r(lose))),      r = log p_theta / p_ref

online    two samples of the model itself for each prompt, ranked by a reward; r is exact for every transition of the walk but
          the last, which has no density, and each has a loss of its own (an upper bound of the walk's, by Jensen). Ratios are
          clamped: outside 1 -+ trust nothing pulls any more.
offline   pairs of images, noised alike to one of the sampler's own times. r is the difference of denoising losses, or, with
          `weighting: transition`, the expectation of the exact one over the next state, given the image.

r is a mean over a sample's elements, and so is beta's scale: per image it is `beta / elements`. Diffusion-DPO's -(beta / 2)
on the same means is twice ours.

A style is tuned on its images, with the model's own for the same captions as losers; a subject on its images with its own
prompt, with the model's for the class's prompts (`data.prompts`) as losers. Both hold the model to those losers by a
denoising loss on them (`anchor`), a self-distillation, and push away from them by a part only (`kappa`). The release's numbers
for its hinge (beta 5, kappa 0.1, anchor 0.5) let both cancel, beta kappa = anchor, and leave the denoising loss of the
subject's images while the hinge is above 0, which is nearly always.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.transitions import Gaussian, Transition, TransitionKind
from stepdistill.errors import UserError
from stepdistill.families.conditioning import Conditioning
from stepdistill.methods import parts
from stepdistill.methods.base import Batch, Decode, Needs, Problem, Progress, Rollout, Terms
from stepdistill.methods.preference.losses import clamp_log_ratios, compute_rewards, log_ratio, pairwise_loss
from stepdistill.methods.preference.tuning import Tuning, TuningConfig
from stepdistill.roles.sampler import sample, sample_trajectory
from stepdistill.roles.triple import Triple

DEFAULT_BETA = {"online": 50.0, "offline": 200.0, "hinge": 5.0}
"""Published for the first and the last; between them the transitions' own weights, which are 135 to 320 for SDXL."""


class PSOConfig(TuningConfig):
    form: Literal["online", "offline"] = Field(description="samples ranked by a reward, or pairs of images")
    beta: float | None = Field(
        None,
        gt=0,
        description="of log ratios that are means over a sample's elements; 50 online, 200 offline, 5 of the hinge by default",
    )
    reward: str | None = Field(
        None, description="online: 'pickscore', 'critic:brightness', any MODULE:FUNCTION, or a sum, '0.5*A + B'"
    )
    trust: float = Field(
        0.1, ge=0, lt=1, description="online: ratios are clamped to 1 -+ this, which ends their pull; 0 is off"
    )
    kernel: Literal["renoise", "ancestral", "tcd"] | None = Field(
        None,
        description="transition that tuning walks, where the sampler's own is deterministic and has no density; the sampler's own "
        "by default",
    )
    strength: float = Field(1.0, gt=0, le=1, description="eta of the ancestral kernel, gamma of the tcd one")
    losers: Literal["captions", "prompts", "given"] = Field(
        "captions",
        description="offline: the untuned model's samples for the winner's caption (style) or for data.prompts (subject), or the "
        "images of data.losers",
    )
    loss: Literal["sigmoid", "hinge"] = Field(
        "sigmoid",
        description="offline: against the reference, or max(0, 1 + beta (l(win) - kappa l(lose))) without one",
    )
    weighting: Literal["denoising", "transition"] = Field(
        "denoising", description="offline: of the times of the ladder; alike, or as the kernel's densities have them"
    )
    kappa: float = Field(1.0, ge=0, description="share of the push away from losers; 0.1 for a subject")
    anchor: float = Field(
        0.0,
        ge=0,
        description="weight of the denoising loss on losers, which are the model's own samples; on those of data.losers, of the "
        "distance to what the untuned model makes of them. 0.5 for a subject",
    )


@dataclass(frozen=True)
class TrajectoryPairs(Rollout):
    """Two walks for each prompt, the second one's rows after the first one's.

    Attributes:
        states: x at every step of the ladder, (N, 2B, C, h, w).
        log_probs: of every transition but the last as it was drawn, per element, (N - 1, 2B).
        rewards: of the samples at their ends, (2B,).
    """

    states: Tensor | None = None
    log_probs: Tensor | None = None
    rewards: Tensor | None = None


@dataclass(frozen=True)
class ImagePairs(Rollout):
    """Winners as x0 and x_t, and what they are compared with, told the winners' captions.

    Attributes:
        index: of t in the ladder, (B,).
        losers, loser_x_t: clean, and noised as the winners are.
    """

    index: Tensor | None = None
    losers: Tensor | None = None
    loser_x_t: Tensor | None = None


class PSO(Tuning[PSOConfig]):
    Config = PSOConfig
    name = "pso"

    def __init__(self, config: PSOConfig, problem: Problem) -> None:
        super().__init__(config, problem)
        self.kernel = (
            self.transition if config.kernel is None else Transition(TransitionKind(config.kernel), config.strength)
        )
        self.beta = config.beta or DEFAULT_BETA["hinge" if config.loss == "hinge" else config.form]
        exact = config.form == "online" or config.weighting == "transition"
        if exact and len(self.timesteps) < 2:
            raise UserError(
                "the student has one step, which has no random transition to compare: set method.steps to 2 or more, or "
                "method.form: offline with method.weighting: denoising"
            )
        if exact and self._step(torch.zeros(1, 1), torch.zeros(1, 1), 0).is_deterministic:
            raise UserError(
                f"method.transition is {config.transition!r} as it is configured, whose steps have no density: set method.kernel "
                "to renoise or ancestral, which tuning then walks"
            )
        if (config.form == "online") != (config.reward is not None):
            said = "not set" if config.reward is None else f"{config.reward!r}"
            raise UserError(
                f"method.form is {config.form!r} and method.reward is {said}: online pairs are ranked by a reward and offline ones "
                "are given, so change one of the two"
            )
        if config.loss == "hinge" and (config.form == "online" or config.weighting == "transition"):
            raise UserError(
                "method.loss is 'hinge', which knows no reference and weighs denoising losses alone: set method.form: offline "
                "with method.weighting: denoising, or method.loss: sigmoid"
            )

    @classmethod
    def needs(cls, config: PSOConfig) -> Needs:
        offline = config.form == "offline"
        return Needs(images=offline, losers=offline and config.losers == "given", reward=config.reward)

    def prepare(self, triple: Triple, decode: Decode | None = None) -> None:
        super().prepare(triple, decode)
        if self.config.form == "online" and decode is None:
            raise UserError("the checkpoint has no autoencoder, and rewards look at images: set method.form: offline")

    def rollout(self, batch: Batch, triple: Triple, progress: Progress, draws: Draws) -> Rollout:
        draws = draws.for_role("rollout")
        return (
            self._sample_trajectories(batch, triple, draws)
            if self.config.form == "online"
            else self._noise_pairs(batch, triple, draws)
        )

    def loss(self, role: str, rollout: Rollout, triple: Triple, progress: Progress, draws: Draws) -> Terms:
        return Terms.sum(self.pieces(role, rollout, triple, progress, draws))

    def pieces(self, role: str, rollout: Rollout, triple: Triple, progress: Progress, draws: Draws) -> Iterator[Terms]:
        if not isinstance(rollout, TrajectoryPairs):
            yield self._offline_loss(rollout, triple)
            return
        for index in range(len(self.timesteps) - 1):
            yield self._online_loss(rollout, index, triple) * (1 / (len(self.timesteps) - 1))

    # ---------------------------------------------------------------- online

    @torch.no_grad()
    def _sample_trajectories(self, batch: Batch, triple: Triple, draws: Draws) -> TrajectoryPairs:
        shape, states, ends, log_probs, rewards = self.latent_shape(batch), [], [], [], []
        for side in ("first", "second"):
            steps = list(
                sample_trajectory(
                    lambda x, t: triple.generator.x0(x, t, batch.cond),
                    self.schedule,
                    draws.normal(f"{side}.noise", shape),
                    self.timesteps,
                    self.kernel,
                    lambda index, side=side: draws.normal(f"{side}.fresh{index}", shape),  # type: ignore[misc]
                )
            )
            states.append(torch.stack([step.x_t for step in steps]))
            ends.append(steps[-1].x_s)
            log_probs.append(torch.stack([step.gaussian.log_prob(step.x_s) for step in steps[:-1]]) / math.prod(shape))
            rewards.append(compute_rewards(ends[-1], batch.prompts, triple, self.decode))
        t = torch.full((len(batch),), self.timesteps[0], dtype=torch.float64, device=ends[0].device)
        return TrajectoryPairs(
            batch, states[0][0], t, ends[0], None, torch.cat(states, 1), torch.cat(log_probs, 1), torch.cat(rewards)
        )

    def _online_loss(self, walks: TrajectoryPairs, index: int, triple: Triple) -> Terms:
        """-log sigmoid(beta (s_1 log rho_1 + s_2 log rho_2)) of one transition; s = (1, -1) where the first sample won."""
        if walks.states is None or walks.log_probs is None or walks.rewards is None:
            raise TypeError("pso was given another method's rollout")
        x_t, x_s, t = walks.states[index], walks.states[index + 1], self.timesteps[index]
        cond = Conditioning.cat([walks.batch.cond, walks.batch.cond])
        with torch.no_grad():
            before = self._step(x_t, self.reference(triple).x0(x_t, t, cond), index)
        now = self._step(x_t, triple.generator.x0(x_t, t, cond), index)
        elements = x_t[0].numel()
        ratios = log_ratio(x_s, now.mean, before.mean, now.std) / elements
        first, second = clamp_log_ratios(ratios, self.config.trust).chunk(2)
        one, other = walks.rewards.chunk(2)
        # a tie has no gradient, and a loss of log 2
        argument = self.beta * (one - other).sign() * (first - second)
        loss = pairwise_loss(argument).mean()
        drift = now.log_prob(x_s).detach() / elements - walks.log_probs[index]
        logged = {
            "preference": loss.detach(),
            "accuracy": (argument > 0).double().mean(),
            "kl": ratios.detach().mean(),
            "outside": (ratios.exp() - 1).abs().gt(self.config.trust).double().mean(),
            # 0 as long as training says of a transition what sampling said
            "resampled": drift.abs().mean(),
            "reward": walks.rewards.mean(),
            "reward_gap": (one - other).abs().mean(),
            "ties": (one == other).double().mean(),
        }
        return Terms(loss, {**logged, **parts.sample_statistics(walks)})

    # ---------------------------------------------------------------- offline

    def _noise_pairs(self, batch: Batch, triple: Triple, draws: Draws) -> ImagePairs:
        """Winners and losers, noised by the same eps to the same time of the ladder, one for each pair."""
        if batch.images is None or batch.image_cond is None:
            raise ValueError("a batch without images reached offline pairs")
        count = len(self.timesteps) - (self.config.weighting == "transition")
        index = (draws.uniform("step") * count).long()
        t = torch.tensor(self.timesteps, dtype=torch.float64, device=index.device)[index]
        eps, losers = draws.normal("eps", batch.images.shape[1:]), self._losers(batch, triple, draws)
        x_t = self.schedule.add_noise(batch.images, eps, t)
        return ImagePairs(batch, x_t, t, batch.images, None, index, losers, self.schedule.add_noise(losers, eps, t))

    @torch.no_grad()
    def _losers(self, batch: Batch, triple: Triple, draws: Draws) -> Tensor:
        if self.config.losers == "given":
            if batch.losers is None:
                raise ValueError("a batch without losers reached given pairs")
            return batch.losers
        if batch.images is None or batch.image_cond is None:
            raise ValueError("a batch without images reached offline pairs")
        cond = batch.image_cond
        if self.config.losers == "prompts":
            cond = batch.cond.with_size_of(cond)
        reference, shape = self.reference(triple), batch.images.shape[1:]
        return sample(
            lambda x, t: reference.x0(x, t, cond),
            self.schedule,
            draws.normal("loser.noise", shape),
            self.timesteps,
            self.transition,
            lambda index: draws.normal(f"loser.fresh{index}", shape),
        )

    def _offline_loss(self, pairs: Rollout, triple: Triple) -> Terms:
        """-log sigmoid(beta (r(win) - kappa r(lose))) + anchor l(lose), or the hinge; r = l_ref - l by default.

        Given losers are nobody's samples, and fitting them would blur: there the anchor is to what the untuned model makes of
        them.
        """
        if not isinstance(pairs, ImagePairs) or pairs.losers is None or pairs.loser_x_t is None or pairs.index is None:
            raise TypeError("pso was given another method's rollout")
        config, image_cond = self.config, pairs.batch.image_cond
        if image_cond is None:
            raise ValueError("a batch without images reached offline pairs")
        cond, t = Conditioning.cat([image_cond, image_cond]), torch.cat([pairs.t, pairs.t])
        x_t, x0 = torch.cat([pairs.x_t, pairs.loser_x_t]), torch.cat([pairs.x0, pairs.losers])
        found = triple.generator.x0(x_t, t, cond)
        losses = self.error(found, x0, t)
        win, lose = losses.chunk(2)
        logged = {"win": win.detach().mean(), "lose": lose.detach().mean()}
        given = config.losers == "given"
        before = found.detach()
        if config.loss != "hinge" or (given and config.anchor > 0):
            with torch.no_grad():
                before = self.reference(triple).x0(x_t, t, cond)
        if config.loss == "hinge":
            preference = (1 + self.beta * (win - config.kappa * lose)).clamp_min(0)
        else:
            ratios = self.error(before, x0, t) - losses
            if config.weighting == "transition":
                ratios = self._expected_log_ratios(x_t, x0, found, before, torch.cat([pairs.index, pairs.index]))
            for_win, for_lose = ratios.chunk(2)
            argument = self.beta * (for_win - config.kappa * for_lose)
            preference = pairwise_loss(argument)
            logged["accuracy"] = (argument > 0).double().mean()
            logged |= {"win_ratio": for_win.detach().mean(), "lose_ratio": for_lose.detach().mean()}
        total = preference.mean()
        terms = Terms(total, {"preference": total.detach(), **logged})
        if config.anchor == 0:
            return terms
        held = self.error(found, before, t).chunk(2)[1] if given else lose
        return terms.plus("anchor", held.mean(), config.anchor)

    def _expected_log_ratios(self, x_t: Tensor, x0: Tensor, found: Tensor, before: Tensor, index: Tensor) -> Tensor:
        """E log p/p_ref of the kernel's next state, per element, (B,), where that follows the image x0 and not an estimate."""
        true, now, ref = (self._step(x_t, of, index) for of in (x0, found, before))
        return log_ratio(true.mean, now.mean, ref.mean, now.std) / x0[0].numel()

    def _step(self, x_t: Tensor, x0: Tensor, index: int | Tensor) -> Gaussian:
        """The kernel's transition from a step of the ladder to the next; `index` of the step, one or (B,)."""
        timesteps = torch.tensor(self.timesteps, dtype=torch.float64, device=x_t.device)
        return self.kernel(self.schedule, x_t, x0, timesteps[index], timesteps[index + 1])
