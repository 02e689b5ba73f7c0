"""LoRA key layouts: every public spelling of a module's matrices is read as the same module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from roles.test_lora_file import deltas, opened
from safetensors.torch import load_file, save_file
from support.toys import disturb

from stepdistill.roles.lora_layouts import (
    kohya_modules,
    kohya_name,
    kohya_names,
    layers_per_block,
    own_module,
    sgm_module,
    split_key,
)

__all__ = ["opened"]

TINY_LAYERS = 1
"""`layers_per_block` of the tiny UNet."""
LAYOUTS: dict[str, Callable[[str, str], str]] = {
    "diffusers": lambda module, matrix: f"unet.{module}.{matrix}.weight",
    "peft": lambda module, matrix: f"base_model.model.{module}.{matrix}.weight",
    "peft-named": lambda module, matrix: f"base_model.model.{module}.{matrix}.default.weight",
    "diffusers-old": lambda module, matrix: f"unet.{module}.lora.{_down_or_up(matrix)}.weight",
    "diffusers-linear-layer": lambda module, matrix: f"unet.{module}.lora_linear_layer.{_down_or_up(matrix)}.weight",
    "kohya": lambda module, matrix: f"{kohya_name('unet', module)}.lora_{_down_or_up(matrix)}.weight",
    "sgm": lambda module, matrix: (
        f"{kohya_name('unet', sgm_module(module, TINY_LAYERS) or module)}.lora_{_down_or_up(matrix)}.weight"
    ),
}


def _down_or_up(matrix: str) -> str:
    return {"lora_A": "down", "lora_B": "up"}[matrix]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_public_layout_starts_a_student(
    opened: Callable[..., Any], tmp_path: Path, layout: str, dtype: torch.dtype
) -> None:
    plain: dict[str, Any] = {"alpha": 8, "rank_pattern": {}, "alpha_pattern": {}}
    writer, file = opened(**plain), tmp_path / "lora.safetensors"
    disturb(writer.triple)
    factors = writer.triple.bank.factors("generator")
    pairs = {(path, "lora_A"): own.down for path, own in factors.items()}
    pairs |= {(path, "lora_B"): own.up for path, own in factors.items()}
    save_file({LAYOUTS[layout](*key): value.detach().to(dtype).contiguous() for key, value in pairs.items()}, file)
    assert len(load_file(file)) == len(pairs)
    expected, found = deltas(writer.triple, "generator"), deltas(opened(file, **plain).triple, "generator")
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    for path, delta in expected.items():
        torch.testing.assert_close(found[path], delta, rtol=tolerance, atol=tolerance)


def test_projections_of_old_attention_processors_are_named() -> None:
    stem = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"
    for projection, module in {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"}.items():
        assert split_key(f"{stem}.processor.{projection}_lora.up.weight") == (f"{stem}.{module}", "lora_B")
    assert own_module("unet", f"{stem}.to_q") == f"{stem.removeprefix('unet.')}.to_q"
    assert split_key("lora_unet_conv_in.alpha") == ("lora_unet_conv_in.alpha", "")


def test_sgm_names_of_full_size_sdxl_are_those_that_diffusers_reads() -> None:
    """On the UNet's full set of modules (meta device): diffusers' own conversion leads every name back to its module."""
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_lora_to_diffusers,
        _maybe_map_sgm_blocks_to_diffusers,
    )

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            transformer_layers_per_block=(1, 2, 10),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    inside = [
        name
        for name, module in unet.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and name.startswith(("down_", "mid_", "up_"))
    ]
    names = {name: sgm_module(name) for name in inside}
    assert None not in names.values()
    assert len(set(names.values())) == len(inside) > 700
    state = {
        f"{kohya_name('unet', str(sgm))}.lora_{part}.weight": torch.zeros(1)
        for sgm in names.values()
        for part in ("down", "up")
    }
    converted, _ = _convert_non_diffusers_lora_to_diffusers(_maybe_map_sgm_blocks_to_diffusers(state, unet.config))
    found = {own_module("unet", split_key(key)[0]) for key in converted}
    assert found == set(inside)
    written = kohya_names(unet, inside, sgm=True)
    assert written == names
    assert written["up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.2.conv"
    assert written["down_blocks.1.attentions.0.proj_in"] == "input_blocks.4.1.proj_in"
    assert kohya_modules("unet", inside) == kohya_modules("unet", inside, layers_per_block(unet))
