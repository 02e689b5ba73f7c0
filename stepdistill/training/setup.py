"""From a config to a plan: everything is read and checked, and what cannot work refused, before any weight is loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stepdistill.assets import resolve
from stepdistill.config.reading import Settings, parse
from stepdistill.config.registry import load_family, load_method
from stepdistill.config.schema import RoleConfig, RunConfig
from stepdistill.data.images.buckets import Buckets, assign_buckets
from stepdistill.data.images.indexed import IndexedImages
from stepdistill.data.images.opening import open_images
from stepdistill.data.images.preference_pairs import PreferencePairs, open_preference_pairs
from stepdistill.data.images.source import ImageSource
from stepdistill.data.latents.latent_shards import TensorFolder
from stepdistill.data.latents.trajectories import TrajectoryFolder
from stepdistill.data.prompts import PromptList, read_prompts
from stepdistill.errors import UserError
from stepdistill.families.base import CheckpointInfo, Family
from stepdistill.families.checkpoints.loading import inspect_checkpoint
from stepdistill.families.common.guidance_embedding import GuidanceEmbeddingSettings
from stepdistill.methods.base import Method, Needs, Problem, RoleKind
from stepdistill.roles.guidance_modules import GuidanceAdapterSettings
from stepdistill.roles.lora import LoraSettings
from stepdistill.roles.triple import RoleLayout
from stepdistill.training.inputs.collection_checks import check_pairs, check_trajectories
from stepdistill.training.option_checks import check_model_options, check_role_modes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunSetup:
    """A config whose every part was read and checked, with nothing heavy loaded yet."""

    config: RunConfig
    info: CheckpointInfo
    family: Family
    method_class: type[Method[Any]]
    method_config: Settings
    problem: Problem
    prompts: PromptList
    images: ImageSource | None
    pairs: TensorFolder | None
    trajectories: TrajectoryFolder | None = None
    buckets: Buckets | None = None

    @property
    def layouts(self) -> dict[str, RoleLayout]:
        """Role -> layout for the roles that the method trains."""
        configured = {"generator": self.config.roles.generator, "fake_score": self.config.roles.fake_score}
        guidance_range = self.method_class.network_guidance_range(self.method_config)
        return {
            role: role_layout(configured[kind], self.family, guidance_range if kind == "generator" else None)
            for role, kind in self.roles.items()
        }

    @property
    def roles(self) -> Mapping[str, RoleKind]:
        """Role -> the config section that speaks of it."""
        return self.method_class.roles(self.method_config)

    @property
    def needs(self) -> Needs:
        """What the method cannot do without."""
        return self.method_class.needs(self.method_config)


def prepare(config: RunConfig, *, images: bool = True) -> RunSetup:
    """Read and check everything a run needs.

    images: open training images (sizes for buckets, too) and pairs; drawing from a finished run needs none of them.

    Raises:
        UserError: the first thing that cannot work, in one sentence.
    """
    # before the checkpoint, whose configs may have to be downloaded
    parse(load_method(config.method_name).Config, config.method_options, where="method")
    info = inspect_checkpoint(resolve(config.model.path), config.model.family, config.model.config_dir)
    setup = prepare_without_data(config, info)
    data, size = config.data, setup.problem.size
    needs = setup.needs
    prompts = read_prompts(str(data.prompts), data.prompt_column)
    source = pairs = trajectories = buckets = None
    if data.images is not None and not needs.images:
        logger.warning("data.images is set, and the method as it is configured looks at no image: they are not read")
    if data.losers is not None and not needs.losers:
        logger.warning(
            "data.losers is set, and the method as it is configured has other losers or none: they are not read"
        )
    if images and needs.images and data.images is not None:
        source = open_images(data, size, config.training.seed)
        if needs.losers:
            source = open_preference_pairs(data, source)
        _check_cache(config, source)
    if images and needs.pairs and data.pairs is not None:
        pairs = TensorFolder(data.pairs)
        check_pairs(pairs, prompts, setup.method_config, setup.problem.latent_shape, config.model.negative_prompt)
    if images and needs.trajectories and data.trajectories is not None:
        trajectories = TrajectoryFolder(data.trajectories)
        check_trajectories(
            trajectories,
            prompts,
            config.model.path,
            setup.method_config,
            setup.problem.latent_shape,
            config.model.negative_prompt,
        )
    if images and data.buckets:
        buckets = _open_buckets(config, info, source, pairs or trajectories)
    return replace(setup, prompts=prompts, images=source, pairs=pairs, trajectories=trajectories, buckets=buckets)


def prepare_without_data(config: RunConfig, info: CheckpointInfo) -> RunSetup:
    """The plan of a config on a checkpoint, checked but for its data, of which nothing is read.

    Raises:
        UserError: model, method and the kinds of data that the config names do not go together.
    """
    method_class = load_method(config.method_name)
    method_config = parse(method_class.Config, config.method_options, where="method")
    family = load_family(info.family)
    check_model_options(config, family, method_class.roles(method_config))
    check_role_modes(config, method_class.roles(method_config), method_class.modes)
    size = config.model.size or info.default_size
    _check_size(size, "model.size", info)
    latent_shape = info.latent_shape(size)
    # buckets share the schedule of model.size, where a dynamic shift depends on the size
    schedule = info.schedule.for_tokens(latent_shape[1] * latent_shape[2] // 4)
    problem = Problem(
        schedule=schedule,
        latent_shape=latent_shape,
        feature_channels=family.feature_channels(info),
        feature_size=_feature_size(config.data.buckets or [size], info, family),
        size=size,
        base=config.model.path,
        initialised=config.init is not None,
    )
    data = config.data
    method_class.check(
        method_config,
        schedule,
        images=data.images is not None,
        pairs=data.pairs is not None,
        trajectories=data.trajectories is not None,
    )
    if method_class.needs(method_config).losers and data.losers is None:
        raise UserError(
            "the method as it is configured needs images that lose and data.losers is not set: give a folder or a column, or let "
            "the model draw them (method.losers: captions)"
        )
    family.stock_recipe(info, method_class(method_config, problem).recipe())
    if data.prompts is None:
        raise UserError("data.prompts is not set: give a .txt, .jsonl, .csv or .parquet file, or 'builtin:general'")
    nothing = PromptList((), data.prompts, "")
    return RunSetup(config, info, family, method_class, method_config, problem, nothing, None, None)


def role_layout(config: RoleConfig, family: Family, guidance_range: tuple[float, float] | None = None) -> RoleLayout:
    """The layout a role's configuration asks for; `told` is the range of guidance scales that its network is told."""
    if config.mode == "adapter":
        low, high = guidance_range or (1.0, 1.0)
        try:
            guide = GuidanceAdapterSettings(
                config.kind, config.width, config.shared, low, high, config.heads, config.rising
            )
        except ValueError as error:
            raise UserError(str(error)) from error
        return RoleLayout("adapter", guide=guide)
    embedding = None if guidance_range is None else GuidanceEmbeddingSettings()
    if config.mode == "full":
        return RoleLayout("full", guide=embedding)
    targets = family.lora_targets(config.targets) if isinstance(config.targets, str) else tuple(config.targets)
    return RoleLayout(
        "lora", LoraSettings(config.rank, config.alpha, targets, config.rank_pattern, config.alpha_pattern), embedding
    )


