"""Which tensors a component's config asks for, and whether a folder's files hold just these; no tensor is read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from stepdistill.families.checkpoints.files import (
    Shapes,
    raise_if_keys_differ,
    read_header,
    read_json,
    variant_of,
    weights,
)

ModelClass = type[Any]
"""A diffusers model or a text encoder of transformers."""

# names that diffusers before 0.15 gave to the VAE's attention; it still renames them as it loads
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

_T5_EMBEDDINGS = {"encoder.embed_tokens.weight": "shared.weight"}


def expected_shapes(folder: Path, component: str, model_class: ModelClass) -> Shapes:
    """What the component's config asks for, found by building it on the meta device."""
    model = empty_component(folder, component, model_class)
    return canonical_keys({key: tuple(tensor.shape) for key, tensor in model.state_dict().items()})


def empty_component(folder: Path, component: str, model_class: ModelClass) -> nn.Module:
    """The component that its config describes, on the meta device."""
    config = read_json(folder / component / "config.json")
    with torch.device("meta"):
        is_text = issubclass(model_class, PreTrainedModel)
        made = model_class.config_class.from_dict(config) if is_text else config
        model: nn.Module = model_class(made) if is_text else model_class.from_config(made)
    return model


def canonical_keys(shapes: Shapes) -> Shapes:
    """Keys in one spelling of those that the libraries take for the same tensor.

    transformers 5 dropped the prefix `text_model.` of CLIPTextModel, position ids are no longer stored, and T5 has its
    embeddings under two names.
    """
    shapes = {_T5_EMBEDDINGS.get(key, key): shape for key, shape in shapes.items()}
    return {
        re.sub(
            r"\.(query|key|value|proj_attn)\.", lambda m: f".{_OLD_ATTENTION[m[1]]}.", key.removeprefix("text_model.")
        ): shape
        for key, shape in shapes.items()
        if not key.endswith("position_ids")
    }


def check_folder(folder: Path, component: str, model_class: ModelClass) -> None:
    """Raises UserError where the component's safetensors files lack tensors, or hold others than its config asks for."""
    found: dict[str, tuple[int, ...]] = {}
    for path in weights(folder, component)[variant_of(folder, component)]:
        found.update(read_header(path).shapes)
    raise_if_keys_differ(
        repr(str(folder / component)),
        canonical_keys(found),
        expected_shapes(folder, component, model_class),
        "restore the config or the weights of the original checkpoint",
    )
