"""Files, ranges, crops and sizes on the way to a feature network: what users reported, each with the right value."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stepdistill.errors import UserError
from stepdistill.evaluation.images import PixelChain, as_uint8, indices_of_rank, list_images, read_image
from stepdistill.evaluation.networks.resize import INCEPTION_SIZE, RESIZE_MODES, resize_for_inception


def save(path: Path, array: np.ndarray, mode: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path)
    return path


RED = np.full((6, 9, 3), (200, 10, 20), np.uint8)


# ---------------------------------------------------------------- ranges


def test_every_stated_range_gives_the_same_bytes() -> None:
    """torchmetrics 1339, 1244: float [0, 1], float [-1, 1] and uint8 of one picture."""
    levels = np.arange(256, dtype=np.float64).reshape(1, 8, 32, 1).repeat(3, axis=3)
    expected = levels.astype(np.uint8)
    assert (as_uint8(expected) == expected).all()
    assert (as_uint8(torch.from_numpy(levels / 255).permute(0, 3, 1, 2).float(), (0, 1)) == expected).all()
    assert (as_uint8(levels / 127.5 - 1, (-1, 1)) == expected).all()


def test_floor_is_what_scripts_that_truncate_do() -> None:
    x = torch.tensor([-1.0, -0.999, 0.0, 0.5, 1.0]).reshape(1, 1, 5, 1).expand(1, 3, 5, 1)
    theirs = ((x + 1) * 127.5).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert (as_uint8(x, (-1, 1), "floor") == theirs).all()
    assert (as_uint8(x, (-1, 1)) != theirs).any()


@pytest.mark.parametrize(
    ("images", "value_range", "words"),
    [
        (
            np.full((1, 4, 4, 3), 1.01),
            (0, 1),
            r"float64 in \[1.01, 1.01\].*said to be \[0, 1\]",
        ),  # wraps to 1 elsewhere
        (np.full((1, 4, 4, 3), -0.5), (0, 1), "said to be"),
        (np.full((1, 4, 4, 3), 0.5), None, r"value_range=\(0, 1\)"),
        (np.full((1, 4, 4, 3), np.nan), (0, 1), "NaN or infinity"),
        (np.zeros((1, 4, 4, 3), np.int64), (0, 1), "int64"),
        (np.zeros((1, 4, 4, 3), np.uint8), (0, 1), "leave it out"),
        (np.zeros((4, 4, 3), np.uint8), None, "shape"),
        (np.zeros((1, 4, 4, 1), np.uint8), None, "shape"),
    ],
)
def test_a_wrong_range_is_refused_with_type_and_extremes(
    images: np.ndarray, value_range: tuple[float, float] | None, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        as_uint8(images, value_range)


def test_a_decoders_overshoot_is_clamped_never_wrapped() -> None:
    assert (
        as_uint8(np.array([-0.0005, 1.0005]).reshape(1, 1, 2, 1).repeat(3, 3), (0, 1)).ravel().tolist()
        == [0] * 3 + [255] * 3
    )


# ---------------------------------------------------------------- files


def test_greys_palettes_and_transparency_become_rgb(tmp_path: Path) -> None:
    """pytorch-fid 1, 12: 'axes don't match array'."""
    assert (read_image(save(tmp_path / "l.png", RED, "L")) == read_image(tmp_path / "l.png")[:, :, :1]).all()
    assert read_image(save(tmp_path / "p.png", RED, "P")).shape == (6, 9, 3)
    half = np.dstack([RED, np.full((6, 9), 0, np.uint8)])
    assert (read_image(save(tmp_path / "a.png", half)) == 255).all()
    assert (read_image(tmp_path / "a.png", background=(0, 0, 7)) == (0, 0, 7)).all()


def test_folders_are_checked_before_anything_is_measured(tmp_path: Path) -> None:
    """pytorch-fid 94, 104, 106, 42, 51: 'batch_size=0', 'range() arg 3 must not be zero'."""
    file = save(tmp_path / "one" / "a.png", RED)
    with pytest.raises(UserError, match="is a file"):
        list_images(file)
    with pytest.raises(UserError, match="no folder"):
        list_images(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no file at all"):
        list_images(tmp_path / "empty")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"suffixes found: \.txt"):
        list_images(tmp_path / "texts")
    with pytest.raises(UserError, match="sub-folders were not searched"):
        list_images(tmp_path)
    assert list_images(tmp_path, recursive=True) == [file]


