"""Options of memory and speed change where tensors live and how blocks run, not what comes out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from safetensors.torch import load, save
from support.method_cases import difference, equal, saved
from torch import Tensor, nn

import stepdistill
from stepdistill.config.reading import parse
from stepdistill.config.registry import load_family
from stepdistill.config.schema import OptimizerConfig, RunConfig
from stepdistill.errors import UserError
from stepdistill.families.checkpoints.loading import inspect_checkpoint, load_checkpoint
from stepdistill.families.conditioning import Conditioning, MicroConditioning
from stepdistill.methods.base import Needs
from stepdistill.roles.lora import LoraSettings
from stepdistill.roles.triple import RoleLayout, Triple
from stepdistill.runtime import kernels
from stepdistill.runtime.kernels import compile_blocks, set_attention_and_memory_format
from stepdistill.training import optimizers
from stepdistill.training.optimizers import RoleOptimizer, check_adamw8bit
from stepdistill.training.option_checks import check_training_options, float32_precision
from stepdistill.training.run import train
from stepdistill.training.session import EMA, checkpointed_decode
from stepdistill.training.setup import prepare

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.gpu,
    ),
]
ROLES = {"generator": "generator", "fake_score": "fake_score"}


@pytest.fixture
def config(tiny: Callable[..., Path]) -> Callable[..., RunConfig]:
    def make(steps: int = 3, mode: str = "lora", kind: str = "adamw", **changes: Any) -> RunConfig:
        role = {"mode": mode, "rank": 16, "alpha": 16}
        data: dict[str, Any] = {
            "model": {"path": str(tiny("sd"))},
            "method": {"name": "dmd2", "guidance": 2.0, "ratio": 2, "steps": 2},
            "roles": {"generator": role, "fake_score": role},
            "optimizers": {"generator": {"lr": 1e-3, "kind": kind}, "fake_score": {"lr": 1e-3, "kind": kind}},
            "data": {"prompts": "builtin:general"},
            "training": {"max_steps": steps, "batch_size": 2, "ema": 0.5, "grid_prompts": 1, "device": "cpu"},
        }
        for key, value in changes.items():
            section, _, name = key.partition("__")
            data[section][name] = value
        return parse(RunConfig, data, "test")

    return make


def build(folder: Path, device: str = "cpu", mode: Any = "lora") -> tuple[Triple, Conditioning]:
    info = inspect_checkpoint(folder)
    family = load_family(info.family)
    checkpoint = load_checkpoint(info, torch.float32, device)
    lora = LoraSettings(4, 4.0, family.lora_targets("all"))
    layout = RoleLayout(mode, lora if mode == "lora" else None)
    triple = Triple(
        checkpoint.network,
        family,
        info.schedule,
        {"generator": layout, "fake_score": layout},
        compute_dtype=torch.float32,
    )
    for seed, role in enumerate(ROLES):
        noise = torch.Generator().manual_seed(seed)
        for parameter in triple.network_parameters(role).values():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=noise).to(device)
    cond = family.encode(checkpoint, ["a cat", "a dog"], [MicroConditioning.plain(*info.default_size)] * 2)
    return triple, cond


def x_t(device: str = "cpu") -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).to(device)


# ---------------------------------------------------------------- optimizers


def stepped(
    kind: str, *, steps: int = 6, cut: int | None = None, offload: bool = False, device: str = "cpu"
) -> dict[str, Tensor]:
    """Parameters, one of them too small for 8 bit, after some steps; after `cut` of them saved, read and gone on with."""
    seeded = torch.Generator().manual_seed(0)
    parameters = {
        name: nn.Parameter(torch.randn(shape, generator=seeded).to(device))
        for name, shape in (("large", (80, 64)), ("other", (64, 64)), ("small", (10,)))
    }
    config = OptimizerConfig.model_validate({"lr": 1e-2, "kind": kind})
    optimizer = RoleOptimizer(parameters, config, offload=offload)
    for update in range(steps):
        if update == cut:
            state = load(save({key: value.contiguous() for key, value in optimizer.state_dict().items()}))
            optimizer = RoleOptimizer(parameters, config, offload=offload)
            optimizer.load_state_dict(state)
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=seeded).to(device)
        optimizer.clip()
        optimizer.step(update)
        optimizer.zero_grad()
        if offload:
            assert {value.device.type for value in optimizer.state_dict().values()} == {"cpu"}
    return {name: parameter.detach() for name, parameter in parameters.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["adamw", "muon", pytest.param("adamw8bit", marks=needs_bitsandbytes)])
def test_the_optimizer_s_state_is_saved_whole_and_may_live_in_main_memory(kind: str, device: str) -> None:
    plain = stepped(kind, device=device)
    for other in (
        stepped(kind, cut=3, device=device),
        stepped(kind, offload=True, device=device),
        stepped(kind, cut=3, offload=True, device=device),
    ):
        assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_muon_moves_all_directions_of_a_matrix_alike() -> None:
    """Singular values of a first step: lr 0.2 sqrt(max(rows, columns)), as near as five iterations come (Jordan 2024: 0.7 to 1.2)."""
    seeded = torch.Generator().manual_seed(0)
    matrix, vector = nn.Parameter(torch.zeros(48, 16)), nn.Parameter(torch.zeros(16))
    optimizer = RoleOptimizer({"m": matrix, "v": vector}, OptimizerConfig(lr=1e-2, kind="muon", weight_decay=0))
    matrix.grad = torch.randn(48, 16, generator=seeded) * torch.logspace(-1, 1, 16)  # a hundredfold from first to last
    vector.grad = torch.logspace(-3, 3, 16)
    optimizer.step(0)
    found = torch.linalg.svdvals(matrix.detach()) / (1e-2 * 0.2 * 48**0.5)
    assert 0.6 < float(found.min()) < float(found.max()) < 1.3
    assert torch.allclose(vector, torch.full((16,), -1e-2), rtol=1e-3)  # AdamW's first step is the sign's
    assert set(optimizer.state_dict()) == {"m|momentum_buffer", "v|exp_avg", "v|exp_avg_sq", "v|step"}
    with pytest.raises(UserError, match="of kind 'muon' and the config says 'adamw'"):
        RoleOptimizer({"m": matrix, "v": vector}, OptimizerConfig(lr=1e-2)).load_state_dict(optimizer.state_dict())


def test_muon_without_a_matrix_is_adamw() -> None:
    vector = nn.Parameter(torch.zeros(3))
    optimizer = RoleOptimizer({"v": vector}, OptimizerConfig(lr=1e-2, kind="muon"))
    vector.grad = torch.ones(3)
    optimizer.step(0)
    again = RoleOptimizer({"v": vector}, OptimizerConfig(lr=1e-2, kind="muon"))
    again.load_state_dict(optimizer.state_dict())
    assert torch.equal(again.state_of(vector)["exp_avg"], optimizer.state_of(vector)["exp_avg"])


def test_muon_is_refused_in_one_sentence(
    config: Callable[..., RunConfig], no_weights: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizers, "MUON_SINCE", "99.0")
    with pytest.raises(UserError, match=r"muon came with torch 99\.0, and this is torch .*: update torch"):
        train(config(kind="muon"), tmp_path)


@needs_bitsandbytes
def test_8_bits_follow_32() -> None:
    """Moments in 8 bit lead a few percent astray of where six steps lead."""
    start, exact, coarse = stepped("adamw", steps=0), stepped("adamw"), stepped("adamw8bit")
    for name in ("large", "other"):
        assert 0 < float((exact[name] - coarse[name]).norm() / (exact[name] - start[name]).norm()) < 0.05
    assert torch.allclose(exact["small"], coarse["small"], atol=1e-7)


@needs_bitsandbytes
def test_8_bit_moments_are_bytes() -> None:
    parameter = nn.Parameter(torch.ones(64, 64))
    optimizer = RoleOptimizer({"w": parameter}, OptimizerConfig(lr=1e-2, kind="adamw8bit"))
    parameter.grad = torch.ones(64, 64)
    optimizer.step(0)
    state = optimizer.state_dict()
    assert {key.rpartition("|")[2] for key in state} == {
        "step", "state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2"
    }  # fmt: skip
    assert {state[f"w|state{i}"].dtype for i in (1, 2)} == {torch.uint8}
    with pytest.raises(UserError, match="of kind 'adamw8bit' and the config says 'adamw'"):
        RoleOptimizer({"w": parameter}, OptimizerConfig(lr=1e-2)).load_state_dict(state)


def test_8_bits_are_refused_in_one_sentence(
    config: Callable[..., RunConfig], no_weights: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec("bitsandbytes") is not None:
        with pytest.raises(UserError, match="the device is 'mps'"):
            check_adamw8bit(torch.device("mps"), torch.float32)
        with pytest.raises(UserError, match=r"model\.dtype is 'float64'"):
            train(config(kind="adamw8bit", model__dtype="float64"), tmp_path)
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"bitsandbytes.*pip install 'stepdistill\[quantization\]'"):
        train(config(kind="adamw8bit"), tmp_path)
    with pytest.raises(UserError, match="bitsandbytes"):
        stepdistill.dry_run(config(kind="adamw8bit"))


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("kind", ["muon", pytest.param("adamw8bit", marks=needs_bitsandbytes)])
def test_a_run_with_it_resumes_exactly(kind: str, config: Callable[..., RunConfig], tmp_path: Path) -> None:
    train(config(3, kind=kind), tmp_path / "whole")
    train(config(2, kind=kind), tmp_path / "broken")
    train(config(3, kind=kind), tmp_path / "broken", resume="latest")
    assert equal(saved(tmp_path / "whole"), saved(tmp_path / "broken"))
    state = saved(tmp_path / "whole")["optimizer.generator"]
    if kind == "muon":
        assert any(key.endswith("|momentum_buffer") for key in state)
    else:
        assert any(value.dtype == torch.uint8 for value in state.values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_offloading_changes_nothing(config: Callable[..., RunConfig], tmp_path: Path, mode: str, device: str) -> None:
    """Grids included: the EMA comes to the device to be drawn with. (A GPU sums in no fixed order, and so not to the bit.)"""
    train(config(mode=mode, training__device=device), tmp_path / "here")
    offload = ["optimizer", "ema"]
    train(config(mode=mode, training__device=device, training__offload=offload), tmp_path / "there")
    here, there = saved(tmp_path / "here"), saved(tmp_path / "there")
    grids = [(tmp_path / name / "grids/step-00000003.png").read_bytes() for name in ("here", "there")]
    if device == "cpu":
        assert equal(here, there)
        assert grids[0] == grids[1]
    else:  # three updates of Adam at a rate of 1e-3, where rounding may turn a direction round
        assert difference(here, there) < 6e-3
        assert all(grids)


def test_options_are_said_in_the_log(
    config: Callable[..., RunConfig], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        train(config(1, training__tf32=True, training__offload=["ema"], model__channels_last=True), tmp_path)
    assert "options     channels last, TensorFloat-32 on CUDA, the EMA in main memory" in caplog.text


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model__quantization": "int8"}, r"model\.quantization"),
        ({"model__compile": True}, r"model\.compile"),
        ({"training__offload": ["ema"]}, r"training\.offload"),
        pytest.param({"kind": "adamw8bit"}, r"optimizers\.fake_score\.kind", marks=needs_bitsandbytes),
        ({"kind": "muon"}, r"optimizers\.fake_score\.kind"),
    ],
)
def test_sharded_networks_are_whole_tensors_no_more(
    config: Callable[..., RunConfig], changes: dict[str, Any], key: str
) -> None:
    roles: Any = {"fake_score": "fake_score"}
    with pytest.raises(UserError, match=rf"^{key} is set and the processes share every network out"):
        check_training_options(config(**changes), roles, Needs(), torch.device("cpu"), sharded=True)
    check_training_options(config(**changes), roles, Needs(), torch.device("cpu"), sharded=False)


@pytest.mark.parametrize(
    ("changes", "key"), [({"quantization": "int4"}, "quantization"), ({"attention": "xformers"}, "attention")]
)
def test_kernels_without_a_forward_mode(config: Callable[..., RunConfig], changes: dict[str, Any], key: str) -> None:
    run = config(**{f"model__{name}": value for name, value in changes.items()})
    with pytest.raises(UserError, match=rf"^model\.{key} is '\w+', whose kernels have no derivatives in forward mode"):
        check_training_options(run, {}, Needs(jvp=True), torch.device("cpu"), sharded=False)
    check_training_options(run, {}, Needs(), torch.device("cpu"), sharded=False)


def test_compiled_blocks_have_no_forward_mode_and_float16_no_small_gradients(config: Callable[..., RunConfig]) -> None:
    compiled = config(model__compile=True)
    with pytest.raises(UserError, match=r"^model\.compile is set and the method takes derivatives in forward mode"):
        check_training_options(compiled, {}, Needs(jvp=True), torch.device("cpu"), sharded=False)
    check_training_options(compiled, {}, Needs(), torch.device("cpu"), sharded=False)
    with pytest.raises(UserError, match=r"^model\.dtype is 'float16', in which gradients"):
        check_training_options(config(model__dtype="float16"), {}, Needs(), torch.device("cpu"), sharded=False)


def test_images_are_decoded_one_by_one_and_again_in_backward(tiny: Callable[..., Path]) -> None:
    checkpoint = load_checkpoint(inspect_checkpoint(tiny("sd")), torch.float32, "cpu")
    family, rows = load_family("sd"), []

    def decode(latents: torch.Tensor) -> torch.Tensor:
        rows.append(len(latents))
        return family.decode(checkpoint, latents)  # type: ignore[no-any-return]

    found = []
    for decoder in (decode, checkpointed_decode(decode)):
        latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        images = decoder(latents)
        images.square().mean().backward()
        found.append((images.detach(), latents.grad))
    assert rows == [3, 1, 1, 1, 1, 1, 1]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        checkpointed_decode(decode)(torch.zeros(2, 4, 8, 8))
    assert rows[-1] == 2


# ---------------------------------------------------------------- the parked role


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_parked_role_is_the_same_role(tiny: Callable[..., Path], mode: str, device: str) -> None:
    triple, cond = build(tiny("sd"), device, mode)
    triple.add_copy(EMA, "generator")
    before = triple.denoiser(EMA).x0(x_t(device), torch.tensor(500.0), cond)
    triple.lerp_role(EMA, "fake_score", 0.3)
    after = triple.denoiser(EMA).x0(x_t(device), torch.tensor(500.0), cond)
    triple.copy_role("generator", EMA)
    triple.offload_role(EMA)

    def places() -> set[str]:
        return {parameter.device.type for parameter in triple.network_parameters(EMA).values()}

    def drawn() -> Tensor:
        return triple.denoiser(EMA).x0(x_t(device), torch.tensor(500.0), cond)

    assert torch.equal(drawn(), before)
    triple.lerp_role(EMA, "fake_score", 0.3)
    assert places() == {"cpu"}
    with triple.on_device(EMA):
        assert places() == {device}
        assert torch.equal(drawn(), after)
        assert places() == {device}
    assert places() == {"cpu"}
    triple.load_state(EMA, {key: value.clone() for key, value in triple.state("generator").items()})
    assert torch.equal(drawn(), before)


# ---------------------------------------------------------------- kernels and layouts


def outputs_and_gradients(triple: Triple, cond: Conditioning, role: str) -> dict[str, Tensor]:
    """Generator, fake and real score in one loss, as distribution matching uses them, and the gradients of one role."""
    for parameter in triple.parameters(role).values():
        parameter.grad = None
    time = torch.tensor(500.0)
    with triple.training(role):
        drawn = triple.generator.x0(x_t(), time, cond)
        with torch.no_grad():
            real = triple.real_score.x0(drawn, time, cond)
        fake = triple.fake_score.x0(drawn, time, cond)
        features = triple.fake_score.features(drawn, time, cond)
        ((drawn - real).square().mean() + (fake * drawn).mean() + features.square().mean()).backward()
    found = {key: value.grad.clone() for key, value in triple.parameters(role).items() if value.grad is not None}
    return {
        **found,
        "output.generator": drawn.detach(),
        "output.real": real,
        "output.fake": fake.detach(),
        "features": features.detach(),
    }


def check_compiled(folder: Path, backend: str, checkpointed: bool, mode: str, tolerance: float) -> None:
    eager, cond = build(folder, mode=mode)
    compiled, _ = build(folder, mode=mode)
    for network in (compiled.base, *compiled.networks.values()):
        compile_blocks(network, backend)
    assert list(compiled.base.state_dict()) == list(eager.base.state_dict())
    if checkpointed:
        eager.enable_gradient_checkpointing()
        compiled.enable_gradient_checkpointing()
    for role in ("generator", "fake_score", "generator", "fake_score"):
        wanted, found = (outputs_and_gradients(triple, cond, role) for triple in (eager, compiled))
        assert wanted.keys() == found.keys()
        assert not torch.equal(wanted["output.fake"], wanted["output.real"])
        for key, value in wanted.items():
            scale = max(1.0, float(value.abs().max()))
            assert float((found[key] - value).abs().max()) <= tolerance * scale, key


@pytest.mark.ci
@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_blocks_know_their_role(tiny: Callable[..., Path], checkpointed: bool) -> None:
    check_compiled(tiny("sd"), "aot_eager", checkpointed, "lora", 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_compiled_by_inductor(tiny: Callable[..., Path], family: str, mode: str, checkpointed: bool) -> None:
    check_compiled(tiny(family), "inductor", checkpointed, mode, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_a_compiled_run_goes_through(config: Callable[..., RunConfig], tmp_path: Path, quantization: str) -> None:
    train(config(2, training__gradient_checkpointing=True, model__quantization=quantization), tmp_path / "eager")
    changes = {"training__gradient_checkpointing": True, "model__quantization": quantization, "model__compile": True}
    train(config(2, **changes), tmp_path / "compiled")
    eager, compiled = saved(tmp_path / "eager"), saved(tmp_path / "compiled")
    assert all(
        torch.allclose(eager[role][key], compiled[role][key], atol=2e-4) for role in ROLES for key in eager[role]
    )


def test_attention_is_sdpa(tiny: Callable[..., Path]) -> None:
    checkpoint = load_checkpoint(inspect_checkpoint(tiny("sd")), torch.float32, "cpu")
    set_attention_and_memory_format(checkpoint.network, "sdpa", False)
    processors = checkpoint.network.attn_processors  # type: ignore[union-attr]
    assert {type(processor) for processor in processors.values()} == {AttnProcessor2_0}  # type: ignore[union-attr]


def test_xformers_is_refused_where_it_cannot_be(
    config: Callable[..., RunConfig], no_weights: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'stepdistill\[xformers\]'"):
        prepare(config(model__attention="xformers"))
    monkeypatch.setattr(kernels, "find_spec", lambda name: "there")
    with pytest.raises(UserError, match="runs on CUDA only, and the device is 'cpu'"):
        prepare(config(model__attention="xformers"))


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_channels_last_draws_the_same(tiny: Callable[..., Path], mode: str) -> None:
    """Full roles inherit the layout of the base."""
    info = inspect_checkpoint(tiny("sd"))
    plain, cond = build(tiny("sd"), mode=mode)
    network = load_checkpoint(info, torch.float32, "cpu").network
    set_attention_and_memory_format(network, "sdpa", True)
    layouts = {"generator": plain.layouts["generator"]}
    other = Triple(network, plain.family, info.schedule, layouts, compute_dtype=torch.float32)
    other.load_state("generator", plain.state("generator"))
    held = other.networks.get("generator", other.base)
    weights = [m.weight for m in held.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights if weight.shape[0] > 16)
    wanted, found = (t.generator.epsilon(x_t(), torch.tensor(500.0), cond) for t in (plain, other))
    assert torch.allclose(wanted, found, atol=1e-5)


def test_options_of_stock_networks_only(tiny: Callable[..., Path], config: Callable[..., RunConfig]) -> None:
    path = str(tiny("analytic"))
    for key, value in (("compile", True), ("quantization", "int8"), ("attention", "xformers")):
        with pytest.raises(UserError, match=rf"model\.{key} is set.*'analytic'"):
            prepare(config(model__path=path, **{f"model__{key}": value}))


def test_precision_of_products_is_put_back() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    for tf32, word in ((True, "high"), (False, "highest")):
        with float32_precision(tf32):
            assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == (word, tf32)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


def test_moments_come_back_in_the_parameters_own_layout() -> None:
    """Fused AdamW refuses moments whose strides are not the parameter's."""
    weight = nn.Parameter(torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last))
    before, after = (RoleOptimizer({"w": weight}, OptimizerConfig(lr=1e-3)) for _ in range(2))
    weight.grad = torch.randn_like(weight)
    before.step(0)
    after.load_state_dict({key: value.contiguous() for key, value in before.state_dict().items()})
    moment = after.state_of(weight)["exp_avg"]
    assert moment.stride() == weight.stride()
    assert torch.equal(moment, before.state_of(weight)["exp_avg"])
