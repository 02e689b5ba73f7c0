"""analytic: a Gaussian mixture with exact scores, as a checkpoint like any other. The test bed's first level.

The network is the mixture's exact prediction plus a small MLP whose last layer is zero, so that an untouched checkpoint
*is* the mixture and a LoRA or a full copy of it can learn. Classes are prompts: a prompt is the name of a class, the
empty prompt the whole mixture.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepdistill.diffusion.prediction import Prediction, from_x0_eps
from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.errors import UserError
from stepdistill.families.base import ALL_PARTS, Checkpoint, CheckpointInfo, CheckpointPart, Family, Posterior
from stepdistill.families.conditioning import Conditioning, MicroConditioning


@dataclass(frozen=True)
class Mixture:
    """sum_k weight_k N(mean_k, std^2 I): means (K, D), weights (K,), float64."""

    means: Tensor
    weights: Tensor
    std: float

    def x0(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, class_mask: Tensor) -> Tensor:
        """E[x0 | x_t] of the sub-mixture named by `members` (B, K) in {0, 1}; x_t (B, D), alpha and sigma (B, 1)."""
        variance = (alpha * self.std).square() + sigma.square()
        means = self.means.to(x_t)
        offset = x_t[:, None] - alpha[:, None] * means
        # -inf, not a tiny weight: far from its members a narrow mixture would otherwise fall back on the others
        log_weight = self.weights.to(x_t).log().masked_fill(class_mask == 0, -torch.inf)
        posterior = torch.softmax(log_weight - 0.5 * offset.square().sum(-1) / variance, dim=1)
        gain = alpha[:, None] * self.std**2 / variance[:, None]
        return (posterior[..., None] * (means + gain * offset)).sum(1)

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(x0 (count, D), component (count,)), float64."""
        component = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[component] + self.std * noise, component


