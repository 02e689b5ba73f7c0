"""Ladders that are written by hand, transitions that stock schedulers know, and the one that walks as a student was trained to."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from stepdistill.diffusion.prediction import Prediction
from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.diffusion.transitions import Transition, TransitionKind
from stepdistill.errors import UserError
from stepdistill.families.recipe import SCHEDULERS, Recipe
from stepdistill.methods.base import Problem


def few_step_recipe(
    problem: Problem, method: str, timesteps: Sequence[float], transition: Transition, baked_guidance: float
) -> Recipe:
    """The stock scheduler that walks this ladder with this transition.

    A deterministic walk from zero SNR is TCD's without noise, which differs by its end alone: timestep 0, not the clean image.

    Raises:
        UserError: no stock scheduler does.
    """
    schedule = problem.schedule
    if transition.kind is TransitionKind.DETERMINISTIC and schedule.zero_terminal_snr and not schedule.is_flow:
        # stock Euler starts a zero-SNR ladder at sigma 4096 and takes the noise off again, in float32; TCD's at eta 0 is DDIM
        transition = Transition(TransitionKind.TCD, 0.0)
    name, ancestral = SCHEDULERS.get((transition.kind, schedule.is_flow)), transition.kind is TransitionKind.ANCESTRAL
    known = schedule.prediction in (Prediction.EPSILON, Prediction.V) and not schedule.zero_terminal_snr
    if name is None or (ancestral and not (known and transition.strength == 1)):
        weak = f" of strength {transition.strength:g}" if ancestral and transition.strength != 1 else ""
        raise UserError(
            f"no stock scheduler walks a ladder of this checkpoint with the {transition.kind.value!r} transition{weak}: use "
            "'renoise' or 'deterministic' (with method.kernel for pso)"
        )
    config: dict[str, object] = {"prediction_type": schedule.prediction.value, "clip_sample": False}
    # whatever the base's scheduler does to a list of sigmas must not be done to the ladder again
    as_given = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
    if schedule.is_flow:
        config = {"shift": schedule.shift, "use_dynamic_shifting": False, "shift_terminal": None, **as_given}
    elif transition.kind is TransitionKind.DETERMINISTIC:
        # with "leading" the first call sees noise of std 1, as in training; with "trailing" of std sigma (0.9977 for SD)
        config |= {"timestep_spacing": "leading", "final_sigmas_type": "zero", **as_given}
    elif transition.kind is TransitionKind.TCD:
        config["original_inference_steps"] = schedule.train_steps  # any whole timestep may stand in a ladder
    elif ancestral:
        # with "trailing" the first call would see noise of std sigma, as above
        config |= {
            "timestep_spacing": "leading",
            "steps_offset": _ancestral_steps_offset(timesteps, schedule.train_steps),
        }
    return Recipe(
        scheduler_class=name,
        scheduler_config=config,
        num_inference_steps=len(timesteps),
        prediction_type=schedule.prediction.value,
        timesteps=() if schedule.is_flow or ancestral else tuple(round(t) for t in timesteps),
        spaced=tuple(round(t) for t in timesteps) if ancestral else (),
        sigmas=tuple(schedule.fraction_at(torch.tensor(timesteps, dtype=torch.float64)).tolist())
        if schedule.is_flow
        else (),
        call={"eta": transition.strength} if transition.kind is TransitionKind.TCD and transition.strength else {},
        base=problem.base,
        method=method,
        baked_guidance=baked_guidance,
        resolution=problem.size,
    )


def _ancestral_steps_offset(timesteps: Sequence[float], train_steps: int) -> int:
    """The last timestep of a ladder whose steps are as even as EulerAncestral's own, which takes no other."""
    gap = train_steps // len(timesteps)
    if any(round(a) - round(b) != gap for a, b in pairwise(timesteps)):
        raise UserError(
            f"the ladder {[round(t) for t in timesteps]} is walked with the 'ancestral' transition, whose stock scheduler takes steps of "
            f"{gap} timesteps here alone: leave method.timesteps out, or choose another transition"
        )
    return round(timesteps[-1])


def tcd_transition(schedule: NoiseSchedule, eta: float) -> Transition:
    """TCD's sampler: jump to (1 - eta) of the next time, then noise back up to it.

    Stock schedulers do so for VP models; for flow models they know its two ends, Euler (0) and re-noising (1).

    Raises:
        UserError: an eta between on a flow model.
    """
    if not schedule.is_flow:
        return Transition(TransitionKind.TCD, eta)
    if eta not in (0.0, 1.0):
        raise UserError(
            f"method.eta is {eta:g} and stock schedulers of flow models take 0 (Euler) and 1 (re-noising) only: choose one"
        )
    return Transition(TransitionKind.DETERMINISTIC if eta == 0 else TransitionKind.RENOISE)


def timesteps_of(schedule: NoiseSchedule, timesteps: Sequence[float]) -> tuple[float, ...]:
    """A ladder written by hand, checked: native times, strictly falling, within the schedule."""
    timesteps = tuple(float(t) for t in timesteps)
    top = schedule.terminal_time
    if (
        not timesteps
        or any(a <= b for a, b in pairwise(timesteps))
        or timesteps[0] > top
        or timesteps[-1] <= schedule.clean_time
    ):
        raise UserError(
            f"method.timesteps is {list(timesteps)}, but a ladder falls strictly and lies in ({schedule.clean_time:g}, {top:g}]: mend it"
        )
    if not schedule.is_flow and any(t != round(t) for t in timesteps):
        raise UserError(f"method.timesteps is {list(timesteps)}, but stock schedulers take whole timesteps: round them")
    return timesteps
