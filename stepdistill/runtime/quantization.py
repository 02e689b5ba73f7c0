"""A frozen base in 8 or 4 bit, by torchao: what its linear layers weigh, not what they compute in.

int8 is symmetric, one scale per output channel; int4 is NF4 in blocks of 64 with 8-bit scales (Dettmers et al. 2023, QLoRA).
Products run in the base's own dtype on weights that are unpacked for them, so gradients flow to the input. Convolutions
keep their dtype: 13 % of SDXL's network and 69 % of SD 1.5's.

One backend for both: torchao runs the same code on the CPU and on CUDA, and peft adapts its layers. bitsandbytes' 8-bit
layers hold their inputs outside autograd's saved tensors, where gradient checkpointing cannot drop them; diffusers loads
them on a GPU only. quanto is deprecated in diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from stepdistill.errors import UserError

QuantizationKind: TypeAlias = Literal["int8", "int4"]
BLOCK, SCALE_BLOCK = 64, 256
"""Weights that share a scale in NF4, and scales that share a scale of their own."""


def check_quantization() -> None:
    """Raises UserError where torchao is missing; cheap, imports nothing."""
    if find_spec("torchao") is None:
        raise UserError(
            "model.quantization needs the package torchao, which is not installed: "
            "run pip install 'stepdistill[quantization]', or set model.quantization to none"
        )


@torch.no_grad()
def quantize(network: nn.Module, kind: QuantizationKind, device: torch.device | str) -> None:
    """Quantise the weights of all linear layers, in place, and move the network to `device`.

    Layer by layer: the device never holds more of the whole network than its quantised form. Layers whose weights do not
    divide into NF4's blocks keep their dtype.

    Raises:
        UserError: torchao is missing.
    """
    check_quantization()
    convert = _int8() if kind == "int8" else _nf4()
    for module in network.modules():
        if isinstance(module, nn.Linear):
            weight = convert(module.to(device).weight.detach())
            module.weight = nn.Parameter(weight, requires_grad=False)
    network.to(device)


def dequantized(tensor: Tensor) -> Tensor:
    """The values of a quantised weight, in the dtype that it is unpacked to; any other tensor itself."""
    if not is_traceable_wrapper_subclass(tensor) or find_spec("torchao") is None:
        return tensor
    from torchao.quantization import Int8Tensor, NF4Tensor

    if isinstance(tensor, Int8Tensor):
        return tensor.dequantize()
    return tensor.get_original_weight() if isinstance(tensor, NF4Tensor) else tensor


def _int8() -> Callable[[Tensor], Tensor]:
    from torchao.quantization import Int8Tensor
    from torchao.quantization.granularity import PerRow

    def convert(weight: Tensor) -> Tensor:
        return Int8Tensor.from_hp(weight, PerRow())  # type: ignore[no-any-return]

    return convert


def _nf4() -> Callable[[Tensor], Tensor]:
    from torchao.quantization import to_nf4

    def convert(weight: Tensor) -> Tensor:
        blocks, rest = divmod(weight.numel(), BLOCK)
        # the scales must divide into blocks as well, and those of a 320 x 320 layer do not divide by 256
        return weight if rest else to_nf4(weight, BLOCK, math.gcd(blocks, SCALE_BLOCK))

    return convert
