"""Noise schedules: alpha(t) and sigma(t) of x_t = alpha x0 + sigma eps, read from a checkpoint's own scheduler config.

Times are *native*: for a variance-preserving (VP) model the network's timestep, a real number in [0, N - 1], with -1 the
noise-free end; for flow matching sigma itself, in [0, 1], with 0 the noise-free end. `fraction` is the common axis in
[0, 1] before any flow shift, on which ranges and ladders are written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from stepdistill.diffusion.prediction import Prediction
from stepdistill.errors import UserError

Time = Tensor | float


OTHER_PROCESSES = frozenset(
    {
        "KarrasVeScheduler",
        "ScoreSdeVeScheduler",
        "ScoreSdeVpScheduler",
        "CMStochasticIterativeScheduler",
        "VQDiffusionScheduler",
        "CosineDPMSolverMultistepScheduler",
        "AmusedScheduler",
        "RePaintScheduler",
    }
)
"""Schedulers of diffusers whose forward process is neither given by betas nor flow matching; so are all with EDM in their names."""


@dataclass(frozen=True)
class DynamicShift:
    """Flow shift that grows with the number of image tokens (Flux, Qwen-Image, SD3.5): `mu` is linear in the token count."""

    base_shift: float = 0.5
    max_shift: float = 1.15
    base_tokens: int = 256
    max_tokens: int = 4096
    exponential: bool = True

    def static_shift(self, tokens: int) -> float:
        """The static shift equal to the dynamic one for `tokens` image tokens."""
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        mu = self.base_shift + slope * (tokens - self.base_tokens)
        return math.exp(mu) if self.exponential else mu


@dataclass(frozen=True)
class NoiseSchedule:
    """alpha(t), sigma(t) in float64 for continuous t. Immutable; knows no network.

    Attributes:
        prediction: what the checkpoint's network predicts.
        angles: for VP, atan2(sigma, alpha) of every integer timestep, float64 of shape (N,); None for flow matching.
        shift: static flow shift s of t = s p / (1 + (s - 1) p); 1 for VP.
        by_angle: for flow matching, the fraction is the TrigFlow angle over pi / 2 (SCMScheduler) and there is no shift.
        dynamic_shift: set where the checkpoint's shift depends on the resolution; resolve it with `for_tokens`.
        train_steps: number of steps the network's integer time is scaled to (1000).
    """

    prediction: Prediction
    angles: Tensor | None = field(default=None, repr=False)
    shift: float = 1.0
    dynamic_shift: DynamicShift | None = None
    train_steps: int = 1000
    fraction_is_angle: bool = False

    # ---------------------------------------------------------------- construction

    @classmethod
    def vp(cls, betas: Tensor, prediction: Prediction, *, zero_terminal_snr: bool = False) -> NoiseSchedule:
        """From the betas of the discrete forward process, shape (N,), each in [0, 1)."""
        alpha = torch.cumprod(1.0 - betas.double(), 0).sqrt()
        if zero_terminal_snr:  # Lin et al. 2023, algorithm 1: shift the last sqrt(abar) to 0, keep the first
            first, last = alpha[0].clone(), alpha[-1].clone()
            alpha = (alpha - last) * first / (first - last)
        sigma = (1.0 - alpha.square()).clamp_min(0).sqrt()
        schedule = cls(prediction, torch.atan2(sigma, alpha), train_steps=len(betas))
        if schedule.zero_terminal_snr and prediction is Prediction.EPSILON:
            raise UserError(
                "the scheduler config has zero terminal SNR with prediction_type 'epsilon', from which x0 cannot be "
                "recovered at the last timestep: use a checkpoint with 'v_prediction', or set rescale_betas_zero_snr to false"
            )
        return schedule

    @classmethod
    def flow(
        cls, shift: float = 1.0, dynamic_shift: DynamicShift | None = None, train_steps: int = 1000
    ) -> NoiseSchedule:
        """Flow matching: alpha = 1 - t, sigma = t."""
        return cls(Prediction.FLOW, None, float(shift), dynamic_shift, train_steps)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """From any diffusers scheduler config (the contents of `scheduler_config.json`).

        Raises:
            UserError: unknown beta schedule or prediction type; epsilon prediction with zero terminal SNR.
        """
        name = str(config.get("_class_name", ""))
        if "EDM" in name or name in OTHER_PROCESSES:
            raise UserError(
                f"the checkpoint's scheduler is {name}, whose noise levels are not those of betas or of flow matching, and the "
                "student would be trained on a wrong schedule: give a checkpoint with a DDIM, Euler or flow-matching scheduler"
            )
        steps = int(config.get("num_train_timesteps", 1000))
        if name == "SCMScheduler":
            # its pipeline shows the network x_t of flow matching and makes TrigFlow's prediction of the answer
            return replace(cls.flow(train_steps=steps), fraction_is_angle=True)
        prediction_type = config.get("prediction_type", "epsilon")
        if "FlowMatch" in name or config.get("use_flow_sigmas") or prediction_type == "flow_prediction":
            dynamic = None
            if config.get("use_dynamic_shifting"):
                dynamic = DynamicShift(
                    float(config.get("base_shift", 0.5)),
                    float(config.get("max_shift", 1.15)),
                    int(config.get("base_image_seq_len", 256)),
                    int(config.get("max_image_seq_len", 4096)),
                    config.get("time_shift_type", "exponential") == "exponential",
                )
            return cls.flow(config.get("shift", config.get("flow_shift", 1.0)) or 1.0, dynamic, steps)
        betas = _betas(config, steps)
        return cls.vp(
            betas, Prediction.parse(prediction_type), zero_terminal_snr=bool(config.get("rescale_betas_zero_snr"))
        )

    def for_tokens(self, tokens: int) -> NoiseSchedule:
        """The schedule with its dynamic shift resolved for `tokens` image tokens; itself where the shift is static."""
        if self.dynamic_shift is None:
            return self
        return replace(self, shift=self.dynamic_shift.static_shift(tokens), dynamic_shift=None)

    # ---------------------------------------------------------------- facts

    @property
    def is_flow(self) -> bool:
        return self.angles is None

    @property
    def clean_time(self) -> float:
        """The time at which x_t = x0 exactly."""
        return 0.0 if self.is_flow else -1.0

    @property
    def terminal_time(self) -> float:
        """The noisiest time the network was trained on."""
        return 1.0 if self.is_flow else float(self.train_steps - 1)

    @property
    def zero_terminal_snr(self) -> bool:
        return self.angles is None or float(torch.cos(self.angles[-1])) < 1e-6

    def _table(self, device: torch.device) -> Tensor:
        """Angles of the times -1, 0, ..., N - 1."""
        if self.angles is None:
            raise ValueError("a flow schedule has no table of angles")
        return torch.cat([self.angles.new_zeros(1), self.angles]).to(device)

    # ---------------------------------------------------------------- alpha and sigma

    def angle(self, t: Time) -> Tensor:
        """TrigFlow time atan2(sigma, alpha) in [0, pi/2], float64, shape of t. VP: linear between integer timesteps."""
        t = float64(t)
        if self.is_flow:
            return torch.atan2(t, 1 - t)
        table = self._table(t.device)
        position = _clamp_keeping_gradient(t + 1, 0.0, float(len(table) - 1))
        low = position.floor().clamp(max=len(table) - 2)
        a, b = table[low.long()], table[low.long() + 1]
        return a + (b - a) * (position - low)

    def time_at_angle(self, angle: Time) -> Tensor:
        """Inverse of `angle`; VP angles beyond the last timestep's are clamped to it."""
        angle = float64(angle)
        if self.is_flow:
            return torch.sin(angle) / (torch.sin(angle) + torch.cos(angle))
        table = self._table(angle.device)
        angle = _clamp_keeping_gradient(angle, 0.0, float(table[-1]))
        high = torch.searchsorted(table, angle.contiguous(), right=True).clamp(1, len(table) - 1)
        a, b = table[high - 1], table[high]
        return (high - 1) + (angle - a) / (b - a) - 1

    def alpha(self, t: Time) -> Tensor:
        """Signal level, float64, shape of t."""
        if self.is_flow:
            return 1 - float64(t)
        # cos(pi/2) is 6e-17, not 0: a zero-terminal-SNR schedule must have no signal at all at its last timestep
        alpha = torch.cos(self.angle(t))
        return torch.where(alpha.abs() < 1e-12, torch.zeros_like(alpha), alpha)

    def sigma(self, t: Time) -> Tensor:
        """Noise level, float64, shape of t."""
        return float64(t) if self.is_flow else torch.sin(self.angle(t))

    def levels(self, t: Time, like: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) on the device of `like`, shaped to broadcast over it, in float32 (float64 where `like` is)."""
        return broadcast(self.alpha(t), like), broadcast(self.sigma(t), like)

    def log_snr(self, t: Time) -> Tensor:
        """log(alpha^2 / sigma^2), float64."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def snr(self, t: Time) -> Tensor:
        """alpha^2 / sigma^2, float64."""
        return (self.alpha(t) / self.sigma(t)).square()

    def add_noise(self, x: Tensor, eps: Tensor, t: Time, s: Time | None = None) -> Tensor:
        """x_t = alpha x + sigma eps, in float32 or better; where x is a sample of time s, by the kernel from s to t."""
        alpha, sigma = self.levels(t, x) if s is None else (broadcast(level, x) for level in self.kernel(s, t))
        return alpha * full(x) + sigma * full(eps)

    def kernel(self, s: Time, t: Time) -> tuple[Tensor, Tensor]:
        """(alpha_{t|s}, sigma_{t|s}) of x_t = alpha_{t|s} x_s + sigma_{t|s} eps for s cleaner than t, float64."""
        ratio = self.alpha(t) / self.alpha(s)
        return ratio, (self.sigma(t).square() - (ratio * self.sigma(s)).square()).clamp_min(0).sqrt()

    # ---------------------------------------------------------------- the fraction axis

    def time_at_fraction(self, fraction: Time) -> Tensor:
        """Native time of a fraction in [0, 1] of the *unshifted* axis: VP floor(p N) capped at N - 1, flow shift(p)."""
        p = float64(fraction)
        if self.fraction_is_angle:
            return self.time_at_angle(p * (math.pi / 2))
        if self.is_flow:
            return self.shift * p / (1 + (self.shift - 1) * p)
        # (t / N) N may fall short of t by a rounding
        return (p * self.train_steps + 1e-9).floor().clamp(0, self.train_steps - 1)

    def fraction_at(self, t: Time) -> Tensor:
        """The fraction whose time is t (left edge of its bin for VP)."""
        t = float64(t)
        if self.fraction_is_angle:
            return self.angle(t) / (math.pi / 2)
        return t / (self.shift - (self.shift - 1) * t) if self.is_flow else t / self.train_steps


