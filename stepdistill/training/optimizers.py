"""One optimizer per role, AdamW or Muon; its learning rate is a pure function of the role's own updates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stepdistill.config.schema import OptimizerConfig
from stepdistill.errors import UserError
from stepdistill.runtime.optimizer_offload import OffloadedState
from stepdistill.runtime.sharding import global_norm, shard_like

CODEBOOK_KEYS = ("qmap1", "qmap2")
"""What the 256 codes of 8-bit moments mean: one tensor for all parameters, saved once."""
KIND_BY_STATE_KEY = {"state1": "adamw8bit", "momentum_buffer": "muon"}
"""What only one kind's state holds -> that kind."""
MUON_SINCE = "2.9"


def learning_rate_at(config: OptimizerConfig, update: int) -> float:
    """Learning rate of the update with index `update` (0-based): linear warm-up, held, then constant, linear or cosine."""
    if update < config.warmup:
        return config.lr * (update + 1) / config.warmup
    if config.schedule == "constant" or config.decay_updates == 0:
        return config.lr
    share = min(1.0, max(0, update - config.warmup - config.hold) / config.decay_updates)
    return config.lr * (1 - share if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * share)))


class RoleOptimizer:
    """An optimizer over a role's named parameters, with a state that is tensors by name.

    Muon (Jordan 2024) orthogonalises the momentum of a matrix, so that all its directions move alike. It knows matrices only:
    what else there is has AdamW beside it. Its steps are of AdamW's size (Liu et al. 2025: 0.2 sqrt(max(rows, columns))), so
    that one rate serves both; its momentum is the first of `betas`.

    Args:
        parameters: by name, all on one device.
        config: kind, rates, clipping.
        offload: the state lives in main memory between steps.

    Raises:
        UserError: adamw8bit without its package, or on a device or dtype that it does not know; muon without a torch that
            has it.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, *, offload: bool = False
    ) -> None:
        self.config = config
        self.parameters = dict(parameters)
        owned = list(self.parameters.values())
        self.optimizers = OPTIMIZER_FACTORIES[config.kind](owned, config)
        self._optimizer_of = {
            p: optimizer for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]
        }
        self._offloaded = [OffloadedState(optimizer.state) for optimizer in self.optimizers] if offload else []

    def clip(self) -> Tensor:
        """Norm of the summed gradient before clipping, float64 scalar; gradients are clipped in place."""
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        total = global_norm(gradients)
        factor = self.config.clip / (float(total) + 1e-6) if self.config.clip else 1.0
        if factor < 1:
            for gradient in gradients:
                gradient.mul_(factor)
        return total

    def step(self, update: int) -> float:
        """Apply the gradients with the rate of this update, and return the rate."""
        lr = learning_rate_at(self.config, update)
        for offloaded in self._offloaded:
            offloaded.fetch()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        for offloaded in self._offloaded:
            offloaded.release()
        return lr

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """What the optimizer keeps for a parameter, by its own names; empty before the first step."""
        state: dict[str, Any] = self._optimizer_of[parameter].state.get(parameter, {})
        return state

    def state_dict(self) -> dict[str, Tensor]:
        """All that the next update depends on, as `NAME|KEY`; empty before the first step.

        Keys: `exp_avg`, `exp_avg_sq` and `step`; `momentum_buffer` of Muon's matrices; in 8 bit `state1` and `state2`
        (moments, float32 for small parameters), `absmax1` and `absmax2` (scales of their blocks), `step`, and without a name
        `qmap1` and `qmap2` (see CODES).
        """
        return {
            f"{'' if key in CODEBOOK_KEYS else name}|{key}": torch.as_tensor(value)
            for name, parameter in self.parameters.items()
            for key, value in self.state_of(parameter).items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`, for the same parameters.

        Raises:
            UserError: the state was saved by another kind of optimizer.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            name, _, quantity = key.rpartition("|")
            found.setdefault(name, {})[quantity] = value
        codes = {key: value.to(self._device) for key, value in found.pop("", {}).items()}
        signs = {KIND_BY_STATE_KEY[key] for values in found.values() for key in values if key in KIND_BY_STATE_KEY}
        saved = next(iter(signs), "adamw")
        if found and saved != self._kind:
            raise UserError(
                f"the saved optimizer is of kind {saved!r} and the config says {self.config.kind!r}: set optimizers.*.kind to {saved}"
            )
        for name, parameter in self.parameters.items():
            if name in found:
                values = {key: self._to_optimizer_layout(key, value, parameter) for key, value in found[name].items()}
                self._optimizer_of[parameter].state[parameter] = {**values, **codes} if "absmax1" in values else values
        for offloaded in self._offloaded:
            offloaded.release()

    @property
    def _kind(self) -> str:
        """As a saved state tells: Muon that has no matrix is AdamW."""
        return (
            "adamw" if self.config.kind == "muon" and not any(map(is_matrix, self._optimizer_of)) else self.config.kind
        )

    @property
    def _device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    def _to_optimizer_layout(self, key: str, value: Tensor, parameter: nn.Parameter) -> Tensor | int:
        """A saved value as the optimizer holds it."""
        if key != "step":
            placed = shard_like(parameter, value.clone())
            # a fused step wants the parameter's own memory layout, which files do not keep
            same = placed.shape == parameter.shape and not isinstance(placed, DTensor)
            return torch.empty_like(parameter, dtype=placed.dtype).copy_(placed) if same else placed
        if self.config.kind == "adamw8bit":
            return int(value)
        # fused AdamW keeps its step counts beside the parameters
        fused = self._optimizer_of[parameter].param_groups[0]["fused"]
        return value.to(parameter.device if fused else "cpu", copy=True)


def check_adamw8bit(device: torch.device, dtype: torch.dtype) -> None:
    """Raises UserError where bitsandbytes is missing, or knows not this device or dtype; cheap, imports nothing."""
    if find_spec("bitsandbytes") is None:
        raise UserError(
            "the optimizer adamw8bit needs the package bitsandbytes, which is not installed: "
            "run pip install 'stepdistill[quantization]', or set optimizers.*.kind to adamw"
        )
    if device.type not in ("cpu", "cuda"):
        raise UserError(
            f"the optimizer adamw8bit runs on 'cuda' and 'cpu', and the device is {device.type!r}: set optimizers.*.kind to adamw"
        )
    if dtype == torch.float64:
        raise UserError(
            "the optimizer adamw8bit steps parameters of 32 bits or fewer, and model.dtype is 'float64': set optimizers.*.kind "
            "to adamw, or another model.dtype"
        )


def check_muon() -> None:
    """Raises UserError where torch has no Muon yet."""
    if torch.__version__ < MUON_SINCE:
        raise UserError(
            f"the optimizer muon came with torch {MUON_SINCE}, and this is torch {torch.__version__}: update torch, or set "
            "optimizers.*.kind to adamw"
        )


def _adamw(parameters: Sequence[nn.Parameter], config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    # (a fused step takes sharded and whole parameters only apart)
    fused = all(p.device.type == "cuda" and not isinstance(p, DTensor) for p in parameters)
    # one tensor at a time on the CPU: foreach would hold a temporary as large as all parameters together
    adamw = torch.optim.AdamW(
        parameters,
        lr=config.lr,
        betas=(float(config.betas[0]), float(config.betas[1])),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=fused or None,
        foreach=None if fused else False,
    )
    return [adamw]


def _muon(parameters: Sequence[nn.Parameter], config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    check_muon()
    matrices = [parameter for parameter in parameters if is_matrix(parameter)]
    others = [parameter for parameter in parameters if not is_matrix(parameter)]
    optimizers: list[torch.optim.Optimizer] = _adamw(others, config) if others else []
    if matrices:
        muon = torch.optim.Muon(
            matrices,
            lr=config.lr,
            momentum=float(config.betas[0]),
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        optimizers.append(muon)
    return optimizers


def is_matrix(parameter: Tensor) -> bool:
    """Whether Muon steps it; AdamW does elsewhere."""
    return parameter.ndim == 2


def _adamw8bit(parameters: Sequence[nn.Parameter], config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    for parameter in parameters:
        check_adamw8bit(parameter.device, parameter.dtype)
    from bitsandbytes.optim import AdamW8bit  # type: ignore[attr-defined]

    return [AdamW8bit(parameters, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)]


OPTIMIZER_FACTORIES = {"adamw": _adamw, "adamw8bit": _adamw8bit, "muon": _muon}
