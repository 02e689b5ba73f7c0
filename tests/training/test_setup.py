"""What `stepdistill plan` says is what a run has: counts, bytes and calls of real sessions, and peaks that were measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from stepdistill.config.reading import parse
from stepdistill.config.schema import RunConfig
from stepdistill.planning.architecture import find_architecture
from stepdistill.planning.network_calls import CallCounter, CallKind, count_network_calls
from stepdistill.planning.plan import Forecast, plan
from stepdistill.planning.trace import auxiliary_modules, build_on_meta, tensor_bytes, trace
from stepdistill.roles.triple import FAKE_SCORE, GENERATOR, REAL_SCORE
from stepdistill.training.collect import CollectConfig, collect
from stepdistill.training.run import train
from stepdistill.training.session import EMA, Session, open_session
from stepdistill.training.setup import prepare, prepare_without_data
from stepdistill.training.trainer import Trainer

GAN = {"name": "dmd2", "guidance": 2.0, "ratio": 2, "steps": 2, "gan": {"weight": 1e-2}}
PLAIN = {"name": "dmd2", "guidance": 2.0, "ratio": 3, "steps": 4}
PAIRS = {"name": "dmd", "guidance": 2.0}
PATH = {"name": "disback", "guidance": 2.0, "ratio": 1, "steps": 2, "checkpoints": 3, "record_every": 1, "interval": 1}
CONSISTENCY = {"name": "tcd", "guidance": 2.0, "source": "pairs", "target": "ema"}
WALKS = {"name": "tbcm", "guidance": 2.0, "route_steps": 3}
MODES = {"lora": ("lora", "lora"), "full": ("full", "full"), "mixed": ("lora", "full")}


@pytest.fixture
def config(tiny: Callable[..., Path], tmp_path: Path) -> Callable[..., RunConfig]:
    """A run on a tiny checkpoint, its data included."""

    def make(
        family: str = "sd", method: dict[str, Any] = GAN, layout: str = "lora", dtype: str = "float32", **training: Any
    ) -> RunConfig:
        model = {"path": str(tiny(family)), "dtype": dtype}
        data = {"prompts": "builtin:general"}
        if method is GAN:
            (tmp_path / "images").mkdir(exist_ok=True)
            Image.new("RGB", (80, 96), "red").save(tmp_path / "images/0.png")
            data["images"] = str(tmp_path / "images")
        if method in (PAIRS, CONSISTENCY):
            if not (tmp_path / "pairs").exists():
                wanted = {"model": model, "prompts": "builtin:general", "count": 4, "guidance": 2.0, "steps": 2}
                collect("pairs", CollectConfig.model_validate({**wanted, "device": "cpu"}), tmp_path / "pairs")
            data["pairs"] = str(tmp_path / "pairs")
        generator, fake_score = ({"mode": mode, "rank": 4, "alpha": 2} for mode in MODES[layout])
        settings = {"max_steps": 6, "batch_size": 2, "ema": 0.9, "device": "cpu", "grid_prompts": 1, **training}
        sections = {"model": model, "method": method, "data": data, "training": settings}
        return parse(RunConfig, {**sections, "roles": {"generator": generator, "fake_score": fake_score}}, "test")

    return make


def parts(forecast: Forecast) -> dict[str, int]:
    return {part.name: part.bytes for part in forecast.memory.parts}


def phases(forecast: Forecast) -> dict[str, int]:
    return {phase.name: phase.bytes for phase in forecast.memory.phases}


@pytest.mark.parametrize("name", ["agd", "guidance"])
def test_roles_beside_the_base_are_told_apart_from_it(tiny: Callable[..., Path], name: str) -> None:
    """Half of a walk's rows are the teacher's two branches each, and what the guides have of parameters is counted."""
    mode = "adapter" if name == "agd" else "lora"
    method = {"name": name, "guidance": 3.0, "walk_steps": 2}
    sections = {
        "model": {"path": str(tiny("sd"))}, "method": method, "data": {"prompts": "builtin:general"},
        "roles": {"generator": {"mode": mode, "rank": 4, "width": 8}},
        "training": {"max_steps": 2, "batch_size": 2, "device": "cpu", "grid_prompts": 1, "gradient_checkpointing": True},
    }  # fmt: skip
    run = parse(RunConfig, sections, "test")
    forecast = plan(run)
    rows = {(call.phase, call.network): call.rows for call in forecast.calls}
    assert rows == {("rollout", REAL_SCORE): 12, (GENERATOR, GENERATOR): 6}
    own = session_of(run).triple.network_parameters(GENERATOR)
    assert parts(forecast)["generator weights"] == tensor_bytes(own.values())


def session_of(config: RunConfig) -> Session:
    return open_session(prepare(config), "cpu")


def test_frozen_copies_of_a_method_are_counted(config: Callable[..., RunConfig]) -> None:
    """The target network beside the generator; no fake score where none is trained, and two calls of teacher and target."""
    run = config(method=CONSISTENCY, layout="full")
    forecast = plan(run)
    held, session = parts(forecast), session_of(run)
    assert (
        held["target weights"]
        == held["generator weights"]
        == tensor_bytes(session.triple.network_parameters("target").values())
    )
    assert not [name for name in held if FAKE_SCORE in name]
    assert "generator optimizer" in held
    calls = count_network_calls(prepare(run)).calls
    asked = {(call.network, call.graph): round(counted.rows, 9) for call, counted in calls.items()}
    assert asked == {(REAL_SCORE, False): 4.0, ("target", False): 2.0, (GENERATOR, True): 2.0}


@pytest.mark.ci
@pytest.mark.parametrize(("family", "layout"), [("sd", "lora"), ("sd", "full"), ("sdxl", "mixed")])
def test_counts_and_bytes_are_those_of_the_session(
    config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, layout: str
) -> None:
    run = config(family, layout=layout, max_steps=1)
    forecast = plan(run)
    trained: list[Trainer] = []
    gradients: dict[str, int] = {}
    update = Trainer.update

    def watched(self: Trainer, role: str) -> Any:
        parameters = self.optimizers[role].parameters.values()
        gradients[role] = tensor_bytes(p.grad for p in parameters if p.grad is not None)
        trained[:] = [self]
        return update(self, role)

    monkeypatch.setattr(Trainer, "update", watched)
    train(run, tmp_path / "run")
    session, triple = trained[0].session, trained[0].session.triple
    base = {key: value for key, value in triple.base.named_parameters() if ".lora_" not in key}
    heads = list(triple.head(FAKE_SCORE, "discriminator").parameters())
    own = {role: list(triple.network_parameters(role).values()) for role in (GENERATOR, FAKE_SCORE, EMA)}
    others = {name: list(part.parameters()) for name, part in auxiliary_modules(session.checkpoint).items()}

    held = dict(zip((GENERATOR, FAKE_SCORE), (mode.replace("lora", "LoRA") for mode in MODES[layout]), strict=True))
    tensors = {f"{REAL_SCORE} (the base)": list(base.values()), "heads": heads, "ema": own[EMA], **others}
    tensors |= {f"{role} ({held[role]})": own[role] for role in held}
    counted = {item.name: item.count for item in forecast.parameters}
    assert counted == {name: sum(p.numel() for p in listed) for name, listed in tensors.items()}

    said = parts(forecast)
    optimizers = {role: tensor_bytes(o.state_dict().values()) for role, o in trained[0].optimizers.items()}
    text = [p for name, listed in others.items() if name != "vae" for p in listed]
    wanted = {
        "base": base.values(),
        "heads": heads,
        "ema": own[EMA],
        "text encoders": text,
        "autoencoder": others["vae"],
    }
    wanted |= {f"{role} weights": own[role] for role in held}
    assert {name: said[name] for name in wanted} == {name: tensor_bytes(listed) for name, listed in wanted.items()}
    assert {role: said[f"{role} optimizer"] for role in held} == optimizers
    # a step holds all that is constant, and the gradients of its role
    constant = sum(said.values()) - said.get("gradients", 0) - said.get("activations", 0)
    assert {role: phases(forecast)[f"{role} step"] - constant for role in held} == gradients


@pytest.mark.ci
@pytest.mark.parametrize(
    ("method", "layout"), [(GAN, "lora"), (PLAIN, "full"), (PAIRS, "lora"), (PATH, "full"), (WALKS, "lora")]
)
def test_calls_are_those_of_the_trainer(
    config: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: dict[str, Any],
    layout: str,
) -> None:
    """Averaged over a run of six iterations, generator updates every `ratio`-th, exits drawn by lot."""
    run = config(method=method, layout=layout, accumulation=2)
    counters: list[CallCounter] = []
    iteration = Trainer.iteration

    def counted(self: Trainer, *args: Any) -> Any:
        with CallCounter(self.triple) as counter:
            counters.append(counter)
            return iteration(self, *args)

    monkeypatch.setattr(Trainer, "iteration", counted)
    train(run, tmp_path / "run")
    found: dict[tuple[str, bool, bool], list[float]] = {}
    for counter in counters:
        for call, seen in counter.found.items():
            total = found.setdefault((call.network, call.features, call.graph), [0.0, 0.0])
            total[0] += seen.calls / len(counters)
            total[1] += seen.rows / len(counters)
    # the first micro-batch alone is walked through: lots are drawn for the whole batch, so the second has its calls
    said: dict[tuple[str, bool, bool], list[float]] = {}
    for item in plan(run).calls:
        total = said.setdefault((item.network, item.features, item.gradient), [0.0, 0.0])
        total[0] += item.calls
        total[1] += item.rows
    assert said.keys() == found.keys()
    for kind, numbers in said.items():
        assert numbers == pytest.approx(found[kind]), kind


def test_the_closed_form_of_dmd2s_calls(config: Callable[..., RunConfig]) -> None:
    run = config(max_steps=2)
    asked = count_network_calls(prepare(run)).calls
    assert asked[CallKind(FAKE_SCORE, FAKE_SCORE, False, True)].rows == 2
    assert asked[CallKind(FAKE_SCORE, FAKE_SCORE, True, True)].calls == 2  # real and generated images
    assert asked[CallKind(GENERATOR, REAL_SCORE, False, False)].rows == 0.5 * 2 * 2  # every second iteration, guided
    assert asked[CallKind(GENERATOR, FAKE_SCORE, True, True)].calls == 0.5


@pytest.mark.ci
@pytest.mark.parametrize(
    ("family", "layout", "dtype", "training"),
    [
        ("sd", "lora", "float32", {"gradient_checkpointing": True, "accumulation": 2}),
        ("sdxl", "mixed", "bfloat16", {}),
        ("sd", "full", "float32", {}),
        ("sd", "lora", "float32", {"method": WALKS, "gradient_checkpointing": True}),
    ],
)
def test_a_trace_without_weights_is_the_trace_with_weights(
    config: Callable[..., RunConfig], family: str, layout: str, dtype: str, training: dict[str, Any]
) -> None:
    """Bytes at every phase's peak and operations, of the same iteration on the same kernels."""
    ready = prepare(config(family, layout=layout, dtype=dtype, **training))
    call_statistics = count_network_calls(ready)
    # in forward mode torch forms the zeros that stand for an absent tangent, one at a time, and a ghost's take no memory
    within = 0.1 if ready.needs.jvp else 2e-3
    ghostly, real = trace(build_on_meta(ready), call_statistics), trace(open_session(ready, "cpu"), call_statistics)
    assert [phase.name for phase in ghostly.phases] == [phase.name for phase in real.phases]
    for one, other in zip(ghostly.phases, real.phases, strict=True):
        assert one.flops == other.flops, one.name
        assert one.gradients == other.gradients
        assert one.transient == pytest.approx(other.transient, rel=within), one.name
    assert ghostly.per_row == real.per_row


