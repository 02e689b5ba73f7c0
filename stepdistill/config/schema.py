"""The sections of a training config.

Imports no method and no torch: a method's own options are validated by its `Config` class, found through the registry.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from stepdistill.config.presets import with_preset
from stepdistill.config.reading import RegularExpression, Settings, parse, read_mapping


class ModelConfig(Settings):
    """The teacher."""

    path: str = Field(description="diffusers folder, hub id, single .safetensors file, or 'builtin:teacher'")
    family: str | None = Field(None, description="registered family; found from the checkpoint where omitted")
    config_dir: str | None = Field(None, description="diffusers folder with the configs of a single-file checkpoint")
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = Field("float32", description="of the frozen base")
    size: tuple[int, int] | None = Field(None, description="(height, width) in pixels; the checkpoint's own by default")
    negative_prompt: str = Field("", description="prompt of the unconditional branch in teacher guidance")
    guidance_adapter: str | None = Field(
        None,
        description="guidance_adapter.safetensors of this checkpoint, or its folder: the teacher is guided by it, in one call "
        "where guidance takes two",
    )
    quantization: Literal["none", "int8", "int4"] = Field(
        "none", description="of the frozen base, for LoRA roles; exports are proved on the unquantised base"
    )
    attention: Literal["sdpa", "xformers"] = Field("sdpa", description="kernel of the network's attention")
    compile: bool = Field(False, description="torch.compile the networks' blocks")
    channels_last: bool = Field(
        False, description="memory layout of the networks; helps convolutions in half precision"
    )


class RoleConfig(Settings):
    """How a trainable role is held."""

    mode: Literal["lora", "full", "adapter"] = Field(
        "lora", description="adapter: guidance adapters beside the attention of the frozen base"
    )
    rank: int = Field(64, gt=0, description="LoRA rank")
    alpha: float = Field(64.0, gt=0, description="LoRA alpha; the delta is scaled by alpha / rank")
    targets: str | list[str] = Field("all", description="preset 'all' or 'attention', or module-name suffixes")
    rank_pattern: dict[RegularExpression, PositiveInt] = Field(
        default_factory=dict, description="regular expression -> rank, as in peft"
    )
    alpha_pattern: dict[RegularExpression, PositiveFloat] = Field(
        default_factory=dict, description="regular expression -> alpha, as in peft"
    )
    kind: Literal["cross", "perceptron", "offset"] = Field(
        "cross",
        description="of guidance adapters: attention over tokens of w, t and prompt (as published); a perceptron of the attention's "
        "input and output that the tokens scale; or a shift that they decide",
    )
    width: int = Field(128, gt=0, description="channels of guidance adapters")
    heads: int = Field(1, gt=0, description="attention heads of guidance adapters of kind cross, a divisor of width")
    rising: bool = Field(
        False,
        description="what guidance adapters add grows with w - 1 and is nothing at w = 1, as guidance itself; not as "
        "published",
    )
    shared: bool = Field(
        False, description="one set of token encoders for all guidance adapters: half the parameters of kind cross"
    )


class OptimizerConfig(Settings):
    """AdamW, or Muon, for one role. Schedules count this role's own updates."""

    kind: Literal["adamw", "adamw8bit", "muon"] = Field(
        "adamw",
        description="adamw8bit: moments in 8 bit, by bitsandbytes; muon: Muon for matrices, its momentum the first of betas, AdamW "
        "for what else there is",
    )
    lr: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.01, ge=0)
    eps: float = Field(1e-8, gt=0)
    warmup: int = Field(0, ge=0, description="linear warm-up, in this role's updates")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="after the warm-up and `hold`")
    hold: int = Field(
        0,
        ge=0,
        description="updates at the full rate before linear or cosine falls: until then, a run may be resumed to be made longer",
    )
    decay_updates: int = Field(0, ge=0, description="updates over which linear or cosine falls to 0")
    clip: float = Field(10.0, ge=0, description="gradient norm; 0 is off")

    @model_validator(mode="after")
    def _check_schedule(self) -> OptimizerConfig:
        if self.schedule != "constant" and self.decay_updates == 0:
            raise ValueError(
                f"the schedule is {self.schedule} and decay_updates is 0, so the rate would never fall; give the updates that its "
                "fall takes"
            )
        if self.schedule == "constant" and self.hold:
            raise ValueError(
                f"the schedule is constant and hold is {self.hold}, after which nothing falls; set schedule to linear or cosine, or "
                "hold to 0"
            )
        return self


