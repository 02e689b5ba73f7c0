"""Aspect-ratio buckets: sorting, the order of iterations, layouts of the batch, shapes down to the discriminator."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.image_runs import resumes_exactly, run_config
from support.image_sources import data, encoded, picture, same
from support.tiny_checkpoints import refusal

from stepdistill.data.images.buckets import (
    CHUNK,
    BucketOrder,
    BucketPosition,
    BucketSamples,
    assign_buckets,
    nearest_bucket,
)
from stepdistill.data.images.folder import ImageFolder
from stepdistill.data.images.indexed import IndexedImages
from stepdistill.data.images.opening import open_images
from stepdistill.data.images.source import read_image_size
from stepdistill.methods.base import Batch
from stepdistill.roles.heads import FeatureHead
from stepdistill.training.description import describe_run
from stepdistill.training.inputs.batches import BatchSource, sample_numbers
from stepdistill.training.run import train
from stepdistill.training.session import open_session
from stepdistill.training.setup import prepare

SIZES = [(16, 16), (16, 24), (32, 16)]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten images: 5 square, 3 wide, 2 tall; their captions say so."""
    folder = tmp_path / "photos"
    folder.mkdir()
    shapes = {"square": (5, 20, 21), "wide": (3, 20, 31), "tall": (2, 41, 20)}
    for kind, (count, height, width) in shapes.items():
        for row in range(count):
            picture(row, height, width).save(folder / f"{kind}{row}.png")
            (folder / f"{kind}{row}.txt").write_text(kind)
    return folder


def test_the_nearest_bucket_on_a_logarithmic_scale() -> None:
    sizes = [(1024, 1024), (832, 1216), (1216, 832)]
    assert [nearest_bucket(shape, sizes) for shape in ((500, 510), (480, 640), (1080, 1920), (1920, 1080))] == [
        0,
        1,
        1,
        2,
    ]
    # 2:1 lies halfway between 1:1 and 4:1, and sqrt(2) above and below 1 are alike
    assert nearest_bucket((201, 100), [(100, 100), (400, 100)]) == 1
    assert nearest_bucket((199, 100), [(100, 100), (400, 100)]) == 0


