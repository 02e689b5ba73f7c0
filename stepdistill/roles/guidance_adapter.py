"""Guidance by small adapters beside the attention of a frozen network: one call where guidance takes two.

Adapter guidance distillation (AGD; Jensen & Sadat, 2025): each adapter adds to the output of one attention module what it
makes of that module's input, the guidance scale w, the time and the prompt. This file and
`guidance_modules.py` import torch and diffusers alone, and an export ships both:

    from guidance_adapter import load_guidance_adapter
    adapter = load_guidance_adapter(pipe, "guidance_adapter.safetensors", w=7.5)
    image = pipe("a photo", guidance_scale=1.0).images[0]          # half the network calls of guidance_scale=7.5
    adapter.w = 5.0                                                 # or one w a row; None turns it off
    adapter.watch(other)                                            # another pipeline on the same network, as of from_pipe
    adapter.products = torch.bfloat16                               # beside a float32 network, too

The network keeps its parameter names: adapters live in hooks, so that LoRAs load before and after, and attention processors,
`torch.compile` and CPU offload are none of their business.
"""

from __future__ import annotations

import inspect
import json
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.model_loading_utils import load_state_dict
from diffusers.models.transformers.sana_transformer import SanaTransformerBlock
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stepdistill.roles.guidance_modules import (
    KINDS,
    ConditionTokens,
    GuidanceAdapterSettings,
    GuidanceInputs,
)

ADAPTER_FILE = "guidance_adapter.safetensors"
METADATA_KEY = "guidance_adapter"
ADAPTED_ATTENTION: dict[type[nn.Module], str] = {
    BasicTransformerBlock: "attn2",
    JointTransformerBlock: "attn",
    SanaTransformerBlock: "attn2",
}
"""Block of a network -> its attention that is adapted: the one that looks at the prompt."""
HALF_DTYPES = (torch.bfloat16, torch.float16)
"""What autocast takes products in."""
TIME_EMBEDDING_NAMES = ("time_embedding", "time_text_embed", "time_embed")
"""Where a network embeds its time."""


