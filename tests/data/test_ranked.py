"""Pairs of a winner and a loser: from two folders, and from two columns of a data set with its judges' votes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.image_sources import data, encoded, picture, pixels
from support.tiny_checkpoints import refusal

from stepdistill.data.images.opening import open_images
from stepdistill.data.images.preference_pairs import PreferencePairs, open_preference_pairs

SIZE = (20, 30)


def ranked(images: str | Path, **options: Any) -> PreferencePairs:
    config = data(images, **options)
    return open_preference_pairs(config, open_images(config, SIZE, 0))


def folders(root: Path, winners: range, losers: range) -> tuple[Path, Path]:
    made = []
    for side, numbers in enumerate((winners, losers)):
        folder = root / str(side)
        folder.mkdir()
        for k in numbers:
            picture(10 * side + k).save(folder / f"{k}.png")
            (folder / f"{k}.txt").write_text(f"caption {side} {k}")
        made.append(folder)
    return made[0], made[1]


def test_folders_pair_by_name(tmp_path: Path) -> None:
    winners, losers = folders(tmp_path, range(3), range(4))
    images = ranked(winners, losers=str(losers))
    assert len(images) == 3
    for k in range(3):
        item = images[k]
        assert item.caption == f"caption 0 {k}"
        assert torch.equal(item.image, pixels(picture(k)))
        assert item.loser is not None
        assert torch.equal(item.loser, pixels(picture(10 + k)))


def test_both_are_cut_alike(tmp_path: Path) -> None:
    """A pair of one picture is one picture after cropping and mirroring."""
    winners, _ = folders(tmp_path, range(2), range(2))
    config = data(winners, losers=str(winners), crop="random", flip=True)
    images = open_preference_pairs(config, open_images(config, (12, 12), 0))
    for k in range(2):
        assert torch.equal(images[k].image, images[k].loser)  # type: ignore[arg-type]


def test_a_pair_goes_as_a_whole(tmp_path: Path) -> None:
    winners, losers = folders(tmp_path, range(3), range(3))
    (losers / "1.png").write_bytes(encoded(11, broken=True))
    images = ranked(winners, losers=str(losers), max_bad_share=0.5)
    item = images[1]
    assert item.index == 2
    assert images.unreadable_names == ("1.png",)


def test_votes_of_a_data_set(tmp_path: Path) -> None:
    """The second image wins where it has more votes; ties are left out."""
    datasets = pytest.importorskip("datasets")
    columns = {
        "jpg_0": [encoded(k) for k in range(3)], "jpg_1": [encoded(10 + k) for k in range(3)],
        "label_0": [1.0, 0.5, 0.0], "caption": [f"caption {k}" for k in range(3)],
    }  # fmt: skip
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "part-0.parquet")
    options = {"image_column": "jpg_0", "losers": "jpg_1"}
    images = ranked(f"hf:{tmp_path}", preferred_column="label_0", **options)
    assert len(images) == 2
    for index, (winner, loser, row) in enumerate(((0, 10, 0), (12, 2, 2))):
        item = images[index]
        assert torch.equal(item.image, pixels(picture(winner)))
        assert item.loser is not None
        assert torch.equal(item.loser, pixels(picture(loser)))
        assert item.caption == f"caption {row}"
    assert len(ranked(f"hf:{tmp_path}", **options)) == 3
    refusal(lambda: ranked(f"hf:{tmp_path}", preferred_column="label", **options), "no column 'label'")
    refusal(lambda: ranked(f"hf:{tmp_path}", preferred_column="caption", **options), "outside of [0, 1]")


def test_what_has_no_loser_is_refused(tmp_path: Path) -> None:
    winners, losers = folders(tmp_path, range(3), range(2))
    refusal(lambda: ranked(winners, losers=str(losers)), "1 of 3 images", "'2.png'")
    refusal(lambda: ranked(winners), "data.losers is not set")
