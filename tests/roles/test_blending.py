"""A role blended into another: exact where it can be, along the tangent of rank-r matrices where it cannot."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from support.toys import disturb, noise, unet_triple
from torch import Tensor

from stepdistill.roles.blending import blend_role, tangent_step
from stepdistill.roles.lora import LoraSettings
from stepdistill.roles.triple import FAKE_SCORE, GENERATOR, RoleLayout, Triple

D, K, R = 7, 9, 3


def factors(seed: int, rank: int = R) -> tuple[Tensor, Tensor]:
    return noise(D, rank, seed=seed), noise(rank, K, seed=seed + 1)


def stepped(up: Tensor, down: Tensor, source: Tensor, weight: float, ridge: float = 1e-14) -> Tensor:
    change_up, change_down = tangent_step(up, down, source, None, weight, ridge)
    return (up + change_up) @ (down + change_down)


def truncated(matrix: Tensor, rank: int = R) -> Tensor:
    u, s, v = torch.linalg.svd(matrix)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def weights(triple: Triple, role: str) -> dict[str, Tensor]:
    """The role as a network without adapters."""
    if role in triple.networks:
        return {key: value.detach().clone() for key, value in triple.network_parameters(role).items()}
    found = {key: value.clone() for key, value in triple.base_state().items()}
    for module, own in triple.bank.factors(role).items():
        delta = own.scale * own.up.detach().flatten(1) @ own.down.detach().flatten(1)
        found[f"{module}.weight"] += delta.reshape(found[f"{module}.weight"].shape)
    return found


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return float(torch.stack([(a[key] - b[key]).square().sum() for key in a]).sum().sqrt())


def between(target: dict[str, Tensor], source: dict[str, Tensor], weight: float) -> dict[str, Tensor]:
    return {key: target[key] + weight * (source[key] - target[key]) for key in target}


# ---------------------------------------------------------------- one matrix


def test_a_step_within_the_tangent_space_is_exact_to_first_order() -> None:
    """S - BA = U A + B V has no part that is left out; what remains is dB dA, w^2 of it."""
    (up, down), (u, v) = factors(0), factors(5)
    source = up @ down + u @ down + up @ v
    for weight in (1e-1, 1e-2, 1e-3):
        change_up, change_down = tangent_step(up, down, source, None, weight, 1e-14)
        first_order = change_up @ down + up @ change_down
        torch.testing.assert_close(first_order, weight * (source - up @ down), rtol=0, atol=1e-10)


def test_a_source_on_the_same_rows_is_met_exactly() -> None:
    (up, down), (u, _) = factors(0), factors(5)
    torch.testing.assert_close(stepped(up, down, u @ down, 0.3), 0.7 * up @ down + 0.3 * u @ down)


def test_the_best_approximation_is_met_to_second_order() -> None:
    """Against the truncated SVD of the exact blend: a tenth of the weight, a hundredth of the error."""
    up, down = factors(0)
    source = noise(D, K, seed=9)
    errors = [
        float((stepped(up, down, source, w) - truncated(up @ down + w * (source - up @ down))).norm())
        for w in (1e-2, 1e-3, 1e-4)
    ]
    for large, small in pairwise(errors):
        assert large / small == pytest.approx(100, rel=0.1)


def test_factors_of_the_source_say_the_same_as_its_product() -> None:
    (up, down), (left, right) = factors(0), factors(5, rank=5)
    for mine, dense in zip(
        tangent_step(up, down, left, right, 0.3), tangent_step(up, down, left @ right, None, 0.3), strict=True
    ):
        torch.testing.assert_close(mine, dense)


def test_at_zero_b_only_b_moves() -> None:
    """A keeps its gauge, and B takes the part of the source that lies in A's rows."""
    _, down = factors(0)
    source = noise(D, K, seed=9)
    change_up, change_down = tangent_step(torch.zeros(D, R).double(), down, source, None, 0.1)
    assert torch.equal(change_down, torch.zeros_like(down))
    torch.testing.assert_close(change_up, 0.1 * source @ torch.linalg.pinv(down))
    for change in tangent_step(torch.zeros(D, R).double(), down, torch.zeros(D, K).double(), None, 0.1):
        assert torch.equal(change, torch.zeros_like(change))


