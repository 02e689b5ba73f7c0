"""A quantised base under the LoRA roles: small, faithful, differentiable, resumed exactly, proved on the whole base."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from original_format import sd1
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import stepdistill
from stepdistill.config.reading import parse
from stepdistill.config.registry import load_family
from stepdistill.config.schema import RunConfig
from stepdistill.data.latents.latent_shards import TensorFolder
from stepdistill.errors import UserError
from stepdistill.exporting.proof import Proof, QuantizedStudent
from stepdistill.families.base import Checkpoint
from stepdistill.families.checkpoints.loading import inspect_checkpoint, load_checkpoint
from stepdistill.families.conditioning import Conditioning, MicroConditioning
from stepdistill.roles.lora import LoraSettings
from stepdistill.roles.triple import RoleLayout, Triple
from stepdistill.runtime import quantization
from stepdistill.runtime.kernels import set_attention_and_memory_format
from stepdistill.runtime.quantization import QuantizationKind, dequantized, quantize
from stepdistill.training.collect import CollectConfig, collect
from stepdistill.training.run import open_run, train
from stepdistill.training.run_folder import checkpoints
from stepdistill.training.setup import prepare

needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
KINDS: list[QuantizationKind] = ["int8", "int4"]
TIME = torch.tensor(500.0)


@pytest.fixture
def config(tiny: Callable[..., Path]) -> Callable[..., RunConfig]:
    def make(kind: str, steps: int = 2, family: str = "sd", mode: str = "lora", **changes: Any) -> RunConfig:
        role = {"mode": mode, "rank": 4, "alpha": 2}
        data: dict[str, Any] = {
            "model": {"path": str(tiny(family)), "quantization": kind},
            "method": {"name": "dmd2", "guidance": 2.0, "ratio": 2, "steps": 2},
            "roles": {"generator": role, "fake_score": role},
            "optimizers": {"generator": {"lr": 1e-3}, "fake_score": {"lr": 1e-3}},
            "data": {"prompts": "builtin:general"},
            "training": {
                "max_steps": steps, "batch_size": 2, "ema": 0.5, "gradient_checkpointing": True, "grid_prompts": 1,
                "device": "cpu",
            },
        }  # fmt: skip
        for key, value in changes.items():
            section, _, name = key.partition("__")
            data[section][name] = value
        return parse(RunConfig, data, "test")

    return make


def loaded(folder: Path, kind: Any, dtype: torch.dtype = torch.float32) -> tuple[Checkpoint, Triple, Conditioning]:
    """A checkpoint with a generator and a fake score, all of whose LoRA matrices are seeded noise."""
    info = inspect_checkpoint(folder)
    family = load_family(info.family)
    checkpoint = load_checkpoint(info, dtype, "cpu", quantization=kind)
    layout = RoleLayout("lora", LoraSettings(4, 4.0, family.lora_targets("all")))
    triple = Triple(
        checkpoint.network, family, info.schedule, {"generator": layout, "fake_score": layout}, compute_dtype=dtype
    )
    noise = torch.Generator().manual_seed(0)
    for role in ("generator", "fake_score"):
        for parameter in triple.network_parameters(role).values():
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=noise))
    cond = family.encode(checkpoint, ["a cat", "a dog"], [MicroConditioning.plain(*info.default_size)] * 2)
    return checkpoint, triple, cond


def x_t() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_a_known_weight() -> None:
    """int8: 127 steps to the largest weight of each row. NF4: the 16 codes of its blocks of 64, scales in 8 bit."""
    pytest.importorskip("torchao")
    weight = torch.linspace(-1, 1, 128).repeat(64, 1) * torch.linspace(0.5, 1, 64)[:, None]
    for kind, step in (("int8", 1 / 127), ("int4", 0.33)):
        layer = nn.Linear(128, 64, bias=False)
        layer.weight = nn.Parameter(weight.clone())
        quantize(layer, kind, "cpu")  # type: ignore[arg-type]
        found = layer(torch.eye(128)).T
        error = ((found - weight).abs() / weight.abs().amax(1, keepdim=True)).max()
        assert 0 < float(error) < step


@needs_torchao
@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize(("kind", "tolerance"), [("int8", 0.01), ("int4", 0.15)])
def test_forward_and_gradients_are_nearly_the_base_s(
    tiny: Callable[..., Path], family: str, kind: QuantizationKind, tolerance: float
) -> None:
    """To x_t, through layers that have no gradient of their own, and to the adapters on them; checkpointed or not."""
    folder = tiny(family)
    _, exact, cond = loaded(folder, "none")
    _, coarse, _ = loaded(folder, kind)
    found: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []
    for triple, checkpointed in ((exact, False), (coarse, False), (coarse, True)):
        if checkpointed:
            triple.enable_gradient_checkpointing()
        x = x_t()
        for parameter in triple.parameters("generator").values():
            parameter.grad = None
        drawn = triple.generator.x0(x, TIME, cond)
        triple.fake_score.x0(drawn, TIME, cond).square().mean().backward()
        assert x.grad is not None
        gradients = {k: p.grad for k, p in triple.parameters("generator").items() if p.grad is not None}
        found.append((drawn.detach(), x.grad, gradients))
    assert 0 < relative(found[1][0], found[0][0]) < tolerance
    assert 0 < relative(found[1][1], found[0][1]) < 3 * tolerance
    assert found[0][2].keys() == found[1][2].keys() == exact.parameters("generator").keys()
    assert torch.equal(found[1][1], found[2][1])
    assert all(torch.equal(found[1][2][key], found[2][2][key]) for key in found[1][2])


class Doubled(nn.Module):
    """A layer whose input nobody else holds."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.inputs: list[weakref.ref[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        doubled = 2 * x
        self.inputs.append(weakref.ref(doubled))
        return self.layer(doubled).relu()  # type: ignore[no-any-return]


