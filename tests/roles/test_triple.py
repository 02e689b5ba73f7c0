"""The triple on one base: equal at the start, isolated in training, right gradients across roles, refusals."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from support.toys import (
    CHANNELS,
    TEXT,
    analytic_triple,
    disturb,
    four_modes,
    layouts,
    noise,
    prompts,
    unet,
    unet_triple,
    vp,
)
from torch import Tensor, nn

from stepdistill.errors import UserError
from stepdistill.families.conditioning import Conditioning
from stepdistill.roles.heads import seeded_head
from stepdistill.roles.lora import LoraSettings
from stepdistill.roles.triple import FAKE_SCORE, GENERATOR, REAL_SCORE, RoleLayout, Triple

HELD = [("lora", "lora"), ("full", "full"), ("lora", "full"), ("full", "lora")]
ROLES = (GENERATOR, FAKE_SCORE)
T = torch.tensor([249.0, 749.0])


def x_t(count: int = 2) -> Tensor:
    return noise(count, 4, 8, 8)


def text(count: int = 2) -> Conditioning:
    return Conditioning(noise(count, 3, TEXT, seed=5))


def fingerprint(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(tensors.items()):
        digest.update(key.encode() + value.detach().double().numpy().tobytes())
    return digest.hexdigest()


def base_of(triple: Triple) -> str:
    return fingerprint({k: v for k, v in triple.base.state_dict().items() if ".lora_" not in k})


def ask(triple: Triple, role: str) -> Tensor:
    with torch.no_grad():
        return triple.denoiser(role).x0(x_t(), T, text())


def with_head(triple: Triple) -> Triple:
    triple.attach_head(
        FAKE_SCORE, "d", seeded_head(CHANNELS[-1], (4, 4), 0, 8).to(next(triple.base.parameters()).dtype)
    )
    return triple


# ---------------------------------------------------------------- the start


@pytest.mark.parametrize("held", HELD, ids="/".join)
def test_at_the_start_every_role_is_the_base(held: tuple[str, str]) -> None:
    """Exactly, not nearly: B = 0 or an equal copy."""
    expected = unet()
    raw = expected(x_t(), T, text().text).sample.detach()
    triple = unet_triple(*held)
    for role in (*ROLES, REAL_SCORE):
        with torch.no_grad():
            estimate = triple.denoiser(role).estimate(x_t(), T, text())
        assert torch.equal(estimate.raw, raw), role
    disturb(triple)
    assert torch.equal(ask(triple, REAL_SCORE), unet_triple(*held).real_score.x0(x_t(), T, text()))
    assert not torch.allclose(ask(triple, GENERATOR), ask(triple, REAL_SCORE))
    assert not torch.allclose(ask(triple, GENERATOR), ask(triple, FAKE_SCORE))


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_at_the_start_of_the_analytic_family(mode: str) -> None:
    triple, x, t = analytic_triple(four_modes(), vp(), mode=mode), noise(5, 2, 1, 1), torch.linspace(10, 990, 5)
    expected = triple.real_score.x0(x, t, prompts(5, 4))
    for role in ROLES:
        assert torch.equal(triple.denoiser(role).x0(x, t, prompts(5, 4)), expected)
    disturb(triple)
    assert torch.equal(triple.real_score.x0(x, t, prompts(5, 4)), expected)
    assert not torch.allclose(triple.generator.x0(x, t, prompts(5, 4)), expected)


@pytest.mark.parametrize("held", [("lora", "lora"), ("full", "full")], ids="/".join)
def test_at_the_start_in_mixed_precision(held: tuple[str, str]) -> None:
    """bf16 base, fp32 roles, bf16 autocast: F - T must be exactly zero, or the gap of two precisions is a constant bias."""
    triple = unet_triple(*held, dtype=torch.bfloat16, compute=torch.bfloat16)
    expected = triple.real_score.x0(x_t().float(), T, text())
    for role in ROLES:
        with torch.no_grad():
            assert torch.equal(triple.denoiser(role).x0(x_t().float(), T, text()), expected), role


@pytest.mark.parametrize("held", HELD, ids="/".join)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_trainable_weights_are_float32(held: tuple[str, str], dtype: torch.dtype) -> None:
    triple = with_head(unet_triple(*held, dtype=dtype, compute=torch.bfloat16))
    assert {p.dtype for p in triple.base.parameters() if not p.requires_grad} == {dtype}
    for role in ROLES:
        assert {p.dtype for p in triple.network_parameters(role).values()} == {torch.float32}
        with triple.training(role):
            estimate = triple.denoiser(role).estimate(x_t().to(dtype), T, text())
            assert estimate.raw.dtype == estimate.x0.dtype == estimate.eps.dtype == torch.float32
            estimate.x0.square().mean().backward()
        grads = [p.grad for p in triple.network_parameters(role).values() if p.grad is not None]
        assert {g.dtype for g in grads} == {torch.float32}
        assert all(torch.isfinite(g).all() for g in grads)
        assert sum(float(g.abs().sum()) for g in grads) > 0


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("held", HELD, ids="/".join)
def test_training_touches_one_role(held: tuple[str, str]) -> None:
    """AdamW steps of one role leave the base, the teacher's answers and the other role bit for bit alone."""
    triple = with_head(unet_triple(*held))
    base, teacher = base_of(triple), ask(triple, REAL_SCORE)
    for role, other in pairwise([GENERATOR, FAKE_SCORE, GENERATOR]):
        before, kept = fingerprint(triple.state(role)), fingerprint(triple.state(other))
        optimizer = torch.optim.AdamW(triple.parameters(role).values(), lr=1e-2)
        for _ in range(2):
            with triple.training(role):
                x0 = triple.denoiser(role).x0(x_t(), T, text())
                crossing = triple.denoiser(other).x0(x0, T, text())  # the graph crosses the other role
                (x0.square().mean() + crossing.square().mean()).backward()
            assert all(p.grad is None for p in triple.parameters(other).values())
            assert all(p.grad is None for name, p in triple.base.named_parameters() if ".lora_" not in name)
            optimizer.step()
            optimizer.zero_grad()
        assert fingerprint(triple.state(role)) != before
        assert fingerprint(triple.state(other)) == kept
    assert base_of(triple) == base
    assert torch.equal(ask(triple, REAL_SCORE), teacher)


