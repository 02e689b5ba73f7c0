"""Reward models with tiny random weights give the same numbers as the published preprocessing and transformers' models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support.reward_models import TEXTS, write_blip
from support.tiny_checkpoints import refusal
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForImageTextRetrieval,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizerFast,
)

from stepdistill.frozen.vision import CLIP_MEAN, CLIP_STD
from stepdistill.rewards import load_reward
from stepdistill.rewards.clip import ClipPreprocessor
from stepdistill.rewards.imagereward import MAX_PROMPT_TOKENS, SCORE_MEAN, SCORE_STD
from stepdistill.rewards.linear_head import linear_stack


def pictures(height: int = 48, width: int = 48) -> Tensor:
    """Whole bytes, smooth enough that rounding of an overshoot is rare."""
    coarse = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(coarse, (height, width), mode="bilinear")
    return (smooth * 255).round() / 255


def processed(images: Tensor, side: int) -> Tensor:
    """What transformers makes of the pictures."""
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    arrays = [(image.permute(1, 2, 0) * 255).round().byte().numpy() for image in images]
    made: Tensor = processor([Image.fromarray(array) for array in arrays], return_tensors="pt")["pixel_values"]
    return made


@pytest.mark.parametrize("size", [(32, 32), (48, 48), (64, 45), (40, 91), (20, 24)])
def test_pixels_are_those_of_clips_processor(size: tuple[int, int]) -> None:
    """Up to its rounding to bytes after each pass of resizing."""
    found = ClipPreprocessor(32)(pictures(*size))
    byte = 1 / 255 / 0.26
    torch.testing.assert_close(found, processed(pictures(*size), 32), rtol=0, atol=1.5 * byte)
    assert float((found - processed(pictures(*size), 32)).abs().mean()) < byte / 2


@pytest.mark.parametrize("size", [(57, 40), (40, 57), (43, 40), (40, 91), (32, 35)])
def test_rewards_crop_as_their_published_preprocessing_does(size: tuple[int, int]) -> None:
    """An odd margin is rounded down by transformers (PickScore) and to even by torchvision (ImageReward, aesthetic)."""
    from torchvision.transforms import CenterCrop, Resize
    from torchvision.transforms.functional import InterpolationMode

    images, mean, deviation = pictures(*size), torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)
    resized = Resize(32, InterpolationMode.BICUBIC, antialias=True)(images).clamp(0, 1)
    expected = (CenterCrop(32)(resized) - mean[:, None, None]) / deviation[:, None, None]
    torch.testing.assert_close(ClipPreprocessor(32, "torchvision")(images), expected)
    byte = 1 / 255 / 0.26
    torch.testing.assert_close(ClipPreprocessor(32)(images), processed(images, 32), rtol=0, atol=1.5 * byte)


@pytest.mark.parametrize("size", [(57, 40), (40, 57), (43, 40), (31, 90), (20, 13)])
def test_hps_pads_as_openclips_resize_to_the_longer_side(size: tuple[int, int]) -> None:
    """OpenCLIP's ResizeMaxSize rounds the shorter side to the nearest pixel and puts half of the padding, rounded down, first."""
    from torchvision.transforms import functional as TF

    images, scale = pictures(*size), 32 / max(size)
    height, width = (round(length * scale) for length in size)
    expected = TF.resize(images, [height, width], TF.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    left, top = (32 - width) // 2, (32 - height) // 2
    expected = TF.pad(expected, [left, top, 32 - width - left, 32 - height - top])
    expected = TF.normalize(expected, list(CLIP_MEAN), list(CLIP_STD))
    torch.testing.assert_close(ClipPreprocessor(32, "padded")(images), expected)


def test_imagerewards_mean_is_the_published_one() -> None:
    """ImageReward/ImageReward.py: self.mean = 0.16717362830052426, self.std = 1.0333394966054072."""
    assert (SCORE_MEAN, SCORE_STD) == (0.16717362830052426, 1.0333394966054072)


def test_padded_pixels_hold_the_whole_image() -> None:
    found = ClipPreprocessor(32, "padded")(pictures(32, 16))
    plain = ClipPreprocessor(16)(pictures(32, 16)[:, :, 8:24])
    torch.testing.assert_close(found[:, :, 8:24, 8:24], plain)
    black = ClipPreprocessor(32)(torch.zeros(1, 3, 32, 32))
    torch.testing.assert_close(found[:1, :, :, :8], black[:, :, :, :8])
    torch.testing.assert_close(found[:1, :, :, 24:], black[:, :, :, 24:])


@pytest.mark.parametrize("name", ["pickscore", "hps"])
def test_cosines_of_preference_clips(name: str, clip: Path) -> None:
    model, tokenizer = CLIPModel.from_pretrained(clip), CLIPTokenizerFast.from_pretrained(clip)
    tokens = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(**tokens, pixel_values=processed(pictures(), 32))
    expected = out.logits_per_image.diagonal() / model.logit_scale.exp()
    found = load_reward(f"{name}:{clip}")(pictures(), TEXTS)
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=2e-3)


