"""The package as a whole: light to import, torch-free where it says so, documented."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import modicum

TORCH_FREE = ("graph", "selection", "methods", "optim", "ops", "lower", "memory", "cost", "plan",
              "board", "trace", "tasks", "blocks", "report", "state", "job", "run", "errors",
              "units")  # fmt: skip


def run(code: str) -> str:
    source = str(Path(modicum.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": source},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_torch_free_modules_import_no_torch():
    names = ", ".join(f"modicum.{name}" for name in TORCH_FREE)
    assert run(f"import {names}, sys; print('torch' in sys.modules)") == "False"


def test_importing_modicum_loads_nothing_large():
    heavy = "[m for m in ('torch', 'numpy', 'matplotlib', 'pydantic', 'flwr') if m in sys.modules]"
    assert run(f"import modicum, sys; print({heavy})") == "[]"


def test_the_command_lines_help_needs_neither_torch_nor_matplotlib():
    code = "import modicum.cli, sys; print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    assert run(code) == "False False"


@pytest.mark.slow
def test_every_public_name_is_there_and_has_a_docstring():
    missing = [
        name for name in modicum.__all__ if not (getattr(modicum, name).__doc__ or "").strip()
    ]
    assert missing == []
    assert set(modicum.__all__) <= set(dir(modicum))


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Plans'"):
        modicum.Plans  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plan", "capture", "apply", "adapt", "emit", "run", "observe"])
def test_a_function_stays_a_function_when_its_module_is_imported(name):
    code = (
        f"import modicum, importlib\nimportlib.import_module('modicum.{name}')\n"
        f"from modicum.plan import Plan\nimport modicum.plan, modicum.{name}\n"
        f"from modicum import {name} as f\n"
        f"print(callable(modicum.{name}), callable(f), callable(modicum.plan), Plan.__name__)"
    )
    assert run(code) == "True True True Plan"
