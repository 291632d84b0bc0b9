"""What every test shares: where outside data lies, what may be skipped, and determinism."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

REPO = Path(__file__).resolve().parents[1]

SHARED = Path(os.environ.get("MODICUM_SHARED", REPO.parent / "shared"))
"""Data too large for the repository: weights of published networks, images."""

# One thread: sums come out in one order, and workers do not fight over cores. Read by torch
# when it is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Compiled kernels: with the clone, not with the user.
os.environ.setdefault("MODICUM_CACHE", str(REPO / "build" / "cache"))

settings.register_profile("dev", deadline=None, max_examples=40)
settings.register_profile("ci", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

_NO_BOARD = "the emulated boards need "


@pytest.fixture
def shared() -> Callable[[str], Path]:
    """Path of a file of SHARED by its name; the test is skipped where it is not there."""
    return _shared


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("needs_shared"):
        for name in marker.args:
            _shared(name)
    if item.get_closest_marker("qemu") and (missing := missing_board_tools()):
        _skip("qemu", _NO_BOARD + ", ".join(missing))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons = [report.longrepr[2] for report in terminalreporter.stats.get("skipped", [])]
    boards = [reason for reason in reasons if _NO_BOARD in reason]
    if boards:
        why = boards[0].removeprefix("Skipped: ")
        terminalreporter.write_line(f"{len(boards)} tests skipped: {why}")


@cache
def missing_board_tools() -> tuple[str, ...]:
    """What an emulated-board test needs and this machine lacks."""
    missing = [
        tool for tool in ("arm-none-eabi-gcc", "qemu-system-arm") if shutil.which(tool) is None
    ]
    if "arm-none-eabi-gcc" not in missing:
        specs = subprocess.run(
            ["arm-none-eabi-gcc", "-print-file-name=nano.specs"],
            capture_output=True,
            text=True,
            check=False,
        )
        if os.sep not in specs.stdout:  # GCC answers with a path only where the file is there
            missing.append("newlib for arm-none-eabi")
    return tuple(missing)


def _shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        _skip("shared", f"{name} is not under {SHARED} (see MODICUM_SHARED)")
    return path


def _skip(part: str, why: str) -> None:
    """Skip the test, or fail it where MODICUM_REQUIRE names `part`."""
    if part in os.environ.get("MODICUM_REQUIRE", "").replace(",", " ").split():
        pytest.fail(f"MODICUM_REQUIRE asks for {part}, but {why}", pytrace=False)
    pytest.skip(why)
