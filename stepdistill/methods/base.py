"""What a method is: configuration, needs, stages, which roles are updated when, a rollout, a loss per role, a recipe."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, Generic, Literal, Protocol, TypeVar

from torch import Tensor

from stepdistill.config.reading import Settings
from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.prediction import Prediction
from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.errors import UserError
from stepdistill.families.conditioning import Conditioning
from stepdistill.families.recipe import Recipe
from stepdistill.roles.sampler import GuidedState
from stepdistill.roles.triple import FAKE_SCORE, GENERATOR, RoleMode, Triple

ConfigT = TypeVar("ConfigT", bound=Settings)
RoleKind = Literal["generator", "fake_score"]
STUDENT = "student"
"""In `Stage.copies`: the generator's EMA where the run has one, the generator elsewhere."""
Decode = Callable[[Tensor], Tensor]
"""Scaled latents (B, C, h, w) -> images (B, 3, H, W) in [0, 1], differentiable; the autoencoder is frozen."""


class TensorStore(Protocol):
    """Tensors that a method keeps beside the checkpoints, too large to be in every one of them. All processes call alike."""

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """Keep tensors under a name; what was there is replaced. Returns their digest, uint8 (32,), for `state_dict`.

        Raises:
            UserError: the disk refuses them.
        """

    def get(self, name: str, digest: Tensor) -> dict[str, Tensor]:
        """What was put, on the CPU.

        Raises:
            UserError: it is gone, or is not what was put.
        """


@dataclass(frozen=True)
class Needs:
    """What a configured method cannot do without; checked before any weight is loaded.

    Attributes:
        images, pairs, trajectories, losers: kinds of data beside prompts.
        predictions: prediction types of teachers it works with; empty for all.
        jvp: forward-mode derivatives through the network.
        vision, reward, held_out: names of frozen models, found in `Triple.frozen` when `prepare` is called.
    """

    images: bool = False
    pairs: bool = False
    trajectories: bool = False
    losers: bool = False
    predictions: tuple[Prediction, ...] = ()
    jvp: bool = False
    vision: str | None = None
    reward: str | None = None
    held_out: str | None = None


@dataclass(frozen=True)
class Problem:
    """The problem a method is posed: everything it may know of teacher and run.

    Attributes:
        schedule: the teacher's, with any dynamic shift resolved for `size`, whatever the buckets.
        latent_shape: (C, h, w) of x_t at `size`; a batch may say otherwise.
        feature_channels: of the network's feature module.
        feature_size: (h, w) of its output for the smallest image of the run.
        size: (height, width) in pixels.
        base: the checkpoint's name, for recipes.
        initialised: the student starts from what `init` names, and not from the checkpoint.
    """

    schedule: NoiseSchedule
    latent_shape: tuple[int, ...]
    feature_channels: int
    feature_size: tuple[int, int]
    size: tuple[int, int]
    base: str
    initialised: bool = False


@dataclass(frozen=True)
class Batch:
    """One micro-batch, B rows throughout.

    Attributes:
        cond, null: conditional and unconditional branch of the prompts.
        images, image_cond: scaled latents of real images and the conditioning of their captions.
        pair_noise, pair_latents, pair_cond: deterministic teacher pairs.
        states, states_cond: states of the guided teacher's walks for these prompts, and `cond`, told w.
        latent_shape: (C, h, w) of this batch's rollouts, which differs by bucket; None is the setting's.
        prompts: the texts of `cond`, for rewards; empty where nobody knows them.
        losers: scaled latents of the images that lose against `images`, told the same captions.
    """

    cond: Conditioning
    null: Conditioning
    images: Tensor | None = None
    image_cond: Conditioning | None = None
    pair_noise: Tensor | None = None
    pair_latents: Tensor | None = None
    pair_cond: Conditioning | None = None
    states: GuidedState | None = None
    states_cond: Conditioning | None = None
    latent_shape: tuple[int, ...] | None = None
    prompts: tuple[str, ...] = ()
    losers: Tensor | None = None

    def __len__(self) -> int:
        return len(self.cond)


@dataclass(frozen=True)
class Progress:
    """Where a run stands: iterations begun before this one, updates done per role, and the stage."""

    iteration: int = 0
    updates: Mapping[str, int] = field(default_factory=dict)
    stage: int = 0
    stage_iteration: int = 0


@dataclass(frozen=True)
class Stage:
    """A stretch of training with its own optimizers.

    Attributes:
        name: for logs and checkpoints.
        iterations: length; None runs to `max_steps`.
        copies: (source, target) roles copied at its start; the source may be `STUDENT`.
        reset: roles set back to the base at its start, after the copies. The EMA starts afresh with the generator.
    """

    name: str = "main"
    iterations: int | None = None
    copies: tuple[tuple[str, str], ...] = ()
    reset: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rollout:
    """What the updates of one micro-batch share.

    Attributes:
        batch: its inputs.
        x_t, t: what the generator was called on, and the native times it was told, (B,).
        x0: the generator's sample, with graph where the generator is due.
        pair_x0: its answer to the pairs' noise, with graph likewise.
    """

    batch: Batch
    x_t: Tensor
    t: Tensor
    x0: Tensor
    pair_x0: Tensor | None = None

    def detach(self) -> Rollout:
        """The same numbers without graph, for the updates that follow the generator's."""
        tensors = {f.name: v.detach() for f in fields(self) if isinstance(v := vars(self)[f.name], Tensor)}
        return replace(self, **tensors)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Terms:
    """A loss.

    Attributes:
        total: the scalar to differentiate.
        parts: detached scalars to log; means over samples.
        statistics: further ones that are not logged; `after_update` gets their means over the global batch.
    """

    total: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    statistics: Mapping[str, Tensor] = field(default_factory=dict)

    def plus(self, name: str, term: Tensor, weight: float) -> Terms:
        """With a further, weighted term, logged under its name without the weight."""
        return replace(self, total=self.total + weight * term, parts={**self.parts, name: term.detach()})

    def __mul__(self, factor: float) -> Terms:
        parts, statistics = ({key: factor * v for key, v in own.items()} for own in (self.parts, self.statistics))
        return Terms(factor * self.total, parts, statistics)

    @classmethod
    def sum(cls, terms: Iterable[Terms]) -> Terms:
        """The loss that pieces add up to, each with the same parts and statistics."""
        first, *others = terms
        for other in others:
            parts = {key: value + other.parts[key] for key, value in first.parts.items()}
            statistics = {key: value + other.statistics[key] for key, value in first.statistics.items()}
            first = cls(first.total + other.total, parts, statistics)
        return first


