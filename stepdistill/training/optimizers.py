"""One AdamW per role; its learning rate is a pure function of the role's own updates."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stepdistill.config import OptimizerConfig
from stepdistill.models.sharding import laid_out_like, norm


def rate(config: OptimizerConfig, update: int) -> float:
    """Learning rate of the update with index `update` (0-based): linear warm-up, then constant, linear or cosine."""
    if update < config.warmup:
        return config.lr * (update + 1) / config.warmup
    if config.schedule == "constant" or config.decay_updates == 0:
        return config.lr
    share = min(1.0, (update - config.warmup) / config.decay_updates)
    return config.lr * (1 - share if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * share)))


class RoleOptimizer:
    """AdamW over a role's named parameters, with a state that is tensors by name."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> None:
        self.config = config
        self.parameters = dict(parameters)
        # (a fused step takes sharded and whole parameters only apart)
        fused = all(p.device.type == "cuda" and not isinstance(p, DTensor) for p in self.parameters.values())
        # one tensor at a time on the CPU: foreach would hold a temporary as large as all parameters together
        self.adam = torch.optim.AdamW(
            self.parameters.values(),
            lr=config.lr,
            betas=(float(config.betas[0]), float(config.betas[1])),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=fused or None,
            foreach=None if fused else False,
        )

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
        self.adam.step()
        return lr

    def zero_grad(self) -> None:
        self.adam.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        """Moments and step counts as `NAME|exp_avg`, `NAME|exp_avg_sq`, `NAME|step`; empty before the first step."""
        state: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            for key, value in self.adam.state.get(parameter, {}).items():
                state[f"{name}|{key}"] = value
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`, for the same parameters."""
        for name, parameter in self.parameters.items():
            moments = {
                key.rpartition("|")[2]: value.clone()
                for key in (f"{name}|step", f"{name}|exp_avg", f"{name}|exp_avg_sq")
                if (value := state.get(key)) is not None
            }
            if moments:
                step = moments.pop("step")
                # fused AdamW keeps its step counts beside the parameters
                where = parameter.device if self.adam.param_groups[0]["fused"] else "cpu"
                laid_out = {key: laid_out_like(parameter, value) for key, value in moments.items()}
                self.adam.state[parameter] = {"step": step.to(where), **laid_out}