class RoleConfigs(Settings):
    generator: RoleConfig = RoleConfig()
    fake_score: RoleConfig = RoleConfig()


class OptimizerConfigs(Settings):
    generator: OptimizerConfig = OptimizerConfig(lr=1e-5)
    fake_score: OptimizerConfig = OptimizerConfig(lr=1e-5)


class DataConfig(Settings):
    """Where prompts, images and teacher data come from. A method says what it needs."""

    prompts: str | None = Field(
        None, description=".txt, .jsonl, .csv or .parquet file, or 'builtin:general', 'builtin:fashion'"
    )
    prompt_column: str | None = Field(None, description="column or key of the prompt in a table")
    images: str | None = Field(
        None,
        description="images with captions, for GAN terms and for methods that noise them: a folder, WebDataset shards "
        "('data/part-*.tar'), or a data set of the datasets library ('hf:NAME' or 'hf:PATH')",
    )
    image_column: str = Field("image", description="column of a data set's images")
    caption_column: str | None = Field(
        None, description="column or key of the captions; text, caption or prompt by default"
    )
    losers: str | None = Field(
        None,
        description="images that lost against data.images, for preference pairs: a folder with the same file names, or the data "
        "set's column that holds them",
    )
    preferred_column: str | None = Field(
        None,
        description="column with the share by which data.image_column won against data.losers: below 0.5 the two are swapped, "
        "ties are left out (Pick-a-Pic: label_0)",
    )
    split: str = Field("train", description="split of a data set")
    streaming: bool = Field(False, description="read a data set as it comes, without having all of it on this disk")
    buckets: list[tuple[int, int]] = Field(
        default_factory=list,
        description="(height, width) sizes that images are sorted into by aspect ratio; model.size alone by default",
    )
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    max_bad_share: float = Field(
        0.05, ge=0, le=1, description="stop when more than this share of the images is unreadable"
    )
    pairs: str | None = Field(None, description="folder made by 'stepdistill collect pairs'")
    trajectories: str | None = Field(None, description="folder made by 'stepdistill collect trajectories'")
    workers: int = Field(0, ge=0, description="image loading threads")


class AlarmsConfig(Settings):
    """Bands of what a run logs: leaving one is said in a warning with its remedy, see training/alarms.py. null turns one off."""

    enabled: bool = True
    window: int = Field(10, gt=0, description="log lines whose mean is judged, and for which it must stay outside")
    latent_std: float | None = Field(1.15, gt=1, description="std of the samples over that of real latents, at most")
    latent_mean: float | None = Field(
        0.25,
        gt=0,
        description="swing of the samples' mean, to and fro, in standard deviations of real latents, at most",
    )
    score_gap: float | None = Field(
        1.5, gt=0, description="|mu_fake - mu_real| / |x - mu_real|, at most; near a good student it is about 1"
    )
    score_gap_rise: float | None = Field(2.0, gt=1, description="the same over its own start, at most, once above 1")
    fake_loss: float | None = Field(
        0.01, gt=0, description="relative change of the fake score's denoising loss since its start, at least"
    )
    fake_shift: float | None = Field(
        0.01, gt=0, description="|mu_fake - mu_base| / |x - mu_base| at the grids' levels, at least"
    )
    gradient: float | None = Field(1e-12, gt=0, description="norm of a role's gradient, at least")
    logits: float | None = Field(8.0, gt=0, description="the discriminator's logits, either way, at most")
    diversity: float | None = Field(0.6, gt=0, lt=1, description="over the teacher's, at least")
    saturation: float | None = Field(0.1, gt=0, lt=1, description="HSV saturation beyond the teacher's, at most")
    clipped: float | None = Field(0.9, gt=0, lt=1, description="share of a role's updates whose gradient was clipped")
    skipped: float | None = Field(0.01, gt=0, lt=1, description="share of steps skipped for gradients not finite")


