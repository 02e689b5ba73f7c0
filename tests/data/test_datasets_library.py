"""Data sets of the `datasets` library, on disk and streamed: order, damage, resume. No network."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import datasets
import fsspec
import pytest
import torch
from support.image_runs import resumes_exactly, run_config
from support.image_sources import by_sample, data, encoded, picture, pixels, read_again, same, spawned
from support.tiny_checkpoints import refusal

from stepdistill.data.hub import open_dataset, open_image_cell
from stepdistill.data.images.datasets_library import HubImages
from stepdistill.data.images.opening import open_images
from stepdistill.data.images.source import CropTransform, decode
from stepdistill.data.images.stream import SHUFFLE_BLOCK, ImageStream, ShardGroup
from stepdistill.data.prompts import read_prompts
from stepdistill.diffusion.draws import generator
from stepdistill.training.description import describe_run
from stepdistill.training.run import open_run, train
from stepdistill.training.setup import prepare

WHOLE = CropTransform((20, 30))
FEATURES = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def table(rows: Sequence[int], broken: Sequence[int] = ()) -> datasets.Dataset:
    cells = {
        "image": [{"bytes": encoded(row, broken=row in broken), "path": None} for row in rows],
        "text": [f"picture  {row}" for row in rows],
    }
    return datasets.Dataset.from_dict(cells, features=FEATURES)


def saved(path: Path, rows: int = 7, broken: Sequence[int] = ()) -> Path:
    table(range(rows), broken).save_to_disk(path)
    return path


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """Five parquet files of 5, 4, 3, 2 and 1 rows, which four lanes read."""
    folder, first = tmp_path / "photos", 0
    folder.mkdir()
    for number, count in enumerate((5, 4, 3, 2, 1)):
        table(range(first, first + count)).to_parquet(folder / f"train-{number:05d}-of-00005.parquet")
        first += count
    return folder


# on this disk


def test_rows_of_a_saved_data_set(tmp_path: Path) -> None:
    images = open_images(data(f"hf:{saved(tmp_path / 'set')}"), (20, 30), seed=0)
    assert isinstance(images, HubImages)
    assert (images.count, images.name_of(3)) == (7, "row 3")
    for row, item in enumerate(images):
        assert torch.equal(item.image, pixels(picture(row)))
        assert (item.caption, item.index) == (f"picture {row}", row)


def test_folders_and_splits(tmp_path: Path, parquet: Path) -> None:
    assert open_images(data(f"hf:{parquet}"), (20, 30), seed=0).count == 15
    datasets.DatasetDict({"train": table(range(3)), "test": table(range(2))}).save_to_disk(tmp_path / "splits")
    assert open_images(data(f"hf:{tmp_path / 'splits'}", split="test"), (20, 30), seed=0).count == 2
    (tmp_path / "files").mkdir()
    for row in range(4):
        picture(row).save(tmp_path / f"files/{row}.png")
    images = open_images(data(f"hf:{tmp_path / 'files'}"), (20, 30), seed=0)
    item = images.read(2, generator(0))
    assert torch.equal(item.image, pixels(picture(2)))
    assert item.caption == ""


def test_columns(tmp_path: Path) -> None:
    renamed = table(range(3)).rename_columns({"image": "photo", "text": "title"}).add_column("id", [1, 2, 3])
    renamed.save_to_disk(tmp_path / "set")
    name = f"hf:{tmp_path / 'set'}"
    images = open_images(data(name, image_column="photo", caption_column="title"), (20, 30), seed=0)
    assert images.read(1, generator(0)).caption == "picture 1"
    refusal(lambda: open_images(data(name), (20, 30), 0), "no column 'image'", "'photo'")
    wrong = data(name, image_column="photo", caption_column="titel")
    refusal(lambda: open_images(wrong, (20, 30), 0), "no column 'titel'", "did you mean 'title'")
    refusal(lambda: open_images(data(name, image_column="id"), (20, 30), 0), "'id'", "no images", "data.image_column")


def test_data_sets_that_are_refused(tmp_path: Path, parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal(lambda: open_dataset(str(parquet), "tset", streaming=False), "cannot be opened", "tset")
    refusal(lambda: open_dataset(str(parquet), "tset", streaming=True), "cannot be opened", "tset")
    datasets.DatasetDict({"train": table(range(3))}).save_to_disk(tmp_path / "splits")
    refusal(lambda: open_dataset(str(tmp_path / "splits"), "tset", streaming=False), "no split 'tset'", "'train'")
    (tmp_path / "empty").mkdir()
    refusal(lambda: open_dataset(str(tmp_path / "empty"), "train", streaming=False), "cannot be opened")
    (tmp_path / "empty/a.parquet").write_bytes(b"PAR1 no")
    refusal(lambda: open_dataset(str(tmp_path / "empty"), "train", streaming=False), "cannot be opened")
    refusal(lambda: HubImages(table([]), "hf:none", WHOLE), "'hf:none'", "no rows")
    monkeypatch.setitem(sys.modules, "datasets", None)
    refusal(lambda: open_dataset(str(parquet), "train", streaming=False), "datasets", "pip install 'stepdistill[data]'")


def test_broken_rows_are_counted_named_and_replaced(tmp_path: Path) -> None:
    name = f"hf:{saved(tmp_path / 'set', 10, broken=(2, 3, 9))}"
    images = open_images(data(name, max_bad_share=0.3), (20, 30), seed=0)
    items = [images.read(row, generator(row)) for row in range(10)]
    assert [item.index for item in items] == [0, 1, 4, 4, 4, 5, 6, 7, 8, 0]
    assert images.unreadable_names == ("row 2", "row 3", "row 9")
    strict = open_images(data(name, max_bad_share=0.1), (20, 30), seed=0)
    refusal(lambda: [strict.read(row, generator(row)) for row in range(10)], "2 of 10 images", "'row 2'", "10.0%")


def test_threads_share_a_data_set(tmp_path: Path) -> None:
    images = open_images(data(f"hf:{saved(tmp_path / 'set')}", crop="random", flip=True), (16, 16), seed=0)
    one, many = by_sample(images, range(42)), by_sample(images, range(42), workers=4, batch=6)
    assert all(same(*pair) for pair in zip(one, many, strict=True))


def test_a_cell_may_name_a_file_of_its_data_set_only(tmp_path: Path) -> None:
    photos, outside = tmp_path / "photos", tmp_path / "2.png"
    photos.mkdir()
    picture(1).save(photos / "1.png")
    picture(2).save(outside)
    with zipfile.ZipFile(photos / "more.zip", "w") as archive:
        archive.writestr("3.png", encoded(3))
    with fsspec.open("memory://photos/2.png", "wb") as file:
        file.write(encoded(2))
    os.mkfifo(photos / "pipe.png")
    (photos / "link.png").symlink_to(outside)
    source = f"hf:{photos}"
    for row, path in ((1, f"{photos}/1.png"), (3, f"zip://3.png::{photos}/more.zip")):
        assert decode(open_image_cell({"bytes": None, "path": path}, source)).tobytes() == picture(row).tobytes()
    assert decode(open_image_cell(encoded(3), source)).tobytes() == picture(3).tobytes()
    for path in (
        str(outside),
        f"{photos}/../2.png",
        f"{photos}/pipe.png",
        f"{photos}/link.png",
        "memory://photos/2.png",
        f"memory://photos::{photos}/1.png",
        "ftp://127.0.0.1/2.png",
        "hf://datasets/other/2.png",
    ):
        with pytest.raises(OSError, match="outside of the data set"):
            open_image_cell({"bytes": None, "path": path}, source)
    for cell in (None, "1.png", {"bytes": None, "path": None}):
        with pytest.raises(TypeError, match="instead of an image"):
            open_image_cell(cell, source)


def test_prompts_of_a_data_set(tmp_path: Path) -> None:
    name = f"hf:{saved(tmp_path / 'set', 3)}"
    prompts = read_prompts(name)
    assert (prompts.texts, prompts.source) == (("picture  0", "picture  1", "picture  2"), name)
    refusal(lambda: read_prompts(name, "txet"), "'txet'", "'text'")


# streams


def numbered(shards: Sequence[int], opened: list[int] | None = None) -> datasets.IterableDataset:
    """A stream with as many rows in each file shard; a row's number is 1000 x shard + place."""

    def rows(numbers: list[tuple[int, int]]) -> Iterator[dict[str, int]]:
        for shard, count in numbers:
            if opened is not None:
                opened.append(shard)
            yield from ({"n": 1000 * shard + place} for place in range(count))

    return datasets.IterableDataset.from_generator(rows, gen_kwargs={"numbers": list(enumerate(shards))})