def test_the_aesthetic_stack(clip: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = linear_stack(24)
    save_file({f"layers.{key}": value for key, value in layers.state_dict().items()}, tmp_path / "head.safetensors")
    model = CLIPModel.from_pretrained(clip)
    with torch.no_grad():
        x = model.visual_projection(model.vision_model(pixel_values=processed(pictures(), 32)).pooler_output)
        x = x / x.norm(dim=1, keepdim=True)
        for layer in layers.values():
            x = x @ layer.weight.T + layer.bias  # type: ignore[operator, union-attr]
    found = load_reward(f"aesthetic:{clip},{tmp_path / 'head.safetensors'}")(pictures(), TEXTS)
    torch.testing.assert_close(found, x[:, 0], rtol=0, atol=1e-3)


def test_outlines_of_public_clips_need_no_download() -> None:
    """Their sizes are the published checkpoints'."""
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in load_reward(name).parameters()) for name in ("clip", "pickscore")}
    assert counts == {"clip": 427_616_513, "pickscore": 986_109_441}


# ---------------------------------------------------------------- ImageReward


@pytest.fixture
def blip(tmp_path: Path) -> tuple[Path, BlipForImageTextRetrieval, torch.nn.ModuleDict]:
    return write_blip(tmp_path)


def test_imagereward_is_blip_and_a_head(blip: tuple[Path, BlipForImageTextRetrieval, torch.nn.ModuleDict]) -> None:
    folder, model, head = blip
    tokens = BertTokenizerFast.from_pretrained(folder)(
        TEXTS, padding="max_length", max_length=MAX_PROMPT_TOKENS, return_tensors="pt"
    )
    with torch.no_grad():
        seen = model.vision_model(pixel_values=processed(pictures(), 32)).last_hidden_state
        x = model.text_encoder(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2]),
        ).last_hidden_state[:, 0]  # fmt: skip
        for layer in head.values():
            x = layer(x)
    reward = load_reward(f"imagereward:{folder}")
    images = pictures().requires_grad_()
    found = reward(images, TEXTS)
    torch.testing.assert_close(found.detach(), (x[:, 0] - SCORE_MEAN) / SCORE_STD, rtol=0, atol=1e-3)
    torch.testing.assert_close(found[1:], reward(images[1:], TEXTS[1:]))
    (gradient,) = torch.autograd.grad(found[0], images)
    assert float(gradient[0].abs().max()) > 0
    assert float(gradient[1].abs().max()) == 0
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    assert float((reward(images, TEXTS[::-1]) - found).detach().abs().max()) > 1e-5


def test_missing_weights_are_refused(clip: Path, tmp_path: Path) -> None:
    refusal(lambda: load_reward("hps"), "OpenCLIP pickle", "hps:FOLDER")
    refusal(lambda: load_reward("imagereward"), "imagereward:FOLDER")
    refusal(lambda: load_reward(f"imagereward:{clip}"), "of type 'clip'")
    refusal(lambda: load_reward(f"aesthetic:{clip}"), "names no head")
    refusal(lambda: load_reward(f"aesthetic:{clip},{tmp_path / 'absent'}"), "no aesthetic head")
    save_file({"layers.0.weight": torch.zeros(2, 2)}, tmp_path / "head.safetensors")
    refusal(lambda: load_reward(f"aesthetic:{clip},{tmp_path / 'head.safetensors'}"), "not the aesthetic head")
    refusal(lambda: load_reward(f"pickscore:{tmp_path / 'absent'}"), "absent")
    BlipConfig().save_pretrained(tmp_path)
    refusal(lambda: load_reward(f"imagereward:{tmp_path}"), "cannot be loaded")


def test_numpy_is_not_in_the_way() -> None:
    """Preprocessing stays on tensors: gradients reach every pixel that is looked at."""
    images = pictures(40, 91).requires_grad_()
    ClipPreprocessor(32)(images).square().sum().backward()
    assert images.grad is not None
    seen = images.grad.abs().sum((0, 1, 2)).numpy()
    assert np.flatnonzero(seen).tolist() == list(range(int(np.flatnonzero(seen)[0]), int(np.flatnonzero(seen)[-1]) + 1))
    assert 40 <= np.count_nonzero(seen) <= 60
