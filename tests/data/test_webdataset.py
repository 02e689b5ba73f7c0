"""WebDataset shards: conventions, damage, order, resume."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from support.image_runs import resumes_exactly
from support.image_sources import by_sample, data, encoded, picture, pixels, same, spawned
from support.tiny_checkpoints import refusal

from stepdistill.data.images.opening import open_images
from stepdistill.data.images.source import CropTransform
from stepdistill.data.images.webdataset import TarImages, expand_pattern
from stepdistill.diffusion.draws import generator

WHOLE = CropTransform((20, 30))


def write_tar(path: Path, members: Mapping[str, bytes | str]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            body = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return path


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """Three shards of 4, 4 and 3 images."""
    for shard, rows in enumerate((range(4), range(4, 8), range(8, 11))):
        members = {}
        for row in rows:
            members |= {f"{row:04d}.png": encoded(row), f"{row:04d}.txt": f"picture\n {row}"}
        write_tar(tmp_path / f"part-{shard:03d}.tar", members)
    return str(tmp_path / "part-{000..002}.tar")


def test_samples_of_shards(shards: str) -> None:
    images = TarImages(shards, WHOLE)
    assert (len(images), images.count) == (11, 11)
    for row, item in enumerate(images):
        assert torch.equal(item.image, pixels(picture(row)))
        assert (item.caption, item.index) == (f"picture {row}", row)
    assert images[9].name == "part-002.tar:0009.png"


def test_members_by_the_conventions_of_webdataset(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = {
        "a/1.json": json.dumps({"caption": "from json", "title": "a title"}),
        "a/1.png": encoded(0),
        "b/1.PNG": encoded(1),
        "b/1.caption": "from caption",
        "2.txt": "without an image",
        "3.seg.png": encoded(2),
        "4.png": encoded(3),
        "5.txt": "from txt",
        "5.json": json.dumps({"title": "another title"}),
        "5.webp": encoded(4),
        "._4.png": b"resource fork",
    }
    path = str(write_tar(tmp_path / "a.tar", members))
    images = TarImages(path, WHOLE)
    assert [(item.name, item.caption) for item in images] == [
        ("a.tar:a/1.png", "from json"), ("a.tar:b/1.png", "from caption"), ("a.tar:4.png", ""), ("a.tar:5.webp", "from txt"),
    ]  # fmt: skip
    assert "left out 2 samples" in caplog.text
    assert "1 of 4 images" in caplog.text
    titled = TarImages(path, WHOLE, caption_column="title")
    assert [item.caption for item in titled] == ["a title", "from caption", "", "another title"]


def test_broken_images_are_counted_named_and_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = (2, 3, 9)
    members = {f"{row}.png": encoded(row, broken=row in broken) for row in range(10)}
    path = str(write_tar(tmp_path / "a.tar", members))
    images = TarImages(path, WHOLE, max_bad_share=0.3)
    assert [item.index for item in images] == [0, 1, 4, 4, 4, 5, 6, 7, 8, 0]
    assert torch.equal(images[2].image, pixels(picture(4)))
    assert images.verify(workers=2) == images.unreadable_names == ("a.tar:2.png", "a.tar:3.png", "a.tar:9.png")
    assert caplog.text.count("skipping unreadable image a.tar:3.png") == 1
    strict = TarImages(path, WHOLE, max_bad_share=0.1)
    refusal(strict.verify, "3 of 10 images (30.0%)", "a.tar", "'a.tar:2.png' (", "10.0%")


def test_a_caption_that_cannot_be_read_spoils_its_sample(tmp_path: Path) -> None:
    members = {"a.png": encoded(0), "a.json": "{", "b.png": encoded(1), "b.txt": b"gr\xfcn", "c.png": encoded(2)}
    members |= {"d.png": encoded(3), "d.json": '{"text": 3}', "e.png": encoded(4), "e.json": "[]"}
    images = TarImages(str(write_tar(tmp_path / "a.tar", members)), WHOLE, max_bad_share=1)
    assert {item.index for item in images} == {2}
    assert len(images.unreadable_names) == 4


@pytest.mark.parametrize(("cut", "left"), [("in the last pixels", 3), ("in a header", 3), ("before the end", 4)])
def test_a_shard_that_is_cut_short(tmp_path: Path, cut: str, left: int, caplog: pytest.LogCaptureFixture) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{row}.png": encoded(row) for row in range(4)})
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    blocks = -(-last.size // 512) * 512
    length = {"in the last pixels": last.offset_data + 99, "in a header": last.offset + 99}.get(
        cut, last.offset_data + blocks
    )
    path.write_bytes(path.read_bytes()[:length])
    images = TarImages(str(path), WHOLE)
    assert [item.index for item in images] == list(range(left))
    assert f"{path} breaks off after its first {left} members" in caplog.text


def test_a_whole_shard_is_not_called_cut(shards: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        TarImages(shards, WHOLE)
    assert caplog.text == ""


def test_patterns(shards: str, tmp_path: Path) -> None:
    names = [path.name for path in expand_pattern(shards)]
    assert names == ["part-000.tar", "part-001.tar", "part-002.tar"]
    assert [path.name for path in expand_pattern(str(tmp_path / "part-*.tar"))] == names
    assert [path.name for path in expand_pattern(str(tmp_path / "part-00{0..1}.tar"))] == names[:2]
    refusal(lambda: expand_pattern(str(tmp_path / "part-{000..004}.tar")), "part-003.tar")
    refusal(lambda: expand_pattern(str(tmp_path / "none-*.tar")), "none-*.tar")


def test_shards_that_are_refused(tmp_path: Path) -> None:
    refusal(lambda: TarImages(str(write_tar(tmp_path / "a.tar", {"a.txt": "x"})), WHOLE), "no image", "0001.jpg")
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz"):
        pass
    refusal(
        lambda: open_images(data(tmp_path / "b.tar.gz"), (16, 16), 0), "b.tar.gz", "no uncompressed tar file", "unpack"
    )
    (tmp_path / "c.tar").write_bytes(b"")
    refusal(lambda: TarImages(str(tmp_path / "c.tar"), WHOLE), "c.tar", "no uncompressed tar file")
    refusal(
        lambda: open_images(data(tmp_path / "a.tar", streaming=True), (16, 16), 0), "data.streaming", "is not streamed"
    )


def test_a_sample_is_the_same_however_it_is_read(shards: str) -> None:
    config = data(shards, crop="random", flip=True)
    source = open_images(config, (16, 16), seed=0)
    whole = by_sample(source, range(24))
    fresh = open_images(config, (16, 16), seed=0)
    threads = by_sample(fresh, range(24), workers=3, batch=6)
    assert all(same(*pair) for pair in zip(whole, threads, strict=True))
    later = by_sample(open_images(config, (16, 16), seed=0), range(13, 24))
    assert all(same(*pair) for pair in zip(whole[13:], later, strict=True))
    assert len({item.index for item in whole[:11]}) == 11


def test_a_spawned_process_reads_the_same(shards: str) -> None:
    config = data(shards, crop="random", flip=True)
    source = open_images(config, (16, 16), seed=0)
    item = source.read(3, generator(7))
    assert all(same(item, other) for other in spawned(config, source, 3))


def test_resume_is_bit_identical(shards: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """In the middle of the first epoch (11 images, 4 seen), and with threads."""
    assert resumes_exactly(tiny("sd"), tmp_path / "runs", images=shards, crop="random", flip=True, workers=2)
