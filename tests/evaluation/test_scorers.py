"""CLIP scores in their conventions, rewards on training's scale, LPIPS, win rates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLIP_LENGTH as LENGTH
from safetensors.torch import save_file
from support.reward_models import write_blip

from stepdistill.errors import UserError
from stepdistill.evaluation.metrics.lpips import Lpips
from stepdistill.evaluation.metrics.win_rate import win_rate
from stepdistill.evaluation.networks.features import (
    CLIP_MEAN,
    CLIP_STD,
    load_extractor,
    pooled_embedding,
    resize_and_normalize,
)
from stepdistill.evaluation.scorers import ClipScorer, RewardScorer, clip_score
from stepdistill.rewards import load_reward, report_name, split_reward_names
from stepdistill.rewards.linear_head import linear_stack


def images(count: int, size: tuple[int, int] = (40, 40)) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for _ in range(count)]


PROMPTS = ["a red bag", "a blue dress on a white background", "a photo of a coat"]


def test_clip_score_conventions_scale_one_cosine_and_are_named(clip: Path) -> None:
    """clipscore 17: the same score is 0.31, 31 or 0.78."""
    scorer = ClipScorer(str(clip))
    raw, prefixed = (
        scorer.cosine_similarities(images(3), PROMPTS)[0],
        scorer.cosine_similarities(images(3), PROMPTS, "A photo depicts ")[0],
    )
    scores = {
        name: clip_score(scorer, images(3), PROMPTS, name) for name in ("raw", "torchmetrics", "gigagan", "hessel")
    }
    assert scores["raw"].mean == pytest.approx(raw.mean())
    assert scores["gigagan"].mean == pytest.approx(prefixed.mean())
    assert scores["torchmetrics"].mean == pytest.approx(max(100 * raw.mean(), 0.0))
    assert scores["hessel"].mean == pytest.approx(2.5 * np.maximum(prefixed, 0).mean())
    assert scores["gigagan"].name == f"clip[{clip.name},gigagan]"
    with pytest.raises(UserError, match="hessel, gigagan"):
        clip_score(scorer, images(3), PROMPTS, "openai")


def test_cosines_equal_the_models_forward(clip: Path) -> None:
    """torchmetrics 3407: transformers 5 answers with an object, whose pooled output is the embedding before the norm."""
    scorer = ClipScorer(str(clip))
    pixels = torch.stack([resize_and_normalize(image, 32, CLIP_MEAN, CLIP_STD) for image in images(3)])
    tokens = scorer.tokenizer(PROMPTS, padding=True, return_tensors="pt")
    answer = scorer.model(pixel_values=pixels, **tokens)
    expected = (answer.image_embeds * answer.text_embeds).sum(1)
    np.testing.assert_allclose(scorer.cosine_similarities(images(3), PROMPTS)[0], expected.double(), atol=1e-6)
    with pytest.raises(TypeError, match="dict"):
        pooled_embedding({})


def test_long_prompts_keep_their_end_token_and_are_counted(clip: Path) -> None:
    """torchmetrics 2000, 2883: a crash, then a wrong token read where the end was cut off (17 in place of 26)."""
    scorer = ClipScorer(str(clip))
    picture = images(1)
    fits, truncated = scorer.cosine_similarities(picture, ["x " * (LENGTH - 2)])
    assert truncated == 0
    longer, truncated = scorer.cosine_similarities(picture, ["x " * (LENGTH - 1)])
    assert truncated == 1
    assert longer == pytest.approx(fits, abs=1e-6)  # the same 75 tokens between the same ends


def test_images_are_cropped_square_and_reduced_with_antialias(clip: Path) -> None:
    """cmmd-pytorch 4: bicubic without antialias turned a fine checkerboard into noise."""
    board = (np.indices((320, 320)).sum(0) % 2 * 255).astype(np.uint8)[:, :, None].repeat(3, axis=2)
    grey = (
        resize_and_normalize(board, 32, CLIP_MEAN, CLIP_STD) * torch.tensor(CLIP_STD)[:, None, None]
        + torch.tensor(CLIP_MEAN)[:, None, None]
    )
    assert (grey - 0.5).abs().max() < 0.03
    scorer = ClipScorer(str(clip))
    wide = np.concatenate([np.zeros((40, 20, 3), np.uint8), images(1)[0], np.zeros((40, 20, 3), np.uint8)], axis=1)
    np.testing.assert_allclose(
        scorer.cosine_similarities([wide], PROMPTS[:1])[0],
        scorer.cosine_similarities(images(1), PROMPTS[:1])[0],
        atol=1e-6,
    )


def test_clip_features_are_unit_vectors(clip: Path) -> None:
    features = load_extractor(f"clip:{clip}")(images(5))
    assert features.shape == (5, 24)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1.0, atol=1e-5)


@pytest.fixture
def blip(tmp_path: Path) -> Path:
    return write_blip(tmp_path / "blip")[0]


def red(pixels: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    return pixels[:, 0].mean((1, 2))


@pytest.mark.parametrize(
    "name",
    [
        "pickscore:CLIP", "hps:CLIP", "clip:CLIP", "imagereward:BLIP", "aesthetic:CLIP,HEAD", "critic:garment", "critic:colour",
        "critic:brightness", "critic:sharpness", "HERE:red", "0.5*pickscore:CLIP + critic:colour + -2*aesthetic:CLIP,HEAD",
    ],
)  # fmt: skip
def test_evaluation_and_training_give_equal_rewards(name: str, clip: Path, blip: Path, tmp_path: Path) -> None:
    """Every reward that a training config may name; images of one size and of several."""
    save_file(
        {f"layers.{key}": value for key, value in linear_stack(24).state_dict().items()}, tmp_path / "head.safetensors"
    )
    for word, place in {"CLIP": clip, "BLIP": blip, "HEAD": tmp_path / "head.safetensors", "HERE": __name__}.items():
        name = name.replace(word, str(place))
    rows = images(3)
    training = load_reward(name)(torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2) / 255, PROMPTS).detach().double()
    scorer = RewardScorer(name)
    np.testing.assert_array_equal(scorer.score(rows, PROMPTS), training.numpy())
    mixed = [*rows, *images(1, (52, 44))]
    np.testing.assert_allclose(scorer.score(mixed, [*PROMPTS, PROMPTS[0]])[:3], training.numpy(), atol=1e-5)
    assert str(tmp_path) not in scorer.name  # reports of two machines name the reward alike


def test_a_list_of_rewards_is_split_at_commas_but_not_inside_an_aesthetic_reward() -> None:
    assert split_reward_names("pickscore, 0.5*aesthetic:CLIP,HEAD + clip,aesthetic:,HEAD,critic:colour") == [
        "pickscore", "0.5*aesthetic:CLIP,HEAD + clip", "aesthetic:,HEAD", "critic:colour",
    ]  # fmt: skip
    assert report_name("0.50*hps:/models/hps-v2 + critic:colour") == "0.5*hps:hps-v2 + critic:colour"


def test_a_reward_that_cannot_be_loaded_is_an_error_before_anything_is_drawn() -> None:
    for name in ("pickscore:/absent", "aesthetic:/absent,/absent", "hps", "imagereward", "pickscor"):
        with pytest.raises(UserError):
            RewardScorer(name)


def nan_reward(pixels: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    return torch.full((len(pixels),), torch.nan)


def one_number(pixels: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    return pixels.mean()


def test_a_reward_must_return_one_finite_number_per_image() -> None:
    with pytest.raises(UserError, match="NaN or infinity"):
        RewardScorer(f"{__name__}:nan_reward").score(images(2), PROMPTS[:2])
    with pytest.raises(UserError, match="one number per image"):
        RewardScorer(f"{__name__}:one_number").score(images(2), PROMPTS[:2])


def test_lpips_needs_its_range_and_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nerfstudio 1424: LPIPS fed [0, 1] where [-1, 1] is wanted is another number."""
    from torchvision.models import squeezenet1_1

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"squeezenet1_1-b8a52dc0\.pth.*downloading is off"):
        Lpips("squeeze")
    with pytest.raises(UserError, match="alex, vgg, squeeze"):
        Lpips("resnet")
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(squeezenet1_1().state_dict(), tmp_path / "hub/checkpoints/squeezenet1_1-b8a52dc0.pth")
    lpips = Lpips("squeeze")
    a, b = (torch.from_numpy(np.stack(images(2))).permute(0, 3, 1, 2).float() / 255, torch.full((2, 3, 40, 40), 0.5))
    right = lpips.mean(a, b, value_range=(0, 1))
    assert lpips.mean(2 * a - 1, 2 * b - 1, value_range=(-1, 1)) == pytest.approx(right, rel=1e-5)
    assert lpips.mean(a, b, value_range=(-1, 1)) != pytest.approx(right, rel=0.05)
    with pytest.raises(ValueError, match=r"said to lie in \[0, 1\]"):
        lpips.mean(255 * a, b, value_range=(0, 1))
    pictures = images(4)
    assert lpips.diversity(lambda rows: [pictures[i] for i in rows], ["a", "b", "c", "d"]) is None
    assert lpips.diversity(lambda rows: [pictures[0] for _ in rows], ["a"] * 3) == pytest.approx(0.0, abs=1e-6)
    two = lpips.diversity(lambda rows: [pictures[i] for i in rows], ["a", "a", "b", "b"])
    pairs = [torch.from_numpy(np.stack(pictures[side::2])).permute(0, 3, 1, 2).float() for side in (0, 1)]
    assert two == pytest.approx(lpips.mean(*pairs, value_range=(0, 255)), rel=1e-5)


def test_win_rate_is_paired_by_prompt_and_ties_count_half() -> None:
    rng = np.random.default_rng(0)
    prompts = ["a", "a", "b", "b", "c"]
    student, teacher = np.array([2.0, 0.0, 1.0, 1.0, 3.0]), np.array([1.0, 1.0, 1.0, 1.0, 1.0])
    won = win_rate(student, teacher, prompts, rng)
    assert won.prompts == 3
    assert won.rate == pytest.approx((0.5 + 0.5 + 1.0) / 3)
    assert won.low <= won.rate <= won.high
    many = [str(i) for i in range(4000)]
    better = win_rate(rng.normal(size=4000) + 1.0, rng.normal(size=4000), many, rng)
    assert better.rate == pytest.approx(0.76, abs=0.02)  # P(N(1, 2) > 0)
    assert better.high - better.low == pytest.approx(4 * np.sqrt(0.76 * 0.24 / 4000), rel=0.15)
    with pytest.raises(ValueError, match="as many of each"):
        win_rate(student, teacher[:3], prompts, rng)
