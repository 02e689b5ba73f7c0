"""What a bit-for-bit resume depends on beside the checkpoint; a change is said, not refused."""

from __future__ import annotations

import logging
import platform
from dataclasses import asdict, dataclass

import torch

from stepdistill.config.schema import RunConfig

logger = logging.getLogger(__name__)
RECORDED_CONFIG_KEYS = frozenset(f"training.{key}" for key in ("threads", "sharding", "batch_size", "accumulation"))
"""Keys of a config that an environment speaks of, as they turned out."""


@dataclass(frozen=True)
class Environment:
    """Whatever may change the last bits of a float.

    Attributes:
        device: name of the card or the processor's architecture.
        threads: CPU threads of torch.
        processes, sharded: layout of the work.
        dtype, attention, compile, channels_last, quantization: as in the config's `model`.
        batch, accumulation: as in the config's `training`.
        version: of torch.
    """

    device: str
    threads: int
    processes: int
    sharded: bool
    dtype: str
    attention: str
    compile: bool
    channels_last: bool
    quantization: str
    batch: int
    accumulation: int
    version: str

    @classmethod
    def of_this_process(cls, config: RunConfig, device: torch.device, processes: int, sharded: bool) -> Environment:
        """This process's."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"
        model, training = config.model, config.training
        return cls(
            name, torch.get_num_threads(), processes, sharded, model.dtype, model.attention, model.compile,
            model.channels_last, model.quantization, training.batch_size, training.accumulation, str(torch.__version__),
        )  # fmt: skip

    def warn_about_changes(self, saved: Environment) -> None:
        """One warning that names everything that differs from a checkpoint's environment."""
        before = asdict(saved)
        changed = [
            f"{key} was {before[key]!r} and is {value!r}" for key, value in asdict(self).items() if before[key] != value
        ]
        if changed:
            logger.warning("this resume is not bit for bit what an unbroken run gives: %s", ", ".join(changed))