def test_a_direction_that_b_hardly_knows_moves_a_little() -> None:
    up, down = factors(0)
    up[:, 0] *= 1e-9
    _, change_down = tangent_step(up, down, noise(D, K, seed=9), None, 0.03)
    assert float(change_down.norm() / down.norm()) < 1


def test_repeated_blending_reaches_a_source_whose_rank_suffices() -> None:
    (left, right), down = factors(5, rank=2), noise(R, K, seed=1)
    up = torch.zeros(D, R).double()
    for _ in range(600):
        change_up, change_down = tangent_step(up, down, left, right, 0.03)
        up, down = up + change_up, down + change_down
    torch.testing.assert_close(up @ down, left @ right, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- roles


@pytest.mark.parametrize("source", ["lora", "full"])
def test_a_full_target_is_blended_exactly(source: str) -> None:
    """Convolutions, biases and all that the generator's LoRA leaves alone: there the base pulls."""
    triple = unet_triple(source, "full")
    disturb(triple)
    expected = between(weights(triple, FAKE_SCORE), weights(triple, GENERATOR), 0.1)
    generator = weights(triple, GENERATOR)
    blend_role(triple, FAKE_SCORE, GENERATOR, 0.1)
    assert apart(weights(triple, FAKE_SCORE), expected) < 1e-12
    assert apart(weights(triple, GENERATOR), generator) == 0


@pytest.mark.parametrize("source", ["lora", "full"])
def test_a_lora_target_comes_nearer(source: str) -> None:
    """As near as the tangent allows: the error against the exact blend is orthogonal to the step."""
    triple = unet_triple(source, "lora")
    disturb(triple)
    before, goal = weights(triple, FAKE_SCORE), weights(triple, GENERATOR)
    blend_role(triple, FAKE_SCORE, GENERATOR, 1e-3)
    after = weights(triple, FAKE_SCORE)
    for module in triple.bank.factors(FAKE_SCORE):
        key = f"{module}.weight"
        step, wanted = after[key] - before[key], 1e-3 * (goal[key] - before[key])
        assert 0 < float(step.norm()) <= float(wanted.norm()) * (1 + 1e-2)
        assert float((step * (wanted - step)).sum()) == pytest.approx(0, abs=2e-2 * float(step.norm() * wanted.norm()))
    assert apart(after, goal) < apart(before, goal)


def layout(rank: int, alpha: float, *targets: str) -> RoleLayout:
    return RoleLayout(
        "lora", LoraSettings(rank, alpha, targets, rank_pattern={"to_q": 2}, alpha_pattern={"conv1": 3.0})
    )


def test_ranks_alphas_and_targets_may_differ() -> None:
    """Both scales are told apart; a module without the generator's LoRA goes back to the base."""
    toy = unet_triple("lora", "lora")
    triple = Triple(
        toy.base, toy.family, toy.schedule,
        {"generator2": layout(3, 2.0, "to_q", "conv1"), "fake2": layout(8, 16.0, "to_q", "to_k", "conv1")},
    )  # fmt: skip
    disturb(triple)
    before, goal = weights(triple, "fake2"), weights(triple, "generator2")
    for _ in range(80):
        blend_role(triple, "fake2", "generator2", 0.2)
    assert apart(weights(triple, "fake2"), goal) < 1e-3 * apart(before, goal)


def test_blending_fully_gives_the_source() -> None:
    triple = unet_triple("lora", "full")
    disturb(triple)
    blend_role(triple, FAKE_SCORE, GENERATOR, 1.0)
    assert apart(weights(triple, FAKE_SCORE), weights(triple, GENERATOR)) < 1e-12
