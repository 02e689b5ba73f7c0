"""The cache's files: round trips, kills, damage, hashes that are computed once."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stepdistill.data.latents import encoding_cache as cache
from stepdistill.data.latents.encoding_cache import (
    EncoderIdentity,
    EncodingCache,
    EncodingCacheWriter,
    FileHashes,
    image_key,
    null_key,
    text_key,
)
from stepdistill.families.conditioning import Conditioning
from stepdistill.files.atomic import file_hash
from stepdistill.training.inputs.encoding import conditioning_from_entry, conditioning_to_entry

IDENTITY = EncoderIdentity(
    "text", "sd", "bfloat16", {"text_encoder/model.safetensors": "ab", "tokenizer/vocab.json": "cd"}
)


def value(number: int) -> dict[str, torch.Tensor]:
    return {"text": torch.full((2, 3), float(number), dtype=torch.bfloat16), "crop": torch.tensor([number])}


def filled(root: Path, count: int) -> EncodingCache:
    entries = EncodingCache(root, IDENTITY)
    with EncodingCacheWriter(entries) as writer:
        for number in range(count):
            writer.add(text_key(str(number)), value(number))
    return entries


def holds(entries: EncodingCache, number: int) -> bool:
    found = entries[text_key(str(number))]
    return found.keys() == value(number).keys() and all(torch.equal(found[k], v) for k, v in value(number).items())


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "ENTRIES_PER_SHARD", 2)


def test_entries_come_back_as_they_were(tmp_path: Path) -> None:
    filled(tmp_path, 5)
    entries = EncodingCache(tmp_path, IDENTITY)
    assert len(entries) == 5
    assert len(entries.shards) == 3
    assert all(holds(entries, number) for number in range(5))
    assert entries[text_key("0")]["text"].dtype == torch.bfloat16
    assert text_key("5") not in entries
    index = json.loads((entries.path / "index.json").read_text())
    assert index["identity"]["dtype"] == "bfloat16"
    assert index["shards"] == {path.name: path.stat().st_size for path in entries.path.glob("*.safetensors")}


def test_what_is_done_to_an_entry_stays_with_it(tmp_path: Path) -> None:
    """Shards stay mapped, and the next reader wants what was written."""
    entries = filled(tmp_path, 1)
    for tensor in entries[text_key("0")].values():
        tensor.add_(1)
    assert holds(entries, 0)


def test_a_second_writer_adds(tmp_path: Path) -> None:
    filled(tmp_path, 3)
    entries = EncodingCache(tmp_path, IDENTITY)
    with EncodingCacheWriter(entries) as writer:
        writer.add(text_key("3"), value(3))
    assert all(holds(EncodingCache(tmp_path, IDENTITY), number) for number in range(4))


def test_encoders_do_not_meet(tmp_path: Path) -> None:
    filled(tmp_path, 3)
    other = EncoderIdentity("text", "sd", "float32", {**IDENTITY.files, "tokenizer/vocab.json": "ef"})
    entries = EncodingCache(tmp_path, other)
    assert len(entries) == 0
    assert entries.previous_identity() == IDENTITY
    assert other.difference(IDENTITY) == "dtype is float32 and was bfloat16, tokenizer/vocab.json changed"
    assert IDENTITY.difference(IDENTITY) == ""


def test_keys_tell_apart() -> None:
    keys = {text_key(""), null_key(""), text_key("a"), null_key("a")}
    keys |= {image_key("ab", size, flipped) for size in ((8, 16), (16, 8)) for flipped in (False, True)}
    assert len(keys) == 8


@pytest.mark.ci
def test_a_killed_writer_loses_its_last_shard_only(tmp_path: Path) -> None:
    script = f"""
import os, signal
from pathlib import Path
from stepdistill.data.latents import encoding_cache as cache
from data.test_cache import IDENTITY, value
cache.ENTRIES_PER_SHARD = 2
writer = cache.EncodingCacheWriter(cache.EncodingCache(Path({str(tmp_path)!r}), IDENTITY)).__enter__()
for number in range(5):
    writer.add(cache.text_key(str(number)), value(number))
