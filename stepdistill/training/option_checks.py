"""Options of memory and speed: whether they fit config and machine, said before any weight is loaded; torch's precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

import torch

from stepdistill.config.schema import RunConfig
from stepdistill.errors import UserError
from stepdistill.families.base import Family
from stepdistill.methods.base import Needs, RoleKind
from stepdistill.roles.triple import RoleMode
from stepdistill.runtime.kernels import check_xformers
from stepdistill.runtime.quantization import check_quantization
from stepdistill.training.optimizers import check_adamw8bit, check_muon


def check_model_options(config: RunConfig, family: Family, roles: Mapping[str, RoleKind]) -> None:
    """Whether the network can be held as `config.model` says.

    Args:
        roles: role -> its config section, for the roles that the method trains.

    Raises:
        UserError: the first option that cannot work.
    """
    model = config.model
    asked = {
        "quantization": model.quantization != "none",
        "compile": model.compile,
        "attention": model.attention != "sdpa",
    }
    if not family.is_diffusers_model and any(asked.values()):
        key = next(key for key, wanted in asked.items() if wanted)
        raise UserError(
            f"model.{key} is set, which is for networks of diffusers, and the family {family.name!r} has one of its own: remove the key"
        )
    if model.attention == "xformers":
        check_xformers(config.training.device)
    if model.quantization == "none":
        return
    _check_quantized_roles(config, roles)
    if model.dtype == "float64":
        raise UserError(
            f"{_quantization_phrase(config)} and model.dtype is 'float64': set model.dtype to float32 or bfloat16"
        )
    check_quantization()


def check_role_modes(config: RunConfig, roles: Mapping[str, RoleKind], generator: Sequence[RoleMode]) -> None:
    """Whether the roles may be held as the config says; `generator` is how its method may hold it. Raises UserError."""
    modes = {"generator": config.roles.generator.mode, "fake_score": config.roles.fake_score.mode}
    for kind in roles.values():
        allowed = generator if kind == "generator" else ("lora", "full")
        if modes[kind] not in allowed:
            raise UserError(
                f"roles.{kind}.mode is {modes[kind]!r}, and the method {config.method_name!r} trains it as {' or '.join(allowed)}: "
                "change the mode, or the method"
            )


def _check_quantized_roles(config: RunConfig, roles: Mapping[str, RoleKind]) -> None:
    modes = {"generator": config.roles.generator.mode, "fake_score": config.roles.fake_score.mode}
    full = [section for section in roles.values() if modes[section] == "full"]
    if config.model.quantization != "none" and full:
        raise UserError(
            f"{_quantization_phrase(config)} and roles.{full[0]}.mode is 'full', which trains every weight of the base: "
            f"set model.quantization to none, or roles.{full[0]}.mode to lora"
        )


def _quantization_phrase(config: RunConfig) -> str:
    """What the config says of it, and where it came from, for the start of a refusal."""
    source = f" (by preset {config.preset!r}, unless the config has the key itself)" if config.preset else ""
    return f"model.quantization is {config.model.quantization!r}{source}"


def describe_options(config: RunConfig) -> list[str]:
    """The options that are set, in words; empty where all are at their defaults."""
    model, training = config.model, config.training
    kinds = {"generator": config.optimizers.generator.kind, "fake_score": config.optimizers.fake_score.kind}
    said = {
        f"linear layers of the base in {model.quantization}": model.quantization != "none",
        "attention by xformers": model.attention == "xformers",
        "compiled blocks": model.compile,
        "channels last": model.channels_last,
        "TensorFloat-32 on CUDA": training.tf32,
        "the optimizers' state in main memory between steps": "optimizer" in training.offload,
        "the EMA in main memory": "ema" in training.offload,
    }
    words = {"adamw8bit": "8-bit AdamW", "muon": "Muon"}
    said |= {f"{words[kind]} for the {name.replace('_', ' ')}": True for name, kind in kinds.items() if kind in words}
    caches = [f"caches in {config.cache.folder!r}"] if config.cache is not None else []
    return [words for words, is_set in said.items() if is_set] + caches


def check_training_options(
    config: RunConfig, roles: Mapping[str, RoleKind], needs: Needs, device: torch.device, *, sharded: bool
) -> None:
    """Whether a run can be trained as its config says; opening a finished one needs none of it.

    Args:
        roles: role -> its config section, for the roles that the method trains.
        needs: what the method cannot do without.
        device: of the training.
        sharded: every process holds a share of every network.

    Raises:
        UserError: the first option that cannot work.
    """
    kinds = {"generator": config.optimizers.generator.kind, "fake_score": config.optimizers.fake_score.kind}
    in_8_bit = [section for section in roles.values() if kinds[section] == "adamw8bit"]
    if in_8_bit:
        check_adamw8bit(device, torch.float64 if config.model.dtype == "float64" else torch.float32)
    if any(kinds[section] == "muon" for section in roles.values()):
        check_muon()
    for tracker in config.training.trackers:
        if find_spec(tracker) is None:
            raise UserError(
                f"training.trackers names {tracker!r}, which is not installed: run pip install {tracker}, or leave it out"
            )
    check_combinations(config, roles, needs, sharded=sharded)


def check_combinations(config: RunConfig, roles: Mapping[str, RoleKind], needs: Needs, *, sharded: bool) -> None:
    """Whether the options of a config go together, whatever is installed here. Arguments and refusals as above."""
    kinds = {"generator": config.optimizers.generator.kind, "fake_score": config.optimizers.fake_score.kind}
    modes = {"generator": config.roles.generator.mode, "fake_score": config.roles.fake_score.mode}
    in_8_bit = [section for section in roles.values() if kinds[section] == "adamw8bit"]
    if config.model.channels_last and any(modes[section] == "full" for section in in_8_bit):
        raise UserError(
            "model.channels_last is set and bitsandbytes lays a full network's weights out anew: set model.channels_last to "
            "false, or optimizers.*.kind to adamw"
        )
    _check_quantized_roles(config, roles)
    if config.model.dtype == "float16":
        raise UserError(
            "model.dtype is 'float16', in which gradients as small as these methods' vanish without a word: set it to bfloat16, or "
            "to float32 on a card without it"
        )
    if needs.jvp and config.model.compile:
        raise UserError(
            "model.compile is set and the method takes derivatives in forward mode, which compiled blocks do not have: set "
            "method.tangent.kind to semi_discrete, or model.compile to false"
        )
    if needs.jvp and (config.model.quantization == "int4" or config.model.attention == "xformers"):
        key = "quantization" if config.model.quantization == "int4" else "attention"
        raise UserError(
            f"model.{key} is {vars(config.model)[key]!r}, whose kernels have no derivatives in forward mode, and the method takes "
            "them: set method.tangent.kind to semi_discrete, or remove the key"
        )
    if config.model.compile and any(modes[section] == "adapter" for section in roles.values()):
        raise UserError(
            "model.compile is set and roles.generator.mode is 'adapter', whose hooks compiled blocks would be compiled anew for at "
            "every call: set model.compile to false"
        )
    whole_only = {
        "model.quantization": (config.model.quantization != "none", "none"),
        "model.compile": (config.model.compile, "false"),
        "model.channels_last": (config.model.channels_last, "false"),
        "training.offload": (bool(config.training.offload), "[]"),
        **{f"optimizers.{section}.kind": (kinds[section] != "adamw", "adamw") for section in roles.values()},
    }
    for key, (is_set, default) in whole_only.items():
        if sharded and is_set:
            raise UserError(
                f"{key} is set and the processes share every network out, which works with whole tensors only: "
                f"set {key} to {default}, or training.sharding to replicated"
            )


@contextmanager
def float32_precision(tf32: bool) -> Iterator[None]:
    """Precision of float32 products and convolutions on CUDA inside: TensorFloat-32, or the whole 24 bits.

    torch keeps it for the process as a whole; it is as it was before afterwards.
    """
    matrices, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matrices)
        torch.backends.cudnn.allow_tf32 = convolutions
