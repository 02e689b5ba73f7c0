"""Prompts, image folders, the order of samples, and collected latents on disk."""

from __future__ import annotations

import io
import itertools
import json
import logging
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stepdistill.data.images import source
from stepdistill.data.images.folder import ImageFolder
from stepdistill.data.images.source import Crop, CropTransform, ImageBatch, to_rgb
from stepdistill.data.latents import latent_shards
from stepdistill.data.latents.latent_shards import ShardWriter, TensorFolder, noise_for
from stepdistill.data.latents.shard_index import Fingerprint, shard_name
from stepdistill.data.loader import EpochOrder, Prefetcher, SampledDataset
from stepdistill.data.prompts import builtin_prompt_lists, read_prompts
from stepdistill.diffusion.draws import generator
from stepdistill.errors import UserError


def refused(action: Callable[[], object], *wanted: str) -> None:
    """`action` is refused, in one sentence that holds every piece of `wanted`."""
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert not re.search(r"[.!?]\s+[A-Z]", message)
    assert not message.endswith(".")
    for piece in wanted:
        assert piece in message, message


# prompts


def test_lines_of_a_text_file_are_prompts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa cat, asleep\r\n\r\n  # not a comment  \nä dog\u2028still the dog\n".encode())
    prompts = read_prompts(file)
    assert prompts.texts == ("a cat, asleep", "# not a comment", "ä dog\u2028still the dog")
    assert (prompts.source, len(prompts), prompts[1]) == (str(file), 3, "# not a comment")


def test_the_hash_is_of_the_texts_not_of_the_format(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo, three\n")
    (tmp_path / "a.jsonl").write_text('{"prompt": "one"}\n\n{"prompt": "two, three"}\n')
    (tmp_path / "a.csv").write_text('id,text\n1,one\n2,"two, three"\n')
    (tmp_path / "b.txt").write_text("one\ntwo\nthree\n")
    lists = [read_prompts(tmp_path / name) for name in ("a.txt", "a.jsonl", "a.csv")]
    assert {prompts.texts for prompts in lists} == {("one", "two, three")}
    assert len({prompts.sha256 for prompts in lists}) == 1
    assert read_prompts(tmp_path / "b.txt").sha256 != lists[0].sha256


@pytest.mark.parametrize("key", ["prompt", "text", "caption"])
def test_the_column_is_found(tmp_path: Path, key: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": 1, key: "a fox"}))
    assert read_prompts(str(tmp_path / "a.jsonl")).texts == ("a fox",)


def test_empty_rows_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "a.csv"
    file.write_text("\ufeffprompt,mine\nx,a\ny,\nz,  \n", encoding="utf-8")
    assert read_prompts(file, "mine").texts == ("a",)
    assert "left out 2 of 3 rows" in caplog.text


def test_prompt_files_that_are_refused(tmp_path: Path) -> None:
    def written(name: str, content: bytes | str, column: str | None = None) -> Callable[[], object]:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return lambda: read_prompts(tmp_path / name, column)

    refused(written("empty.txt", " \n\n"), "empty.txt", "no prompt", "builtin:general")
    refused(written("latin.txt", "gr\xfcn".encode("latin-1")), "latin.txt", "not UTF-8 (byte 2)")
    refused(written("list.docx", "x"), ".txt, .jsonl, .csv or .parquet")
    refused(lambda: read_prompts(tmp_path / "latim.txt"), "latim.txt", "did you mean 'latin.txt'")
    refused(lambda: read_prompts(tmp_path), "not a prompt file")
    refused(written("a.csv", "id,prompts\n1,x\n", "promt"), "no column 'promt'", "use 'prompts'", "'id', 'prompts'")
    refused(written("a.csv", "id,title\n1,x\n"), "no column 'prompt', 'text' or 'caption'", "'id', 'title'")
    refused(written("a.csv", "prompt\na red, blue thing\n"), "line 2", "double quotes")
    refused(written("a.csv", 'prompt\n"a" b\n'), "line 2", "malformed CSV")
    refused(written("a.csv", ""), "no prompt")
    refused(written("a.jsonl", '{"prompt": "x"}\n{"prompt": \n'), "line 2", "not a JSON object")
    refused(written("a.jsonl", '{"prompt": "x"}\n["y"]\n'), "line 2", "not a JSON object")
    refused(written("a.jsonl", '{"prompt": 3}'), "row 1", "type int")
    refused(written("a.jsonl", '{"prompt": "x"}\n{"text": "y"}\n', "prompt"), "line 2", "no column 'prompt'")


def test_shipped_prompts() -> None:
    prompts = read_prompts("builtin:general")
    assert "general" in builtin_prompt_lists()
    assert 250 <= len(prompts) == len(set(prompts.texts))
    assert prompts.source == "builtin:general"
    assert max(map(len, prompts.texts)) < 100
    refused(lambda: read_prompts("builtin:genral"), "'genral'", "'builtin:general'")
    refused(lambda: read_prompts("builtin:../prompts/general"), "no shipped prompt list")


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"id": [1, 2, 3], "caption": ["a", None, "b"]}), file)
    assert read_prompts(file).texts == ("a", "b")
    refused(lambda: read_prompts(file, "captoin"), "use 'caption'")
    refused(lambda: read_prompts(file, "id"), "row 1", "type int")
    file.write_bytes(b"PAR1 no")
    refused(lambda: read_prompts(file), "not a readable parquet file")


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(lambda: read_prompts(tmp_path / "a.parquet"), "pyarrow", "stepdistill[data]")


