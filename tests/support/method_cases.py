"""A case for every registered method, and runs of it: what the matrices of tests share.

A new method joins by an entry here; `test_no_method_is_missing` fails until it has one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from stepdistill.config.reading import parse
from stepdistill.config.registry import load_method
from stepdistill.config.schema import RunConfig
from stepdistill.methods.base import Needs
from stepdistill.training.collect import CollectConfig, collect
from stepdistill.training.run_folder import checkpoints

Tensors = dict[str, dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Case:
    """A configured method.

    Attributes:
        method, options: as in a config's `method`.
        period: iterations after which the pattern of updates repeats; resume is tested around it.
        generator: more of the generator's section.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    period: int = 1
    generator: Mapping[str, Any] = field(default_factory=dict)

    @property
    def needs(self) -> Needs:
        method = load_method(self.method)
        needs: Needs = method.needs(method.Config.model_validate(dict(self.options)))
        return needs

    @property
    def family(self) -> str:
        """Of its short runs: the analytic one unless images must be encoded or decoded."""
        return "sd" if self.needs.images or self.needs.vision or self.needs.reward or self.told else "analytic"

    @property
    def told(self) -> bool:
        """Whether the student is told its guidance scale, for which the analytic network has no place."""
        method = load_method(self.method)
        return method.network_guidance_range(method.Config.model_validate(dict(self.options))) is not None

    def role(self, mode: str) -> dict[str, Any]:
        """The generator's section, for a layout's mode or the one that the method knows."""
        modes = load_method(self.method).modes
        return {"mode": mode if mode in modes else modes[0], "rank": 4, "alpha": 2, "width": 8, **self.generator}


