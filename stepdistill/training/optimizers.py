"""One AdamW per role; its learning rate is a pure function of the role's own updates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stepdistill.config import OptimizerConfig
from stepdistill.errors import Refusal
from stepdistill.models.sharding import laid_out_like, norm
from stepdistill.training.offload import OffloadedState

CODES = ("qmap1", "qmap2")
"""What the 256 codes of 8-bit moments mean: one tensor for all parameters, saved once."""


def rate(config: OptimizerConfig, update: int) -> float:
    """Learning rate of the update with index `update` (0-based): linear warm-up, then constant, linear or cosine."""
    if update < config.warmup:
        return config.lr * (update + 1) / config.warmup
    if config.schedule == "constant" or config.decay_updates == 0:
        return config.lr
    share = min(1.0, (update - config.warmup) / config.decay_updates)
    return config.lr * (1 - share if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * share)))


class RoleOptimizer:
    """AdamW over a role's named parameters, with a state that is tensors by name.

    Args:
        parameters: by name, all on one device.
        config: kind, rates, clipping.
        offload: the state lives in main memory between steps.

    Raises:
        Refusal: adamw8bit without its package, or on a device or dtype that it does not know.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, *, offload: bool = False
    ) -> None:
        self.config = config
        self.parameters = dict(parameters)
        owned = list(self.parameters.values())
        self.adam = _adamw8bit(owned, config) if config.kind == "adamw8bit" else _adamw(owned, config)
        self._offloaded = OffloadedState(self.adam.state) if offload else None

    def clip(self) -> Tensor:
        """Norm of the summed gradient before clipping, float64 scalar; gradients are clipped in place."""
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        total = norm(gradients)
        factor = self.config.clip / (float(total) + 1e-6) if self.config.clip else 1.0
        if factor < 1:
            for gradient in gradients:
                gradient.mul_(factor)
        return total

    def step(self, update: int) -> float:
        """Apply the gradients with the rate of this update, and return the rate."""
        lr = rate(self.config, update)
        for group in self.adam.param_groups:
            group["lr"] = lr
        if self._offloaded is None:
            self.adam.step()
            return lr
        self._offloaded.fetch()
        self.adam.step()
        self._offloaded.release()
        return lr

    def zero_grad(self) -> None:
        self.adam.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        """All that the next update depends on, as `NAME|KEY`; empty before the first step.

        Keys: `exp_avg`, `exp_avg_sq` and `step`; in 8 bit `state1` and `state2` (moments, float32 for small parameters),
        `absmax1` and `absmax2` (scales of their blocks), `step`, and without a name `qmap1` and `qmap2` (see CODES).
        """
        return {
            f"{'' if key in CODES else name}|{key}": torch.as_tensor(value)
            for name, parameter in self.parameters.items()
            for key, value in self.adam.state.get(parameter, {}).items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`, for the same parameters.

        Raises:
            Refusal: the state was saved by the other kind of optimizer.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            name, _, quantity = key.rpartition("|")
            found.setdefault(name, {})[quantity] = value
        codes = {key: value.to(self._device) for key, value in found.pop("", {}).items()}
        saved = "adamw8bit" if any("state1" in values for values in found.values()) else "adamw"
        if found and saved != self.config.kind:
            raise Refusal(
                f"the saved optimizer is an {saved} and the config says {self.config.kind!r}: set optimizers.*.kind to {saved}"
            )
        for name, parameter in self.parameters.items():
            if name in found:
                values = {key: self._placed(key, value, parameter) for key, value in found[name].items()}
                self.adam.state[parameter] = {**values, **codes} if "absmax1" in values else values
        if self._offloaded is not None:
            self._offloaded.release()

    @property
    def _device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    def _placed(self, key: str, value: Tensor, parameter: nn.Parameter) -> Tensor | int:
        """A saved value as the optimizer holds it."""
        if key != "step":
            placed = laid_out_like(parameter, value.clone())
            # a fused step wants the parameter's own memory layout, which files do not keep
            same = placed.shape == parameter.shape and not isinstance(placed, DTensor)
            return torch.empty_like(parameter, dtype=placed.dtype).copy_(placed) if same else placed
        if self.config.kind == "adamw8bit":
            return int(value)
        # fused AdamW keeps its step counts beside the parameters
        return value.to(parameter.device if self.adam.param_groups[0]["fused"] else "cpu", copy=True)


def check_adamw8bit(device: torch.device, dtype: torch.dtype) -> None:
    """Raises Refusal where bitsandbytes is missing, or knows not this device or dtype; cheap, imports nothing."""
    if find_spec("bitsandbytes") is None:
        raise Refusal(
            "the optimizer adamw8bit needs the package bitsandbytes, which is not installed: "
            "run pip install 'stepdistill[quantization]', or set optimizers.*.kind to adamw"
        )
    if device.type not in ("cpu", "cuda"):
        raise Refusal(
            f"the optimizer adamw8bit runs on 'cuda' and 'cpu', and the device is {device.type!r}: set optimizers.*.kind to adamw"
        )
    if dtype == torch.float64:
        raise Refusal(
            "the optimizer adamw8bit steps parameters of 32 bits or fewer, and model.dtype is 'float64': set optimizers.*.kind "
            "to adamw, or another model.dtype"
        )


def _adamw(parameters: Sequence[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    # (a fused step takes sharded and whole parameters only apart)
    fused = all(p.device.type == "cuda" and not isinstance(p, DTensor) for p in parameters)
    # one tensor at a time on the CPU: foreach would hold a temporary as large as all parameters together
    return torch.optim.AdamW(
        parameters,
        lr=config.lr,
        betas=(float(config.betas[0]), float(config.betas[1])),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=fused or None,
        foreach=None if fused else False,
    )


def _adamw8bit(parameters: Sequence[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    for parameter in parameters:
        check_adamw8bit(parameter.device, parameter.dtype)
    from bitsandbytes.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(
        parameters, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
    )
    return optimizer
