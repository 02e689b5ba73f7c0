"""The config of `stepdistill collect`."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from stepdistill.config.reading import Seed, Settings
from stepdistill.config.schema import Count, ModelConfig

CollectionKind: TypeAlias = Literal["pairs", "samples", "trajectories"]
"""Teacher samples with their noise, samples of a teacher or a student, or whole trajectories of the teacher."""
StoredDtype: TypeAlias = Literal["float16", "bfloat16", "float32"]
"""Number format of stored trajectories."""
GuidanceScale = Annotated[float, Field(ge=1, le=1000)]


class CollectConfig(Settings):
    """What to sample, and how much of it."""

    model: ModelConfig | None = Field(None, description="the teacher, for pairs and teacher samples")
    run: str | None = Field(None, description="a training run, whose student makes the samples")
    prompts: str = Field(description="prompt file, or builtin:NAME")
    prompt_column: str | None = Field(None, description="column or key of the prompt in a table")
    count: Count = Field(description="number of latents, or of trajectories")
    guidance: GuidanceScale = Field(1.0, description="teacher guidance scale w; 1 is off")
    guidance_range: tuple[GuidanceScale, GuidanceScale] = Field(
        (1.0, 12.0), description="for trajectories: w is drawn uniformly from this range, once per trajectory"
    )
    steps: int = Field(
        50,
        gt=0,
        le=10_000,
        description="steps of the teacher's deterministic solver (DDIM or Euler, trailing timesteps)",
    )
    keep: Count | None = Field(
        None, description="states that are kept of each trajectory, a random subset; all by default"
    )
    dtype: StoredDtype = Field("float16", description="number format in which trajectories are stored")
    seed: Seed = 0
    batch_size: int = Field(8, gt=0, le=2**20)
    shard_size: Count | None = Field(
        None, description="latents or trajectories per file; 256 latents or 16 trajectories by default"
    )
    device: str | None = Field(None, description="'cuda', 'cpu', 'mps'; the best available by default")
