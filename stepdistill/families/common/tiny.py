"""Parts of tiny random checkpoints: real classes, real formats, seeded weights. The second level of the test bed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    PNDMScheduler,
    SanaTransformer2DModel,
    UNet2DConditionModel,
)
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from stepdistill.families.common.clip import make_tokenizer

Config = Mapping[str, Any]

_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
SD_SCHEDULER: Config = {**_BETAS, "_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 1}
DDIM_SCHEDULER: Config = {
    **_BETAS, "_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1
}  # fmt: skip
SDXL_SCHEDULER: Config = {
    **_BETAS, "_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", "steps_offset": 1
}  # fmt: skip
_SCHEDULERS = {c.__name__: c for c in (PNDMScheduler, DDIMScheduler, EulerDiscreteScheduler)}

WORDS = ("a", "photo", "of", "the", "red", "green", "blue", "square", "cat", "dog")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Weights made within depend on the seed alone, and the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """A byte-level BPE tokenizer in CLIP's format that knows ten words whole and spells all others."""
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            merges[symbols[0], symbols[1]] = None
            symbols[:2] = [symbols[0] + symbols[1]]
    return make_tokenizer(tuple(merges), pad)


def text_encoder(width: int, act: str) -> CLIPTextModel:
    return _with_larger_embeddings(CLIPTextModel(_text_config(width, act)))


def text_encoder_with_projection(width: int, act: str = "gelu") -> CLIPTextModelWithProjection:
    return _with_larger_embeddings(CLIPTextModelWithProjection(_text_config(width, act)))


def t5_encoder(width: int) -> T5EncoderModel:
    """T5 v1.1's form: gated, its embeddings apart from any output; for the vocabulary of `t5_tokenizer`."""
    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=3,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config)


def t5_tokenizer() -> T5Tokenizer:
    """A unigram tokenizer in T5's format that knows ten words whole and spells all others."""
    letters = "abcdefghijklmnopqrstuvwxyz,."
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in WORDS if len(word) > 1] + [(letter, -6.0) for letter in letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def unet(channels: tuple[int, int], **changes: Any) -> UNet2DConditionModel:
    """Two levels with cross-attention in one, 8 x 8 latents of four channels, under a million parameters."""
    network = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        **changes,
    )
    _strengthen_prompt_response(network, network.conv_out.weight)
    return network


def vae(scaling_factor: float, **changes: Any) -> AutoencoderKL:
    """Images of 16 x 16 pixels to 8 x 8 latents, of four channels unless told otherwise."""
    return AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=16,
        scaling_factor=scaling_factor,
        **{"latent_channels": 4, **changes},
    )


def gemma_tokenizer(text: str) -> GemmaTokenizer:
    """A byte-level BPE tokenizer in Gemma's format that knows ten words and those of `text` whole and spells all others."""
    words = [f"▁{word}" for word in (*WORDS, *text.split())]
    symbols = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    symbols += sorted({symbol for word in words for symbol in word})
    merges = {(word[:end], word[end]): None for word in words for end in range(1, len(word))}
    symbols += dict.fromkeys("".join(pair) for pair in merges)
    # declared as list[str] by transformers, which hands the pairs on to tokenizers
    pairs: list[Any] = list(merges)
    made = GemmaTokenizer(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=pairs)
    start = TemplateProcessing(single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)])
    made.backend_tokenizer.post_processor = start
    return made


def gemma(vocabulary: int, width: int) -> Gemma2Model:
    return _with_larger_embeddings(
        Gemma2Model(
            Gemma2Config(
                vocab_size=vocabulary,
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                query_pre_attn_scalar=8,
            )
        )
    )


def dc_autoencoder(scaling_factor: float) -> AutoencoderDC:
    """Images to latents of four channels and a quarter of the side."""
    blocks: Config = {
        "block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
        "block_out_channels": (8, 16, 32),
        "layers_per_block": (1, 1, 1),
        "qkv_multiscales": ((), (), (5,)),
    }
    both = {f"{half}_{key}": value for half in ("encoder", "decoder") for key, value in blocks.items()}
    return AutoencoderDC(latent_channels=4, attention_head_dim=8, scaling_factor=scaling_factor, **both)


def sana_transformer(caption_channels: int, **changes: Any) -> SanaTransformer2DModel:
    """Two blocks on 8 x 8 latents of four channels."""
    network = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=caption_channels,
        sample_size=8,
        **changes,
    )
    _strengthen_prompt_response(network, network.proj_out.weight)
    return network


@torch.no_grad()
def _strengthen_prompt_response(network: torch.nn.Module, last: torch.Tensor) -> None:
    """An untrained network hardly heeds its prompt: louder values of the cross-attention make guidance matter."""
    last.mul_(4)
    for name, parameter in network.named_parameters():
        if "attn2.to_v" in name:
            parameter.mul_(8)


def scheduler(config: Config) -> PNDMScheduler | DDIMScheduler | EulerDiscreteScheduler:
    return _SCHEDULERS[config["_class_name"]].from_config(dict(config))


def write(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Write in diffusers format, with the tokenizer files of published checkpoints beside transformers' own."""
    pipeline.save_pretrained(folder, safe_serialization=True)
    for path in folder.glob("tokenizer*"):
        model = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        if model["type"] != "BPE":
            continue
        (path / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
        merges = "".join(" ".join(pair) + "\n" for pair in model["merges"])
        (path / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")


def _text_config(width: int, act: str) -> CLIPTextConfig:
    size = len(tokenizer())
    return CLIPTextConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act=act,
        projection_dim=width,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )


def _with_larger_embeddings(encoder: nn.Module) -> Any:
    """Untrained encoders say nearly the same of every prompt: larger embeddings let a prompt make a difference."""
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "embedding" in name:
                parameter.mul_(20)
    return encoder