LATENT_GAN = {"weight": 1e-2, "features": "real_score", "reals": "pairs"}
FLASH: Mapping[str, Any] = {
    "guidance": 2.0, "ratio": 2, "steps": 3, "gan": {"weight": 1e-2, "features": "vision", "reals": "pairs"},
}  # fmt: skip
CASES: Mapping[str, Case] = {
    "dmd": Case("dmd", {"guidance": 2.0}),
    "dmd2": Case("dmd2", {"guidance": 2.0, "ratio": 2, "steps": 2}, period=2),
    "dmd2-gan": Case("dmd2", {"guidance": 2.0, "ratio": 2, "steps": 2, "gan": {"weight": 1e-2}}, period=2),
    "dmd2-deterministic": Case(
        "dmd2", {"guidance": 2.0, "ratio": 1, "steps": 2, "transition": "deterministic", "exits": "sample"}
    ),
    "dmd2-blend": Case("dmd2", {"guidance": 2.0, "ratio": 1, "steps": 2, "fake_blend": 0.9}),
    "dmd2-divergence": Case(
        "dmd2", {"guidance": 2.0, "ratio": 1, "steps": 2, "divergence": "jensen_shannon", "gan": LATENT_GAN}
    ),
    "flash": Case("flash", FLASH, period=2),
    "flash-joint": Case(
        "flash",
        {**FLASH, "rl": {"reward": "critic:brightness", "start": 1, "per_distillation": 1, "candidates": 2}},
        period=3,
    ),
    "scm": Case("scm", {"guidance": 2.0, "tangent": {"kind": "semi_discrete", "warmup": 4}}),
    "scm-gan": Case("scm", {"guidance": 2.0, "steps": 4, "gan": {"weight": 0.5}, "tangent": {"warmup": 4}}),
    "tbcm-differences": Case(
        "tbcm", {"guidance": 2.0, "route_steps": 3, "route": "logit_normal", "tangent": {"kind": "finite_difference"}}
    ),
    "tbcm": Case("tbcm", {"guidance": 2.0, "route_steps": 4, "tangent": {"warmup": 2, "calm_from": 2}}),
    "decoupled": Case("decoupled", {"guidance": 2.0, "ratio": 2, "steps": 2, "moments": {"weight": 0.1}}, period=2),
    # three iterations of the record, then s'_2, s'_1 and the teacher, one update each: broken off at every turn of the path
    "disback": Case(
        "disback",
        {"guidance": 2.0, "ratio": 1, "steps": 2, "checkpoints": 3, "record_every": 1, "interval": 1},
        period=4,
    ),
    "disback-one-step": Case(
        "disback", {"guidance": 2.0, "ratio": 1, "checkpoints": 2, "record_every": 1, "interval": 1}, period=3
    ),
    "phased": Case("phased", {"guidance": 2.0, "ratio": 2, "steps": 2, "phase_iterations": 2}, period=2),
    "phased-kl": Case(
        "phased",
        {
            "guidance": 2.0,
            "ratio": 1,
            "steps": 3,
            "phases": 2,
            "phase_iterations": 2,
            "dm_weight": "exact_kl",
            "exits": "sample",
        },
        period=2,
    ),
    "lcm": Case("lcm", {"guidance": 2.0, "steps": 2, "points": 10, "source": "pairs"}),
    "lcm-told": Case(
        "lcm",
        {
            "guidance": 2.0,
            "guidance_range": [1.5, 6.0],
            "tell_guidance": True,
            "steps": 2,
            "points": 10,
            "source": "pairs",
            "target": "ema",
        },
    ),
    "tcd": Case("tcd", {"guidance": 2.0, "guidance_range": [1.5, 2.5], "steps": 2, "target": "ema", "source": "pairs"}),
    "cm": Case(
        "cm",
        {
            "guidance": 2.0,
            "steps": 2,
            "points": 12,
            "source": "pairs",
            "curriculum": "doubling",
            "first_points": 3,
            "curriculum_iterations": 3,
            "decay": "curriculum",
            "times": "lognormal",
            "weights": "gap",
        },
    ),
    "tscd": Case(
        "tscd",
        {
            "guidance": 2.0,
            "steps": 2,
            "points": 10,
            "source": "pairs",
            "gan": {"weight": 0.1, "features": "fake_score"},
            "stages": [{"segments": 2, "iterations": 1, "gan": 0.0}, {"segments": 1, "iterations": 1}],
            "score": {},
        },
    ),
    "agd-trajectories": Case(
        "agd",
        {"guidance": 3.0, "guidance_range": (1.0, 5.0), "steps": 2, "source": "trajectories"},
        generator={"kind": "perceptron", "rising": True},
    ),
    "agd": Case("agd", {"guidance": 3.0, "guidance_range": (1.0, 5.0), "steps": 2, "walk_steps": 2}),
    "guidance-fixed": Case("guidance", {"guidance": 3.0, "guidance_range": None, "steps": 2, "walk_steps": 2}),
    "guidance": Case("guidance", {"guidance": 3.0, "guidance_range": (1.0, 5.0), "steps": 2, "source": "images"}),
    "pso-ancestral": Case(
        "pso", {"form": "online", "steps": 3, "transition": "ancestral", "reward": "critic:brightness"}
    ),
    "pso-offline": Case("pso", {"form": "offline", "steps": 2, "losers": "prompts", "anchor": 0.5, "kappa": 0.1}),
    "pso-pairs": Case("pso", {"form": "offline", "steps": 2, "losers": "given", "weighting": "transition"}),
    "pso": Case("pso", {"form": "online", "steps": 2, "reward": "critic:brightness"}),
    "reward-late": Case(
        "reward",
        {"form": "late", "steps": 3, "reward": "critic:brightness", "margin": 0.9, "transition": "deterministic"},
    ),
    "reward": Case(
        "reward",
        {
            "form": "last",
            "last": 2,
            "steps": 3,
            "reward": "critic:brightness",
            "held_out": "critic:sharpness",
            "stay": 0.1,
        },
    ),
    "pcm": Case("pcm", {"guidance": 2.0, "steps": 2, "phases": 2, "source": "pairs", "gan": {"weight": 0.1}}),
}
FULLEST: Mapping[str, str] = {
    case.method: name for name, case in sorted(CASES.items(), key=lambda item: item[1].family == "sd")
}
"""Method -> its case with the most parts: one on images where there is one, the last of them."""
LAYOUTS = {"lora": ("lora", "lora"), "full": ("full", "full"), "mixed": ("lora", "full")}


