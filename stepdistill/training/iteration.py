"""One iteration of any method: which roles roll out, compute a loss and are updated, and in which order.

Training, planning and the tool with CUDA graphs run this code. They differ in what happens around it (`IterationHooks`): training
differentiates, reduces, clips and steps; planning counts network calls and memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from stepdistill.diffusion.draws import Draws
from stepdistill.methods.base import Batch, Method, Progress, Rollout, Terms
from stepdistill.roles.triple import Triple


class IterationHooks:
    """What is done around the parts of an iteration; nothing by default."""

    def begin_role(self, role: str) -> None:
        """Called before anything of a role that is due."""

    def begin_rollout(self) -> None:
        """Called before the rollout of each micro-batch."""

    def begin_loss(self, role: str) -> None:
        """Called before a role's loss on each micro-batch."""

    def on_terms(self, role: str, piece: int, terms: Terms) -> None:
        """Called with each piece of a role's loss on a micro-batch, while its graph lives."""

    def end_role(self, role: str) -> None:
        """Called when the losses of all micro-batches are done: the place of the role's update."""


def run_iteration(
    method: Method[Any],
    triple: Triple,
    micro_batches: Sequence[tuple[Draws, Batch]],
    progress: Progress,
    hooks: IterationHooks,
) -> None:
    """Runs every role that is due, in the method's order, on rollouts that are made before the first update.

    Args:
        method: whose roles, rollouts and losses these are.
        triple: the networks.
        micro_batches: random streams and inputs of each micro-batch; the role in the streams is replaced by the role due.
        progress: where the run stands.
        hooks: what is done around each part.
    """
    rollouts: list[Rollout] = []
    for order, role in enumerate(method.updates(progress)):
        hooks.begin_role(role)
        for micro, (draws, batch) in enumerate(micro_batches):
            own = draws.for_role(role)
            with triple.training(role):
                if order == 0:
                    hooks.begin_rollout()
                    rollout = method.rollout(batch, triple, progress, own)
                else:
                    rollout = rollouts[micro]
                hooks.begin_loss(role)
                compute_loss(method, role, rollout, triple, progress, own, hooks.on_terms)
            if order == 0:
                rollouts.append(rollout.detach())
        hooks.end_role(role)


def compute_loss(
    method: Method[Any],
    role: str,
    rollout: Rollout,
    triple: Triple,
    progress: Progress,
    draws: Draws,
    on_terms: Callable[[str, int, Terms], None],
) -> None:
    """Computes a role's loss on one rollout, piece by piece.

    Args:
        on_terms: called with the role, the piece's number and its terms; the next piece is computed when it returns.
    """
    for piece, terms in enumerate(method.pieces(role, rollout, triple, progress, draws)):
        on_terms(role, piece, terms)