# images


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise: large enough as a JPEG that cutting it takes pixels away."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards: a crop tells where it was cut."""
    columns, rows = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([columns, rows, np.zeros_like(rows)], axis=-1).round().astype(np.uint8))


def truncated_jpeg(file: Path, keep: float = 0.5) -> None:
    buffer = io.BytesIO()
    picture(64, 64).save(buffer, "JPEG", quality=95)
    file.write_bytes(buffer.getvalue()[: int(keep * buffer.tell())])


def folder_of(path: Path, count: int, broken: tuple[int, ...] = ()) -> Path:
    path.mkdir()
    for i in range(count):
        if i in broken:
            truncated_jpeg(path / f"{i:02d}.jpg")
        else:
            picture(40, 20, i).save(path / f"{i:02d}.jpg")
    return path


def test_items_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".cache").mkdir()
    picture(8, 8).save(tmp_path / "b.PNG")
    picture(8, 8).save(tmp_path / "a.webp")
    picture(8, 8).save(tmp_path / "sub" / "c.jpeg")
    picture(8, 8).save(tmp_path / "._a.png")
    picture(8, 8).save(tmp_path / ".cache" / "d.png")
    (tmp_path / "a.txt").write_text("\ufeffa grey\n noise ", encoding="utf-8")
    folder = ImageFolder(tmp_path, (8, 8))
    assert [path.relative_to(tmp_path).as_posix() for path in folder.paths] == ["a.webp", "b.PNG", "sub/c.jpeg"]
    assert folder.captions == ("a grey noise", "", "")
    items = list(folder)
    assert [(item.caption, item.index) for item in items] == [("a grey noise", 0), ("", 1), ("", 2)]
    assert items[1].image.shape == (3, 8, 8)
    assert items[1].image.dtype == torch.float32
    expected = torch.from_numpy(np.array(picture(8, 8))).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(items[1].image, expected)
    batch = ImageBatch.of(items)
    assert batch.images.shape == (3, 3, 8, 8)
    assert (batch.captions, batch.indices) == (folder.captions, (0, 1, 2))
    assert batch.crops[0] == Crop((8, 8), (0, 0), (8, 8))


def test_captions_from_metadata(tmp_path: Path) -> None:
    for name in "abcd":
        picture(4, 4).save(tmp_path / f"{name}.png")
    rows = [{"file_name": "a.png", "text": "one"}, {"file_name": "b.png", "caption": "two"}, {"file_name": "./c.png"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "c.txt").write_text("sidecar")
    assert ImageFolder(tmp_path, (4, 4)).captions == ("one", "two", "sidecar", "")
    required = "1 of 4 images", "no caption", "'d.png'", "metadata.jsonl"
    refused(lambda: ImageFolder(tmp_path, (4, 4), require_captions=True), *required)
    (tmp_path / "d.txt").write_text("now it has one")
    ImageFolder(tmp_path, (4, 4), require_captions=True)


def test_a_listed_file_that_is_missing_counts_as_unreadable(tmp_path: Path) -> None:
    picture(4, 4).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "x"}')
    assert ImageFolder(tmp_path, (4, 4), max_bad_share=0.5).verify() == ("gone.png",)