@needs_torchao
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_frees_the_input_of_a_quantised_layer(kind: QuantizationKind) -> None:
    """What bitsandbytes' 8-bit layer does not do: it keeps the input where autograd cannot drop it."""
    block = Doubled(nn.Linear(64, 64)).requires_grad_(False)
    quantize(block, kind, "cpu")
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    out = checkpoint(block, x, use_reentrant=False)
    assert block.inputs[0]() is None
    out.sum().backward()
    assert x.grad is not None
    assert len(block.inputs) == 2


@needs_torchao
def test_a_quantised_teacher_says_so(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = {"path": str(tiny("sd")), "quantization": "int8"}
    common = {"prompts": "builtin:general", "count": 2, "guidance": 2.0, "steps": 2, "device": "cpu"}
    for name, changes in (("coarse", {}), ("exact", {"quantization": "none"})):
        collect("pairs", CollectConfig.model_validate({**common, "model": model | changes}), tmp_path / name)
    coarse, exact = (TensorFolder(tmp_path / name) for name in ("coarse", "exact"))
    assert (coarse.fingerprint.precision, exact.fingerprint.precision) == ("float32, int8", "float32")
    assert 0 < relative(coarse[0].latents, exact[0].latents) < 0.05


@needs_torchao
@pytest.mark.parametrize("kind", KINDS)
def test_roles_share_the_quantised_base(tiny: Callable[..., Path], kind: QuantizationKind) -> None:
    checkpoint, triple, cond = loaded(tiny("sd"), kind)
    plain = load_checkpoint(inspect_checkpoint(tiny("sd")), torch.float32, "cpu", quantization=kind)
    with torch.no_grad():
        real = triple.real_score.x0(x_t(), TIME, cond)
        untouched = triple.family.call(plain.network, x_t(), TIME.expand(2).double(), cond)
        assert torch.equal(triple.real_score.estimate(x_t(), TIME, cond).raw, untouched)
        assert not torch.equal(triple.generator.x0(x_t(), TIME, cond), real)
        triple.reset_role("generator")
        assert torch.equal(triple.generator.x0(x_t(), TIME, cond), real)
    assert all(not p.requires_grad for k, p in checkpoint.network.named_parameters() if ".lora_" not in k)


@needs_torchao
@pytest.mark.parametrize(("kind", "byte"), [("int8", 1.0), ("int4", 0.5)])
def test_size_and_what_stays(tiny: Callable[..., Path], kind: QuantizationKind, byte: float) -> None:
    """Linear layers of the network shrink; its convolutions, the text encoder and the VAE do not."""
    from torchao.quantization import Int8Tensor, NF4Tensor

    checkpoint = load_checkpoint(inspect_checkpoint(tiny("sd")), torch.bfloat16, "cpu", quantization=kind)
    linears = [m for m in checkpoint.network.modules() if isinstance(m, nn.Linear)]
    held = 0
    for layer in linears:
        data = layer.weight.data
        assert isinstance(data, Int8Tensor if kind == "int8" else NF4Tensor)
        held += sum(data.__dict__[name].nbytes for name in data.__tensor_flatten__()[0])
    assert held / sum(layer.weight.numel() for layer in linears) == pytest.approx(byte, rel=0.35)
    convolutions = [m for m in checkpoint.network.modules() if isinstance(m, nn.Conv2d)]
    assert {type(m.weight.data) for m in convolutions} == {Tensor}
    assert checkpoint.pipeline is not None
    encoder, vae = checkpoint.pipeline.text_encoder, checkpoint.pipeline.vae
    assert {type(p.data) for part in (encoder, vae) for p in part.parameters()} == {Tensor}
    assert (encoder.dtype, vae.dtype) == (torch.bfloat16, torch.float32)


@needs_torchao
def test_a_single_file_is_quantised_like_its_folder(tiny: Callable[..., Path], tmp_path: Path) -> None:
    parts = [load_file(next((tiny("sd") / name).glob("*.safetensors"))) for name in ("unet", "vae", "text_encoder")]
    path = tmp_path / "sd.safetensors"
    save_file({key: value.contiguous() for key, value in sd1(*parts, layers=1).items()}, path)
    info = inspect_checkpoint(path, config_dir=tiny("sd"))
    one = load_checkpoint(info, torch.float32, "cpu", quantization="int8").network
    other = load_checkpoint(inspect_checkpoint(tiny("sd")), torch.float32, "cpu", quantization="int8").network
    for key, value in one.state_dict().items():
        assert torch.equal(dequantized(value), dequantized(other.state_dict()[key])), key


@needs_torchao
@pytest.mark.parametrize("kind", KINDS)
def test_channels_last_leaves_quantised_weights_alone(tiny: Callable[..., Path], kind: QuantizationKind) -> None:
    plain, other = (
        load_checkpoint(inspect_checkpoint(tiny("sd")), torch.float32, "cpu", quantization=kind).network
        for _ in range(2)
    )
    set_attention_and_memory_format(other, "sdpa", True)
    arguments = x_t().detach(), TIME, torch.ones(2, 77, 32)
    with torch.no_grad():
        assert torch.allclose(plain(*arguments).sample, other(*arguments).sample, atol=1e-5)


@pytest.mark.ci
@needs_torchao
@pytest.mark.parametrize("kind", KINDS)
def test_train_resume_and_export(config: Callable[..., RunConfig], tmp_path: Path, kind: str) -> None:
    """2 + 1 steps are 3 steps, bit for bit; the proof holds on the unquantised base, and the card says the distance."""
    train(config(kind, 3), tmp_path / "whole")
    train(config(kind, 2), tmp_path / "broken")
    train(config(kind, 3), tmp_path / "broken", resume="latest")
    whole, broken = (checkpoints.read(tmp_path / name / "checkpoints/step-00000003") for name in ("whole", "broken"))
    assert all(torch.equal(whole.tensors[f][k], broken.tensors[f][k]) for f in whole.tensors for k in whole.tensors[f])
    exported = stepdistill.export(tmp_path / "whole", "diffusers-lora", tmp_path / "lora", device="cpu")
    card = (exported / "README.md").read_text()
    found = re.search(rf"trained on a base in {kind} \(float32 elsewhere\).* by ([\d.]+)% \(relative rms\)", card)
    assert found is not None
    assert 0 < float(found[1]) < (5 if kind == "int8" else 60)
    session, _ = open_run(tmp_path / "whole", "cpu", full_precision=True)
    assert session.setup.config.model.quantization == "none"


@needs_torchao
def test_a_pipeline_of_a_quantised_run_is_whole(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    train(config("int4"), tmp_path / "run")
    exported = stepdistill.export(tmp_path / "run", "pipeline", tmp_path / "pipeline", device="cpu")
    network = load_checkpoint(inspect_checkpoint(exported), torch.float32, "cpu").network
    assert {type(p.data) for p in network.parameters()} == {Tensor}


def test_the_distance_is_relative_rms() -> None:
    ones = torch.ones(1, 1, 2, 2)
    proof = Proof(("a",), (0,), ones, ones[:0], 1.5 * ones, ones, ones)
    assert QuantizedStudent("a base in int8", 2 * ones).difference(proof) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mode": "full"}, r"roles\.generator\.mode is 'full'"),
        ({"model__dtype": "float64"}, r"model\.dtype is 'float64'"),
        ({"family": "analytic"}, r"model\.quantization is set.* family 'analytic'"),
    ],
)
def test_refusals_before_any_weight(
    config: Callable[..., RunConfig], no_weights: None, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        prepare(config("int8", **changes))


def test_a_missing_package_is_named(
    config: Callable[..., RunConfig], no_weights: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'stepdistill\[quantization\]'"):
        prepare(config("int8"))
