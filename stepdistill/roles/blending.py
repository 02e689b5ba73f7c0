"""Blending one role into another in weight space: psi <- psi + w (theta - psi), however the two are held.

Implicit distribution alignment (SenseFlow, arXiv 2506.00523, section on IDA) and Flash-DMD (arXiv 2511.20549) keep a fake
score near its generator in this way. A full network takes the exact step. A LoRA cannot: the blend of two deltas of rank r
has rank 2r. It moves along the tangent of its own manifold of rank-r matrices instead,

    D = w (S - W) / s,   dB = D A^+,   dA = (B^T B + rho)^-1 B^T D (I - A^+ A)          (W = s B A, the source's delta S)

which is the projection of the step, to first order, written in the factors that are there: A and B stay near themselves, so
that the moments of their optimizer keep their meaning. What is left out is second order in w.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.roles.lora import LoraFactors
from stepdistill.roles.triple import Triple
from stepdistill.runtime.sharding import shard_like, whole

RIDGE = 1e-4
"""Of B^T B, in units of its mean eigenvalue, the source's counted too: directions that B hardly knows would throw A far."""


@torch.no_grad()
def blend_role(triple: Triple, target: str, source: str, weight: float) -> None:
    """target <- target + weight (source - target), every process alike.

    A full target follows exactly, to the base where the source's LoRA has no target of its own. A LoRA target follows to
    first order in `weight` on its own modules, and cannot follow elsewhere.

    Args:
        weight: in [0, 1].
    """
    triple.reshard()
    if target not in triple.networks:
        _blend_lora(triple, target, source, weight)
    elif source in triple.networks:
        triple.lerp_role(target, source, weight)
    else:
        _blend_full(triple, target, source, weight)


def _blend_full(triple: Triple, target: str, source: str, weight: float) -> None:
    base, factors = triple.base_state(), triple.bank.factors(source)
    for key, parameter in triple.network_parameters(target).items():
        parameter.lerp_(base[key].to(parameter.dtype), weight)
        module, _, kind = key.rpartition(".")
        if kind == "weight" and module in factors:
            left, right = _delta_factors(factors[module])
            parameter.add_(shard_like(parameter, (left @ right).reshape(parameter.shape)), alpha=weight)


def _blend_lora(triple: Triple, target: str, source: str, weight: float) -> None:
    full = triple.networks.get(source)
    moved = dict(full.named_parameters()) if full is not None else {}
    base = triple.base_state() if full is not None else {}
    factors = triple.bank.factors(source)
    for module, own in triple.bank.factors(target).items():
        down, up, key = whole(own.down), whole(own.up), f"{module}.weight"
        # nothing, back to the base, where the source has no delta
        left: Tensor = up.new_zeros(len(up), 1)
        right: Tensor | None = down.new_zeros(1, down[0].numel())
        if full is not None:
            left, right = (whole(moved[key]) - whole(base[key]).to(up.dtype)).flatten(1), None
        elif module in factors:
            left, right = _delta_factors(factors[module])
        change_up, change_down = tangent_step(up.flatten(1), down.flatten(1), left / own.scale, right, weight)
        own.up.copy_(shard_like(own.up, up + change_up.reshape(up.shape)))
        own.down.copy_(shard_like(own.down, down + change_down.reshape(down.shape)))


def _delta_factors(factors: LoraFactors) -> tuple[Tensor, Tensor]:
    return factors.scale * whole(factors.up).flatten(1), whole(factors.down).flatten(1)


def tangent_step(
    up: Tensor, down: Tensor, left: Tensor, right: Tensor | None, weight: float, ridge: float = RIDGE
) -> tuple[Tensor, Tensor]:
    """(dB, dA) of the step from B A toward left @ right.

    Shapes: up B (d, r), down A (r, k), left (d, m), right (m, k); right None is the identity, m = k. No (d, k) matrix is
    made where there is a right factor.
    """
    onto_rows = left @ (down.T if right is None else right @ down.T)  # S A^T, (d, r)
    onto_columns = up.T @ left if right is None else (up.T @ left) @ right  # B^T S, (r, k)
    rows = _regularized_gram(down @ down.T, 1e-12 * down.double().square().sum())
    fitted = _solve(rows, onto_rows.T).T  # S A^+
    beyond = onto_columns - _solve(rows, (onto_columns @ down.T).T).T @ down
    size = up.double().square().sum() + fitted.double().square().sum()
    columns = _regularized_gram(up.T @ up, ridge * size)
    return weight * (fitted - up), weight * _solve(columns, beyond)


def _regularized_gram(gram: Tensor, size: Tensor) -> Tensor:
    """A Gram matrix in float64 with a diagonal that keeps it regular where it has no full rank."""
    amount = size / len(gram) + torch.finfo(torch.float32).tiny
    return gram.double() + amount * torch.eye(len(gram), dtype=torch.float64, device=gram.device)


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    return torch.linalg.solve(matrix, right.double()).to(right.dtype)  # type: ignore[no-any-return]