@dataclass(frozen=True)
class Bench:
    """Where runs find their checkpoint and data.

    Attributes:
        tiny: the fixture of that name.
        folder: for images and pairs, made when a case needs them.
    """

    tiny: Callable[..., Path]
    folder: Path

    def config(
        self,
        case: Case,
        steps: int,
        *,
        family: str | None = None,
        variant: str = "default",
        layout: str = "lora",
        dtype: str = "float64",
        **training: Any,
    ) -> RunConfig:
        """A short run; on the analytic family unless another is named or the case needs images."""
        family = family or case.family
        model = self.tiny(family, variant)
        generator, fake_score = LAYOUTS[layout]
        data: dict[str, Any] = {
            "model": {"path": str(model), "dtype": dtype},
            "method": {"name": case.method, **case.options},
            "roles": {"generator": case.role(generator), "fake_score": {"mode": fake_score, "rank": 4, "alpha": 2}},
            "optimizers": {"generator": {"lr": 1e-3, "warmup": 2}, "fake_score": {"lr": 1e-3}},
            "data": self._data(case, family, model),
            "training": {
                "max_steps": steps, "batch_size": 4, "ema": 0.5, "grid_prompts": 1, "device": "cpu", "log_every": 1,
                "save_every": 100, **training,
            },
        }  # fmt: skip
        return parse(RunConfig, data, "test")

    def _data(self, case: Case, family: str, model: Path) -> dict[str, Any]:
        prompts = self.folder / f"{family}.txt"
        # five of them, so that batches of four end in the middle of an epoch
        words = [f"mode {k % 4}" for k in range(5)] if family == "analytic" else ["a", "red", "cat", "on", "a mat"]
        prompts.write_text("\n".join(words))
        data: dict[str, Any] = {"prompts": str(prompts)}
        if case.needs.images:
            data["images"] = str(self._images())
        if case.needs.losers:
            data["losers"] = str(self._images("losers", ("gray", "black", "white")))
        if case.needs.pairs:
            data["pairs"] = str(self._pairs(case, model, prompts))
        if case.needs.trajectories:
            data["trajectories"] = str(self._trajectories(case, model, prompts))
        return data

    def _images(self, name: str = "images", colours: tuple[str, ...] = ("red", "green", "blue")) -> Path:
        images = self.folder / name
        if not images.exists():
            images.mkdir()
            for index, colour in enumerate(colours):
                Image.new("RGB", (80, 96), colour).save(images / f"{index}.png")
                (images / f"{index}.txt").write_text(f"a {colour} square")
        return images

    def _pairs(self, case: Case, model: Path, prompts: Path) -> Path:
        pairs = self.folder / f"pairs-{model.name}"
        if not pairs.exists():
            wanted = {
                "model": {"path": str(model)}, "prompts": str(prompts), "count": 5, "steps": 2, "device": "cpu",
                "guidance": case.options["guidance"],
            }  # fmt: skip
            collect("pairs", CollectConfig.model_validate(wanted), pairs)
        return pairs

    def _trajectories(self, case: Case, model: Path, prompts: Path) -> Path:
        folder = self.folder / f"trajectories-{model.name}"
        if not folder.exists():
            wanted = {
                "model": {"path": str(model)}, "prompts": str(prompts), "count": 5, "steps": 4, "keep": 2, "device": "cpu",
                "guidance_range": case.options["guidance_range"], "dtype": "float32",
            }  # fmt: skip
            collect("trajectories", CollectConfig.model_validate(wanted), folder)
        return folder


def saved(folder: Path) -> Tensors:
    """Tensors of a run's newest checkpoint."""
    path = checkpoints.latest(folder / "checkpoints")
    assert path is not None
    return checkpoints.read(path).tensors


def equal(a: Tensors, b: Tensors) -> bool:
    """Bit for bit, the same names included."""
    return a.keys() == b.keys() and all(
        a[f].keys() == b[f].keys() and all(torch.equal(a[f][k], b[f][k]) for k in a[f]) for f in a
    )


def difference(a: Tensors, b: Tensors) -> float:
    """Largest absolute difference of any two numbers; random states and digests, which are bytes, left out."""
    assert a.keys() == b.keys()
    numbers = [(a[f][k].double(), b[f][k].double()) for f in a for k in a[f] if a[f][k].dtype != torch.uint8]
    return max(float((mine - its).abs().max()) for mine, its in numbers)