def broadcast(values: Tensor, like: Tensor) -> Tensor:
    """Per-sample values, shape (B,) or (), shaped (B, 1, ...) beside `like`, in its device and at least float32."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    values = values.to(device=like.device, dtype=dtype)
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim)) if values.ndim else values


def full(x: Tensor) -> Tensor:
    """x in float32 or better: arithmetic on samples never runs in half precision."""
    return x if x.dtype == torch.float64 else x.float()


def _clamp_keeping_gradient(values: Tensor, low: float, high: float) -> Tensor:
    """Clamped, with the derivative of the inside at both ends: where a schedule ends, its time still moves."""
    return torch.where(values < low, low, torch.where(values > high, high, values))


def float64(t: Time) -> Tensor:
    """A time as a float64 tensor, on its own device."""
    # a Python number goes straight to float64: torch's default would round 0.9 to float32 first
    return t.double() if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)


def _betas(config: Mapping[str, Any], steps: int) -> Tensor:
    trained = config.get("trained_betas")
    if trained is not None:
        return torch.tensor(trained, dtype=torch.float64)
    start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    kind = config.get("beta_schedule", "linear")
    if kind == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64).square()
    if kind == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, eq. 17
        edge = torch.arange(steps + 1, dtype=torch.float64) / steps
        bar = torch.cos((edge + 0.008) / 1.008 * math.pi / 2).square()
        return (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    raise UserError(
        f"the scheduler config has beta_schedule {kind!r}, but 'linear', 'scaled_linear' and 'squaredcos_cap_v2' are known: "
        "write the betas out as trained_betas"
    )