class TrainingConfig(Settings):
    max_steps: int = Field(gt=0, description="iterations, absolute: a resumed run stops at the same number")
    batch_size: int = Field(1, gt=0, description="per process and micro-batch")
    accumulation: int = Field(1, gt=0, description="micro-batches per optimizer step")
    seed: int = 0
    gradient_checkpointing: bool = False
    ema: float = Field(0.0, ge=0, lt=1, description="EMA decay of the generator, per generator update; 0 is off")
    device: str | None = Field(None, description="'cuda', 'cpu', 'mps'; the best available by default")
    sharding: Literal["auto", "replicated", "full"] = Field(
        "auto",
        description="full: every process holds a share of every network (FSDP2); auto: as `accelerate launch` says",
    )
    offload: list[Literal["optimizer", "ema"]] = Field(
        default_factory=list, description="what is kept in main memory between its uses"
    )
    tf32: bool = Field(False, description="TensorFloat-32 products on CUDA")
    threads: int | None = Field(None, gt=0, description="CPU threads")
    save_every: int = Field(500, gt=0, description="iterations between checkpoints; one is always written at the end")
    keep: int = Field(2, gt=0, description="newest checkpoints kept")
    log_every: int = Field(10, gt=0)
    grid_every: int = Field(0, ge=0, description="iterations between sample grids; 0 draws one at the end only")
    grid_prompts: int = Field(8, gt=0)
    grid_seeds: int = Field(
        2,
        gt=0,
        description="noises per prompt of a grid: the first is shown, diversity is taken between them; 1 takes none",
    )
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
    max_bad_steps: int = Field(10, gt=0, description="non-finite steps in a row that stop the run")
    alarms: AlarmsConfig = AlarmsConfig()


class CacheConfig(Settings):
    """What encoders say, on disk; see `stepdistill cache`. A cache that fits no longer is made anew."""

    folder: str = Field(description="where caches live; runs may share one")
    text: bool = Field(True, description="text embeddings; the text encoders leave memory once it is warm")
    latents: bool = Field(True, description="latents of the training images")


class EvaluationConfig(Settings):
    """Measuring the student while it trains; see `stepdistill evaluate` for protocols."""

    every: int = Field(gt=0, description="iterations between evaluations")
    protocol: str = "prompts"
    prompts: str | None = Field(None, description="prompt file, for protocols that bring none")
    reference: str | None = Field(None, description="folder of images, or statistics, for protocols that bring none")
    images: int | None = Field(None, ge=2, description="fewer than the protocol's own number")
    features: str | None = Field(None, description="NAME[:WEIGHTS] instead of the protocol's network")
    metrics: list[str] = Field(default_factory=lambda: ["fid"])
    best: str = Field("fid", description="metric that decides which checkpoint is kept as checkpoints/best")


class RunConfig(Settings):
    """One training run, as a YAML file."""

    preset: Literal["8gb", "12gb", "24gb", "80gb"] | None = Field(
        None, description="defaults for a card of that memory, beneath every key that is written out"
    )
    model: ModelConfig
    method: dict[str, Any] = Field(description="'name' and the options of that method")
    roles: RoleConfigs = RoleConfigs()
    optimizers: OptimizerConfigs = OptimizerConfigs()
    data: DataConfig = DataConfig()
    training: TrainingConfig
    cache: CacheConfig | None = None
    evaluation: EvaluationConfig | None = None
    output: str = "runs/run"
    init: str | None = Field(
        None,
        description="earlier run whose trained roles this one starts from (staged training), or a LoRA file for the generator alone",
    )

    @property
    def method_name(self) -> str:
        return str(self.method.get("name", ""))

    @property
    def method_options(self) -> dict[str, Any]:
        return {key: value for key, value in self.method.items() if key != "name"}


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a training config, apply `a.b=value` overrides (values in YAML syntax), and put its preset beneath.

    Raises as `read_settings`.
    """
    return parse(RunConfig, with_preset(read_mapping(path, overrides)), where=Path(path).name)
