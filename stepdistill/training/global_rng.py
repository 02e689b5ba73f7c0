"""The state of torch's global random generators, saved with a run.

Nothing in this package draws from them, but code of third parties may.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stepdistill.training.distributed import Processes


def global_rng_states(processes: Processes) -> dict[str, Tensor]:
    """Returns the states of the CPU's and the GPU's generators on every process, by `DEVICE.PROCESS`."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {
        f"{device}.{index}": state
        for device, mine in states.items()
        for index, state in enumerate(processes.gather(mine))
    }


def restore_global_rng(states: Mapping[str, Tensor], processes: Processes) -> None:
    """Restores this process's states. A process that the saved run did not have leaves its generators alone."""
    if (state := states.get(f"cpu.{processes.index}")) is not None:
        torch.set_rng_state(state)
    if torch.cuda.is_available() and (state := states.get(f"cuda.{processes.index}")) is not None:
        torch.cuda.set_rng_state(state)