def test_lossy_files_are_taken_only_when_asked_for(tmp_path: Path) -> None:
    """GeoDiffusion 13: PNG against JPEG moves the distance."""
    save(tmp_path / "a.jpg", RED)
    with pytest.raises(UserError, match=r"JPEG or WebP \(first: 'a.jpg'\)"):
        list_images(tmp_path)
    assert len(list_images(tmp_path, allow_lossy=True)) == 1


def test_a_corrupt_or_deep_image_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match=r"a\.png.*cannot be read"):
        read_image(path)
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match="more than 8 bits"):
        read_image(tmp_path / "deep.png")


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize("mode", RESIZE_MODES)
def test_width_and_height_stay_apart(mode: str) -> None:
    """clean-fid 2, 7: a 200 x 300 picture whose left half is dark must be dark on the left."""
    image = np.zeros((200, 300, 3), np.uint8)
    image[:, 150:] = 240
    resized = resize_for_inception(image, mode)
    assert resized.shape == (3, INCEPTION_SIZE, INCEPTION_SIZE)
    assert resized[:, :, :140].max() < 1
    assert resized[:, :, 160:].min() > 239
    assert resize_for_inception(np.ascontiguousarray(image.transpose(1, 0, 2)), mode).allclose(
        resized.transpose(1, 2), atol=1e-3
    )


def test_the_three_modes_differ_where_they_should() -> None:
    """A fine checkerboard, reduced: antialias makes grey of it, the legacy modes alias. At 299 pixels all agree."""
    board = np.indices((600, 600)).sum(0) % 2 * 255
    board = board.astype(np.uint8)[:, :, None].repeat(3, axis=2)
    spread = {mode: float(resize_for_inception(board, mode).std()) for mode in RESIZE_MODES}
    assert spread["clean"] < 5 < min(spread["legacy_pytorch"], spread["legacy_tensorflow"])
    same = np.random.default_rng(0).integers(0, 256, (INCEPTION_SIZE, INCEPTION_SIZE, 3), dtype=np.uint8)
    for mode in RESIZE_MODES:
        assert resize_for_inception(same, mode).sub(torch.from_numpy(same).permute(2, 0, 1)).abs().max() < 1e-2


def test_bilinear_modes_against_values_by_hand() -> None:
    """Two columns, 0 and 255, to 299: TensorFlow 1 samples at i 2/299, PyTorch at (i + 1/2) 2/299 - 1/2."""
    pair = np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8).repeat(2, axis=0)
    position = np.arange(INCEPTION_SIZE) * 2 / INCEPTION_SIZE
    tensorflow = 255 * np.clip(position, 0, 1)
    pytorch = 255 * np.clip(position + 1 / INCEPTION_SIZE - 0.5, 0, 1)
    np.testing.assert_allclose(resize_for_inception(pair, "legacy_tensorflow")[0, 7], tensorflow, atol=1e-3)
    np.testing.assert_allclose(resize_for_inception(pair, "legacy_pytorch")[0, 7], pytorch, atol=1e-3)


def test_pixel_chains() -> None:
    image = np.zeros((40, 60, 3), np.uint8)
    image[10:30, 20:40] = 250
    assert PixelChain("square", 8)(image).shape == (8, 8, 3)
    patch = PixelChain("patch", 20)(image)
    assert patch.shape == (20, 20, 3)
    assert (patch == 250).all()
    assert PixelChain("patch", 299)(image) is image
    assert PixelChain()(image) is image
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 99
    assert (PixelChain("square")(wide) == 99).all()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_shards_cover_everything_once(world: int) -> None:
    """accelerate 575: padded samplers count the last images twice."""
    indices = [i for rank in range(world) for i in indices_of_rank(97, rank, world)]
    assert sorted(indices) == list(range(97))
