"""One zero counted 256 times: what T5's absent tokens cost a small transformer, and how it need not be paid.

Without T5 the pipeline of SD3 hands its network 256 zero vectors in the place of T5's tokens. They are alike and stay alike
from block to block, so one of them is enough wherever attention counts it 256 times, that is, adds log 256 to its logit.
Exact to rounding; for training and comparing on few cores. What is exported, and what draws with it, knows nothing of it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor


def without_repeats(text: Tensor, zeros: int) -> Tensor:
    """(B, N + zeros, D) whose last `zeros` tokens are zero -> (B, N + 1, D).

    Raises:
        ValueError: the last tokens are something.
    """
    if bool(text[:, -zeros:].any()):
        raise ValueError(f"the last {zeros} tokens are not zero: this text has tokens of T5, and none can be left out")
    return text[:, : text.shape[1] - zeros + 1]


def count_zeros(network: SD3Transformer2DModel, zeros: int) -> None:
    """In place: calls leave all but one of the text's last `zeros` tokens out, and every joint attention counts it for all."""
    for block in network.transformer_blocks:
        block.attn.set_processor(_Counted(zeros))

    def shortened(_: object, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, given | {"encoder_hidden_states": without_repeats(given["encoder_hidden_states"], zeros)}

    network.register_forward_pre_hook(shortened, with_kwargs=True)


class _Counted:
    """Joint attention of SD3's blocks, with a bias on the last key."""

    def __init__(self, zeros: int) -> None:
        self.bias = math.log(zeros)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | Tensor:
        def heads(states: Tensor) -> Tensor:
            return states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        def normed(states: Tensor, norm: torch.nn.Module | None) -> Tensor:
            return states if norm is None else norm(states)

        query = torch.cat(
            [
                normed(heads(attn.to_q(hidden_states)), attn.norm_q),
                normed(heads(attn.add_q_proj(encoder_hidden_states)), attn.norm_added_q),
            ],
            dim=2,
        )
        key = torch.cat(
            [
                normed(heads(attn.to_k(hidden_states)), attn.norm_k),
                normed(heads(attn.add_k_proj(encoder_hidden_states)), attn.norm_added_k),
            ],
            dim=2,
        )
        value = torch.cat([heads(attn.to_v(hidden_states)), heads(attn.add_v_proj(encoder_hidden_states))], dim=2)
        counts = query.new_zeros(key.shape[2])
        counts[-1] = self.bias
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=counts.expand(query.shape[2], -1))
        mixed = mixed.transpose(1, 2).flatten(2)
        image, text = mixed.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        image = attn.to_out[1](attn.to_out[0](image))
        return (image, text) if attn.context_pre_only else (image, attn.to_add_out(text))