def _check_size(size: tuple[int, int], key: str, info: CheckpointInfo) -> None:
    step = info.downsampling * info.latent_multiple if info.downsampling > 1 else 1
    if any(side < 1 or side % step for side in size):
        raise UserError(f"{key} is {list(size)}, and the sides of this model must be multiples of {step}: change it")


def _feature_size(sizes: Sequence[tuple[int, int]], info: CheckpointInfo, family: Family) -> tuple[int, int]:
    """(h, w) of the feature module's output for the smallest of some image sizes, each side by itself."""
    stride = family.feature_stride(info)
    shapes = [info.latent_shape(size) for size in sizes]
    height, width = (max(1, min(shape[axis] for shape in shapes) // stride) for axis in (1, 2))
    return height, width


def _open_buckets(
    config: RunConfig,
    info: CheckpointInfo,
    images: ImageSource | None,
    collected: TensorFolder | TrajectoryFolder | None,
) -> Buckets:
    """The run's buckets, checked, with the images that belong to each."""
    sizes = config.data.buckets
    for size in sizes:
        _check_size(size, "a size in data.buckets", info)
    if len(set(sizes)) < len(sizes):
        raise UserError(f"data.buckets names a size twice ({[list(size) for size in sizes]}): name each once")
    if collected is not None:
        raise UserError("data.buckets is set, and what the teacher drew is of one size: remove one of the two")
    if images is None:
        return Buckets(tuple(sizes))
    if not isinstance(images, IndexedImages):
        raise UserError(
            "data.buckets needs the sizes of all images before the first is read, which a stream cannot tell: "
            "set data.streaming to false, or remove data.buckets"
        )
    return assign_buckets(images, sizes, config.data.workers)


def _check_cache(config: RunConfig, images: ImageSource) -> None:
    cache = config.cache
    if cache is None or not (cache.text or cache.latents):
        return
    if not isinstance(images, IndexedImages):
        raise UserError(
            "a cache encodes all images and captions before the first is needed, and a stream cannot tell which they are: set "
            "data.streaming to false, or remove the cache section"
        )
    if cache.latents and isinstance(images, PreferencePairs):
        raise UserError(
            "cache.latents keeps the images of data.images and data.losers would have no place there: set cache.latents to false"
        )
    if cache.latents and config.data.crop == "random":
        raise UserError(
            "cache.latents keeps one crop of every image and data.crop is 'random', which wants a new one each time: set "
            "data.crop to center, or cache.latents to false"
        )