def test_operations_are_torchs_own_count(config: Callable[..., RunConfig]) -> None:
    run = config(method=PLAIN)
    session = session_of(run)
    traced = trace(build_on_meta(session.setup), count_network_calls(session.setup))
    x, cond = torch.zeros(3, *session.setup.problem.latent_shape), traced.cond[[0, 0, 0]]
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        session.triple.real_score.x0(x, 499.0, session.setup.family.encode(session.checkpoint, [""] * 3, []))
    network = counter.get_flop_counts()["UNet2DConditionModel"]
    assert 3 * traced.per_row[REAL_SCORE, False].total == sum(network.values())
    assert cond.text.shape == (3, 77, 32)


@pytest.mark.gpu
def test_the_peak_is_what_a_gpu_allocates() -> None:
    """SD 1.5 at 512 pixels with a GAN, weights zero: the allocator's highest count against the highest phase."""
    roles = {role: {"mode": "lora", "rank": 64, "targets": "attention"} for role in (GENERATOR, FAKE_SCORE)}
    run = parse(
        RunConfig,
        {
            "model": {"path": "stable-diffusion-v1-5/stable-diffusion-v1-5", "dtype": "bfloat16"},
            "method": {"name": "dmd2", "guidance": 7.0, "gan": {"weight": 5e-3}},
            "roles": roles,
            "data": {"prompts": "builtin:general", "images": "images"},
            "training": {"max_steps": 10, "gradient_checkpointing": True, "device": "cuda", "grid_prompts": 1},
        },
        "test",
    )
    ready = prepare_without_data(run, find_architecture(run.model).info)
    call_statistics, session = count_network_calls(ready), build_on_meta(ready)
    expected = max(phase.transient for phase in trace(build_on_meta(ready), call_statistics).phases)
    triple = session.triple
    heads = [head for named in triple.heads.values() for head in named.values()]
    for module in (triple.base, *heads, *auxiliary_modules(session.checkpoint).values()):
        torch.nn.Module.to_empty(module, device="cuda")
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data.zero_()
    session.device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats()
    weights = torch.cuda.memory_allocated()
    trace(session, call_statistics)
    assert torch.cuda.max_memory_allocated() == pytest.approx(weights + expected, rel=0.15)
