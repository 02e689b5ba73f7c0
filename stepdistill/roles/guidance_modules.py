"""The modules of a guidance adapter: encoders of guidance scale, time and prompt, and what is added to an attention.

This file imports torch alone; an export ships it beside `guidance_adapter.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class GuidanceAdapterSettings:
    """Hyperparameters; they travel with the weights.

    Attributes:
        kind: `cross` looks at the tokens from the module's input; `perceptron` computes on the module's input and output;
            `offset` shifts all positions alike.
        width: d of tokens and attention.
        shared: one set of token encoders for all adapters instead of one each: less than half the parameters of `cross`.
        w_low, w_high: range of w that was trained; outside of it a warning is given once.
        heads: of the attention of `cross`, a divisor of the width; one or many, the parameters are the same.
        rising: what is added is multiplied by `strength(w)`, which w = 1 makes nothing of, as of guidance itself. Ours, not
            the paper's: what adapters are left to learn is then nearly the same at all w.

    Raises:
        ValueError: the heads do not divide the width, or a kind that has no attention has several.
    """

    kind: Literal["cross", "perceptron", "offset"] = "cross"
    width: int = 128
    shared: bool = False
    w_low: float = 1.0
    w_high: float = 12.0
    heads: int = 1
    rising: bool = False

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(
                f"guidance adapters of width {self.width} cannot have {self.heads} heads: choose a divisor of the width"
            )
        if self.heads > 1 and self.kind != "cross":
            raise ValueError(
                f"guidance adapters of kind {self.kind} have no attention and were given {self.heads} heads: choose kind cross, or 1 head"
            )


@dataclass
class GuidanceInputs:
    """What the adapters know of the pass that is running; each (B, ...), `strength` (B, 1, 1) or None for 1."""

    w: Tensor
    text: Tensor
    guidance_strength: Tensor | None = None
    time: Tensor | None = None
    tokens: Tensor | None = None


class ScalarEncoder(nn.Module):
    """LayerNorm(MLP(cos(2 pi (f p + b)))) of scalars p (B,), as one token (B, d); f and b are drawn once and saved."""

    frequencies: Tensor
    phases: Tensor

    def __init__(self, width: int, stream: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(width, generator=stream, device="cpu"))
        self.register_buffer("phases", torch.rand(width, generator=stream, device="cpu"))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, p: Tensor) -> Tensor:
        weight = self.frequencies
        angles = 2 * math.pi * (p.to(weight)[:, None] * weight + self.phases)
        return self.norm(self.mlp(angles.cos()))  # type: ignore[no-any-return]


class ConditionTokens(nn.Module):
    """Tokens (B, 2 + L, d) of w, of the network's own time embedding, and of the L text embeddings.

    With `each` false, one token stands for all text, (B, 3, d): their mean, which is all that adapters without attention look
    at, and a matrix product for one token instead of L.
    """

    def __init__(
        self, width: int, time_width: int, text_width: int, stream: torch.Generator, *, each: bool = True
    ) -> None:
        super().__init__()
        self.each = each
        self.guidance = ScalarEncoder(width, stream)
        self.time = nn.Linear(time_width, width)
        self.text = nn.Linear(text_width, width)

    def forward(self, told: GuidanceInputs) -> Tensor:
        if told.time is None:
            raise RuntimeError("the network reached an attention before it embedded its time")
        like = self.time.weight
        text = told.text.to(like) if self.each else told.text.to(like).mean(1, keepdim=True)
        time = self.time(told.time.to(like))
        return torch.cat([self.guidance(told.w)[:, None], time[:, None], self.text(text)], 1)


class CrossAdapter(nn.Module):
    """softmax(Q K^T / sqrt(d)) V W_o + b with Q of the module's input and K, V of the tokens, d a head's; zero at first."""

    def __init__(self, channels: int, settings: GuidanceAdapterSettings) -> None:
        super().__init__()
        width, self.heads = settings.width, settings.heads
        self.query = nn.Linear(channels, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = _zero_linear(width, channels)
        for linear in (self.query, self.key, self.value):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, hidden: Tensor, attended: Tensor, tokens: Tensor) -> Tensor:
        """Input hidden and output attended of the module, (B, N, C) each; tokens (B, S, d) -> (B, N, C)."""
        tokens = tokens + sinusoidal_positions(tokens.shape[1], tokens.shape[2], tokens.device).to(tokens)
        query, key, value = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projected in (self.query(hidden), self.key(tokens), self.value(tokens))
        )
        scores = query @ key.transpose(-1, -2) / math.sqrt(key.shape[-1])
        weights = scores.float().softmax(-1).to(scores) if scores.dtype.itemsize < 4 else scores.softmax(-1)
        return self.out((weights @ value).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class PerceptronAdapter(nn.Module):
    """W_o silu((1 + s) W_h LayerNorm(h) + W_a LayerNorm(a)) + b of input h and output a of the module; zero at first.

    s is of the token of w + token of t + mean of the text's; 4 d channels inside. Ours, not the paper's: an attention over
    tokens can only mix what they say, while what guidance adds depends on h most of all, and a has looked at the prompt
    already.
    """

    def __init__(self, channels: int, settings: GuidanceAdapterSettings) -> None:
        super().__init__()
        inner = 4 * settings.width
        self.norm_hidden, self.norm_attended = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.hidden = nn.Linear(channels, inner)
        self.attended = nn.Linear(channels, inner)
        self.scale = nn.Linear(settings.width, inner)
        self.out = _zero_linear(inner, channels)

    def forward(self, hidden: Tensor, attended: Tensor, tokens: Tensor) -> Tensor:
        """Input hidden and output attended of the module, (B, N, C) each; tokens (B, S, d) -> (B, N, C)."""
        scale = 1 + self.scale(_pooled(tokens))[:, None]
        inner = scale * self.hidden(self.norm_hidden(hidden)) + self.attended(self.norm_attended(attended))
        return self.out(nn.functional.silu(inner))  # type: ignore[no-any-return]


class OffsetAdapter(nn.Module):
    """MLP(token of w + token of t + mean of the text's), the same at all positions; zero at first."""

    def __init__(self, channels: int, settings: GuidanceAdapterSettings) -> None:
        super().__init__()
        width = settings.width
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), _zero_linear(width, channels))

    def forward(self, hidden: Tensor, attended: Tensor, tokens: Tensor) -> Tensor:
        """hidden, attended (B, N, C), not looked at; tokens (B, S, d) -> (B, 1, C)."""
        return self.mlp(_pooled(tokens))[:, None]  # type: ignore[no-any-return]


KINDS: dict[str, type[CrossAdapter | PerceptronAdapter | OffsetAdapter]] = {
    "cross": CrossAdapter,
    "perceptron": PerceptronAdapter,
    "offset": OffsetAdapter,
}


def sinusoidal_positions(count: int, width: int, device: torch.device | None = None) -> Tensor:
    """Sinusoidal code of places 0 .. count - 1, (count, width): sines, then cosines."""
    half = (width + 1) // 2
    places, rates = torch.arange(count, device=device), torch.arange(half, device=device)
    angles = places[:, None] * torch.exp(-math.log(10000.0) * rates / half)
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :width]


def _pooled(tokens: Tensor) -> Tensor:
    """(B, S, d) -> (B, d): token of w + token of t + mean of the text's."""
    return tokens[:, 0] + tokens[:, 1] + tokens[:, 2:].mean(1)


def _zero_linear(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