@pytest.mark.parametrize("held", HELD, ids="/".join)
def test_requires_grad_is_restored(held: tuple[str, str]) -> None:
    triple = with_head(unet_triple(*held))
    triple.add_copy("ema", GENERATOR)

    def trainable() -> dict[str, set[bool]]:
        return {role: {p.requires_grad for p in triple.parameters(role).values()} for role in triple.layouts}

    free = {GENERATOR: {True}, FAKE_SCORE: {True}, "ema": {False}}
    assert trainable() == free
    with triple.training(GENERATOR):
        assert trainable() == {**free, FAKE_SCORE: {False}}
    with pytest.raises(KeyboardInterrupt), triple.training(FAKE_SCORE):  # noqa: PT012
        assert trainable() == {**free, GENERATOR: {False}}
        raise KeyboardInterrupt
    assert trainable() == free
    assert not any(p.requires_grad for name, p in triple.base.named_parameters() if ".lora_" not in name)


def test_the_role_is_restored_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    triple = unet_triple("lora", "lora")
    disturb(triple)
    with triple.bank.role(GENERATOR):
        with pytest.raises(ValueError, match="broken"), triple.bank.role(FAKE_SCORE):
            raise ValueError("broken")
        assert triple.bank.active == GENERATOR
    assert triple.bank.active is None
    teacher = ask(triple, REAL_SCORE)
    with pytest.raises(RuntimeError):
        triple.generator.x0(noise(2, 3, 8, 8), T, text())  # wrong channels, in the middle of the forward
    assert triple.bank.active is None
    assert torch.equal(ask(triple, REAL_SCORE), teacher)


def through_features(triple: Triple) -> Tensor:
    """A GAN term: the generator's sample through the fake score's features and a head."""
    x0 = triple.generator.x0(x_t(), T, text())
    loss = triple.head(FAKE_SCORE, "d")(triple.fake_score.features(x0, T, text())).mean()
    triple.real_score.guided(x0.detach(), T, text(), text(), 3.0)  # a role switch between forward and backward
    return loss


def through_samples(triple: Triple) -> Tensor:
    """The generator's sample through the fake score's x0 and the teacher's, all with graph, and the generator again."""
    x0 = triple.generator.x0(x_t(), T, text())
    again = triple.generator.x0(triple.fake_score.x0(x0, T, text()), T, text())
    loss = (again + triple.real_score.x0(x0, T, text())).square().mean()
    triple.bank.select(FAKE_SCORE if FAKE_SCORE in triple.bank.settings else None)  # backward starts under another role
    return loss