def test_images_are_sorted_by_their_headers(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(0, 20, 31).save(photos / "turned.png", exif=exif)
    (photos / "broken.png").write_bytes(encoded(0)[:20])
    folder = ImageFolder(photos, (16, 16), max_bad_share=0.1)
    buckets = assign_buckets(folder, SIZES, workers=3)
    named = [{folder.names[index].rstrip("0123456789.png") for index in found} for found in buckets.members]
    assert named == [{"square"}, {"wide"}, {"tall", "turned"}]
    assert buckets.weights == (5, 3, 3)
    assert folder.unreadable_names == ("broken.png",)
    refusal(
        lambda: assign_buckets(ImageFolder(photos, (16, 16), max_bad_share=0.05), SIZES), "1 of 12 images", "broken.png"
    )


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_header_sizes_are_those_of_the_upright_picture(kind: str) -> None:
    for orientation, wanted in ((1, (20, 31)), (3, (20, 31)), (5, (31, 20)), (6, (31, 20)), (8, (31, 20))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        buffer = io.BytesIO()
        picture(0, 20, 31).save(buffer, kind, exif=exif)
        assert read_image_size(io.BytesIO(buffer.getvalue())) == wanted
    assert read_image_size(io.BytesIO(encoded(0, broken=True))) == (20, 30)


def test_the_place_of_a_sample() -> None:
    order = BucketOrder((5, 3, 0, 2), seed=3, per_iteration=4)
    seen: Counter[int] = Counter()
    for iteration in range(60):
        bucket = order.bucket(iteration)
        for slot in range(4):
            assert order.place(4 * iteration + slot) == BucketPosition(bucket, seen[bucket])
            seen[bucket] += 1
    assert seen[2] == 0
    assert min(seen[0], seen[1], seen[3]) > 0


def test_buckets_come_up_as_often_as_they_have_images() -> None:
    order = BucketOrder((500, 300, 0, 200), seed=0, per_iteration=1)
    drawn = Counter(order.bucket(iteration) for iteration in range(3 * CHUNK))
    assert drawn[2] == 0
    for bucket, share in ((0, 0.5), (1, 0.3), (3, 0.2)):
        assert drawn[bucket] / (3 * CHUNK) == pytest.approx(share, abs=0.015)
    assert {BucketOrder((7,), 0, 1).bucket(iteration) for iteration in range(9)} == {0}


def test_the_order_needs_no_state() -> None:
    whole = BucketOrder((2, 1), seed=1, per_iteration=2)
    numbers = [*range(2 * CHUNK - 6, 2 * CHUNK + 6), 7 * CHUNK + 1, 3, 2 * CHUNK]
    wanted = {number: whole.place(number) for number in sorted(numbers)}
    assert [whole.place(number) for number in numbers] == [wanted[number] for number in numbers]
    assert all(BucketOrder((2, 1), 1, 2).place(number) == wanted[number] for number in numbers)
    positions = [whole.place(2 * row).position for row in range(3 * CHUNK) if whole.bucket(row) == 1]
    assert positions == list(range(0, 2 * len(positions), 2))


def samples_of(photos: Path, per_iteration: int) -> BucketSamples:
    source = open_images(data(photos, crop="random", flip=True), (16, 16), seed=0)
    assert isinstance(source, IndexedImages)
    buckets = assign_buckets(source, SIZES)
    return BucketSamples(source, buckets, BucketOrder(buckets.weights, 0, per_iteration), 0)


def test_an_iteration_is_of_one_bucket_and_a_bucket_shows_all_of_its_images(photos: Path) -> None:
    samples = samples_of(photos, 4)
    shown: dict[str, list[int]] = {"square": [], "wide": [], "tall": []}
    for iteration in range(40):
        items = [samples[4 * iteration + slot] for slot in range(4)]
        assert len({(item.caption, item.crop.target) for item in items}) == 1
        assert items[0].image.shape[1:] == {"square": (16, 16), "wide": (16, 24), "tall": (32, 16)}[items[0].caption]
        shown[items[0].caption] += [item.index for item in items]
    for kind, count in (("square", 5), ("wide", 3), ("tall", 2)):
        whole = len(shown[kind]) // count
        assert whole > 1
        for epoch in range(whole):
            assert len(set(shown[kind][epoch * count : (epoch + 1) * count])) == count
    fresh = samples_of(photos, 4)
    assert all(same(fresh[number], samples[number]) for number in (121, 3, 60))


def test_an_unreadable_image_is_replaced_within_its_bucket(photos: Path) -> None:
    (photos / "tall1.png").write_bytes(encoded(1, 41, 20, broken=True))
    source = ImageFolder(photos, (16, 16), max_bad_share=0.1)
    buckets = assign_buckets(source, SIZES)
    assert buckets.weights == (5, 3, 2)  # its header is whole
    samples = BucketSamples(source, buckets, BucketOrder((0, 0, 2), 0, 2), 0)
    assert [samples[number].name for number in range(4)] == ["tall0.png"] * 4
    assert source.unreadable_names == ("tall1.png",)


def gathered(model: Path, photos: Path, batch: int, accumulation: int, processes: int = 1) -> list[dict[str, Any]]:
    """Captions' conditioning, latents and sizes of the samples of six iterations, by global sample number."""
    rows: dict[int, dict[str, Any]] = {}
    config = run_config(model, 6, batch, accumulation, images=str(photos), buckets=SIZES, crop="random")
    session = open_session(prepare(config))
    for process in range(processes):
        layout = {"batch": batch, "accumulation": accumulation, "process": process, "processes": processes}
        source = BatchSource(session, 0, processes)
        for numbers, made in source.batches(sample_numbers(0, 6, **layout)):
            assert made.images is not None
            assert made.image_cond is not None
            assert made.latent_shape == made.images.shape[1:]
            for row, number in enumerate(numbers):
                rows[number] = {
                    "shape": made.latent_shape, "latents": made.images[row], "cond": made.cond[row : row + 1],
                    "null": made.null[row : row + 1], "image_cond": made.image_cond[row : row + 1],
                }  # fmt: skip
    return [rows[number] for number in range(24)]


def test_every_layout_of_the_batch_sees_the_same_samples(tiny: Callable[..., Path], photos: Path) -> None:
    model = tiny("sdxl")
    whole = gathered(model, photos, 4, 1)
    assert len({row["shape"] for row in whole}) > 1
    assert all(len({row["shape"] for row in whole[start : start + 4]}) == 1 for start in range(0, 24, 4))
    for other in (gathered(model, photos, 2, 2), gathered(model, photos, 2, 1, processes=2)):
        for one, two in zip(whole, other, strict=True):
            assert one["shape"] == two["shape"]
            torch.testing.assert_close(one["latents"], two["latents"], atol=1e-4, rtol=1e-4)
            for name in ("cond", "null", "image_cond"):
                assert torch.equal(one[name].time_ids, two[name].time_ids)
                torch.testing.assert_close(one[name].text, two[name].text, atol=1e-4, rtol=1e-4)
    for row in whole:
        size = [2 * side for side in row["shape"][1:]]
        assert row["cond"].time_ids[0].tolist() == row["null"].time_ids[0].tolist() == [*size, 0, 0, *size]
        assert row["image_cond"].time_ids[0, 4:].tolist() == size


def test_resume_is_bit_identical(tiny: Callable[..., Path], tmp_path: Path, photos: Path) -> None:
    sections = {"images": str(photos), "buckets": SIZES, "crop": "random", "flip": True, "workers": 2}
    assert resumes_exactly(tiny("sd"), tmp_path / "runs", **sections)


def test_buckets_of_tar_shards(photos: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for path in sorted(photos.iterdir()):
            tar.add(path, path.name)
    source = open_images(data(tmp_path / "a.tar"), (16, 16), seed=0)
    assert isinstance(source, IndexedImages)
    assert assign_buckets(source, SIZES, workers=2).weights == (5, 3, 2)


def test_a_run_on_prompts_alone_takes_buckets_alike(tiny: Callable[..., Path], tmp_path: Path) -> None:
    config = run_config(tiny("sd"), 3, 2, buckets=SIZES)
    config = config.model_copy(update={"method": {"name": "dmd2", "guidance": 2.0, "steps": 2}})
    setup = prepare(config)
    assert setup.buckets is not None
    assert (setup.buckets.weights, setup.buckets.members) == ((1, 1, 1), ())
    assert any("buckets 16x16" in line for line in describe_run(setup))
    source = BatchSource(open_session(setup), 0, 1)
    shapes = {made.latent_shape for _, made in source.batches(sample_numbers(0, 12, batch=2, accumulation=1))}
    assert shapes == {(4, 8, 8), (4, 8, 12), (4, 16, 8)}
    assert train(config, tmp_path / "run").finished


def test_a_batch_without_buckets_has_the_shape_of_the_setting(tiny: Callable[..., Path]) -> None:
    config = run_config(tiny("sd"), 1).model_copy(update={"method": {"name": "dmd2", "guidance": 2.0}})
    session = open_session(prepare(config))
    _, batch = next(BatchSource(session, 0, 1).batches(sample_numbers(0, 1, batch=2, accumulation=1)))
    assert session.method.latent_shape(batch) == (4, 8, 8)
    assert session.method.latent_shape(Batch(batch.cond, batch.null)) == (4, 8, 8)


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (9, 13), (32, 20), (3, 7), (1, 2)])
def test_the_head_takes_every_size_from_its_own_on(size: tuple[int, int]) -> None:
    head = FeatureHead(16, size)
    for height, width in (size, (size[0] + 3, size[1]), (2 * size[0], 3 * size[1])):
        assert head(torch.zeros(2, 16, height, width)).shape == (2,)


def test_the_head_is_made_for_the_smallest_bucket(tiny: Callable[..., Path], photos: Path) -> None:
    setup = prepare(run_config(tiny("sd"), 1, images=str(photos), buckets=[(64, 32), (16, 48)]))
    assert setup.problem.feature_size == (4, 8)
    assert prepare(run_config(tiny("sd"), 1, images=str(photos))).problem.feature_size == (4, 4)


def test_buckets_that_are_refused(tiny: Callable[..., Path], photos: Path, tmp_path: Path) -> None:
    def prepared(**section: Any) -> Callable[[], object]:
        return lambda: prepare(run_config(tiny("sd"), 1, **{"images": str(photos), **section}))

    refusal(prepared(buckets=[[16, 16], [18, 16]]), "data.buckets is [18, 16]", "multiples of 4")
    refusal(prepared(buckets=[[16, 16], [0, 16]]), "data.buckets.1.0", "greater than 0")
    refusal(prepared(buckets=[[16, 16], [16, 16]]), "twice", "name each once")
    stream = "data.streaming to false"
    pytest.importorskip("datasets")
    refusal(prepared(buckets=[[16, 16]], images=f"hf:{photos}", streaming=True), "sizes of all images", stream)
