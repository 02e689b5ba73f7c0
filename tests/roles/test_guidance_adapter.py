"""Guidance adapters beside a stock network: their counts, and that everything else goes on as if they were not there."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from support.guidance_adapters import grown, written
from torch import Tensor

from stepdistill.assets import FOLDER
from stepdistill.roles.guidance_adapter import (
    GuidanceAdapter,
    guidance_strength,
    load_guidance_adapter,
    settings_metadata,
)
from stepdistill.roles.guidance_modules import (
    ConditionTokens,
    CrossAdapter,
    GuidanceAdapterSettings,
    GuidanceInputs,
    PerceptronAdapter,
    sinusoidal_positions,
)

KINDS = [
    ("cross", False, 1),
    ("cross", True, 1),
    ("cross", False, 4),
    ("perceptron", False, 1),
    ("perceptron", True, 1),
    ("offset", False, 1),
    ("offset", True, 1),
]
CONFIGS = FOLDER / "public_configs"


@pytest.fixture(params=["sd", "sdxl"])
def pipeline(request: pytest.FixtureRequest, tiny: Callable[..., Path]) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(tiny(request.param))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(pipe: DiffusionPipeline, rows: int = 2) -> dict[str, Any]:
    unet, stream = pipe.unet, torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=stream)

    given: dict[str, Any] = {
        "sample": normal(rows, 4, 8, 8),
        "encoder_hidden_states": normal(rows, 77, unet.config.cross_attention_dim),
    }
    if unet.config.addition_embed_type == "text_time":
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        given["added_cond_kwargs"] = {"text_embeds": normal(rows, pooled), "time_ids": torch.full((rows, 6), 64.0)}
    return given


@pytest.mark.parametrize(
    ("kind", "model", "width", "modules", "parameters"),
    [
        # 8 d^2 + 7 d + (C_time + 1) d + (C_text + 1) d + 2 d^2 + 2 C d + C a module, and published shares of the network
        ("cross", "sdxl", 64, 70, 28_549_760),
        ("cross", "sdxl", 128, 70, 62_750_720),
        ("cross", "sdxl", 192, 70, 102_686_080),
        ("cross", "sd21", 192, 16, 17_808_576),
        ("cross", "sd15", 192, 16, 17_022_144),
        ("perceptron", "sdxl", 96, 70, 126_509_120),
        ("perceptron", "sd21", 192, 16, 43_036_608),
        ("perceptron", "sd15", 192, 16, 42_250_176),
    ],
)
def test_counts_of_public_networks(kind: Any, model: str, width: int, modules: int, parameters: int) -> None:
    config = json.loads((CONFIGS / model / "unet" / "config.json").read_text())
    with torch.device("meta"):
        network = UNet2DConditionModel.from_config(config)
    adapter = GuidanceAdapter(network, GuidanceAdapterSettings(kind, width))
    count = sum(parameter.numel() for parameter in adapter.parameters())
    assert (len(adapter.adapters), count) == (modules, parameters)
    # the defaults stay below a twentieth of the network
    total = sum(parameter.numel() for parameter in network.parameters())
    shared = GuidanceAdapter(network, GuidanceAdapterSettings(kind, width, shared=True))
    assert count < 0.05 * total
    fewer = sum(parameter.numel() for parameter in shared.parameters())
    assert fewer < (0.5 if kind == "cross" else 0.8) * count


@pytest.mark.parametrize(("kind", "shared", "heads"), KINDS)
def test_at_first_it_is_the_network_and_off_it_always_is(
    pipeline: DiffusionPipeline, kind: Any, shared: bool, heads: int
) -> None:
    unet, given = pipeline.unet, inputs(pipeline)
    names = list(unet.state_dict())
    with torch.no_grad():
        own = unet(**given, timestep=torch.tensor(500)).sample
        adapter = GuidanceAdapter(unet, GuidanceAdapterSettings(kind, 16, shared, heads=heads)).attach(unet)
        adapter.w = 7.5
        assert torch.equal(unet(**given, timestep=torch.tensor(500)).sample, own)
        grown(adapter)
        on = unet(**given, timestep=torch.tensor(500)).sample
        assert float((on - own).abs().max()) > 1e-3
        adapter.w = None
        assert torch.equal(unet(**given, timestep=torch.tensor(500)).sample, own)
        adapter.w = 7.5
        assert torch.equal(unet(**given, timestep=torch.tensor(500)).sample, on)
        adapter.detach()
        assert torch.equal(unet(**given, timestep=torch.tensor(500)).sample, own)
    assert list(unet.state_dict()) == names


@pytest.mark.parametrize("kind", ["cross", "perceptron", "offset"])
def test_rising_adapters_are_nothing_at_w_1_and_steepest_there(pipeline: DiffusionPipeline, kind: Any) -> None:
    unet, given = pipeline.unet, inputs(pipeline)
    with torch.no_grad():
        own = unet(**given, timestep=torch.tensor(500)).sample
        adapter = grown(GuidanceAdapter(unet, GuidanceAdapterSettings(kind, 16, rising=True))).attach(unet)
        adapter.w = torch.tensor([1.0, 3.0])
        on = unet(**given, timestep=torch.tensor(500)).sample
    assert torch.equal(on[0], own[0])
    assert float((on[1] - own[1]).abs().max()) > 1e-3
    w = torch.tensor([0.0, 1.0, 1.001, 5.0, 9.0], dtype=torch.float64)
    wanted = torch.tensor([-0.8, 0.0, 0.001, 2.0, 8 / 3], dtype=torch.float64)
    assert torch.allclose(guidance_strength(w), wanted, atol=1e-6)


@pytest.mark.parametrize(("kind", "shared", "heads"), KINDS)
def test_it_hears_w_time_prompt_and_only_its_own_row(
    pipeline: DiffusionPipeline, kind: Any, shared: bool, heads: int
) -> None:
    unet, given = pipeline.unet, inputs(pipeline)
    adapter = grown(GuidanceAdapter(unet, GuidanceAdapterSettings(kind, 16, shared, heads=heads))).attach(unet)

    def ask(w: Tensor | float, t: Tensor | int | float, **changes: Any) -> Tensor:
        adapter.w = w
        with torch.no_grad():
            return unet(**{**given, **changes}, timestep=t).sample

    whole = ask(torch.tensor([2.0, 7.0]), torch.tensor([300, 800]))
    for form in (300, 300.0, torch.tensor(300), torch.tensor([300, 300])):
        assert torch.allclose(ask(2.0, form)[0], whole[0], atol=1e-5)
    assert torch.allclose(ask(7.0, 800)[1], whole[1], atol=1e-5)

    def shift(w: float, t: int, text: Tensor) -> Tensor:
        """What the adapters add, to the first row."""
        on = ask(w, t, encoder_hidden_states=text)
        adapter.w = None
        with torch.no_grad():
            return (on - unet(**{**given, "encoder_hidden_states": text}, timestep=t).sample)[0]

    text = given["encoder_hidden_states"]
    for other in (shift(3.0, 300, text), shift(2.0, 800, text), shift(2.0, 300, text.flip(2))):
        assert float((other - shift(2.0, 300, text)).abs().max()) > 1e-4


def test_loras_before_and_after_attention_processors_and_compilation(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """The same picture in whatever order LoRA and adapter came, with another attention, and compiled."""
    from peft import LoraConfig

    def fresh() -> DiffusionPipeline:
        pipe = DiffusionPipeline.from_pretrained(tiny("sd"))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def with_lora(pipe: DiffusionPipeline) -> DiffusionPipeline:
        torch.manual_seed(5)
        pipe.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_out.0"], init_lora_weights=False), "style")
        return pipe

    file = written(grown(GuidanceAdapter(fresh().unet, GuidanceAdapterSettings(width=16))), tmp_path)

    def draw(pipe: DiffusionPipeline) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.as_tensor(
            pipe("a cat", num_inference_steps=3, guidance_scale=1.0, generator=generator, output_type="pt").images
        )

    plain = draw(fresh())
    first, second = with_lora(fresh()), fresh()
    load_guidance_adapter(first, file, w=6.0)
    load_guidance_adapter(second, file, w=6.0)
    adapted = draw(second)
    both = draw(with_lora(second))
    assert float((adapted - plain).abs().max()) > 1e-3
    assert float((both - adapted).abs().max()) > 1e-3
    assert torch.allclose(draw(first), both, atol=1e-6)
    first.unet.set_attn_processor(AttnProcessor())
    assert torch.allclose(draw(first), both, atol=1e-4)
    second.unet = torch.compile(second.unet, backend="eager")
    assert torch.allclose(draw(second), both, atol=1e-5)


def test_guiding_twice_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(tiny("sd"))
    file = written(GuidanceAdapter(pipe.unet, GuidanceAdapterSettings(width=16)), tmp_path)
    adapter = load_guidance_adapter(pipe, file, w=5.0)
    with pytest.raises(ValueError, match="and the pipeline guides as well"):
        pipe("a cat", num_inference_steps=1, guidance_scale=7.5)
    adapter.w = None
    pipe("a cat", num_inference_steps=1, guidance_scale=7.5, output_type="latent")


def test_another_pipeline_on_the_network_is_watched_instead(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """As of `from_pipe`: the first one's guidance scale, which may be years old, decides nothing any more."""
    first = StableDiffusionPipeline.from_pretrained(tiny("sd"))
    file = written(GuidanceAdapter(first.unet, GuidanceAdapterSettings(width=16)), tmp_path)
    adapter = load_guidance_adapter(first, file, w=5.0)
    with torch.no_grad():
        first.unet(**inputs(first), timestep=500)  # a pipeline that was never called guides nothing
    with pytest.raises(ValueError, match="and the pipeline guides as well"):
        first("a cat", num_inference_steps=1, guidance_scale=7.5)
    second = StableDiffusionImg2ImgPipeline.from_pipe(first)
    adapter.register_pipeline(second)
    image = torch.rand(1, 3, 16, 16)
    second("a cat", image=image, num_inference_steps=2, guidance_scale=1.0, output_type="latent")
    with pytest.raises(ValueError, match="and the pipeline guides as well"):
        second("a cat", image=image, num_inference_steps=2, guidance_scale=7.5)