os.kill(os.getpid(), signal.SIGKILL)
"""
    here = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    assert subprocess.run([sys.executable, "-c", script], env=environment).returncode == -signal.SIGKILL
    entries = EncodingCache(tmp_path, IDENTITY)
    assert len(entries) == 4
    # what a kill between a shard and its index, or in the middle of a write, leaves behind
    (entries.path / "shard-00002.safetensors").write_bytes(b"not in the index")
    (entries.path / "shard-00002.safetensors.tmp").write_bytes(b"half")
    with EncodingCacheWriter(entries) as writer:
        writer.add(text_key("4"), value(4))
    again = EncodingCache(tmp_path, IDENTITY)
    assert all(holds(again, number) for number in range(5))
    assert not list(again.path.glob("*.tmp"))


@pytest.mark.parametrize("damage", ["cut", "longer", "header", "gone"])
def test_a_damaged_shard_is_made_anew(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    shard = filled(tmp_path, 5).path / "shard-00001.safetensors"
    content = shard.read_bytes()
    broken = {"cut": content[:-1], "longer": content + b"x", "header": b"\xff" * 8 + content[8:]}
    shard.unlink() if damage == "gone" else shard.write_bytes(broken[damage])
    with caplog.at_level(logging.WARNING):
        entries = EncodingCache(tmp_path, IDENTITY)
    assert "shard-00001" in caplog.text
    assert [text_key(str(number)) in entries for number in range(5)] == [True, True, False, False, True]
    with EncodingCacheWriter(entries) as writer:
        for number in (2, 3):
            writer.add(text_key(str(number)), value(number))
    assert all(holds(EncodingCache(tmp_path, IDENTITY), number) for number in range(5))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": 1, "identity": 3, "shards": {"../x": 1}}'])
def test_a_damaged_index_is_an_empty_cache(tmp_path: Path, content: str) -> None:
    entries = filled(tmp_path, 3)
    (entries.path / "index.json").write_text(content)
    assert len(EncodingCache(tmp_path, IDENTITY)) == 0
    assert all(holds(filled(tmp_path, 3), number) for number in range(3))
    assert len(EncodingCache(tmp_path, IDENTITY)) == 3


def test_an_error_keeps_what_was_encoded(tmp_path: Path) -> None:
    entries = EncodingCache(tmp_path, IDENTITY)

    def interrupted() -> None:
        with EncodingCacheWriter(entries) as writer:
            writer.add(text_key("0"), value(0))
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert holds(EncodingCache(tmp_path, IDENTITY), 0)


def test_writers_take_turns(tmp_path: Path) -> None:
    first, second = EncodingCache(tmp_path, IDENTITY), EncodingCache(tmp_path, IDENTITY)
    with EncodingCacheWriter(first) as writer:
        writer.add(text_key("0"), value(0))
    assert text_key("0") not in second
    with EncodingCacheWriter(second):
        assert text_key("0") in second


def test_a_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"one")
    hashed: list[Path] = []

    def counted(path: Path) -> str:
        hashed.append(path)
        return file_hash(path)

    monkeypatch.setattr(cache, "file_hash", counted)

    def now() -> str:
        hashes = FileHashes(tmp_path / "cache")
        found = hashes.hash_of(file)
        hashes.save()
        return found

    one = now()
    assert now() == one == file_hash(file)
    assert len(hashed) == 1
    file.write_bytes(b"two, longer")
    assert now() != one
    (tmp_path / "cache/hashes.json").write_text("{")
    assert now() == file_hash(file)
    assert len(hashed) == 3
    with pytest.raises(OSError):
        FileHashes(tmp_path).hash_of(tmp_path / "none")


def test_padding_that_a_mask_hides_is_not_stored() -> None:
    text = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0, 0, 0]])
    entry = conditioning_to_entry(Conditioning(text, mask=mask, time_ids=torch.ones(1, 6)))
    assert entry["text"].shape == (3, 4)
    assert entry.keys() == {"text", "mask"}
    back = conditioning_from_entry(entry)
    assert back.text.shape == text.shape
    assert torch.equal(back.text[:, :3], text[:, :3])
    assert not back.text[:, 3:].any()
    assert back.mask is not None
    assert torch.equal(back.mask, mask)
    # without a mask every token is attended to
    assert conditioning_to_entry(Conditioning(text))["text"].shape == (6, 4)
    # padding on the left stays, since positions would move
    left = torch.tensor([[0, 0, 0, 0, 1, 1]])
    assert conditioning_to_entry(Conditioning(text, mask=left))["text"].shape == (6, 4)
