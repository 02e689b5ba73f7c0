"""The names that LoRA files give to a module's two matrices: diffusers', peft's and kohya's, for reading and for writing.

The network's module `X` with the matrices A and B of delta = (alpha / rank) B A is called

* `unet.X.lora_A.weight`, `unet.X.lora_B.weight` by diffusers (`transformer.` for a transformer);
* `unet.X.lora.down.weight` or `unet.X.lora_linear_layer.down.weight` by diffusers before 0.22;
* `unet.Y.processor.to_q_lora.down.weight` by diffusers' old attention processors, for the module `Y.to_q`;
* `base_model.model.X.lora_A.weight` by peft, also with the adapter's name as in `lora_A.default.weight`;
* `lora_unet_X.lora_down.weight` by kohya, with `_` for every `.` of X and a tensor `lora_unet_X.alpha`;
* the same with the block names of Stability AI's code (SGM), such as `input_blocks_4_1`, by kohya for SDXL.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

A, B = "lora_A", "lora_B"
_MATRIX = re.compile(r"\.(?:lora_(A|B)(?:\.default)?|lora[._](down|up)|lora_linear_layer\.(down|up))$")
_PROCESSOR = re.compile(r"\.processor\.(to_q|to_k|to_v|to_out)_lora\.(down|up)$")
_BLOCK = re.compile(r"(?:down_blocks|mid_block|up_blocks)\.")
_DOWN_OR_UP = {"A": A, "down": A, "B": B, "up": B}
_SGM_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_SGM_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def split_key(key: str) -> tuple[str, str]:
    """Splits a file's key into the name of its module and `lora_A` or `lora_B`; the second is empty for any other tensor."""
    stem = key.removesuffix(".weight")
    if found := _PROCESSOR.search(stem):
        projection, matrix = found.groups()
        # diffusers' attention keeps its output projection in a list whose second entry is dropout
        module = "to_out.0" if projection == "to_out" else projection
        return f"{stem[: found.start()]}.{module}", _DOWN_OR_UP[matrix]
    if found := _MATRIX.search(stem):
        return stem[: found.start()], next(_DOWN_OR_UP[word] for word in found.groups() if word is not None)
    return stem, ""


def diffusers_key(key: str) -> str:
    """Returns the key under which current versions of diffusers know a tensor of one of diffusers' layouts."""
    module, matrix = split_key(key)
    return f"{module}.{matrix}.weight" if matrix else key


def kohya_name(component: str, module: str) -> str:
    """Returns kohya's name of a module; `component` is `unet` or `transformer`."""
    return f"lora_{component}_{module.replace('.', '_')}"


def kohya_modules(component: str, modules: Iterable[str], layers: int = 2) -> dict[str, str]:
    """Maps every kohya name, with diffusers' and with SGM's block names, to the module of the network that it means."""
    listed = list(modules)
    names = {
        kohya_name(component, other): module for module in listed if (other := sgm_module(module, layers)) is not None
    }
    return {**names, **{kohya_name(component, module): module for module in listed}}


def kohya_names(network: nn.Module, modules: Iterable[str], *, sgm: bool) -> dict[str, str]:
    """Maps each module to the path that a file in kohya's layout names it by: its own, or SGM's where `sgm` is set.

    All modules keep their own paths if one lies outside the UNet's blocks, because diffusers reads SGM names of blocks only.
    """
    listed = list(modules)
    if not sgm or not all(_BLOCK.match(module) for module in listed):
        return {module: module for module in listed}
    layers = layers_per_block(network)
    return {module: sgm_module(module, layers) or module for module in listed}


def layers_per_block(network: nn.Module) -> int:
    """Returns the number of resnets in a down block of a UNet; 0 for a transformer."""
    return sum(re.fullmatch(r"down_blocks\.0\.resnets\.\d+", name) is not None for name, _ in network.named_modules())


def own_module(component: str, module: str) -> str:
    """Returns the module's path in the network for a name of diffusers' or peft's layout, which put a prefix before it."""
    return module.removeprefix("base_model.model.").removeprefix(f"{component}.")


def sgm_module(module: str, layers: int = 2) -> str | None:
    """Returns the path that a module of a diffusers UNet has in Stability AI's code; None for a module outside the UNet's blocks.

    Args:
        module: its path in diffusers, such as `down_blocks.1.attentions.0.proj_in`.
        layers: resnets of a down block (`layers_per_block` of the network's config); 2 for SD 1.x, SD 2.x and
            SDXL. An up block has one more.
    """
    if found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", module):
        side, block, kind, index, rest = found.groups()
        number = (layers + 1) * int(block) + int(index)
        place = f"input_blocks.{number + 1}" if side == "down" else f"output_blocks.{number}"
        return f"{place}.0.{_resnet_part(rest)}" if kind == "resnets" else f"{place}.1.{rest}"
    if found := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv", module):
        return f"input_blocks.{(layers + 1) * (int(found[1]) + 1)}.0.op"
    if found := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv", module):
        # the upsampler follows the attention of its block; SDXL's blocks with an upsampler all have one
        return f"output_blocks.{(layers + 1) * int(found[1]) + layers}.2.conv"
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", module):
        kind, index, rest = found.groups()
        return f"middle_block.{2 * int(index)}.{_resnet_part(rest)}" if kind == "resnets" else f"middle_block.1.{rest}"
    return next(
        (
            new + module.removeprefix(old)
            for old, new in _SGM_OUTSIDE.items()
            if module == old or module.startswith(f"{old}.")
        ),
        None,
    )


def _resnet_part(rest: str) -> str:
    head, dot, tail = rest.partition(".")
    return _SGM_RESNET.get(head, head) + dot + tail