@pytest.mark.parametrize("held", HELD, ids="/".join)
@pytest.mark.parametrize("due", ROLES)
@pytest.mark.parametrize("loss", [through_features, through_samples])
def test_checkpointing_does_not_change_gradients(
    loss: Callable[[Triple], Tensor], due: str, held: tuple[str, str]
) -> None:
    """A graph through two roles: gradients with and without gradient checkpointing agree to 1e-12 (relative)."""

    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        triple = with_head(unet_triple(*held))
        disturb(triple)
        if checkpointing:
            triple.enable_gradient_checkpointing()
        with triple.training(due):
            loss(triple).backward()
        return {key: p.grad for key, p in triple.parameters(due).items() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    assert plain
    scale = max(float(value.abs().max()) for value in plain.values())
    assert scale > 0
    for key, value in plain.items():
        torch.testing.assert_close(checkpointed[key], value, rtol=0, atol=1e-12 * max(scale, 1))


def test_checkpointing_is_really_on() -> None:
    """Fewer tensors are kept for backward, in eval mode, in which all networks of a triple stay."""

    def kept(checkpointing: bool) -> int:
        triple, count = unet_triple("lora", "lora"), 0
        if checkpointing:
            triple.enable_gradient_checkpointing()

        def pack(tensor: Tensor) -> Tensor:
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            triple.generator.x0(x_t(), T, text())
        return count

    assert kept(True) < 0.6 * kept(False)


# ---------------------------------------------------------------- features


@pytest.mark.parametrize("held", [("lora", "lora"), ("full", "full")], ids="/".join)
@pytest.mark.parametrize("role", [*ROLES, REAL_SCORE])
def test_features_are_the_mid_block_of_a_full_forward(held: tuple[str, str], role: str) -> None:
    triple = unet_triple(*held)
    disturb(triple)
    denoiser, seen, after = triple.denoiser(role), [], []
    handles = [
        denoiser.network.mid_block.register_forward_hook(lambda _m, _a, output: seen.append(output)),  # type: ignore[union-attr]
        denoiser.network.up_blocks[0].register_forward_hook(lambda *_args: after.append(1)),  # type: ignore[union-attr,index]
    ]
    denoiser.x0(x_t(), T, text())
    for handle in handles[:1]:
        handle.remove()
    features = denoiser.features(x_t(), T, text())
    assert features.shape == (2, CHANNELS[-1], 4, 4)
    assert torch.equal(features, seen[0])
    assert after == [1]  # the up path ran in the full forward alone
    assert triple.bank.active is None
    denoiser.x0(x_t(), T, text())  # and the hook is gone
    assert after == [1, 1]


def test_flat_features_have_two_more_dimensions() -> None:
    features = analytic_triple(four_modes(), vp()).fake_score.features(noise(3, 2, 1, 1), 500, prompts(3, 4))
    assert features.shape == (3, 16, 1, 1)


# ---------------------------------------------------------------- copies, averages, resets


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_copies_and_averages_go_by_name(mode: str) -> None:
    """EMA after k updates: e_k = d e_{k-1} + (1 - d) p_k, for every parameter, in float32 or better."""
    triple = unet_triple(mode, mode)
    disturb(triple)
    triple.add_copy("ema", GENERATOR)
    assert torch.equal(ask(triple, "ema"), ask(triple, GENERATOR))
    expected = {key: value.detach().clone() for key, value in triple.network_parameters("ema").items()}
    for _ in range(3):
        disturb(triple, 0.1)
        triple.copy_role(FAKE_SCORE, GENERATOR)
        before = {key: value.detach().clone() for key, value in triple.network_parameters("ema").items()}
        triple.lerp_role("ema", GENERATOR, 1 - 0.9)
        for key, value in triple.network_parameters(GENERATOR).items():
            expected[key] = 0.9 * before[key] + 0.1 * value.detach()
    for key, value in triple.network_parameters("ema").items():
        torch.testing.assert_close(value.detach(), expected[key], rtol=0, atol=1e-12)
    assert torch.equal(ask(triple, GENERATOR), ask(triple, FAKE_SCORE))
    assert not any(p.requires_grad for p in triple.parameters("ema").values())


@pytest.mark.parametrize("held", [("lora", "lora"), ("full", "lora")], ids="/".join)
def test_reset_returns_to_the_base(held: tuple[str, str]) -> None:
    triple = unet_triple(*held)
    disturb(triple)
    kept = ask(triple, FAKE_SCORE)
    triple.reset_role(GENERATOR)
    assert torch.equal(ask(triple, GENERATOR), ask(triple, REAL_SCORE))
    assert torch.equal(ask(triple, FAKE_SCORE), kept)


def test_roles_may_be_added_later() -> None:
    """Experts: a LoRA at any time, a full network as long as one exists from the start; others do not notice."""
    triple = unet_triple("lora", "full")
    disturb(triple)
    answers = {role: ask(triple, role) for role in (*ROLES, REAL_SCORE)}
    triple.add_role("expert", RoleLayout("lora", triple.layouts[GENERATOR].lora))
    triple.add_role("big", RoleLayout("full"))
    assert all(torch.equal(ask(triple, role), answer) for role, answer in answers.items())
    assert torch.equal(ask(triple, "expert"), answers[REAL_SCORE])
    assert torch.equal(ask(triple, "big"), answers[REAL_SCORE])
    assert all(p.requires_grad for role in triple.layouts for p in triple.parameters(role).values())
    with pytest.raises(KeyError, match="nobody"):
        triple.denoiser("nobody")


@pytest.mark.parametrize("name", [GENERATOR, REAL_SCORE])
def test_a_role_is_not_added_twice(name: str) -> None:
    """peft would silently re-initialise an adapter of the same name."""
    triple = unet_triple("lora", "lora")
    disturb(triple)
    before = ask(triple, GENERATOR)
    with pytest.raises(ValueError, match=name):
        triple.add_role(name, triple.layouts[GENERATOR])
    assert torch.equal(ask(triple, GENERATOR), before)


# ---------------------------------------------------------------- state


def broken(state: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    first = next(iter(state))
    yield "1 missing", {key: value for key, value in state.items() if key != first}
    yield "1 unexpected", {**state, "stranger": torch.zeros(1)}
    yield "1 differently shaped", {**state, first: torch.zeros(1, 2, 3, 4, 5)}


@pytest.mark.parametrize("held", [("lora", "lora"), ("full", "full")], ids="/".join)
@pytest.mark.parametrize("role", ROLES)
def test_state_round_trip_and_refusals(held: tuple[str, str], role: str) -> None:
    triple, other = (with_head(unet_triple(*held)) for _ in range(2))
    disturb(triple)
    other.load_state(role, triple.state(role))
    assert torch.equal(ask(other, role), ask(triple, role))
    assert fingerprint(other.state(role)) == fingerprint(triple.state(role))
    assert any(key.startswith("head.d.") for key in triple.state(FAKE_SCORE))
    before = fingerprint(other.state(role))
    changed = {key: value + 1 for key, value in triple.state(role).items()}
    for message, state in broken(changed):
        with pytest.raises(UserError, match=f"{role}.*{message}"):
            other.load_state(role, state)
        assert fingerprint(other.state(role)) == before


# ---------------------------------------------------------------- LoRA settings


def test_ranks_per_module() -> None:
    triple = unet_triple("lora", "lora", rank_pattern={"mid_block.*to_q": 2}, alpha_pattern={"mid_block.*to_q": 8.0})
    shapes = {key: tuple(p.shape) for key, p in triple.network_parameters(GENERATOR).items() if ".lora_A." in key}
    ranks = {key: shape[0] for key, shape in shapes.items()}
    special = [key for key in ranks if key.startswith("mid_block") and ".to_q." in key]
    assert special
    assert all(rank == (2 if key in special else 4) for key, rank in ranks.items())
    layer = triple.base.get_submodule(special[0].removesuffix(".lora_A.weight"))
    assert layer.scaling[GENERATOR] == 4.0  # type: ignore[union-attr,index]


def test_the_delta_is_alpha_over_rank() -> None:
    """y = W x + (alpha / rank) B A x, with alpha != rank."""
    triple = analytic_triple(four_modes(), vp(), mode="lora")
    disturb(triple)
    layer, x = triple.base.get_submodule("mlp.fc_mid"), noise(3, 16)
    a, b = (triple.network_parameters(GENERATOR)[f"mlp.fc_mid.lora_{m}.weight"] for m in "AB")
    with triple.bank.role(GENERATOR):
        got = layer(x)
    torch.testing.assert_close(
        got, nn.functional.linear(x, layer.base_layer.weight + 2 / 4 * b @ a, layer.base_layer.bias)
    )  # type: ignore[union-attr,operator]


@pytest.mark.parametrize("targets", [("nothing",), ("to_q", "to_quu")])
def test_targets_that_match_nothing_are_refused(targets: tuple[str, ...]) -> None:
    """All of them, or only one: a misspelt target must not vanish in silence."""
    with pytest.raises(UserError, match=targets[-1]):
        Triple(unet(), _family(), vp(), layouts("lora", "lora", targets))


def test_adapters_do_not_depend_on_the_global_seed_or_on_each_other() -> None:
    """A is a function of (seed, role); adding roles leaves the global generator where it was."""

    def weights(global_seed: int, *roles: str) -> dict[str, Tensor]:
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        layout = RoleLayout("lora", LoraSettings(4, 2.0, ("to_q",)))
        triple = Triple(unet(), _family(), vp(), {role: layout for role in roles}, seed=3)
        assert torch.equal(torch.get_rng_state(), state)
        return {key: p.detach() for key, p in triple.network_parameters(GENERATOR).items()}

    one, two = weights(0, GENERATOR), weights(1, FAKE_SCORE, GENERATOR)
    assert all(torch.equal(one[key], two[key]) for key in one)


def _family() -> Any:
    return unet_triple("full", "full").family