def lane_rows(shard_group: ShardGroup, start: int, stop: int) -> list[int]:
    return [shard_group.row(position).cells["n"] for position in range(start, stop)]


SHARDS = (50, 3, 40, 0, 17, 9)
LENGTH = 50 + 40 + 17


def test_an_epoch_of_a_lane_shows_each_of_its_rows_once() -> None:
    shard_group = ShardGroup(numbered(SHARDS), 0, 2, seed=1)
    assert shard_group.length is None
    epochs = [lane_rows(shard_group, LENGTH * epoch, LENGTH * (epoch + 1)) for epoch in range(3)]
    wanted = [1000 * shard + place for shard in (0, 2, 4) for place in range(SHARDS[shard])]
    assert all(sorted(epoch) == wanted for epoch in epochs)
    assert shard_group.length == LENGTH
    assert len({tuple(epoch) for epoch in epochs}) == 3
    # another order of the files, not of the blocks alone
    assert (
        len({epoch[0] // 1000 for epoch in [lane_rows(ShardGroup(numbered(SHARDS), 0, 2, s), 0, 1) for s in range(9)]})
        == 3
    )
    assert lane_rows(ShardGroup(numbered(SHARDS), 1, 2, 1), 0, 12) != sorted(
        lane_rows(ShardGroup(numbered(SHARDS), 1, 2, 1), 0, 12)
    )


def test_a_row_is_a_function_of_its_position() -> None:
    stream = numbered(SHARDS)
    whole = lane_rows(ShardGroup(stream, 0, 2, seed=1), 0, 3 * LENGTH)
    for start in (1, SHUFFLE_BLOCK, LENGTH - 1, LENGTH, 2 * LENGTH + 40):
        assert lane_rows(ShardGroup(stream, 0, 2, seed=1), start, start + 60) == whole[start : start + 60]
    backwards = ShardGroup(stream, 0, 2, seed=1)
    assert [backwards.row(position).cells["n"] for position in reversed(range(0, 3 * LENGTH, 7))] == whole[::7][::-1]
    restored = pickle.loads(
        pickle.dumps(ShardGroup(datasets.Dataset.from_dict({"n": range(9)}).to_iterable_dataset(3), 0, 2, 1))
    )
    assert sorted(lane_rows(restored, 0, 6)) == [0, 1, 2, 6, 7, 8]


def test_lanes_that_are_refused() -> None:
    refusal(lambda: ShardGroup(numbered((3, 0, 3, 0)), 1, 2, seed=0).row(0), "file shard 1", "every 2th", "no rows")
    shard_group = ShardGroup(numbered((3,)), 0, 1, seed=0)
    lane_rows(shard_group, 0, 4)
    shard_group.dataset = numbered((2,))
    refusal(lambda: lane_rows(shard_group, 4, 12), "file shard 0", "had 3 rows and now has 2")


@pytest.mark.parametrize(("shards", "shard_groups"), [(1, 1), (3, 2), (5, 4), (8, 8), (40, 8)])
def test_lanes_of_a_stream(shards: int, shard_groups: int) -> None:
    stream = ImageStream(table(range(shards)).to_iterable_dataset(shards), "hf:it", WHOLE, seed=0)
    assert len(stream.shard_groups) == shard_groups
    assert sorted(file for shard_group in stream.shard_groups for file in shard_group.files) == list(range(shards))


def test_a_process_opens_its_own_lanes_only() -> None:
    opened: list[int] = []
    shard_groups = [ShardGroup(numbered((5,) * 8, opened), shard_group, 8, seed=0) for shard_group in range(8)]
    for number in range(0, 24, 2):  # process 0 of 2, batches of 1
        shard_groups[number % 8].row(number // 8)
    assert sorted(opened) == [0, 2, 4, 6]


def test_samples_of_a_stream(parquet: Path) -> None:
    config = data(f"hf:{parquet}", streaming=True)
    source = open_images(config, (20, 30), seed=0)
    assert isinstance(source, ImageStream)
    assert (source.count, len(source.shard_groups)) == (None, 4)
    # the longest lane has the files of 5 and 1 rows
    items = by_sample(source, range(4 * 6))
    assert {item.caption for item in items} == {f"picture {row}" for row in range(15)}
    for item in items:
        row = int(item.caption.split()[1])
        assert torch.equal(item.image, pixels(picture(row)))
    assert {item.caption for item in items[0::4]} == {f"picture {row}" for row in (0, 1, 2, 3, 4, 14)}


def test_a_sample_is_the_same_however_the_stream_is_read(parquet: Path) -> None:
    config = data(f"hf:{parquet}", streaming=True, crop="random", flip=True)
    whole = by_sample(open_images(config, (16, 16), seed=0), range(60))
    threads = by_sample(open_images(config, (16, 16), seed=0), range(60), workers=4, batch=12)
    assert all(same(*pair) for pair in zip(whole, threads, strict=True))
    later = by_sample(open_images(config, (16, 16), seed=0), range(37, 60))
    assert all(same(*pair) for pair in zip(whole[37:], later, strict=True))
    other = by_sample(open_images(config, (16, 16), seed=1), range(60))
    assert [item.name for item in other] != [item.name for item in whole]


def test_broken_images_of_a_stream(tmp_path: Path) -> None:
    stream = ImageStream(table(range(10), (2, 3, 9)).to_iterable_dataset(1), "hf:it", WHOLE, 0, max_bad_share=0.03)
    items = by_sample(stream, range(20))
    assert {item.caption for item in items} == {f"picture {row}" for row in (0, 1, 4, 5, 6, 7, 8)}
    assert stream.unreadable_names == ("row 2 of file shard 0", "row 3 of file shard 0", "row 9 of file shard 0")
    plain = ImageStream(table(range(10)).to_iterable_dataset(1), "hf:it", WHOLE, 0)
    wanted = [item.caption for item in by_sample(plain, range(20))]
    # each is replaced by the next of its lane, and nothing else moves
    for number in reversed(range(19)):
        if wanted[number] in ("picture 2", "picture 3", "picture 9"):
            wanted[number] = wanted[number + 1]
    assert [item.caption for item in items[:19]] == wanted[:19]
    strict = ImageStream(table(range(10), (2, 3, 9)).to_iterable_dataset(1), "hf:it", WHOLE, 0, max_bad_share=0.02)
    refusal(lambda: by_sample(strict, range(10)), "3 of 100 images (3.0%)", "'hf:it'", "2.0%")
    hopeless = ImageStream(table([0, 1], (0, 1)).to_iterable_dataset(1), "hf:it", WHOLE, 0, max_bad_share=1)
    refusal(lambda: by_sample(hopeless, range(2)), "lane 0", "no readable image")


def failing(shards: list[int]) -> Iterator[dict[str, object]]:
    yield from ({"image": picture(row), "text": ""} for row in range(3))
    raise RuntimeError("the line went dead")


def test_an_error_of_a_stream_is_not_taken_for_its_end() -> None:
    stream = datasets.IterableDataset.from_generator(failing, FEATURES, gen_kwargs={"shards": [0]})
    images = ImageStream(stream, "hf:it", WHOLE, 0)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="went dead"):
            images.read(0, generator(0))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_a_stream_ends_the_run(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    config = run_config(tiny("sd"), 4, images=f"hf:{saved(tmp_path / 'set')}", streaming=True, workers=workers)

    def dead(self: ShardGroup, position: int) -> None:
        raise RuntimeError("the line went dead")

    monkeypatch.setattr(ShardGroup, "row", dead)
    with pytest.raises(RuntimeError, match="went dead"):
        train(config, tmp_path / "run")


@pytest.mark.ci
@pytest.mark.parametrize("streaming", [False, True])
def test_a_spawned_process_reads_the_same(parquet: Path, streaming: bool) -> None:
    config = data(f"hf:{parquet}", streaming=streaming, crop="random", flip=True)
    source = open_images(config, (16, 16), seed=0)
    item = read_again(source, 3)
    assert all(same(item, other) for other in spawned(config, source, 3))


def test_a_dry_run_and_an_export_know_of_streams(parquet: Path, tiny: Callable[..., Path], tmp_path: Path) -> None:
    config = run_config(tiny("sd"), 1, 1, images=f"hf:{parquet}", streaming=True)
    assert any(
        line.endswith("prompts from builtin:general, a stream of images") for line in describe_run(prepare(config))
    )
    train(config, tmp_path / "run")
    shutil.rmtree(parquet)
    assert open_run(tmp_path / "run")[0].setup.images is None


@pytest.mark.parametrize("streaming", [False, True])
def test_resume_is_bit_identical(parquet: Path, tiny: Callable[..., Path], tmp_path: Path, streaming: bool) -> None:
    """In the middle of the first epoch: 4 of 15 images seen."""
    options = {"images": f"hf:{parquet}", "streaming": streaming, "crop": "random", "flip": True}
    assert resumes_exactly(tiny("sd"), tmp_path / "runs", **options)