class MixtureNetwork(nn.Module):
    """Exact prediction of the mixture + an MLP correction that starts at zero. x_t (B, D, 1, 1), t (B,), text (B, 1, K)."""

    def __init__(self, mixture: Mixture, schedule: NoiseSchedule, width: int = 128) -> None:
        super().__init__()
        self.mixture = mixture
        self.schedule = schedule
        self.width = width
        classes, dimension = mixture.means.shape
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc_in", nn.Linear(dimension + 2 + classes, width))
        self.mlp.add_module("act_in", nn.SiLU())
        self.mlp.add_module("fc_mid", nn.Linear(width, width))
        self.mlp.add_module("act_mid", nn.SiLU())
        self.mlp.add_module("fc_out", nn.Linear(width, dimension))
        for parameter in self.mlp[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        x = x_t.flatten(1)
        alpha, sigma = (level.to(x)[:, None] for level in (self.schedule.alpha(t), self.schedule.sigma(t)))
        class_mask = text[:, 0]
        x0 = self.mixture.x0(x, alpha, sigma, class_mask)
        exact = from_x0_eps(x0, (x - alpha * x0) / sigma, alpha, sigma, self.schedule.prediction)
        return (exact + self.mlp(torch.cat([x, alpha, sigma, class_mask], 1))).reshape(x_t.shape)  # type: ignore[no-any-return]


class Analytic(Family):
    name: ClassVar[str] = "analytic"
    pipeline_name: ClassVar[str] = "AnalyticMixture"
    network_component: ClassVar[str] = "network"
    tiny_variants: ClassVar[tuple[str, ...]] = ("default", "v", "flow")
    is_diffusers_model: ClassVar[bool] = False

    def inspect(self, source: str, folder: Path, single_file: Path | None) -> CheckpointInfo:
        if single_file is not None:
            raise UserError(f"{source!r} is a single file, and an analytic mixture is a folder: give the folder")
        config = json.loads((folder / "network" / "config.json").read_text())
        scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        schedule = NoiseSchedule.from_config(scheduler)
        return CheckpointInfo(
            source, folder, None, self.name, config, scheduler, schedule, config["dimension"], 1, (1, 1)
        )

    def load(
        self,
        info: CheckpointInfo,
        dtype: torch.dtype,
        device: torch.device | str,
        parts: frozenset[CheckpointPart] = ALL_PARTS,
    ) -> Checkpoint:
        # nothing to leave out: the classes are in the config, and the network is a kilobyte
        network = _network(info)
        network.load_state_dict(load_file(info.folder / "network" / "weights.safetensors"))
        return Checkpoint(info, network.to(device, dtype).eval().requires_grad_(False), None)

    def build_on_meta(self, info: CheckpointInfo, dtype: torch.dtype) -> Checkpoint:
        return Checkpoint(info, _network(info).to("meta", dtype).eval().requires_grad_(False), None)

    def call(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return network(x_t, t, cond.text)  # type: ignore[no-any-return]

    def encode(
        self, checkpoint: Checkpoint, prompts: Sequence[str], sizes: Sequence[MicroConditioning]
    ) -> Conditioning:
        names = list(checkpoint.info.network_config["classes"])
        rows = []
        for prompt in prompts:
            if prompt and prompt not in names:
                raise UserError(
                    f"the prompt {prompt!r} is not a class of the mixture: use one of {', '.join(names)}, or an empty prompt"
                )
            rows.append([1.0 if not prompt or prompt == name else 0.0 for name in names])
        device = next(checkpoint.network.parameters()).device
        return Conditioning(torch.tensor(rows, dtype=torch.float64, device=device)[:, None])

    def null(
        self, checkpoint: Checkpoint, sizes: Sequence[MicroConditioning], negative_prompt: str = ""
    ) -> Conditioning:
        return self.encode(checkpoint, [negative_prompt] * len(sizes), sizes)

    def encoder_files(self, info: CheckpointInfo, part: Literal["text", "images"]) -> dict[str, Path]:
        return {"network/config.json": info.folder / "network" / "config.json"} if part == "text" else {}

    def encoding_bytes(self, info: CheckpointInfo, dtype: torch.dtype) -> int:
        return len(info.network_config["classes"]) * torch.float64.itemsize

    def posterior(self, checkpoint: Checkpoint, images: Tensor) -> Posterior:
        raise UserError("an analytic mixture has no images: use prompts only")

    def decode(self, checkpoint: Checkpoint, latents: Tensor) -> Tensor:
        raise UserError("an analytic mixture has no images: look at its samples as points")

    def feature_module(self, network: nn.Module) -> nn.Module:
        return network.get_submodule("mlp.act_mid")

    def feature_channels(self, info: CheckpointInfo) -> int:
        return int(info.network_config["width"])

    def feature_stride(self, info: CheckpointInfo) -> int:
        return 1

    def lora_targets(self, preset: str) -> tuple[str, ...]:
        return "fc_in", "fc_mid", "fc_out"

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        return [network.get_submodule(f"mlp.{name}") for name in ("fc_in", "fc_mid", "fc_out")]

    def enable_gradient_checkpointing(self, network: nn.Module, function: Callable[..., Tensor]) -> None:
        """Nothing to save: the network is three small layers."""

    def empty_like(self, network: nn.Module) -> nn.Module:
        if not isinstance(network, MixtureNetwork):
            raise TypeError(f"an analytic network was expected, not {type(network).__name__}")
        return MixtureNetwork(network.mixture, network.schedule, network.width)

    def write_tiny(self, folder: Path, variant: str = "default", seed: int = 0) -> None:
        """Four modes on a circle of radius 2, std 0.25, as in the two-dimensional smoke test of the literature."""
        angles = torch.arange(4, dtype=torch.float64) * torch.pi / 2
        means = 2 * torch.stack([angles.cos(), angles.sin()], 1)
        write_mixture(folder, means, torch.full((4,), 0.25, dtype=torch.float64), 0.25, variant, seed)


def _network(info: CheckpointInfo) -> MixtureNetwork:
    """The network of a checkpoint's config, its MLP untrained."""
    config = info.network_config
    means = torch.tensor(config["means"], dtype=torch.float64)
    mixture = Mixture(means, torch.tensor(config["weights"], dtype=torch.float64), float(config["std"]))
    return MixtureNetwork(mixture, info.schedule, int(config["width"]))


def write_mixture(
    folder: Path, means: Tensor, weights: Tensor, std: float, variant: str = "default", seed: int = 0, width: int = 128
) -> None:
    """Write an analytic checkpoint; class names are 'mode 0', 'mode 1', ...; variant: default (epsilon), v, or flow."""
    scheduler: dict[str, object] = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": 1.0,
    }
    if variant != "flow":
        prediction = Prediction.V if variant == "v" else Prediction.EPSILON
        scheduler = {
            "_class_name": "DDIMScheduler",
            "num_train_timesteps": 1000,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "prediction_type": prediction.value,
        }
    config = {
        "dimension": means.shape[1],
        "means": means.tolist(),
        "weights": weights.tolist(),
        "std": std,
        "classes": [f"mode {k}" for k in range(len(means))],
        "width": width,
    }
    for name, file, content in (("network", "config.json", config), ("scheduler", "scheduler_config.json", scheduler)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / file).write_text(json.dumps(content, indent=2))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": Analytic.pipeline_name}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = MixtureNetwork(Mixture(means, weights, std), NoiseSchedule.from_config(scheduler), width)
    save_file(network.state_dict(), folder / "network" / "weights.safetensors")
