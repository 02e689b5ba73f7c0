"""Guidance adapters in company: a ControlNet, an IP-Adapter, weights that are elsewhere, another checkpoint of the base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from support.guidance_adapters import grown, written
from torch import Tensor

from stepdistill.roles.guidance_adapter import GuidanceAdapter, load_guidance_adapter
from stepdistill.roles.guidance_modules import GuidanceAdapterSettings

W, SIZE, FACES = 6.0, 16, 12


@pytest.fixture
def pipe(tiny: Callable[..., Path]) -> StableDiffusionPipeline:
    made = StableDiffusionPipeline.from_pretrained(tiny("sd"))
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def file(pipe: StableDiffusionPipeline, tmp_path: Path) -> Path:
    return written(grown(GuidanceAdapter(pipe.unet, GuidanceAdapterSettings(width=16))), tmp_path)


def draw(pipe: Any, **more: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    given = {"num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "latent"}
    return torch.as_tensor(pipe("a cat", generator=generator, **given, **more).images)


def apart(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) > 1e-3


def test_a_controlnet(pipe: StableDiffusionPipeline, file: Path) -> None:
    """It steers the adapted network as it does the plain one, and adapters do not touch it."""
    # its embedding halves the image once, as the tiny autoencoder does
    control = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 16))
    stream = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for block in (*control.controlnet_down_blocks, control.controlnet_mid_block):
            block.weight.copy_(0.3 * torch.randn(block.weight.shape, generator=stream))
    steered = StableDiffusionControlNetPipeline.from_pipe(pipe, controlnet=control)
    steered.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, SIZE, SIZE, generator=stream)
    untouched = draw(steered, image=image)
    adapter = load_guidance_adapter(steered, file)
    assert torch.equal(draw(steered, image=image), untouched)
    adapter.w = W
    both = draw(steered, image=image)
    alone = draw(steered, image=image, controlnet_conditioning_scale=0.0)
    assert apart(both, untouched)
    assert apart(both, alone)
    assert torch.allclose(alone, draw(pipe), atol=1e-6)  # without its say it is the adapted network


def test_an_ip_adapter(pipe: StableDiffusionPipeline, file: Path) -> None:
    """It exchanges attention processors, and adapters stand beside modules: the picture speaks, w speaks."""
    adapter = load_guidance_adapter(pipe, file, w=W)
    adapted = draw(pipe)
    pipe.unet._load_ip_adapter_weights([faces(pipe)])
    picture = [torch.randn(1, 1, FACES, generator=torch.Generator().manual_seed(4))]
    pipe.set_ip_adapter_scale(0.6)
    both = draw(pipe, ip_adapter_image_embeds=picture)
    assert apart(both, adapted)
    pipe.set_ip_adapter_scale(0.0)
    assert torch.allclose(draw(pipe, ip_adapter_image_embeds=picture), adapted, atol=1e-5)
    pipe.set_ip_adapter_scale(0.6)
    adapter.w = None
    assert apart(draw(pipe, ip_adapter_image_embeds=picture), both)


@pytest.mark.parametrize("kind", ["whole", "sequential"])
@pytest.mark.parametrize("first", ["adapter", "offload"])
def test_weights_that_are_elsewhere(pipe: StableDiffusionPipeline, file: Path, kind: str, first: str) -> None:
    """What `enable_model_cpu_offload` and `enable_sequential_cpu_offload` do to a network, on a processor."""
    load_guidance_adapter(pipe, file, w=W)
    expected = draw(pipe)
    fresh = StableDiffusionPipeline(**{**pipe.components, "unet": type(pipe.unet).from_config(pipe.unet.config)})
    fresh.unet.load_state_dict(pipe.unet.state_dict())
    fresh.set_progress_bar_config(disable=True)
    if first == "adapter":
        load_guidance_adapter(fresh, file, w=W)
    if kind == "whole":
        cpu_offload_with_hook(fresh.unet, "cpu")
    else:
        cpu_offload(fresh.unet, "cpu")
        assert next(fresh.unet.parameters()).device.type == "meta"
    if first == "offload":
        load_guidance_adapter(fresh, file, w=W)
    assert torch.allclose(draw(fresh), expected, atol=1e-6)


def test_another_checkpoint_of_the_base(pipe: StableDiffusionPipeline, file: Path) -> None:
    """A fine-tune has the same modules: the same file loads there, and both say their part."""
    load_guidance_adapter(pipe, file, w=W)
    adapted = draw(pipe)
    stream = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=stream))
    adapter = load_guidance_adapter(pipe, file, w=W)
    tuned = draw(pipe)
    adapter.w = None
    assert apart(tuned, adapted)
    assert apart(tuned, draw(pipe))


def faces(pipe: StableDiffusionPipeline) -> dict[str, dict[str, Tensor]]:
    """Weights of an IP-Adapter in its own format: an image embedding becomes four tokens, each attn2 gets keys and values."""
    unet, stream = pipe.unet, torch.Generator().manual_seed(6)
    width = unet.config.cross_attention_dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=stream)

    looks = {"proj.weight": normal(4 * width, FACES), "proj.bias": normal(4 * width)}
    looks |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    attention = {}
    modules = dict(unet.named_modules())
    for number, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            channels = modules[name.removesuffix(".processor")].to_q.out_features
            attention[f"{number}.to_k_ip.weight"] = normal(channels, width) * width**-0.5
            attention[f"{number}.to_v_ip.weight"] = normal(channels, width) * width**-0.5
    return {"image_proj": looks, "ip_adapter": attention}
