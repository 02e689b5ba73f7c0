"""Named LoRA adapters on one frozen network, through peft, without peft's side effects on `requires_grad`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from stepdistill.errors import UserError
from stepdistill.runtime.gradient_checkpointing import checkpointed


@dataclass(frozen=True)
class LoraSettings:
    """A LoRA: delta = (alpha / rank) B A on every target module.

    Attributes:
        rank, alpha: as in Hu et al. 2021; alpha need not equal rank and is kept in every export.
        targets: module-name suffixes.
        rank_pattern, alpha_pattern: per-module exceptions, regular expressions as in peft.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def peft(self) -> LoraConfig:
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=list(self.targets),
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern=dict(self.alpha_pattern),
            init_lora_weights=True,
        )


@dataclass(frozen=True)
class LoraFactors:
    """One module's delta = scale B A.

    Attributes:
        down: A, (rank, in) or (rank, in, h, w).
        up: B, (out, rank) or (out, rank, 1, 1).
        scale: alpha / rank.
    """

    down: nn.Parameter
    up: nn.Parameter
    scale: float

    def delta(self) -> Tensor:
        """Returns what the LoRA adds to the module's weight, scale B A in float32, (out, in) or (out, in * h * w)."""
        return (self.up.float().flatten(1) @ self.down.float().flatten(1)) * self.scale


class AdapterBank:
    """The adapters of one network: added by name, selected by name, none selected = the untouched base."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.settings: dict[str, LoraSettings] = {}
        self.trainable: set[str] = set()
        self.active: str | None = None
        self._layers: list[BaseTunerLayer] = []

    def add(self, name: str, settings: LoraSettings, *, seed: int, trainable: bool = True) -> None:
        """Add a LoRA whose B is zero, so that the network is unchanged; its weights are float32 on any base.

        Raises:
            UserError: a target matches no module.
        """
        unmatched = [
            target for target, count in count_target_matches(self.network, settings.targets).items() if count == 0
        ]
        if unmatched:
            raise UserError(f"no module of the network matches the LoRA targets {unmatched}: mend roles.*.targets")
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            torch.manual_seed(seed)
            # peft says of a quantised base that it cannot merge into it; nothing here ever does
            warnings.filterwarnings("ignore", message=".*get_apply_tensor_subclass.*")
            try:
                inject_adapter_in_model(settings.peft(), self.network, adapter_name=name)
            except ValueError as error:
                raise UserError(
                    f"no module of the network matches the LoRA targets {list(settings.targets)}: {error}"
                ) from None
        self.settings[name] = settings
        if trainable:
            self.trainable.add(name)
        self._layers = [module for module in self.network.modules() if isinstance(module, BaseTunerLayer)]
        # injection decides requires_grad for every adapter it finds; say it again for all of them
        self.network.requires_grad_(False)
        for owner in self.settings:
            for _, parameter in self.parameters(owner):
                if parameter.dtype != torch.float64:  # fp32 masters: bf16 would round small updates away
                    parameter.data = parameter.data.float()
                parameter.requires_grad_(owner in self.trainable)
        self.select(None)

    def parameters(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        """(key, parameter) of one adapter; keys are `module.path.lora_A.weight`, without the adapter's name."""
        marker = f".{name}."
        for key, parameter in self.network.named_parameters():
            if marker in key and ".lora_" in key:
                yield key.replace(marker, "."), parameter

    def factors(self, name: str) -> dict[str, LoraFactors]:
        """Module path -> the factors that one adapter has there."""
        return {
            path: LoraFactors(layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name]))
            for path, layer in self.network.named_modules()
            if isinstance(layer, LoraLayer) and name in layer.lora_A
        }

    def select(self, name: str | None) -> None:
        """Make one adapter (or none) active. Unlike peft's own switches this leaves `requires_grad` alone, because a
        role's parameters must still be trainable when backward runs after another role was selected."""
        for layer in self._layers:
            layer._disable_adapters = name is None
            layer._active_adapter = [name] if name is not None else []
        self.active = name

    @contextmanager
    def role(self, name: str | None) -> Iterator[None]:
        """Select within a block and restore afterwards, also after an exception."""
        before = self.active
        self.select(name)
        try:
            yield
        finally:
            self.select(before)

    def checkpointed(self, function: Callable[..., Tensor], *args: Tensor) -> Tensor:
        """Gradient checkpointing for diffusers' `gradient_checkpointing_func`: the recomputation runs under the adapter
        that was active in the forward, whichever is active when backward comes by."""
        name = self.active

        def run(*inputs: Tensor) -> Tensor:
            with self.role(name):
                return function(*inputs)

        return checkpointed(run, *args)  # type: ignore[no-any-return]


def count_target_matches(network: nn.Module, targets: Sequence[str]) -> dict[str, int]:
    """How many modules each target suffix matches: a target that matches none is a typing error worth naming."""
    names = [name for name, _ in network.named_modules()]
    return {target: sum(name == target or name.endswith("." + target) for name in names) for target in targets}
