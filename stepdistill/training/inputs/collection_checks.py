"""Whether what a teacher drew beforehand is what a run needs."""

from __future__ import annotations

from stepdistill.config.reading import Settings
from stepdistill.data.latents.latent_shards import TensorFolder
from stepdistill.data.latents.trajectories import TrajectoryFolder
from stepdistill.data.prompts import PromptList
from stepdistill.errors import UserError


def check_pairs(
    pairs: TensorFolder,
    plan_prompts: PromptList,
    method_config: Settings,
    latent_shape: tuple[int, ...],
    negative_prompt: str,
) -> None:
    """Raises UserError where pairs are of another size, guidance or prompt list than the run's."""
    made = pairs.fingerprint
    if pairs.kind == "trajectories":
        raise UserError("data.pairs names trajectories: give a folder made by 'stepdistill collect pairs'")
    if pairs.shape != tuple(latent_shape):
        raise UserError(
            f"the pairs in data.pairs hold latents of shape {list(pairs.shape)} and the run wants {list(latent_shape)}: "
            "collect them at model.size"
        )
    guidance = dict(method_config).get("guidance")
    if guidance is not None and made.guidance != float(guidance):
        raise UserError(
            f"the pairs were made with guidance {made.guidance} and method.guidance is {guidance}: "
            "the two must agree, so change one or collect again"
        )
    _check_negative("pairs", made.negative_prompt, negative_prompt)
    if made.prompts_sha256 != plan_prompts.sha256:
        raise UserError(
            "the pairs were made with another prompt list than data.prompts: name the list they were collected with"
        )


def check_trajectories(
    trajectories: TrajectoryFolder,
    prompts: PromptList,
    model: str,
    method_config: Settings,
    latent_shape: tuple[int, ...],
    negative_prompt: str,
) -> None:
    """Raises UserError where trajectories are of another teacher, size, range of w or prompt list than the run's."""
    made, options = trajectories.fingerprint, dict(method_config)
    guidance_range = options["guidance_range"] or (options["guidance"],) * 2
    if trajectories.shape != tuple(latent_shape):
        raise UserError(
            f"the trajectories in data.trajectories hold latents of shape {list(trajectories.shape)} and the run wants "
            f"{list(latent_shape)}: collect them at model.size"
        )
    if made.guidance_range != tuple(guidance_range):
        raise UserError(
            f"the trajectories were made with guidance_range {made.guidance_range} and method.guidance_range is {guidance_range}: the two "
            "must agree, so change one or collect again"
        )
    _check_negative("trajectories", made.negative_prompt, negative_prompt)
    if made.prompts_sha256 != prompts.sha256:
        raise UserError(
            "the trajectories were made with another prompt list than data.prompts: name the list they were collected with"
        )
    if made.model != model:
        raise UserError(
            f"the trajectories are of {made.model!r} and model.path is {model!r}: collect them with that teacher"
        )


def _check_negative(kind: str, made: str | None, wanted: str) -> None:
    """What a guided teacher draws depends on the prompt that it is guided away from."""
    if (made or "") != wanted:
        raise UserError(
            f"the {kind} were made with the negative prompt {made or ''!r} and model.negative_prompt is {wanted!r}: the two must "
            "agree, so change one or collect again"
        )
