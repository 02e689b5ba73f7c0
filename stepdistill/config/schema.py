"""The sections of a training config.

This module imports no method and no torch. The options of a method are validated by that method's own `Config` class, which
the registry finds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from stepdistill.config.presets import with_preset
from stepdistill.config.reading import RegularExpression, Seed, Settings, parse, read_mapping

Beta = Annotated[float, Field(ge=0, lt=1)]
"""A decay rate of an optimizer's running means."""
Pixels = Annotated[int, Field(gt=0, le=65_536)]
"""Height or width of an image."""
Count = Annotated[int, Field(gt=0, le=10**9)]
"""A number of iterations, samples or updates; the limit catches mistyped numbers."""
CountOrZero = Annotated[int, Field(ge=0, le=10**9)]
"""As `Count`; 0 turns the option off."""


class ModelConfig(Settings):
    """The teacher."""

    path: str = Field(description="diffusers folder, hub id, single .safetensors file, or 'builtin:teacher'")
    family: str | None = Field(None, description="registered family; found from the checkpoint where omitted")
    config_dir: str | None = Field(None, description="diffusers folder with the configs of a single-file checkpoint")
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = Field("float32", description="of the frozen base")
    size: tuple[Pixels, Pixels] | None = Field(
        None, description="(height, width) in pixels; the checkpoint's own by default"
    )
    negative_prompt: str = Field("", description="prompt of the unconditional branch in teacher guidance")
    guidance_adapter: str | None = Field(
        None,
        description="guidance_adapter.safetensors of this checkpoint, or its folder: the adapter guides the teacher with one network "
        "call per step, where classifier-free guidance takes two",
    )
    quantization: Literal["none", "int8", "int4"] = Field(
        "none", description="of the frozen base, for LoRA roles; exports are verified on the base without quantization"
    )
    attention: Literal["sdpa", "xformers"] = Field("sdpa", description="implementation of the networks' attention")
    compile: bool = Field(False, description="torch.compile the networks' blocks")
    channels_last: bool = Field(
        False, description="memory layout of the networks; helps convolutions in half precision"
    )


class RoleConfig(Settings):
    """How a trainable role (generator or fake score) is parametrized."""

    mode: Literal["lora", "full", "adapter"] = Field(
        "lora", description="adapter: guidance adapters in parallel to the attention of the frozen base"
    )
    rank: int = Field(64, gt=0, le=65_536, description="LoRA rank")
    alpha: float = Field(64.0, gt=0, le=1e6, description="LoRA alpha; the delta is scaled by alpha / rank")
    targets: str | list[str] = Field("all", description="preset 'all' or 'attention', or module-name suffixes")
    rank_pattern: dict[RegularExpression, PositiveInt] = Field(
        default_factory=dict, description="regular expression -> rank, as in peft"
    )
    alpha_pattern: dict[RegularExpression, PositiveFloat] = Field(
        default_factory=dict, description="regular expression -> alpha, as in peft"
    )
    kind: Literal["cross", "perceptron", "offset"] = Field(
        "cross",
        description="of guidance adapters: cross is attention over tokens of w, t and the prompt (as published); perceptron is an MLP of "
        "the attention's input and output, scaled by the tokens; offset is a shift computed from the tokens",
    )
    width: int = Field(128, gt=0, le=65_536, description="channels of guidance adapters")
    heads: int = Field(1, gt=0, description="attention heads of guidance adapters of kind cross, a divisor of width")
    rising: bool = Field(
        False,
        description="scale the output of guidance adapters by w - 1, so that it is 0 at w = 1 as for guidance itself; not "
        "part of the published method",
    )
    shared: bool = Field(
        False, description="one set of token encoders for all guidance adapters: half the parameters of kind cross"
    )


