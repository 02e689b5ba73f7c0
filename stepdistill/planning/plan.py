"""What a run will take in memory, work and time, from its config alone, before anything is downloaded.

forecast = plan(load_config("configs/sdxl_dmd2_4step_lora.yaml"), gpu="4090")
print("\\n".join(lines(forecast)))
"""

from __future__ import annotations

from stepdistill.config.schema import RunConfig
from stepdistill.errors import UserError
from stepdistill.planning.advice import advise
from stepdistill.planning.forecast import Machine, Planner
from stepdistill.planning.formatting import forecast_lines
from stepdistill.planning.hardware import find_gpu
from stepdistill.planning.report import Forecast

__all__ = ["Forecast", "forecast_lines", "plan"]


def plan(config: RunConfig, gpu: str = "h100", processes: int = 1, memory_gb: float | None = None) -> Forecast:
    """What the run will take, and what to change where it does not fit.

    Args:
        config: as loaded by `load_config`; its data need not be on this machine.
        gpu: card of every process, a name of `planning/hardware.py`.
        processes: of the run, one a card.
        memory_gb: GB of 10^9 bytes on each card, where it is not the card's own.

    Raises:
        UserError: the config cannot work, its architecture is not known here, or the card is not.
    """
    if processes < 1:
        raise UserError(f"the run was planned for {processes} processes, and it takes one at least: give 1 or more")
    if memory_gb is not None and memory_gb <= 0:
        raise UserError(f"the memory to plan for is {memory_gb:g} GB, and a card has more than none: give its GB")
    planner = Planner(Machine.of(find_gpu(gpu), processes, memory_gb))
    forecast = planner.forecast(config)
    return forecast.model_copy(update={"advice": advise(planner, config, forecast)})