def test_image_folders_that_are_refused(tmp_path: Path) -> None:
    refused(lambda: ImageFolder(tmp_path / "none", (4, 4)), "no image folder", "none")
    refused(lambda: ImageFolder(tmp_path, (4, 4)), "holds no image", "put image files there")
    picture(4, 4).save(tmp_path / "a.png")
    refused(lambda: ImageFolder(tmp_path, (0, 4)), "(0, 4)", "(height, width)")
    refused(lambda: ImageFolder(tmp_path, (4, 4), crop="centre"), "'centre'", "'center' or 'random'")  # type: ignore[arg-type]
    refused(lambda: ImageFolder(tmp_path, (4, 4), max_bad_share=5), "max_bad_share is 5", "between 0 and 1")
    (tmp_path / "a.txt").write_bytes(b"gr\xfcn")
    refused(lambda: ImageFolder(tmp_path, (4, 4)), "a.txt", "not UTF-8")
    for name in ("../a.png", "/a.png", 3, None):
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
        refused(lambda: ImageFolder(tmp_path, (4, 4)), "line 1", f"file_name {name!r}", "relative to the folder")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": ["x"]}')
    refused(lambda: ImageFolder(tmp_path, (4, 4)), "line 1", "type list")
    with pytest.raises(IndexError):
        ImageFolder(folder_of(tmp_path / "one", 1), (4, 4))[1]


@pytest.mark.parametrize("size", [(32, 32), (16, 48), (48, 16), (33, 31)])
@pytest.mark.parametrize("shape", [(100, 50), (50, 100), (7, 9), (101, 33)])
def test_every_shape_covers_every_size(tmp_path: Path, size: tuple[int, int], shape: tuple[int, int]) -> None:
    gradient(*shape).save(tmp_path / "a.png")
    item = ImageFolder(tmp_path, size)[0]
    assert item.image.shape == (3, *size)
    assert item.crop.original == (shape[1], shape[0])
    assert item.crop.target == size
    # short side resized: one of the two offsets is 0, and the crop lies in the middle
    assert 0 in item.crop.offset
    assert item.image[0].mean().abs() < 0.05
    assert item.image[1].mean().abs() < 0.05


def test_a_crop_lies_where_its_offset_says(tmp_path: Path) -> None:
    gradient(256, 64).save(tmp_path / "a.png")
    folder = ImageFolder(tmp_path, (64, 64), crop="random")
    offsets = set()
    for seed in range(40):
        item = folder.read(0, generator(seed))
        top, left = item.crop.offset
        assert top == 0
        assert abs(float(item.image[0, 0, 0] + 1) * 127.5 - left) <= 1
        offsets.add(left)
    assert len(offsets) > 30
    assert max(offsets) <= 192
    assert ImageFolder(tmp_path, (64, 64))[0].crop.offset == (0, 96)


def test_flip_mirrors_half_of_the_images_before_the_crop(tmp_path: Path) -> None:
    gradient(256, 64).save(tmp_path / "a.png")
    folder = ImageFolder(tmp_path, (64, 64), crop="random", flip=True)
    items = [folder.read(0, generator(seed)) for seed in range(60)]
    flipped = [item for item in items if item.image[0, 0, 0] > item.image[0, 0, -1]]
    assert 15 < len(flipped) < 45
    for item in flipped:
        assert abs(255 - float(item.image[0, 0, 0] + 1) * 127.5 - item.crop.offset[1]) <= 1


def test_draws_belong_to_the_sample_not_to_the_file(tmp_path: Path) -> None:
    picture(30, 60).save(tmp_path / "a.png")
    picture(8, 8).save(tmp_path / "b.png")
    folder = ImageFolder(tmp_path, (8, 8), crop="random", flip=True)
    first, again = (folder.read(0, generator(5)) for _ in range(2))
    assert torch.equal(first.image, again.image)
    assert first.crop == again.crop
    left, right = generator(1), generator(1)
    folder.read(0, left)
    folder.read(1, right)
    assert torch.equal(left.get_state(), right.get_state())
    assert torch.equal(folder[0].image, folder[0].image)


def test_exif_orientation(tmp_path: Path) -> None:
    upright = gradient(40, 20)
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    turned, plain = ImageFolder(tmp_path, (20, 40))
    assert turned.crop.original == plain.crop.original == (20, 40)
    torch.testing.assert_close(turned.image, plain.image)