class OptimizerConfig(Settings):
    """AdamW or Muon for one role. Warm-up and schedule count the updates of this role, not the iterations of the run."""

    kind: Literal["adamw", "adamw8bit", "muon"] = Field(
        "adamw",
        description="adamw8bit: moments in 8 bits, by bitsandbytes; muon: Muon for matrices, with the first of betas as its momentum, "
        "and AdamW for all other parameters",
    )
    lr: float = Field(gt=0, le=10, description="learning rate")
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: float = Field(0.01, ge=0, le=1e6)
    eps: float = Field(1e-8, gt=0, le=1)
    warmup: CountOrZero = Field(0, description="linear warm-up, in updates of this role")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="after the warm-up and `hold`")
    hold: CountOrZero = Field(
        0,
        description="updates at the full learning rate before linear or cosine decay starts; until then a run can be resumed with "
        "a larger max_steps",
    )
    decay_updates: CountOrZero = Field(0, description="updates over which linear or cosine decay reaches 0")
    clip: float = Field(10.0, ge=0, description="largest gradient norm; 0 is off")

    @model_validator(mode="after")
    def _check_decay(self) -> OptimizerConfig:
        if self.schedule != "constant" and self.decay_updates == 0:
            raise ValueError(
                f"the schedule is {self.schedule} and decay_updates is 0, so the learning rate would never fall; set decay_updates "
                "to the number of updates over which it falls to 0"
            )
        if self.schedule == "constant" and self.hold:
            raise ValueError(
                f"the schedule is constant and hold is {self.hold}, which has no effect without a decay; set schedule to linear or "
                "cosine, or hold to 0"
            )
        return self


class RoleConfigs(Settings):
    """The two trainable roles."""

    generator: RoleConfig = RoleConfig()
    fake_score: RoleConfig = RoleConfig()


class OptimizerConfigs(Settings):
    """The optimizers of the two trainable roles."""

    generator: OptimizerConfig = OptimizerConfig(lr=1e-5)
    fake_score: OptimizerConfig = OptimizerConfig(lr=1e-5)


class DataConfig(Settings):
    """Where prompts, images and collected teacher data come from. Each method checks that it has what it needs."""

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
        description="images that were not preferred, each paired with one of data.images: a folder with the same file names, or a column "
        "of the data set",
    )
    preferred_column: str | None = Field(
        None,
        description="column with the preference for data.image_column over data.losers, from 0 to 1: below 0.5 the two are swapped, and "
        "ties (0.5) are left out (Pick-a-Pic: label_0)",
    )
    split: str = Field("train", description="split of a data set")
    streaming: bool = Field(False, description="stream a data set instead of downloading all of it first")
    buckets: list[tuple[Pixels, Pixels]] = Field(
        default_factory=list,
        description="(height, width) sizes; each image is assigned to the one with the nearest aspect ratio; only model.size by default",
    )
    crop: Literal["center", "random"] = Field("center", description="which part of the resized image is used")
    flip: bool = Field(False, description="mirror half of the images, at random")
    max_bad_share: float = Field(
        0.05, ge=0, le=1, description="stop when more than this share of the images is unreadable"
    )
    pairs: str | None = Field(None, description="folder made by 'stepdistill collect pairs'")
    trajectories: str | None = Field(None, description="folder made by 'stepdistill collect trajectories'")
    workers: int = Field(0, ge=0, le=1024, description="image loading threads")


class AlarmsConfig(Settings):
    """Limits on logged values. Outside of its limit, a value causes a warning that says what to do; null turns a limit off."""

    enabled: bool = True
    window: int = Field(
        10,
        gt=0,
        le=10**6,
        description="log records that are averaged, and for which the mean must stay outside before a warning",
    )
    latent_std: float | None = Field(
        1.15, gt=1, description="largest ratio of the samples' std to that of real latents"
    )
    latent_mean: float | None = Field(
        0.25,
        gt=0,
        description="largest oscillation of the samples' mean, in standard deviations of real latents",
    )
    score_gap: float | None = Field(
        1.5, gt=0, description="largest |mu_fake - mu_real| / |x - mu_real|; about 1 for a good student"
    )
    score_gap_rise: float | None = Field(
        2.0, gt=1, description="largest ratio of score_gap to its value at the start, once above 1"
    )
    fake_loss: float | None = Field(
        0.01, gt=0, description="smallest relative change of the fake score's denoising loss since the start"
    )
    fake_shift: float | None = Field(
        0.01, gt=0, description="smallest |mu_fake - mu_base| / |x - mu_base|, measured with the sample grids"
    )
    gradient: float | None = Field(1e-12, gt=0, description="smallest gradient norm of a role")
    logits: float | None = Field(8.0, gt=0, description="largest absolute logit of the discriminator")
    diversity: float | None = Field(
        0.6, gt=0, lt=1, description="smallest ratio of the samples' diversity to the teacher's"
    )
    saturation: float | None = Field(0.1, gt=0, lt=1, description="largest HSV saturation above the teacher's")
    clipped: float | None = Field(
        0.9, gt=0, lt=1, description="largest share of a role's updates whose gradient was clipped"
    )
    skipped: float | None = Field(
        0.01, gt=0, lt=1, description="largest share of steps that were skipped because of non-finite gradients"
    )


