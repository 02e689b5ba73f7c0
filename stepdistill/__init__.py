"""stepdistill: few-step distillation of diffusion models.

The public names are loaded on first use, so that `import stepdistill` and `stepdistill --help` cost nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "Refusal": "errors",
    "RunConfig": "config",
    "load_config": "config",
    "distill": "api",
    "dry_run": "api",
    "cache": "api",
    "collect": "api",
    "CollectConfig": "api",
    "export": "api",
    "sample": "api",
    "load_teacher": "api",
    "evaluate": "evaluating",
    "evaluate_images": "evaluating",
    "compare": "evaluating",
    "quickstart": "demo",
    "plan": "planning",
    "Forecast": "planning",
}

if TYPE_CHECKING:
    from stepdistill.api import CollectConfig, cache, collect, distill, dry_run, export, load_teacher, sample
    from stepdistill.config import RunConfig, load_config
    from stepdistill.demo import quickstart
    from stepdistill.errors import Refusal
    from stepdistill.evaluating import compare, evaluate, evaluate_images
    from stepdistill.planning import Forecast, plan

__all__ = [
    "CollectConfig", "Forecast", "Refusal", "RunConfig", "cache", "collect", "compare", "distill", "dry_run", "evaluate",
    "evaluate_images", "export", "load_config", "load_teacher", "plan", "quickstart", "sample",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'stepdistill' has no attribute {name!r}")
    return vars(import_module(f"stepdistill.{_PUBLIC[name]}"))[name]