class GuidanceAdapter(nn.Module):
    """All adapters of one network, by the name of the module they stand beside.

    Args:
        network: a diffusers UNet or transformer; nothing of it is changed until `attach`.
        settings: of the adapters.
        seed: of their first weights.

    Raises:
        ValueError: the network has no attention that looks at a prompt.
    """

    def __init__(self, network: nn.Module, settings: GuidanceAdapterSettings, seed: int = 0) -> None:
        super().__init__()
        self.settings = settings
        found = adapted_modules(network)
        if not found:
            raise ValueError(
                f"{type(network).__name__} has no attention that looks at a prompt, which guidance adapters stand beside: use a "
                "U-Net or transformer of diffusers that has"
            )
        stream = torch.Generator().manual_seed(seed)
        widths = settings.width, time_width(network), text_width(network)
        with torch.random.fork_rng(devices=[]):  # initialisers draw from the global stream
            torch.manual_seed(seed)
            self.adapters = nn.ModuleDict(
                {_key(name): KINDS[settings.kind](channels, settings) for name, (_, channels) in found.items()}
            )
            owners = ["all"] if settings.shared else list(self.adapters)
            each = settings.kind == "cross"
            self.encoders = nn.ModuleDict({owner: ConditionTokens(*widths, stream, each=each) for owner in owners})
        self._products: torch.dtype | None = None
        self._w: Tensor | float | None = None
        self._recorded_guidance: GuidanceInputs | None = None
        self._warned = False
        self._handles: list[RemovableHandle] = []
        self._pipeline: Any = None

    # ---------------------------------------------------------------- what a user says

    @property
    def w(self) -> Tensor | float | None:
        """Guidance scale: a number, one a row (B,), or None for the untouched network."""
        return self._w

    @w.setter
    def w(self, value: Tensor | float | None) -> None:
        if value is not None:
            self.warn_if_outside_trained_range(value)
        self._w = value

    @property
    def products(self) -> torch.dtype | None:
        """Precision of the adapters' matrix products, whatever that of the network; None is the network's.

        Raises:
            ValueError: set to what is neither None nor float32, bfloat16 or float16 of torch.
        """
        return self._products

    @products.setter
    def products(self, value: torch.dtype | None) -> None:
        if value not in (None, torch.float32, *HALF_DTYPES):
            raise ValueError(
                f"products of guidance adapters were asked for in {value!r}: give torch.bfloat16, torch.float16, torch.float32 or None"
            )
        self._products = value

    def warn_if_outside_trained_range(self, value: Tensor | float) -> None:
        """Warn, once, where a w is not one that was trained."""
        low, high = float(torch.as_tensor(value).min()), float(torch.as_tensor(value).max())
        settings = self.settings
        if not self._warned and (low < settings.w_low or high > settings.w_high):
            self._warned = True
            warnings.warn(
                f"guidance w = {low if low < settings.w_low else high:g} is outside of the trained range "
                f"[{settings.w_low:g}, {settings.w_high:g}]: the adapter extrapolates",
                stacklevel=3,
            )

    @contextmanager
    def told(self, w: Tensor | float | None) -> Iterator[None]:
        """Inside, guidance is w."""
        before, self._w = self._w, w
        try:
            yield
        finally:
            self._w = before

    @property
    def recorded_guidance(self) -> GuidanceInputs | None:
        """What the pass that is running, or ran last, was told; None where guidance is off."""
        return self._recorded_guidance

    @contextmanager
    def restore_guidance(self, told: GuidanceInputs | None) -> Iterator[None]:
        """Inside, modules that are run again hear what their pass was told: for checkpointed blocks in backward."""
        before, self._recorded_guidance = self._recorded_guidance, told
        try:
            yield
        finally:
            self._recorded_guidance = before

    @torch.no_grad()
    def zero_output(self) -> None:
        """Zero what the adapters add, as at first."""
        for adapter in self.adapters.values():
            for parameter in _last_linear(adapter).parameters():
                parameter.zero_()

    # ---------------------------------------------------------------- hooks

    def attach(self, network: nn.Module, pipeline: Any = None) -> GuidanceAdapter:
        """Stand beside a network. With a pipeline, guidance by two calls at the same time is refused.

        Raises:
            ValueError: the network's attention modules are not those that the adapters were made for, or they stand beside a
                network already.
        """
        if self._handles:
            raise ValueError(
                "the adapters stand beside a network already, and would be added twice: detach() them first"
            )
        self._pipeline = pipeline
        found = adapted_modules(network)
        if {_key(name) for name in found} != set(self.adapters):
            raise ValueError(
                f"the adapters were made for {len(self.adapters)} attention modules and {type(network).__name__} has "
                f"{len(found)}, not the same: load them on the base that they were trained on"
            )

        def record_time(_module: nn.Module, _args: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
            told = self._recorded_guidance
            if told is None:
                return
            embedded = output[-1] if isinstance(output, tuple) else output
            told.time = embedded.expand(len(told.w), -1)
            if self.settings.shared:  # here, since blocks may be checkpointed, which must not share what they compute
                told.tokens = self._encode_tokens("all", told)

        self._handles = [
            network.register_forward_pre_hook(_ForwardPreHook(self, type(network)), with_kwargs=True),
            _time_module(network).register_forward_hook(record_time),
        ]
        for name, (module, _) in found.items():
            self._handles.append(module.register_forward_hook(self._make_attention_hook(_key(name)), with_kwargs=True))
        return self

    def detach(self) -> None:
        """Leave the network as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._pipeline = [], None

    def register_pipeline(self, pipeline: Any) -> None:
        """Refuse guidance by two calls of this pipeline from now on, which shares the network with the one before."""
        self._pipeline = pipeline

    def begin_forward(self, given: dict[str, Any]) -> None:
        """A pass begins, of a network that was given these arguments.

        Raises:
            ValueError: the pipeline guides as well, or there are neither one w, nor one a row, nor one a prompt.
        """
        self._recorded_guidance = None
        if self._w is None:
            return
        # a pipeline that was never called does not know yet whether it guides
        called = self._pipeline is not None and "_guidance_scale" in vars(self._pipeline)
        if called and self._pipeline.do_classifier_free_guidance:
            raise ValueError(
                f"the guidance adapter is on (w = {self._w}) and the pipeline guides as well: call it with "
                "guidance_scale=1.0, or set adapter.w = None"
            )
        text, mask = given["encoder_hidden_states"], given.get("encoder_attention_mask")
        if mask is not None and mask.ndim == 2:
            # as in training: what the network's own attention does not look at says nothing here either
            text = text.masked_fill(mask[..., None] == 0, 0)
        w = torch.as_tensor(self._w, dtype=torch.float32, device=text.device)
        if w.ndim and len(w) > 1 and len(text) != len(w):
            if len(text) % len(w):
                raise ValueError(
                    f"the guidance adapter was told {len(w)} values of w and the network {len(text)} rows: give one, or one a prompt"
                )
            w = w.repeat_interleave(len(text) // len(w))  # num_images_per_prompt repeats each prompt in place
        if next(self.parameters()).device != text.device:
            self.to(text.device)
        w = w.expand(len(text))
        self._recorded_guidance = GuidanceInputs(
            w, text, guidance_strength(w)[:, None, None] if self.settings.rising else None
        )

    def _make_attention_hook(self, name: str) -> Any:
        adapter = self.adapters[name]

        def add(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            told = self._recorded_guidance
            if told is None:
                return None
            hidden = args[0] if args else kwargs["hidden_states"]
            attended = output[0] if isinstance(output, tuple) else output
            tokens = self._encode_tokens(name, told) if told.tokens is None else told.tokens
            own, like = self._own_dtype(), self._products or attended.dtype
            half = like in HALF_DTYPES  # without a cache, which CUDA graphs would read later
            with torch.autocast(attended.device.type, like if half else None, enabled=half, cache_enabled=False):
                more = adapter(hidden.to(own), attended.to(own), tokens)
                more = more if told.guidance_strength is None else told.guidance_strength.to(more) * more
            added = attended + more.to(attended)
            return (added, *output[1:]) if isinstance(output, tuple) else added  # image and text stream

        return add

    def _encode_tokens(self, owner: str, told: GuidanceInputs) -> Tensor:
        with torch.autocast(told.text.device.type, enabled=False):  # half precision cannot hold the phases of w
            return self.encoders[owner](told)  # type: ignore[no-any-return]

    def _own_dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


class _ForwardPreHook:
    """The hook before a network's pass."""

    def __init__(self, adapter: GuidanceAdapter, network: type[nn.Module]) -> None:
        self.adapter, self.signature = adapter, inspect.signature(network.forward)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.adapter.begin_forward(self.signature.bind(module, *args, **kwargs).arguments)


def load_guidance_adapter(pipeline: Any, path: str | Path, w: Tensor | float | None = None) -> GuidanceAdapter:
    """Load adapters onto a pipeline's network, in the place of those that were loaded before.

    Args:
        pipeline: a stock diffusers pipeline; called with guidance_scale=1.0 from now on.
        path: guidance_adapter.safetensors, or its folder.
        w: guidance scale, (B,) or a number; None is off.

    Raises:
        ValueError: not a guidance adapter, or one of another base; the first missing or unexpected key is named.
    """
    network = pipeline.unet if "unet" in pipeline.components else pipeline.transformer
    network = dict(network.named_children()).get("_orig_mod", network)  # within torch.compile's
    adapter = read_guidance_adapter(network, path)
    for hook in list(network._forward_pre_hooks.values()):
        if isinstance(hook, _ForwardPreHook):
            hook.adapter.detach()
    adapter.attach(network, pipeline)
    adapter.w = w
    return adapter


def read_guidance_adapter(network: nn.Module, path: str | Path) -> GuidanceAdapter:
    """Adapters from a file (or its folder) for a network, frozen, not attached. Raises as `load_guidance_adapter`."""
    file = Path(path)
    if file.is_dir():
        file = file / ADAPTER_FILE
    adapter = GuidanceAdapter(network, read_adapter_settings(file))
    tensors, own = load_state_dict(str(file)), adapter.state_dict()
    for what, keys in (("lacks", own.keys() - tensors.keys()), ("has", tensors.keys() - own.keys())):
        if keys:
            raise ValueError(
                f"{file} {what} {len(keys)} tensors (first: {min(keys)!r}) that this network's adapters "
                f"{'have' if what == 'lacks' else 'have not'}: load it on the base that it was trained on"
            )
    reshaped = [key for key in own if own[key].shape != tensors[key].shape]
    if reshaped:
        raise ValueError(
            f"{file} has {len(reshaped)} tensors of another shape (first: {reshaped[0]!r}): load it on the base it was trained on"
        )
    adapter.load_state_dict(tensors)
    return adapter.eval().requires_grad_(False)


def read_adapter_settings(file: Path) -> GuidanceAdapterSettings:
    """The hyperparameters in a file's metadata. Raises ValueError where it is no guidance adapter."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        metadata = json.loads(opened.read(length)).get("__metadata__", {})
    if METADATA_KEY not in metadata:
        raise ValueError(
            f"{file} is not a guidance adapter (it says no hyperparameters): give one that was exported as such"
        )
    return GuidanceAdapterSettings(**json.loads(metadata[METADATA_KEY]))


def settings_metadata(settings: GuidanceAdapterSettings) -> dict[str, str]:
    """What `settings_in` reads."""
    return {METADATA_KEY: json.dumps(asdict(settings))}


def adapted_modules(network: nn.Module) -> dict[str, tuple[nn.Module, int]]:
    """Name -> (attention module, channels of its input), of every block by its type: 16 in SD 1.5 and 2.1, 70 in SDXL."""
    found = {}
    for name, block in network.named_modules():
        attribute = ADAPTED_ATTENTION.get(type(block))
        if attribute is not None:
            module = block.get_submodule(attribute)
            found[f"{name}.{attribute}"] = (module, module.get_submodule("to_q").in_features)
    return found


def guidance_strength(w: Tensor) -> Tensor:
    """(w - 1) / (1 + |w - 1| / 4): guidance's own slope at w = 1, less where it bends what a network makes of it."""
    above = w - 1
    return above / (1 + above.abs() / 4)


def time_width(network: nn.Module) -> int:
    """Channels of the network's own time embedding."""
    return _last_linear(_time_module(network)).out_features


def text_width(network: Any) -> int:
    """Channels of the text embeddings that the network is given."""
    config = network.config
    for key in ("joint_attention_dim", "caption_channels", "cross_attention_dim"):
        if isinstance(config.get(key), int):
            return int(config[key])
    raise ValueError(f"the config of {type(network).__name__} does not say how wide its text embeddings are")


def _time_module(network: nn.Module) -> nn.Module:
    for name, module in network.named_children():
        if name in TIME_EMBEDDING_NAMES:
            return module
    raise ValueError(f"{type(network).__name__} embeds no time in any of {', '.join(TIME_EMBEDDING_NAMES)}")


def _last_linear(module: nn.Module) -> nn.Linear:
    embedders = [m for name, m in module.named_modules() if name.endswith("timestep_embedder")]
    linears = [m for m in (embedders[0] if embedders else module).modules() if isinstance(m, nn.Linear)]
    return linears[-1]


def _key(name: str) -> str:
    return name.replace(".", "/")
