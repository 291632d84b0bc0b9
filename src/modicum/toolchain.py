"""Building an emitted folder with make.  Imports nothing heavy: `native` has to stay small."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from modicum.errors import InvalidInput, ModicumError, ToolMissing


def build(folder: Path, target: str, parity: bool) -> Path:
    """Run make; returns the program.  Raises ToolMissing or ModicumError with make's message."""
    make = shutil.which("make")
    if make is None:
        raise ToolMissing("make is not installed", hint="apt install make gcc")
    command = [make, "-s", "-j2", "-C", str(folder), target]
    command += ["PARITY=1"] if parity else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        kind: type[ModicumError] = ModicumError
        if any("not on the PATH" in line for line in lines):
            kind = ToolMissing
        raise kind(f"{target} does not build", where=str(folder), why=lines[:12])
    variant = "parity" if parity else "fast"
    name = {"host": "main", "lib": f"lib{net_name(folder)}.so"}.get(target, "main.elf")
    place = "host" if target in ("host", "lib") else target
    return folder / "build" / f"{place}-{variant}" / name


def net_name(folder: Path) -> str:
    """The prefix of the net's symbols, from net.mk."""
    for line in (folder / "net.mk").read_text().splitlines():
        key, _, value = line.partition("=")
        if key.strip() == "NET":
            return value.strip()
    raise InvalidInput(f"{folder / 'net.mk'} does not name the net")
