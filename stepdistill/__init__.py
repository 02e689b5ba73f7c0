"""stepdistill: few-step distillation of diffusion models.

The public names are loaded on first use, so that `import stepdistill` and `stepdistill --help` cost nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "Refusal": "errors",
    "UserError": "errors",
    "RunConfig": "config.schema",
    "load_config": "config.schema",
    "distill": "api.training",
    "dry_run": "api.training",
    "cache": "api.training",
    "collect": "api.training",
    "CollectConfig": "api.training",
    "export": "api.training",
    "sample": "api.training",
    "load_teacher": "api.training",
    "evaluate": "api.evaluating",
    "evaluate_images": "api.evaluating",
    "compare": "api.evaluating",
    "quickstart": "api.quickstart",
    "plan": "planning.plan",
    "Forecast": "planning.plan",
}

if TYPE_CHECKING:
    from stepdistill.api.evaluating import compare, evaluate, evaluate_images
    from stepdistill.api.quickstart import quickstart
    from stepdistill.api.training import CollectConfig, cache, collect, distill, dry_run, export, load_teacher, sample
    from stepdistill.config.schema import RunConfig, load_config
    from stepdistill.errors import Refusal, UserError
    from stepdistill.planning.plan import Forecast, plan

__all__ = [
    "CollectConfig", "Forecast", "Refusal", "RunConfig", "UserError", "cache", "collect", "compare", "distill", "dry_run", "evaluate",
    "evaluate_images", "export", "load_config", "load_teacher", "plan", "quickstart", "sample",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'stepdistill' has no attribute {name!r}")
    return vars(import_module(f"stepdistill.{_PUBLIC[name]}"))[name]
