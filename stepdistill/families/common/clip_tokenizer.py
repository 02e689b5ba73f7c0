"""CLIP's tokenizer from the packaged byte-pair merges, for checkpoints that come as one file and so without a tokenizer."""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

from stepdistill.assets import FOLDER
from stepdistill.families.checkpoints.files import read_json

MERGES = FOLDER / "public_configs" / "clip" / "merges.txt.gz"
START, END = "<|startoftext|>", "<|endoftext|>"

Merges = tuple[tuple[str, str], ...]


def byte_symbols() -> tuple[str, ...]:
    """The printable characters that stand for the 256 bytes, in the order of byte-level BPE (GPT-2, CLIP)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return tuple(chr(byte) for byte in plain) + tuple(chr(256 + i) for i in range(256 - len(plain)))


def vocabulary(merges: Merges) -> dict[str, int]:
    """Token -> id: bytes, bytes that end a word, one token per merge, then start and end of text."""
    symbols = byte_symbols()
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(pair) for pair in merges), START, END]
    return {token: index for index, token in enumerate(tokens)}


@cache
def clip_merges() -> Merges:
    """The 48,894 merges of CLIP."""
    with gzip.open(MERGES, "rt", encoding="utf-8") as file:
        pairs = [line.split() for line in file]
    return tuple((first, second) for first, second in pairs)


def make_tokenizer(merges: Merges, pad: str = END, length: int = 77) -> CLIPTokenizer:
    """pad: END for CLIP-L, "!" (id 0) for the OpenCLIP encoders of SD 2.x and SDXL."""
    pairs: list[Any] = list(merges)  # declared as list[str] by transformers, which hands the pairs on to tokenizers
    return CLIPTokenizer(vocab=vocabulary(merges), merges=pairs, pad_token=pad, model_max_length=length)


def tokenizer_of(folder: Path) -> CLIPTokenizer:
    """The tokenizer of a folder; where it holds `tokenizer_config.json` alone, CLIP's packaged vocabulary with its pad.

    Raises:
        UserError: there is no tokenizer config either.
    """
    if (folder / "vocab.json").is_file() or (folder / "tokenizer.json").is_file():
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    config = read_json(folder / "tokenizer_config.json")
    return make_tokenizer(clip_merges(), pad=config["pad_token"], length=int(config["model_max_length"]))
