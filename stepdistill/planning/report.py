"""What a plan says, as data: printed, or written as JSON and read again."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from stepdistill.config.reading import Settings
from stepdistill.errors import UserError

GB = 10**9


class Parameters(Settings):
    """Numbers that a part of the run holds."""

    name: str
    count: int
    trained: bool


class MemoryItem(Settings):
    """Bytes that one part of the run takes on one GPU."""

    name: str
    bytes: int


class Memory(Settings):
    """One GPU's memory.

    Attributes:
        parts: at the peak; they sum to it.
        phases: the peak of every phase of an iteration, and of a sample grid.
        peak: bytes of the highest of them.
        peak_phase: the phase of the highest one.
        capacity: bytes that there are.
    """

    parts: tuple[MemoryItem, ...]
    phases: tuple[MemoryItem, ...]
    peak: int
    peak_phase: str
    capacity: int

    @property
    def fits(self) -> bool:
        return self.peak <= self.capacity


class NetworkCalls(Settings):
    """Network calls of one kind, on one GPU, as means over the run's iterations.

    Attributes:
        phase: `rollout`, or the role whose loss asks.
        network: the role that is called.
        features: for a discriminator head; left at the feature module.
        gradient: kept for a backward pass.
        calls, rows: per iteration; a guided call has two rows a sample.
    """

    phase: str
    network: str
    features: bool
    gradient: bool
    calls: float
    rows: float


class Compute(Settings):
    """Work and time of one GPU.

    Attributes:
        half, full: floating-point operations per iteration in 16 bits, and in float32.
        gpu: the card.
        utilisation: assumed share of its published rate.
        seconds: per iteration, data loading, optimizers and communication left out.
        iterations: of the run.
    """

    half: float
    full: float
    gpu: str
    utilisation: float
    seconds: float
    iterations: int

    @property
    def hours(self) -> float:
        """Of the whole run."""
        return self.seconds * self.iterations / 3600


class Disk(Settings):
    """Bytes on disk.

    Attributes:
        prompt: embeddings of one prompt or caption in a text cache.
        image: latents of one image in a cache of latents; 0 where the run reads no images.
        text_cache: embeddings of the whole prompt list; None where it is not on this machine.
        checkpoint: one checkpoint.
    """

    prompt: int
    image: int
    text_cache: int | None
    checkpoint: int


class Advice(Settings):
    """One change, and the peak that the run has with it and all changes before it."""

    change: str
    saved_bytes: int
    peak: int


class Forecast(Settings):
    """What a run will take.

    Attributes:
        model, family, method, size, dtype: of the config.
        device: `training.device`; cuda where the config leaves it open.
        source: where the architecture was read.
        processes, sharding: how the run is spread; `replicated` or `full`.
        advice: what makes it fit, in order; empty where it fits.
    """

    model: str
    family: str
    method: str
    size: tuple[int, int]
    dtype: str
    device: str
    source: str
    processes: int = Field(gt=0)
    sharding: str
    parameters: tuple[Parameters, ...]
    memory: Memory
    calls: tuple[NetworkCalls, ...]
    compute: Compute
    disk: Disk
    advice: tuple[Advice, ...] = ()

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Forecast:
        """Raises UserError where the file holds no forecast."""
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{str(path)!r} holds no plan ({reason}): write it with stepdistill plan --json") from None