class TrainingConfig(Settings):
    """Length, batch, checkpoints and hardware of a run."""

    max_steps: Count = Field(
        description="iterations since the start of the run: a resumed run stops at the same number"
    )
    batch_size: int = Field(1, gt=0, le=2**20, description="per process and micro-batch")
    accumulation: int = Field(1, gt=0, le=2**20, description="micro-batches per optimizer step")
    seed: Seed = 0
    gradient_checkpointing: bool = False
    ema: float = Field(0.0, ge=0, lt=1, description="EMA decay of the generator, per generator update; 0 is off")
    device: str | None = Field(None, description="'cuda', 'cpu', 'mps'; the best available by default")
    sharding: Literal["auto", "replicated", "full"] = Field(
        "auto",
        description="full: each process holds a shard of every network (FSDP2); auto: as configured for `accelerate launch`",
    )
    offload: list[Literal["optimizer", "ema"]] = Field(
        default_factory=list, description="what is moved to CPU memory while it is not in use"
    )
    tf32: bool = Field(False, description="TensorFloat-32 matrix products on CUDA")
    threads: int | None = Field(None, gt=0, le=4096, description="CPU threads")
    save_every: Count = Field(500, description="iterations between checkpoints; one is always written at the end")
    keep: Count = Field(2, description="number of newest checkpoints that are kept")
    log_every: Count = Field(10, description="iterations between log records")
    grid_every: CountOrZero = Field(0, description="iterations between sample grids; 0 draws one at the end only")
    grid_prompts: int = Field(8, gt=0, le=10_000, description="prompts of a sample grid")
    grid_seeds: int = Field(
        2,
        gt=0,
        le=1000,
        description="samples per prompt of a grid: the first is shown, and diversity is measured between them; with 1 it is not "
        "measured",
    )
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
    max_bad_steps: Count = Field(10, description="the run stops after this many non-finite steps in a row")
    alarms: AlarmsConfig = AlarmsConfig()


class CacheConfig(Settings):
    """Cached outputs of the text encoders and the VAE; see `stepdistill cache`. An outdated cache is made again."""

    folder: str = Field(description="folder of the caches; several runs may share it")
    text: bool = Field(
        True, description="cache text embeddings; the text encoders are removed from memory once all are cached"
    )
    latents: bool = Field(True, description="cache latents of the training images")


class EvaluationConfig(Settings):
    """Evaluation of the student during training; `stepdistill list protocols` names the protocols."""

    every: Count = Field(description="iterations between evaluations")
    protocol: str = "prompts"
    prompts: str | None = Field(None, description="prompt file, for protocols without prompts of their own")
    reference: str | None = Field(None, description="images or statistics (.npz), for protocols without a reference")
    images: int | None = Field(None, ge=2, le=10**9, description="number of images, instead of the protocol's")
    features: str | None = Field(None, description="NAME[:WEIGHTS] instead of the protocol's network")
    metrics: list[str] = Field(default_factory=lambda: ["fid"])
    best: str = Field("fid", description="metric that decides which checkpoint is kept as checkpoints/best")


class RunConfig(Settings):
    """One training run, as a YAML file."""

    preset: Literal["8gb", "12gb", "24gb", "80gb"] | None = Field(
        None, description="defaults for a GPU with that much memory, for all keys that the config does not set"
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
        description="earlier run whose trained roles this run starts from (staged training), or a LoRA file for the generator only",
    )

    @property
    def method_name(self) -> str:
        """The name of the method; "" where the config has none."""
        return str(self.method.get("name", ""))

    @property
    def method_options(self) -> dict[str, Any]:
        """The options of the method, without its name."""
        return {key: value for key, value in self.method.items() if key != "name"}


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Reads a training config, applies `a.b=value` overrides (values in YAML syntax), and fills in its preset.

    Raises:
        UserError: as `read_settings`.
    """
    return parse(RunConfig, with_preset(read_mapping(path, overrides)), where=Path(path).name)
