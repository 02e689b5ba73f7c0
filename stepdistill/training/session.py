"""From a plan to a triple and a method: what a run holds in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpointed

from stepdistill.errors import UserError
from stepdistill.families.base import ALL_PARTS, Checkpoint
from stepdistill.families.checkpoints.loading import load_checkpoint
from stepdistill.families.recipe import Recipe
from stepdistill.frozen.vision import VISION_ENCODER, load_vision
from stepdistill.methods.base import Decode, Method, Needs
from stepdistill.rewards import HELD_OUT, REWARD, load_reward
from stepdistill.roles.guidance_adapter import GuidanceAdapter
from stepdistill.roles.triple import GENERATOR, REAL_SCORE, Triple
from stepdistill.runtime.kernels import compile_blocks, set_attention_and_memory_format
from stepdistill.training.initialization import load_initial_roles
from stepdistill.training.inputs.encoding import Encoder, RunCaches, make_encoder
from stepdistill.training.setup import RunSetup

EMA = "generator_ema"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass
class Session:
    """A plan with its weights, and the stage of the run that they are of."""

    setup: RunSetup
    checkpoint: Checkpoint
    encoder: Encoder
    triple: Triple
    method: Method[Any]
    device: torch.device
    stage: int = 0

    @property
    def student(self) -> str:
        """The role that is shown and exported: the EMA where there is one."""
        return EMA if self.setup.config.training.ema > 0 else GENERATOR

    @property
    def experts(self) -> tuple[str, ...]:
        """All roles of what is shown and exported, in the order of the recipe's experts."""
        return self.method.experts(self.student, self.stage)

    @property
    def recipe(self) -> Recipe:
        """How the student must be sampled, in the words of its checkpoint's pipeline, and how its base was opened."""
        model, recipe = self.setup.config.model, self.setup.family.stock_recipe(self.setup.info, self.method.recipe())
        folder = "" if model.config_dir is None else str(Path(model.config_dir).expanduser().resolve())
        return replace(recipe, base_family=model.family or "", base_config_dir=folder)

    @property
    def dtype(self) -> torch.dtype:
        """Of latents and noise: float32, or float64 where the base is."""
        return torch.float64 if self.setup.config.model.dtype == "float64" else torch.float32


def open_session(setup: RunSetup, device: torch.device | str | None = None, caches: RunCaches | None = None) -> Session:
    """Load the checkpoint and build triple and method; what warm caches make needless is not loaded."""
    config = setup.config
    where = device if isinstance(device, torch.device) else resolve_device(device or config.training.device)
    checkpoint = load_checkpoint(
        setup.info,
        DTYPES[config.model.dtype],
        where,
        caches.parts if caches is not None else ALL_PARTS,
        config.model.quantization,
    )
    set_attention_and_memory_format(checkpoint.network, config.model.attention, config.model.channels_last)
    session = build_session(setup, checkpoint, where, caches)
    if config.init is not None:
        load_initial_roles(session.triple, Path(config.init), tuple(setup.roles), EMA)
    return session


def build_session(
    setup: RunSetup, checkpoint: Checkpoint, where: torch.device, caches: RunCaches | None = None
) -> Session:
    """Triple and method on a checkpoint that is on the device `where` already."""
    config, dtype = setup.config, DTYPES[setup.config.model.dtype]
    encoder = make_encoder(setup.family, checkpoint, config.model.negative_prompt, setup.images, caches, where)
    triple = Triple(
        checkpoint.network,
        setup.family,
        setup.problem.schedule,
        setup.layouts,
        compute_dtype=dtype,
        seed=config.training.seed,
        teacher_guidance_adapter=config.model.guidance_adapter,
    )
    with torch.device("cpu"):  # its ladders and levels are numbers even where weights are outlines
        method = setup.method_class(setup.method_config, setup.problem)
    teacher = triple.guidance_conditioners.get(REAL_SCORE)
    guidance = dict(setup.method_config).get("guidance")
    if isinstance(teacher, GuidanceAdapter) and guidance is not None:
        teacher.warn_if_outside_trained_range(float(guidance))
    pipeline = checkpoint.pipeline
    triple.frozen = load_frozen_models(setup.method_class.needs(setup.method_config))
    decode: Decode | None = None
    if pipeline is not None:
        decode = lambda latents: setup.family.decode(checkpoint, latents)  # noqa: E731
        decode = checkpointed_decode(decode) if config.training.gradient_checkpointing else decode
    method.prepare(triple, decode)
    heads = (head for owned in triple.heads.values() for head in owned.values())
    for module in (*heads, *triple.frozen.values()):
        module.to(where, torch.float64 if dtype == torch.float64 else torch.float32)
    if config.training.ema > 0:
        triple.add_copy(EMA, GENERATOR)
    if config.training.gradient_checkpointing:
        triple.enable_gradient_checkpointing()
    return Session(setup, checkpoint, encoder, triple, method, where)


def checkpointed_decode(decode: Decode) -> Decode:
    """Decodes what needs a gradient image by image, and again in backward: the autoencoder's activations are those of one."""

    def decoded(latents: Tensor) -> Tensor:
        if not latents.requires_grad:
            return decode(latents)
        return torch.cat([checkpointed(decode, row, use_reentrant=False) for row in latents.split(1)])

    return decoded


def load_frozen_models(needs: Needs) -> dict[str, nn.Module]:
    """The models that a method needs beside the triple; outlines where tensors are made on the meta device.

    Raises:
        UserError: one of them is not there.
    """
    found: dict[str, nn.Module] = {}
    if needs.vision is not None:
        found[VISION_ENCODER] = load_vision(needs.vision)
    if needs.reward is not None:
        found[REWARD] = load_reward(needs.reward)
    if needs.held_out is not None:
        found[HELD_OUT] = load_reward(needs.held_out)
    return found


def finalize_placement(session: Session) -> None:
    """Where training wants it, once the roles are on their processes: the EMA in main memory, the blocks compiled.

    A run that is only opened needs neither.
    """
    config, triple = session.setup.config, session.triple
    if "ema" in config.training.offload and EMA in triple.layouts:
        triple.offload_role(EMA)
    if config.model.compile:
        for network in (triple.base, *triple.networks.values()):
            compile_blocks(network)


def process_device(name: str | None) -> torch.device:
    """Where this process computes: as told, or its own card among several processes'. Raises as `device_of`."""
    state = PartialState(cpu=name == "cpu")
    if name is None and state.num_processes > 1:
        return state.device  # type: ignore[no-any-return]
    return resolve_device(name)


def resolve_device(name: str | None) -> torch.device:
    """The device of that name; cuda, mps or cpu, whichever is there first, for None.

    Raises:
        UserError: no such device, or none on this machine.
    """
    if name is None:
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        return torch.device(next(kind for kind, found in there.items() if found))
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0].split(". ")[0][:160]
        raise UserError(f"the device {name!r} cannot be used ({first}): give cpu, cuda, cuda:N or mps") from None
    return device
