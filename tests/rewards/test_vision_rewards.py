"""Frozen models that look at decoded images: what a discriminator reads, and rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_checkpoints import refusal
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    CLIPModel,
    CLIPTokenizerFast,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SamConfig,
    SamModel,
)

from stepdistill.assets import FOLDER
from stepdistill.frozen.critic import Critic
from stepdistill.frozen.vision import (
    CLIP_MEAN,
    CLIP_STD,
    CRITIC,
    IMAGENET_MEAN,
    IMAGENET_STD,
    load_vision,
    resize_and_normalize,
)
from stepdistill.rewards import load_reward
from stepdistill.roles.heads import seeded_multi_map_head

SMALL = {"hidden_size": 16, "num_hidden_layers": 8, "num_attention_heads": 2}
SAM = {
    "vision_config": {**SMALL, "image_size": 32, "patch_size": 8, "output_channels": 8, "mlp_dim": 32, "window_size": 2}
}
MODELS: dict[str, tuple[Callable[[], Any], int]] = {
    "dinov2": (lambda: Dinov2Model(Dinov2Config(**SMALL, image_size=28, patch_size=7)), 4),
    "registers": (lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SMALL, image_size=28, patch_size=7)), 4),
    "clip": (
        lambda: CLIPVisionModel(CLIPVisionConfig(**SMALL, intermediate_size=32, image_size=32, patch_size=8)), 4,
    ),
    "sam": (lambda: SamModel(SamConfig(**SAM)), 4),
}  # fmt: skip


def pictures(count: int = 2, side: int = 32) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def written(name: str, folder: Path) -> str:
    torch.manual_seed(0)
    MODELS[name][0]().save_pretrained(folder)
    return str(folder)


# ---------------------------------------------------------------- vision


@pytest.mark.parametrize("name", MODELS)
def test_maps_of_a_transformer(name: str, tmp_path: Path) -> None:
    """Four of them, in the places of the patches, each sample's own; gradients reach the images and no weight."""
    encoder, side = load_vision(written(name, tmp_path)), MODELS[name][1]
    images = pictures().requires_grad_()
    maps = encoder(images)
    assert [tuple(m.shape) for m in maps] == [(2, 16, side, side)] * 4
    assert encoder.channels == (16,) * 4
    torch.testing.assert_close(encoder(images[1:])[2], maps[2][1:])
    seeded_multi_map_head(encoder.channels, 0, 8)(maps).sum().backward()
    assert images.grad is not None
    assert float(images.grad.abs().max()) > 0
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_maps_are_the_hidden_states_in_the_order_of_rows(tmp_path: Path) -> None:
    encoder = load_vision(written("dinov2", tmp_path))
    model = Dinov2Model.from_pretrained(tmp_path)
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        pixels = resize_and_normalize(pictures(), 28, mean, deviation)
        states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
    for found, layer in zip(encoder(pictures()), (2, 4, 6, 8), strict=True):
        torch.testing.assert_close(found[:, :, 1, 2], states[layer][:, 1 + 4 + 2])


def test_the_critic_sees_what_it_was_trained_on() -> None:
    critic = Critic.load(FOLDER / "critic.safetensors")
    for found, expected in zip(load_vision(CRITIC)(pictures()), critic.features(2 * pictures() - 1), strict=True):
        assert torch.equal(found, expected)


def test_an_outline_has_no_weights() -> None:
    with torch.device("meta"):
        for name in (CRITIC, "facebook/dinov2-small", "facebook/sam-vit-base"):
            assert all(parameter.is_meta for parameter in load_vision(name).parameters())
        assert all(parameter.is_meta for parameter in load_reward("critic:garment").parameters())


def test_what_is_no_vision_model_is_refused(tmp_path: Path) -> None:
    refusal(lambda: load_vision(str(tmp_path / "nothing")), "no transformers folder", CRITIC)
    BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ).save_pretrained(tmp_path)
    refusal(lambda: load_vision(str(tmp_path)), "of type 'bert'", "dinov2")


# ---------------------------------------------------------------- rewards


def test_brightness_and_sharpness_by_hand() -> None:
    gray = torch.full((1, 3, 8, 8), 0.25)
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2
    board = board.float().expand(1, 3, 8, 8)
    bright, sharp = load_reward("critic:brightness"), load_reward("critic:sharpness")
    torch.testing.assert_close(bright(torch.cat([gray, board]), ["", ""]), torch.tensor([0.25, 0.5]))
    torch.testing.assert_close(sharp(torch.cat([gray, board]), ["", ""]), torch.tensor([0.0, 4.0]), atol=1e-6, rtol=0)
    green = torch.tensor([0.0, 1.0, 0.0])[None, :, None, None].expand(1, 3, 4, 4)
    assert float(bright(green, [""])) == pytest.approx(0.587)


