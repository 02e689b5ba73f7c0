"""From a config to a triple and a method. `prepare` refuses what cannot work before any weight is loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from stepdistill.assets import resolve
from stepdistill.config import RoleConfig, RunConfig, Settings, parse
from stepdistill.data.images import ImageFolder
from stepdistill.data.prompts import PromptList, read_prompts
from stepdistill.data.tensors import TensorFolder
from stepdistill.errors import Refusal
from stepdistill.methods.base import Method, RoleKind, Setting
from stepdistill.models.adapters import LoraSettings
from stepdistill.models.families.base import Checkpoint, CheckpointInfo, Family
from stepdistill.models.loading import inspect_checkpoint, load_checkpoint
from stepdistill.models.triple import GENERATOR, RoleLayout, Triple
from stepdistill.registry import load_family, load_method
from stepdistill.training import checkpoint as checkpoints

logger = logging.getLogger(__name__)
EMA = "generator_ema"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Plan:
    """A config whose every part was read and checked, with nothing heavy loaded yet."""

    config: RunConfig
    info: CheckpointInfo
    family: Family
    method_class: type[Method[Any]]
    method_config: Settings
    setting: Setting
    prompts: PromptList
    images: ImageFolder | None
    pairs: TensorFolder | None

    @property
    def layouts(self) -> dict[str, RoleLayout]:
        """Role -> layout for the roles that the method trains."""
        configured = {"generator": self.config.roles.generator, "fake_score": self.config.roles.fake_score}
        return {role: layout_of(configured[kind], self.family) for role, kind in self.roles.items()}

    @property
    def roles(self) -> Mapping[str, RoleKind]:
        """Role -> the config section that speaks of it."""
        return self.method_class.roles(self.method_config)


@dataclass
class Session:
    """A plan with its weights."""

    plan: Plan
    checkpoint: Checkpoint
    triple: Triple
    method: Method[Any]
    device: torch.device

    @property
    def student(self) -> str:
        """The role that is shown and exported: the EMA where there is one."""
        return EMA if self.plan.config.training.ema > 0 else GENERATOR

    @property
    def dtype(self) -> torch.dtype:
        """Of latents and noise: float32, or float64 where the base is."""
        return torch.float64 if self.plan.config.model.dtype == "float64" else torch.float32


def prepare(config: RunConfig) -> Plan:
    """Read and check everything a run needs.

    Raises:
        Refusal: the first thing that cannot work, in one sentence.
    """
    # before the checkpoint, whose configs may have to be downloaded
    parse(load_method(config.method_name).Config, config.method_options, where="method")
    info = inspect_checkpoint(resolve(config.model.path), config.model.family, config.model.config_dir)
    plan = without_data(config, info)
    data, size = config.data, plan.setting.size
    needs = plan.method_class.needs(plan.method_config)
    prompts = read_prompts(str(data.prompts), data.prompt_column)
    images = pairs = None
    if needs.images and data.images is not None:
        images = ImageFolder(data.images, size, crop=data.crop, flip=data.flip, max_bad_share=data.max_bad_share)
    if needs.pairs and data.pairs is not None:
        pairs = TensorFolder(data.pairs)
        _check_pairs(pairs, prompts, plan.method_config, plan.setting.latent_shape)
    return replace(plan, prompts=prompts, images=images, pairs=pairs)


def without_data(config: RunConfig, info: CheckpointInfo) -> Plan:
    """The plan of a config on a checkpoint, checked but for its data, of which nothing is read.

    Raises:
        Refusal: model, method and the kinds of data that the config names do not go together.
    """
    method_class = load_method(config.method_name)
    method_config = parse(method_class.Config, config.method_options, where="method")
    family = load_family(info.family)
    size = _size(config, info)
    latent_shape = info.latent_shape(size)
    schedule = info.schedule.for_tokens(latent_shape[1] * latent_shape[2] // 4)
    stride = family.feature_stride(info)
    setting = Setting(
        schedule=schedule,
        latent_shape=latent_shape,
        feature_channels=family.feature_channels(info),
        feature_size=(max(1, latent_shape[1] // stride), max(1, latent_shape[2] // stride)),
        size=size,
        base=config.model.path,
    )
    data = config.data
    method_class.check(method_config, schedule, images=data.images is not None, pairs=data.pairs is not None)
    method_class(method_config, setting).recipe()
    if data.prompts is None:
        raise Refusal("data.prompts is not set: give a .txt, .jsonl, .csv or .parquet file, or 'builtin:general'")
    nothing = PromptList((), data.prompts, "")
    return Plan(config, info, family, method_class, method_config, setting, nothing, None, None)


def open_session(plan: Plan, device: torch.device | str | None = None) -> Session:
    """Load the checkpoint and build triple and method."""
    config = plan.config
    where = torch.device(device or config.training.device or best_device())
    session = assemble(plan, load_checkpoint(plan.info, DTYPES[config.model.dtype], where), where)
    if config.init is not None:
        load_initial(session.triple, Path(config.init), tuple(plan.roles))
    return session


def assemble(plan: Plan, checkpoint: Checkpoint, where: torch.device) -> Session:
    """Triple and method on a checkpoint that is on the device `where` already."""
    config, dtype = plan.config, DTYPES[plan.config.model.dtype]
    triple = Triple(
        checkpoint.network,
        plan.family,
        plan.setting.schedule,
        plan.layouts,
        compute_dtype=dtype,
        seed=config.training.seed,
    )
    method = plan.method_class(plan.method_config, plan.setting)
    method.prepare(triple)
    for heads in triple.heads.values():
        for head in heads.values():
            head.to(where, torch.float64 if dtype == torch.float64 else torch.float32)
    if config.training.ema > 0:
        triple.add_copy(EMA, GENERATOR)
    if config.training.gradient_checkpointing:
        triple.enable_gradient_checkpointing()
    return Session(plan, checkpoint, triple, method, where)


def load_initial(triple: Triple, run: Path, roles: tuple[str, ...]) -> None:
    """Start from the roles of an earlier run's newest checkpoint: its student becomes this generator (staged training).

    Raises:
        Refusal: no checkpoint there, or one that does not fit.
    """
    path = checkpoints.latest(run / "checkpoints")
    if path is None:
        raise Refusal(
            f"init names {str(run)!r}, which holds no complete checkpoint: give the output folder of an earlier run"
        )
    saved = checkpoints.read(path).tensors
    for role in roles:
        source = EMA if role == GENERATOR and EMA in saved else role
        own = {key: value for key, value in saved.get(source, {}).items() if not key.startswith("head.")}
        if role != GENERATOR and own.keys() != triple.network_parameters(role).keys():
            logger.info("%s is laid out differently in %s: it starts from the teacher", role, run)
            continue
        kept = {key: value for key, value in triple.state(role).items() if key.startswith("head.")}
        triple.load_state(role, {**own, **kept})
    if EMA in triple.layouts:
        triple.copy_role(GENERATOR, EMA)


def layout_of(config: RoleConfig, family: Family) -> RoleLayout:
    """The layout a role's configuration asks for."""
    if config.mode == "full":
        return RoleLayout("full")
    targets = family.lora_targets(config.targets) if isinstance(config.targets, str) else tuple(config.targets)
    return RoleLayout(
        "lora", LoraSettings(config.rank, config.alpha, targets, config.rank_pattern, config.alpha_pattern)
    )


