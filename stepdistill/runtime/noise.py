"""Silences messages of libraries that a user of the command line can do nothing about."""

from __future__ import annotations

import logging
import warnings
from collections.abc import MutableMapping

LOGGERS = (
    "httpx",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "torch",
    "torch.utils._pytree",
    "torchao",
    "bitsandbytes",
    "bitsandbytes.backends.cpu.ops",
)
LIBRARIES = "(diffusers|transformers|accelerate|peft|torch|torchao|bitsandbytes|huggingface_hub)(\\.|$)"


def silence_libraries(environment: MutableMapping[str, str]) -> None:
    """Raises the level of the libraries' loggers and filters their warnings. Must run before they are imported.

    A variable that the user has set, such as `DIFFUSERS_VERBOSITY`, is kept.

    Args:
        environment: the variables of this process, `os.environ`.
    """
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        environment.setdefault(f"{library}_VERBOSITY", "error")
    warnings.filterwarnings("ignore", module=LIBRARIES)


def disable_loading_bars() -> None:
    """Turns off the progress bars that diffusers and transformers show while they load weights from disk.

    Progress bars of downloads stay.
    """
    import diffusers.utils.logging as of_diffusers
    import transformers.utils.logging as of_transformers

    of_diffusers.disable_progress_bar()
    of_transformers.disable_progress_bar()
