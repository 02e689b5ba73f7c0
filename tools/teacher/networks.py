"""The teacher's four parts, untrained: autoencoder, tokenizer, text encoder, UNet; and its scheduler's configuration."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from stepdistill.data import fashion

LATENT_CHANNELS = 8
LATENT_SIZE = 8
TEXT_LENGTH = 16
TEXT_WIDTH = 128
START, END = "<|startoftext|>", "<|endoftext|>"


def build_autoencoder() -> AutoencoderKL:
    """32x32 RGB <-> 8x8 latents of 8 channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=fashion.IMAGE_SIZE,
    )


def build_unet() -> UNet2DConditionModel:
    """An epsilon predictor at 8x8 and 4x4; attention at 4x4 only, which keeps a step cheap on a CPU."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 112),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion 1.5."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
        timestep_spacing="leading",
    )


def vocabulary_words() -> list[str]:
    """Every word of the captions, in alphabetical order, cut as CLIP's tokenizer cuts (``t-shirt`` is three words)."""
    names = " ".join((*fashion.GARMENTS, *fashion.COLOURS, *fashion.BACKGROUNDS)).replace("-", " - ")
    return sorted(set(names.split()) | {"a", "an", "photo", "picture", "of", "on", "against", "background"})


def byte_pair_merges(words: list[str]) -> list[tuple[str, str]]:
    """Greedy byte-pair merges until each word is one token; ties go to the alphabetically first pair."""
    spellings = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while any(len(spelling) > 1 for spelling in spellings):
        counts = Counter(pair for spelling in spellings for pair in pairwise(spelling))
        merged = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(merged)
        for spelling in spellings:
            i = 0
            while i < len(spelling) - 1:
                if (spelling[i], spelling[i + 1]) == merged:
                    spelling[i : i + 2] = ["".join(merged)]
                i += 1
    return merges


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose vocabulary is all bytes and the captions' words."""
    alphabet = sorted(ByteLevel.alphabet())
    merges = byte_pair_merges(vocabulary_words())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges), START, END]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TEXT_LENGTH)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A two-layer CLIP text model for ``tokenizer``."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids (N, 16), padded as StableDiffusionPipeline pads them."""
    return tokenizer(
        captions, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
