"""modicum teaches neural networks on devices that barely have room to run them.

capture a model, plan what to update on a board, adapt in PyTorch or emit C and run it, report.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "capture": "capture",
    "Graph": "graph",
    "Board": "board",
    "boards": "board",
    "Plan": "plan",
    "plan": "plan",
    "Full": "methods",
    "Blocks": "methods",
    "MobileTL": "methods",
    "TinyTL": "methods",
    "TinyTrain": "methods",
    "SparseUpdate": "methods",
    "prepare_model": "lite",
    "add_lite_residuals": "lite",
    "Last": "methods",
    "Bias": "methods",
    "Norm": "methods",
    "account": "accounting",
    "backward_cost": "backward_cost",
    "Explicit": "methods",
    "SGD": "optim",
    "Adam": "optim",
    "Selection": "selection",
    "Slice": "selection",
    "Update": "selection",
    "apply": "apply",
    "adapt": "adapt",
    "emit": "emit",
    "Candidates": "emit",
    "run": "run",
    "Native": "native",
    "Trace": "trace",
    "compare": "trace",
    "compare_methods": "comparison",
    "few_shot": "heads",
    "FewShot": "heads",
    "CosineHead": "heads",
    "observe": "observe",
    "fine_tune": "fewshot",
    "FineTune": "fewshot",
    "metatrain": "meta",
    "MetaTrain": "meta",
    "compare_on_tasks": "task_comparison",
    "Contender": "task_comparison",
    "Domain": "task_comparison",
    "contribution": "search",
    "search": "search",
    "find_scheme": "search",
    "report": "report",
    "ModicumError": "errors",
    "DoesNotFit": "errors",
    "InvalidInput": "errors",
    "ParityError": "errors",
    "UnsupportedOperator": "errors",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used, so that importing modicum is quick."""
    if name not in _HOME:
        raise AttributeError(f"module 'modicum' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"modicum.{_HOME[name]}"), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """Keeps `modicum.plan` the function when the import system sets the submodule of that name.

    `from modicum.plan import Plan` is not affected: it looks in sys.modules.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