def best_device() -> str:
    """cuda, mps or cpu, whichever is there first."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _size(config: RunConfig, info: CheckpointInfo) -> tuple[int, int]:
    size = config.model.size or info.default_size
    if any(side % (info.downsampling * 2) for side in size) and info.downsampling > 1:
        raise Refusal(
            f"model.size is {list(size)}, and the sides of this model must be multiples of {info.downsampling * 2}: change it"
        )
    return size


def _check_pairs(
    pairs: TensorFolder, plan_prompts: PromptList, method_config: Settings, latent_shape: tuple[int, ...]
) -> None:
    made = pairs.fingerprint
    if pairs.shape != tuple(latent_shape):
        raise Refusal(
            f"the pairs in data.pairs hold latents of shape {list(pairs.shape)} and the run wants {list(latent_shape)}: "
            "collect them at model.size"
        )
    guidance = dict(method_config).get("guidance")
    if guidance is not None and made.guidance != float(guidance):
        raise Refusal(
            f"the pairs were made with guidance {made.guidance} and method.guidance is {guidance}: "
            "the two must agree, so change one or collect again"
        )
    if made.prompts_sha256 != plan_prompts.sha256:
        raise Refusal(
            "the pairs were made with another prompt list than data.prompts: name the list they were collected with"
        )