class Method(ABC, Generic[ConfigT]):
    """Base of all methods. The trainer knows methods by this interface alone."""

    Config: ClassVar[type[Settings]]
    modes: ClassVar[tuple[RoleMode, ...]] = ("lora", "full")
    """How its generator may be held."""

    def __init__(self, config: ConfigT, problem: Problem) -> None:
        self.config = config
        self.problem = problem

    @property
    def schedule(self) -> NoiseSchedule:
        return self.problem.schedule

    def latent_shape(self, batch: Batch) -> tuple[int, ...]:
        """(C, h, w) of the samples that are rolled out for a batch."""
        return batch.latent_shape or self.problem.latent_shape

    @property
    def beside(self) -> str | None:
        """Role that grids draw beside the student, in the student's steps; None is the guided teacher in many."""
        return None

    @classmethod
    def roles(cls, config: ConfigT) -> Mapping[str, RoleKind]:
        """Trainable roles of the triple, and whose section of the config says how each is held and optimised."""
        return {GENERATOR: "generator", FAKE_SCORE: "fake_score"}

    @classmethod
    def network_guidance_range(cls, config: ConfigT) -> tuple[float, float] | None:
        """Range of the guidance scales w that the generator's network is told; None where it is told none."""
        return None

    @classmethod
    @abstractmethod
    def needs(cls, config: ConfigT) -> Needs:
        """What this configuration needs."""

    @classmethod
    def check(
        cls, config: ConfigT, schedule: NoiseSchedule, *, images: bool, pairs: bool, trajectories: bool = False
    ) -> None:
        """Refuse an impossible combination, before any weight is loaded.

        Raises:
            UserError: naming what is missing.
        """
        needs = cls.needs(config)
        if needs.images and not images:
            raise UserError(
                "the method needs real images and data.images is not set: give an image folder, or set method.gan.weight to 0 if "
                "its GAN term is what needs them"
            )
        if needs.pairs and not pairs:
            raise UserError(
                "the method as it is configured needs teacher pairs and data.pairs is not set: run 'stepdistill collect pairs' first"
            )
        if needs.trajectories and not trajectories:
            raise UserError(
                "method.source is 'trajectories' and data.trajectories is not set: run 'stepdistill collect trajectories' first, or "
                "set method.source to rollout"
            )
        if needs.predictions and schedule.prediction not in needs.predictions:
            wanted = ", ".join(prediction.value for prediction in needs.predictions)
            raise UserError(
                f"the teacher predicts {schedule.prediction.value} and the method works with {wanted}: choose another teacher or method"
            )

    def stages(self) -> Sequence[Stage]:
        """The stretches of the run, in order."""
        return (Stage(),)

    def prepare(self, triple: Triple, decode: Decode | None = None) -> None:
        """Attach heads and frozen roles, before optimizers are made.

        decode: for losses on images; None where the family has none.
        """

    def attach_storage(self, store: TensorStore) -> None:
        """Called once before the first iteration of training, or of its resumption."""

    @abstractmethod
    def updates(self, progress: Progress) -> Sequence[str]:
        """Roles updated at this iteration, in order; they share the rollouts, made before the first update."""

    @abstractmethod
    def rollout(self, batch: Batch, triple: Triple, progress: Progress, draws: Draws) -> Rollout:
        """Draw the generator's sample; with graph if and only if the generator is due first."""

    @abstractmethod
    def loss(self, role: str, rollout: Rollout, triple: Triple, progress: Progress, draws: Draws) -> Terms:
        """The loss of one role on a micro-batch: a mean over its samples."""

    def pieces(self, role: str, rollout: Rollout, triple: Triple, progress: Progress, draws: Draws) -> Iterator[Terms]:
        """The loss in pieces that add up to it; each is differentiated before the next is asked for, and shares no graph
        with it. One piece, `loss` itself, by default.
        """
        yield self.loss(role, rollout, triple, progress, draws)

    def after_update(self, role: str, statistics: Mapping[str, float], triple: Triple, progress: Progress) -> None:
        """Called without graph when a role's optimizer has stepped (not where a step was skipped), on all processes alike.

        statistics: means of `Terms.statistics` over the global batch.
        """

    @abstractmethod
    def recipe(self) -> Recipe:
        """How the generator must be sampled."""

    def experts(self, role: str, stage: int) -> tuple[str, ...]:
        """Roles that sample at a stage, one for each of the recipe's experts; `role` (generator or EMA) is in training."""
        return (role,)

    def state_dict(self) -> dict[str, Tensor]:
        """Running tensors of the method itself."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`."""
