"""Measures the student during training by the protocols of `stepdistill evaluate`, with its raw weights and with their EMA.

RUN/evaluation.jsonl     one log record per evaluation
    checkpoints/best     the best checkpoint so far, which is never pruned
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from stepdistill.assets import FOLDER
from stepdistill.config.schema import EvaluationConfig
from stepdistill.diffusion.draws import Draws
from stepdistill.errors import UserError
from stepdistill.evaluation.images import ImageArray, as_uint8, indices_of_rank
from stepdistill.evaluation.measure import (
    METRICS_NEEDING_FEATURES,
    ImageSetFeatures,
    check_metrics,
    compute_metrics,
    measure_images,
    merge,
    read_reference,
)
from stepdistill.evaluation.networks.features import load_extractor
from stepdistill.evaluation.protocols import (
    Metric,
    PromptSet,
    Protocol,
    expand_metric_names,
    load_protocol,
    metric_label,
    prompt_set,
)
from stepdistill.evaluation.reports.report import LOWER_IS_BETTER
from stepdistill.families.conditioning import MicroConditioning
from stepdistill.roles.triple import GENERATOR
from stepdistill.training.evaluation_hook import EvaluationResult
from stepdistill.training.monitoring.grids import student_latents
from stepdistill.training.run_folder import checkpoints
from stepdistill.training.run_folder.logs import EVALUATION, JsonLinesFile
from stepdistill.training.session import Session

BATCH = 16
BEST_METRICS = ("fid", "fd_infinity", "kid", "cmmd", "precision", "recall", "density", "coverage", "diversity")
"""Metrics that can decide which checkpoint is best: lower or higher is better."""


@dataclass(frozen=True)
class EvaluationSetup:
    """What the `evaluation` section of a config asks for, before anything is loaded.

    Attributes:
        protocol: the protocol of the section.
        metrics: what is computed.
        prompts: prompts and seeds.
        reference_path: a folder of images, or statistics.
    """

    protocol: Protocol
    metrics: tuple[Metric, ...]
    prompts: PromptSet
    reference_path: Path

    @classmethod
    def of(cls, config: EvaluationConfig) -> EvaluationSetup:
        """Checks a section; raises UserError for an unknown protocol or metric, and if prompts or reference are missing."""
        protocol = load_protocol(config.protocol)
        metrics = tuple(m for m in expand_metric_names(config.metrics) if m != "prompt_accuracy")
        if config.best not in metrics or config.best not in BEST_METRICS:
            raise UserError(
                f"evaluation.best is {config.best!r}, and one of evaluation.metrics with a better side is wanted: use one of "
                f"{', '.join(m for m in metrics if m in BEST_METRICS) or 'fid'}"
            )
        prompts = prompt_set(protocol, config.prompts, config.images)
        reference_path = config.reference or (
            FOLDER / protocol.reference.builtin if protocol.reference.builtin else None
        )
        if reference_path is None:
            raise UserError("evaluation.reference is not set: give a folder of images, or statistics")
        if not Path(reference_path).exists():
            raise UserError(
                f"evaluation.reference is {str(reference_path)!r}, and nothing is there: give a folder of images, or statistics"
            )
        return cls(protocol, metrics, prompts, Path(reference_path))


class StudentEvaluation:
    """Draws the protocol's images with the networks in training and measures them.

    Args:
        session: the run's.
        folder: the run's.
        config: its `evaluation` section.

    Raises:
        UserError: unknown protocol or metric, no prompts or no reference; before any training.
    """

    def __init__(self, session: Session, folder: Path, config: EvaluationConfig) -> None:
        self.session, self.folder, self.every, self.best_metric = session, folder, config.every, config.best
        self.log = JsonLinesFile(folder / EVALUATION)
        evaluation_setup = EvaluationSetup.of(config)
        protocol, self.metrics, self.prompts = (
            evaluation_setup.protocol,
            evaluation_setup.metrics,
            evaluation_setup.prompts,
        )
        self.extractor = load_extractor(
            config.features or protocol.features, resize=protocol.resize, device=session.device
        )
        self.protocol, self.chain = protocol, protocol.chain.chain()
        self.keep_features = bool(METRICS_NEEDING_FEATURES & set(self.metrics))
        self.reference = read_reference(
            evaluation_setup.reference_path,
            self.extractor,
            keep_features=self.keep_features,
            chain=self.chain,
            lossy=protocol.reference.lossy,
        )
        check_metrics(self.metrics, self.reference, len(self.prompts))

    def __call__(self, iteration: int) -> EvaluationResult:
        """Measures the raw weights and, if there is one, the EMA; the student that would be exported decides the best checkpoint."""
        values: dict[str, float] = {}
        decisive: float | None = None
        for role in dict.fromkeys((GENERATOR, self.session.student)):
            own = measure_images(self._generate_images(role), self.extractor, keep_features=self.keep_features)
            found = self._compute_metrics(merge(own, len(self.prompts)))
            count = self.protocol.prompts.count
            values |= {
                f"evaluation/{role}/{metric_label(name, len(self.prompts), count)}": value
                for name, value in found.items()
            }
            decisive = found.get(self.best_metric)
        if PartialState().is_main_process:
            self.log.append(iteration, values)
        # the main process decides for all, because it rewrites the file that the decision reads
        is_main_process = PartialState().is_main_process
        if decisive is None or not gather_object([is_main_process and self._is_best(decisive)])[0]:
            return EvaluationResult(values, None)
        return EvaluationResult(values, {"iteration": iteration, "metric": self.best_metric, "value": decisive})

    def _compute_metrics(self, measured: ImageSetFeatures) -> dict[str, float]:
        return compute_metrics(
            measured, self.reference, self.metrics, np.random.default_rng(0), self.prompts.prompts
        ).metrics

    @torch.no_grad()
    def _generate_images(self, role: str) -> Iterator[ImageArray]:
        session, setup = self.session, self.session.setup
        state = PartialState()
        indices = indices_of_rank(len(self.prompts), state.process_index, state.num_processes)
        # the main process has the most images; all processes must call a sharded network equally often
        calls = range(0, len(indices_of_rank(len(self.prompts), 0, state.num_processes)), BATCH)
        for start in calls:
            mine = indices[start : start + BATCH]
            rows = mine or range(1)
            draws = Draws(0, 0, "evaluation", [self.prompts.seeds[i] for i in rows], session.device, session.dtype)
            texts = [self.prompts.prompts[i] for i in rows]
            cond = session.encoder.text(texts, [MicroConditioning.plain(*setup.problem.size)] * len(rows))
            noise = draws.normal("noise", setup.problem.latent_shape)
            latents = student_latents(session, role, cond, noise, draws)[: len(mine)]
            for latent in latents:
                decoded = setup.family.decode(session.checkpoint, latent[None]).float()
                if not torch.isfinite(decoded).all():  # clamping would hide infinity
                    raise UserError(
                        f"the {role} draws NaN or infinity at this iteration's evaluation: lower the learning rate, or resume from an "
                        "earlier checkpoint"
                    )
                yield self.chain(as_uint8(decoded.clamp(0, 1), (0, 1), self.protocol.quantize)[0])

    def _is_best(self, value: float) -> bool:
        before = checkpoints.read_best_metadata(self.folder / "checkpoints")
        if before is None or before["metric"] != self.best_metric:
            return True
        best = float(before["value"])
        return value < best if self.best_metric in LOWER_IS_BETTER else value > best