def test_every_mode_becomes_rgb(tmp_path: Path) -> None:
    def read(image: Image.Image, file_format: str = "png") -> tuple[int, ...]:
        buffer = io.BytesIO()
        image.save(buffer, file_format)
        with Image.open(buffer) as file:
            pixel = to_rgb(file).getpixel((1, 1))
        assert isinstance(pixel, tuple)
        return pixel

    assert read(Image.new("L", (4, 4), 90)) == (90, 90, 90)
    assert read(Image.new("1", (4, 4), 1)) == (255, 255, 255)
    assert read(Image.new("RGBA", (4, 4), (255, 0, 0, 0))) == (255, 255, 255)
    assert read(Image.new("LA", (4, 4), (0, 51))) == (204, 204, 204)
    palette = Image.new("RGB", (4, 4), (0, 128, 255)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert read(palette) == (0, 128, 255)
    palette.info["transparency"] = 0
    assert read(palette) == (255, 255, 255)
    deep = Image.fromarray(np.full((4, 4), 40000, dtype=np.uint16))
    assert read(deep) == (155, 155, 155)
    assert read(Image.new("CMYK", (4, 4), (255, 0, 0, 0)), "jpeg") == pytest.approx((0, 255, 255), abs=3)
    assert read(Image.new("RGBA", (4, 4), (200, 0, 0, 0)), "webp") == pytest.approx((255, 255, 255), abs=3)


def test_unreadable_images_are_skipped_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = folder_of(tmp_path / "photos", 10, broken=(3, 4))
    (path / "04.jpg").write_bytes(b"no image")
    folder = ImageFolder(path, (16, 16), max_bad_share=0.2)
    assert folder.unreadable_names == ()
    assert folder[3].name == folder[4].name == "05.jpg"
    assert folder[3].index == 5
    assert folder.unreadable_names == ("03.jpg", "04.jpg")
    assert caplog.text.count("03.jpg") == 1
    assert "truncated" in caplog.text
    assert folder.verify(workers=2) == folder.unreadable_names


def test_replacement_depends_on_the_files_only(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "photos", 6, broken=(5,))
    lazy, scanned = (ImageFolder(path, (16, 16), crop="random", max_bad_share=0.5) for _ in range(2))
    scanned.verify()
    for index in (5, 0, 2):
        assert torch.equal(lazy[index].image, scanned[index].image)
    assert lazy[5].index == 0


def test_too_many_unreadable_images_are_refused(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "photos", 10, broken=(1, 4, 8))
    wanted = "3 of 10 images (30.0%)", "photos", "'01.jpg' (", "'04.jpg'", "10.0%", "repair or remove"
    refused(ImageFolder(path, (16, 16), max_bad_share=0.1).verify, *wanted)
    folder = ImageFolder(path, (16, 16), max_bad_share=0.1)
    assert folder[1].index == 2
    refused(lambda: folder[4], "2 of 10", "'01.jpg'", "'04.jpg'")
    refused(lambda: folder[0], "2 of 10")
    hopeless = ImageFolder(folder_of(tmp_path / "broken", 2, broken=(0, 1)), (16, 16), max_bad_share=1.0)
    refused(lambda: hopeless[0], "none of the 2 images")


# order of samples


def test_an_epoch_shows_every_item_once_and_each_is_shuffled_anew() -> None:
    stream = EpochOrder(13, seed=5)
    epochs = [stream.indices(13 * epoch, 13) for epoch in range(4)]
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert EpochOrder(13, seed=6).indices(0, 13) != epochs[0]
    assert EpochOrder(3, 0, shuffle=False).indices(1, 6) == [1, 2, 0, 1, 2, 0]


def test_an_index_is_a_function_of_the_sample_number() -> None:
    stream = EpochOrder(7, seed=1)
    whole = stream.indices(0, 40)
    # resumed in the middle, read backwards, or in two processes
    assert EpochOrder(7, seed=1).indices(17, 23) == whole[17:]
    assert [stream.index(g) for g in reversed(range(40))] == whole[::-1]
    assert [EpochOrder(7, seed=1).index(g) for g in range(1, 40, 2)] == whole[1::2]
    refused(lambda: EpochOrder(0, 1), "0 items", "at least one")
    with pytest.raises(ValueError, match="count from 0"):
        stream.index(-1)


def test_a_sample_is_the_same_however_it_is_batched(tmp_path: Path) -> None:
    folder = ImageFolder(folder_of(tmp_path / "photos", 5), (8, 8), crop="random", flip=True)
    samples = SampledDataset(folder, EpochOrder(len(folder), seed=3), seed=3)

    def images(batches: list[list[int]], workers: int) -> torch.Tensor:
        return torch.stack([item.image for items in Prefetcher(samples, batches, workers) for item in items])

    one = images([[g] for g in range(12)], workers=0)
    assert torch.equal(one, images([[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]], workers=3))
    assert torch.equal(one[4:], images([[g, g + 1] for g in range(4, 12, 2)], workers=1))
    # a file is cropped anew in each epoch
    shown: dict[int, set[tuple[int, int]]] = {index: set() for index in range(5)}
    for g in range(20):
        shown[samples[g].index].add(samples[g].crop.offset)
    assert all(len(offsets) > 1 for offsets in shown.values())


class Counted:
    """Items that remember having been asked for, one of them with an error."""

    def __init__(self, error_at: int = -1) -> None:
        self.asked: list[int] = []
        self.threads: set[str] = set()
        self.error_at = error_at

    def __getitem__(self, index: int) -> int:
        self.asked.append(index)
        self.threads.add(threading.current_thread().name)
        if index == self.error_at:
            raise UserError("item 4 is unreadable: replace it")
        return index * 10


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_prefetching_keeps_order_and_looks_a_little_ahead(workers: int) -> None:
    items = Counted()
    endless = ([2 * batch, 2 * batch + 1] for batch in itertools.count())
    batches = iter(Prefetcher(items, endless, workers=workers, prefetch_batches=2))
    assert list(itertools.islice(batches, 5)) == [[20 * b, 20 * b + 10] for b in range(5)]
    batches.close()  # type: ignore[attr-defined]
    assert max(items.asked) < 2 * (5 + 2 + (workers > 0))
    assert all(name.startswith("stepdistill-data") == (workers > 0) for name in items.threads)
    assert not any(thread.name.startswith("stepdistill-data") for thread in threading.enumerate())
    assert list(Prefetcher(items, [], workers)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_arrives_as_it_was_raised_at_its_batch(workers: int) -> None:
    batches = iter(Prefetcher(Counted(error_at=4), [[0, 1], [2, 3], [4, 5], [6, 7]], workers))
    assert [next(batches), next(batches)] == [[0, 10], [20, 30]]
    refused(lambda: next(batches), "item 4 is unreadable")


# collected latents

MADE = Fingerprint("teacher", 4.5, 30, 7, "abc", (64, 32), sampler="ddim", precision="float32", command="collect pairs")


def latents_of(numbers: range) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Seeds, latents (half of their noise) and prompts of samples with these numbers."""
    seeds = torch.tensor([2**62 + number for number in numbers], dtype=torch.int64)
    latents = torch.stack([noise_for(int(seed), (4, 2, 3)) / 2 for seed in seeds])
    return seeds, latents, torch.tensor([number % 3 for number in numbers])


def collect(path: Path, count: int, *, batch: int = 3, shard_size: int = 4, made: Fingerprint = MADE) -> None:
    with ShardWriter(path, "pairs", made, shard_size) as writer:
        for start in range(writer.completed, count, batch):
            writer.write(*latents_of(range(start, min(start + batch, count))))


def contents(path: Path) -> list[tuple[int, int, list[float]]]:
    return [(item.seed, item.prompt, item.latents.flatten().tolist()) for item in TensorFolder(path)]


def test_pairs_come_back_with_their_noise(tmp_path: Path) -> None:
    collect(tmp_path / "pairs", 10)
    folder = TensorFolder(tmp_path / "pairs")
    assert (len(folder), folder.kind, folder.shape, folder.fingerprint) == (10, "pairs", (4, 2, 3), MADE)
    assert folder.fingerprint.command == "collect pairs"
    assert sorted(file.name for file in folder.folder.iterdir()) == ["index.json", *map(shard_name, range(3))]
    for number, item in enumerate(folder):
        assert (item.seed, item.prompt) == (2**62 + number, number % 3)
        assert item.latents.dtype == item.noise.dtype == torch.float32
        torch.testing.assert_close(item.noise, 2 * item.latents, atol=2e-3, rtol=2e-3)
    with pytest.raises(IndexError):
        folder[10]
    index = json.loads((folder.folder / "index.json").read_text())
    assert (index["schema"], index["count"], index["dtype"], index["shape"]) == (1, 10, "float16", [4, 2, 3])
    assert [shard["count"] for shard in index["shards"]] == [4, 4, 2]


def test_noise_is_that_of_a_torch_generator() -> None:
    expected = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(11))
    assert torch.equal(noise_for(11, (4, 8, 8)), expected)


def test_collecting_in_pieces_equals_collecting_at_once(tmp_path: Path) -> None:
    collect(tmp_path / "whole", 11)
    for count in (2, 7, 7, 11):
        collect(tmp_path / "pieces", count)
        assert len(TensorFolder(tmp_path / "pieces")) == count
    assert contents(tmp_path / "pieces") == contents(tmp_path / "whole")


@pytest.mark.parametrize("fatal", range(1, 8))
def test_killed_at_any_write_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fatal: int) -> None:
    collect(tmp_path / "whole", 11)
    writes = itertools.count(1)
    write = latent_shards.write_atomically

    def killed(path: Path, content: bytes) -> None:
        if next(writes) >= fatal:
            path.with_name(path.name + ".tmp").write_bytes(content[: len(content) // 2])
            raise OSError("no space left on device")
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(latent_shards, "write_atomically", killed)
        with pytest.raises(OSError, match="no space left"):
            collect(tmp_path / "pieces", 11)
    if fatal > 3:
        # nothing half-written is ever visible
        assert len(TensorFolder(tmp_path / "pieces")) == (4, 8)[fatal > 5]
    collect(tmp_path / "pieces", 11)
    assert contents(tmp_path / "pieces") == contents(tmp_path / "whole")
    assert not list((tmp_path / "pieces").glob("*.tmp"))


def test_an_interrupted_collection_keeps_what_it_was_given(tmp_path: Path) -> None:
    def interrupted() -> None:
        with ShardWriter(tmp_path, "samples", MADE, shard_size=100) as writer:
            writer.write(*latents_of(range(5)))
            assert writer.completed == 0
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert ShardWriter(tmp_path, "samples", MADE).completed == 5


@pytest.mark.parametrize("damage", ["truncated", "header", "missing", "reshaped"])
def test_a_damaged_shard_is_refused_by_readers_and_collected_again_by_writers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    collect(tmp_path / "whole", 11)
    collect(tmp_path / "pairs", 11)
    shard = tmp_path / "pairs" / shard_name(1)
    if damage == "missing":
        shard.unlink()
    elif damage == "reshaped":
        shard.write_bytes((tmp_path / "pairs" / shard_name(2)).read_bytes())
    else:
        shard.write_bytes(shard.read_bytes()[: 5 if damage == "header" else -10])
    refused(lambda: TensorFolder(tmp_path / "pairs"), shard.name, "damaged", "collect")
    with caplog.at_level(logging.WARNING):
        assert ShardWriter(tmp_path / "pairs", "pairs", MADE).completed == 4
    assert shard.name in caplog.text
    assert "7 of 11 samples" in caplog.text
    collect(tmp_path / "pairs", 11)
    assert contents(tmp_path / "pairs") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "another"), ("guidance", 5.0), ("steps", 29), ("seed", 8), ("prompts_sha256", "abd"),
        ("resolution", (64, 64)), ("sampler", "euler"), ("precision", "bfloat16"),
    ],
)  # fmt: skip
def test_another_fingerprint_is_refused(tmp_path: Path, field: str, value: object) -> None:
    collect(tmp_path, 4)
    other = replace(MADE, **{field: value})
    old = repr(vars(MADE)[field])
    refused(lambda: ShardWriter(tmp_path, "pairs", other), f"{field} is {value!r} here and {old} there", str(tmp_path))
    assert len(TensorFolder(tmp_path)) == 4


def test_another_kind_is_refused_and_another_command_is_not(tmp_path: Path) -> None:
    collect(tmp_path, 4)
    refused(lambda: ShardWriter(tmp_path, "samples", MADE), "kind is 'samples' here and 'pairs' there")
    collect(tmp_path, 8, made=replace(MADE, command="collect pairs --count 8"))
    assert len(TensorFolder(tmp_path)) == 8
    assert TensorFolder(tmp_path).fingerprint.command == "collect pairs --count 8"


def test_samples_that_are_refused(tmp_path: Path) -> None:
    refused(lambda: ShardWriter(tmp_path, "pairs", MADE, shard_size=0), "shard_size is 0")
    writer = ShardWriter(tmp_path, "pairs", MADE)
    refused(lambda: TensorFolder(tmp_path), "no samples yet", "collect")
    seeds, latents, prompts = latents_of(range(3))
    refused(lambda: writer.write(seeds[:2], latents, prompts), "(2,), (3, 4, 2, 3) and (3,)", "(B, C, h, w)")
    refused(lambda: writer.write(seeds, latents[0], prompts), "(4, 2, 3)")
    refused(lambda: writer.write(seeds, latents * 1e6, prompts), "not finite in float16")
    refused(lambda: writer.write(seeds, latents.log(), prompts), "not finite in float16")
    writer.write(seeds, latents, prompts)
    refused(lambda: writer.write(seeds, latents[..., :2], prompts), "(4, 2, 2)", "holds (4, 2, 3)")
    writer.close()
    writer.close()
    assert writer.completed == 3


def test_indices_that_are_refused(tmp_path: Path) -> None:
    refused(lambda: TensorFolder(tmp_path / "none"), "no index.json", "stepdistill collect")
    collect(tmp_path, 4)
    good = json.loads((tmp_path / "index.json").read_text())
    changes: list[tuple[dict[str, object], str]] = [
        ({"count": 5}, "contradicts itself"),
        ({"schema": 2}, "schema 1"),
        ({"kind": "videos"}, "contradicts itself"),
        ({"dtype": "int8"}, "contradicts itself"),
        ({"shards": [{"file": "../../x.safetensors", "count": 4}]}, "contradicts itself"),
        ({"fingerprint": {"model": "x"}}, "no index of collected latents"),
        ({"shards": 3}, "no index of collected latents"),
    ]
    for change, wanted in changes:
        (tmp_path / "index.json").write_text(json.dumps(good | change))
        refused(lambda: TensorFolder(tmp_path), "index.json", wanted)
        refused(lambda: ShardWriter(tmp_path, "pairs", MADE), "index.json", wanted)
    for text in ("", "[]", "{", '"x"', "3"):
        (tmp_path / "index.json").write_text(text)
        refused(lambda: TensorFolder(tmp_path), "index.json", "no index of collected latents")
    (tmp_path / "index.json").write_bytes(b"\xff\xfe")
    refused(lambda: TensorFolder(tmp_path), "no index of collected latents")


def test_a_thin_picture_is_cropped_without_resizing_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The crop alone has the pixels that resizing everything and cropping it has, at a fraction of the memory."""
    rows = torch.arange(40)[:, None] * torch.ones(1, 4000, dtype=torch.int64)
    values = torch.stack([rows * 6, torch.arange(4000).expand(40, -1) % 251, rows * 0 + 7], -1).to(torch.uint8)
    banner = Image.fromarray(values.numpy())
    for crop in ("center", "random"):
        for numbers in ([0.9, 0.3, 0.7], [0.1, 0.3, 0.7]):
            transform = CropTransform((64, 64), crop, flip=True)
            small, where = transform.apply(banner, numbers)
            with monkeypatch.context() as patched:
                patched.setattr(source, "MAX_RESIZED_AREA", 10**9)
                whole, expected = transform.apply(banner, numbers)
            assert where == expected
            assert (small - whole).abs().max() <= 2 / 127.5
    resized: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def recorded(picture: Image.Image, size: tuple[int, int], *rest: object, **options: object) -> Image.Image:
        resized.append(size)
        return resize(picture, size, *rest, **options)

    monkeypatch.setattr(Image.Image, "resize", recorded)
    assert CropTransform((64, 64)).apply(Image.new("RGB", (6000, 1)), [0.9, 0.5, 0.5])[0].shape == (3, 64, 64)
    assert resized == [(64, 64)]


def test_a_picture_that_would_be_enlarged_too_much_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (6000, 1)).save(tmp_path / "banner.png")
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    folder = ImageFolder(tmp_path, (128, 128), max_bad_share=0.5)
    assert [folder[index].name for index in range(2)] == ["red.png", "red.png"]
    assert folder.unreadable_names == ("banner.png",)