def test_the_critics_probability_of_what_the_prompt_names() -> None:
    critic = Critic.load(FOLDER / "critic.safetensors")
    seen = critic(2 * pictures(3) - 1)
    texts = ["a red bag", "a dress on a blue background", "something else"]
    garment, colour = (
        load_reward("critic:garment")(pictures(3), texts),
        load_reward("critic:colour")(pictures(3), texts),
    )
    assert garment.tolist() == pytest.approx(
        [float(seen.garment.softmax(1)[0, 8]), float(seen.garment.softmax(1)[1, 3]), 1]
    )
    assert colour.tolist() == pytest.approx([float(seen.colour.softmax(1)[0, 0]), 1, 1])


@pytest.mark.parametrize("name", ["critic:garment", "critic:colour", "critic:brightness", "critic:sharpness", "clip"])
def test_rewards_are_differentiable_and_each_samples_own(name: str, clip: Path) -> None:
    reward = load_reward(f"clip:{clip}" if name == "clip" else name)
    assert reward.differentiable
    texts = ["a red bag", "a photo of a blue coat on a white background"]
    images = pictures().requires_grad_()
    both = reward(images, texts)
    torch.testing.assert_close(both[1:], reward(images[1:], texts[1:]))
    (found,) = torch.autograd.grad(both[0], images)
    assert float(found[0].abs().max()) > 0
    assert float(found[1].abs().max()) == 0
    assert not any(parameter.requires_grad for parameter in reward.parameters())


def test_the_clip_reward_is_clips_cosine(clip: Path) -> None:
    """Images of CLIP's own size need no resizing; the model's own forward scales the cosine."""
    model, tokenizer = CLIPModel.from_pretrained(clip), CLIPTokenizerFast.from_pretrained(clip)
    texts = ["a red bag", "a blue coat"]
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(**tokens, pixel_values=(pictures() - mean) / deviation)
    expected = out.logits_per_image.diagonal() / model.logit_scale.exp()
    torch.testing.assert_close(load_reward(f"clip:{clip}")(pictures(), texts), expected.detach())


def redness(images: Tensor, texts: Sequence[str]) -> Tensor:
    return images[:, 0].mean((1, 2))


def redness_without_gradient(images: Tensor, texts: Sequence[str]) -> Tensor:
    return images.detach()[:, 0].mean((1, 2))


def test_any_function_is_a_reward() -> None:
    assert torch.equal(load_reward(f"{__name__}:redness")(pictures(), ["", ""]), redness(pictures(), []))


def test_a_sum_of_rewards_is_one() -> None:
    images, prompts = pictures(), ["a red bag", "a blue coat"]
    images.requires_grad_()
    found = load_reward("0.5*critic:brightness + critic:garment + -2*critic:sharpness")(images, prompts)
    parts = [load_reward(f"critic:{name}")(images, prompts) for name in ("brightness", "garment", "sharpness")]
    torch.testing.assert_close(found, 0.5 * parts[0] + parts[1] - 2 * parts[2])
    assert torch.equal(load_reward("2 * critic:garment")(images, prompts), 2 * parts[1])
    stuck = load_reward(f"critic:brightness + {__name__}:redness_without_gradient")
    refusal(lambda: stuck(images, prompts), "part 2", "has no gradient")
    assert stuck(images.detach(), prompts).shape == (2,)
    assert torch.autograd.grad(found.sum(), images)[0].abs().sum() > 0
    refusal(
        lambda: load_reward("critic:brightness + much*critic:garment"), "'much*critic:garment'", "0.5*critic:garment"
    )
    refusal(lambda: load_reward("critic:brightness + nan*critic:garment"), "write a number")
    refusal(lambda: load_reward("critic:brightness + critik:garment"), "critik")


def test_what_is_no_reward_is_refused(clip: Path, tmp_path: Path) -> None:
    refusal(lambda: load_reward("critic:shine"), "'shine'", "'garment'")
    refusal(lambda: load_reward("clipp"), "'clipp'", "did you mean 'clip'")
    refusal(lambda: load_reward("nowhere:anything"), "cannot be imported")
    refusal(lambda: load_reward(f"{__name__}:nothing"), "cannot be imported")
    refusal(lambda: load_reward(f"{__name__}:SMALL"), "is a dict")
    refusal(lambda: load_reward(f"clip:{written('dinov2', tmp_path)}"), "of type 'dinov2'")