def test_adapters_are_never_there_twice(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """A cell of a notebook that is run again loads them in the place of the first; attaching twice is refused."""
    pipe = DiffusionPipeline.from_pretrained(tiny("sd"))
    file = written(grown(GuidanceAdapter(pipe.unet, GuidanceAdapterSettings(width=16))), tmp_path)

    @torch.no_grad()
    def ask() -> Tensor:
        return pipe.unet(**inputs(pipe), timestep=500).sample  # type: ignore[no-any-return]

    plain = ask()
    adapter = load_guidance_adapter(pipe, file, w=5.0)
    once = ask()
    with pytest.raises(ValueError, match="would be added twice"):
        adapter.attach(pipe.unet)
    again = load_guidance_adapter(pipe, file, w=5.0)
    assert torch.equal(ask(), once)
    again.detach()
    assert torch.equal(ask(), plain)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    load_guidance_adapter(pipe, file, w=5.0)
    assert torch.allclose(ask(), once, atol=1e-5)


def test_one_w_a_prompt(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Of several images a prompt each hears its prompt's; numbers that fit no way are refused."""
    pipe = DiffusionPipeline.from_pretrained(tiny("sd"))
    pipe.set_progress_bar_config(disable=True)
    adapter = load_guidance_adapter(
        pipe, written(grown(GuidanceAdapter(pipe.unet, GuidanceAdapterSettings(width=16))), tmp_path)
    )

    def draw(prompts: list[str], seeds: list[int], w: list[float], images: int) -> Tensor:
        adapter.w = torch.tensor(w)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        call = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "pt"}
        return torch.as_tensor(pipe(prompts, generator=generators, num_images_per_prompt=images, **call).images)

    rows = draw(["a cat", "a cat", "a dog", "a dog"], [0, 1, 2, 3], [2.0, 2.0, 8.0, 8.0], 1)
    assert torch.allclose(draw(["a cat", "a dog"], [0, 1, 2, 3], [2.0, 8.0], 2), rows, atol=1e-6)
    with pytest.raises(ValueError, match="2 values of w and the network 3 rows"):
        draw(["a", "b", "c"], [0, 1, 2], [2.0, 8.0], 1)


def test_what_a_mask_hides_says_nothing(tiny: Callable[..., Path]) -> None:
    """Sana's pipeline hands over the encoder's padding with its mask; in training it is zeros."""
    network = DiffusionPipeline.from_pretrained(tiny("sana")).transformer
    adapter = grown(GuidanceAdapter(network, GuidanceAdapterSettings(width=16))).attach(network)
    adapter.w = 4.0
    stream = torch.Generator().manual_seed(0)
    text = torch.randn(2, 6, network.config.caption_channels, generator=stream)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    given = {"hidden_states": torch.randn(2, 4, 8, 8, generator=stream), "timestep": torch.tensor([500.0, 500.0])}

    @torch.no_grad()
    def ask(states: Tensor) -> Tensor:
        return network(**given, encoder_hidden_states=states, encoder_attention_mask=mask).sample  # type: ignore[no-any-return]

    hidden = torch.where(mask[..., None] == 0, 9.0, text)
    assert torch.allclose(ask(hidden), ask(text), atol=1e-5)
    assert float((ask(text + 0.1) - ask(text)).abs().max()) > 1e-4


def test_w_outside_of_the_range_warns_once(pipeline: DiffusionPipeline) -> None:
    adapter = GuidanceAdapter(pipeline.unet, GuidanceAdapterSettings(width=16, w_low=1.0, w_high=8.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.w = torch.tensor([1.0, 8.0])
    with pytest.warns(UserWarning, match=r"w = 9 is outside of the trained range \[1, 8\]"):
        adapter.w = torch.tensor([2.0, 9.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.w = 0.5


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape", "stranger", "base"])
def test_loading_takes_the_right_file_alone(tiny: Callable[..., Path], tmp_path: Path, fault: str) -> None:
    pipe = DiffusionPipeline.from_pretrained(tiny("sd"))
    file = written(GuidanceAdapter(pipe.unet, GuidanceAdapterSettings(width=16)), tmp_path)
    tensors, metadata = load_file(file), settings_metadata(GuidanceAdapterSettings(width=16))
    key = min(tensors)
    if fault == "missing":
        del tensors[key]
    if fault == "unexpected":
        tensors["adapters.elsewhere"] = torch.zeros(1)
    if fault == "shape":
        tensors[key] = torch.zeros(3, 3, 3)
    save_file(tensors, file, {} if fault == "stranger" else metadata)
    if fault == "base":
        pipe = DiffusionPipeline.from_pretrained(tiny("sdxl"))
    told = {
        "missing": "lacks 1 tensors", "unexpected": "has 1 tensors", "shape": "another shape",
        "stranger": "not a guidance adapter", "base": "base that it was trained on",
    }[fault]  # fmt: skip
    with pytest.raises(ValueError, match=told):
        load_guidance_adapter(pipe, file)


@pytest.mark.parametrize(("kind", "shared", "heads"), KINDS)
def test_beside_half_precision_only_products_are_in_half(
    tiny: Callable[..., Path], kind: Any, shared: bool, heads: int
) -> None:
    """Weights stay float32, and so do the Fourier features of w, whose phases half precision could not hold."""
    pipe = DiffusionPipeline.from_pretrained(tiny("sd"))
    settings = GuidanceAdapterSettings(kind=kind, width=16, shared=shared, heads=heads, rising=True)
    adapter = grown(GuidanceAdapter(pipe.unet, settings), 0.05).attach(pipe.unet)
    adapter.w = 5.0
    given = inputs(pipe)
    seen: set[tuple[bool, torch.dtype]] = set()
    for name, module in adapter.named_modules():
        if isinstance(module, torch.nn.Linear):
            encodes = name.startswith("encoders.")
            module.register_forward_hook(lambda _m, _a, out, encodes=encodes: seen.add((encodes, out.dtype)))
    with torch.no_grad():
        exact = pipe.unet(**given, timestep=500).sample
        assert seen == {(True, torch.float32), (False, torch.float32)}
        seen.clear()
        adapter.products = torch.bfloat16
        close = pipe.unet(**given, timestep=500).sample
        assert seen == {(True, torch.float32), (False, torch.bfloat16)}
        assert close.dtype == torch.float32
        assert 0 < float((close - exact).abs().max()) < 0.01 * float(exact.abs().max())
        seen.clear()
        adapter.products = None
        pipe.unet.bfloat16()
        half = {
            key: value.bfloat16() if isinstance(value, Tensor) else value
            for key, value in given.items()
        }  # fmt: skip
        rough = pipe.unet(**half, timestep=500).sample
    assert rough.dtype == torch.bfloat16
    assert seen == {(True, torch.float32), (False, torch.bfloat16)}
    assert all(parameter.dtype == torch.float32 for parameter in adapter.parameters())
    seen.clear()
    adapter.products = torch.float32
    pipe.unet(**half, timestep=500)
    assert seen == {(True, torch.float32), (False, torch.float32)}
    assert float((rough.float() - exact).abs().max()) < 0.1 * float(exact.abs().max())


@pytest.mark.parametrize("value", ["bfloat16", torch.float8_e4m3fn, torch.int8, 16])
def test_products_are_in_a_float_that_autocast_knows(tiny: Callable[..., Path], value: Any) -> None:
    adapter = GuidanceAdapter(DiffusionPipeline.from_pretrained(tiny("sd")).unet, GuidanceAdapterSettings(width=16))
    with pytest.raises(ValueError, match=r"asked for in .*: give torch\.bfloat16"):
        adapter.products = value
    assert adapter.products is None


def test_places_are_told_apart() -> None:
    code = sinusoidal_positions(79, 16)
    assert code.shape == (79, 16)
    assert torch.equal(code[0], torch.tensor([0.0] * 8 + [1.0] * 8))
    distances = torch.cdist(code, code) + 10 * torch.eye(79)
    assert float(distances.min()) > 0.05


def test_heads_are_attentions_on_slices_of_the_channels() -> None:
    stream = torch.Generator().manual_seed(0)
    adapter = CrossAdapter(12, GuidanceAdapterSettings(width=8, heads=2))
    torch.nn.init.normal_(adapter.out.weight, generator=stream)
    hidden, tokens = torch.randn(2, 5, 12, generator=stream), torch.randn(2, 3, 8, generator=stream)
    told = tokens + sinusoidal_positions(3, 8)
    query, key, value = adapter.query(hidden), adapter.key(told), adapter.value(told)
    slices = [slice(0, 4), slice(4, 8)]
    each = [((query[..., s] @ key[..., s].mT) / 2).softmax(-1) @ value[..., s] for s in slices]
    assert torch.allclose(adapter(hidden, hidden, tokens), adapter.out(torch.cat(each, -1)), atol=1e-6)


def test_a_perceptron_computes_on_input_and_output() -> None:
    """silu((1 + s) W_h LayerNorm(h) + W_a LayerNorm(a)) by hand, s of the tokens."""
    stream = torch.Generator().manual_seed(0)
    adapter = PerceptronAdapter(12, GuidanceAdapterSettings("perceptron", width=8))
    torch.nn.init.normal_(adapter.out.weight, generator=stream)
    hidden, attended = torch.randn(2, 2, 5, 12, generator=stream)
    tokens = torch.randn(2, 6, 8, generator=stream)

    def normed(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()

    scale = 1 + adapter.scale(tokens[:, 0] + tokens[:, 1] + tokens[:, 2:].sum(1) / 4)[:, None]
    inner = scale * adapter.hidden(normed(hidden)) + adapter.attended(normed(attended))
    assert inner.shape == (2, 5, 32)
    assert torch.allclose(adapter(hidden, attended, tokens), adapter.out(inner * inner.sigmoid()), atol=1e-5)


def test_one_token_of_the_mean_is_the_mean_of_the_tokens() -> None:
    stream = torch.Generator().manual_seed(0)
    told = GuidanceInputs(
        torch.tensor([1.5, 7.0]), torch.randn(2, 6, 5, generator=stream), time=torch.randn(2, 12, generator=stream)
    )
    each = ConditionTokens(8, 12, 5, torch.Generator().manual_seed(1))
    one = ConditionTokens(8, 12, 5, torch.Generator().manual_seed(1), each=False)
    one.load_state_dict(each.state_dict())
    many, few = each(told), one(told)
    assert (many.shape, few.shape) == ((2, 8, 8), (2, 3, 8))
    assert torch.equal(many[:, :2], few[:, :2])
    assert torch.allclose(many[:, 2:].mean(1), few[:, 2], atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"width": 10, "heads": 4}, "divisor of the width"), ({"kind": "offset", "heads": 2}, "kind cross, or 1 head")],
)
def test_heads_that_cannot_be_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GuidanceAdapterSettings(**settings)


def test_a_network_without_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="no attention that looks at a prompt"):
        GuidanceAdapter(torch.nn.Linear(2, 2), GuidanceAdapterSettings())
