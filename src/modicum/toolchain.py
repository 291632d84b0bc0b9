"""Building an emitted folder with make.  Imports nothing heavy: `native` has to stay small."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from modicum.errors import InvalidInput, ModicumError, ToolMissing


def build(folder: Path, target: str, parity: bool) -> Path:
    """Run make; returns the program.  Raises ToolMissing or ModicumError with make's message.

    The kernels are the same files for every net, and compiling them takes most of the time: their
    objects are kept in `kernel_cache()` and lent to folders that have none.
    """
    make = shutil.which("make")
    if make is None:
        raise ToolMissing("make is not installed", hint="apt install make gcc")
    command = [make, "-s", "-j2", "-C", str(folder), target]
    command += ["PARITY=1"] if parity else []
    objects = folder / "build" / f"{target}-{'parity' if parity else 'fast'}"
    kept = kernel_cache() / _kernel_key(folder, objects.name)
    with contextlib.suppress(OSError):  # without a cache they are compiled
        _lend(kept, objects)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        kind: type[ModicumError] = ModicumError
        if any("not on the PATH" in line for line in lines):
            kind = ToolMissing
        raise kind(f"{target} does not build", where=str(folder), why=lines[:12])
    with contextlib.suppress(OSError):
        _keep(objects, kept)
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


def kernel_cache() -> Path:
    """Where compiled kernels are kept: MODICUM_CACHE, or the user's cache folder."""
    given = os.environ.get("MODICUM_CACHE")
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(given) if given else Path(user) / "modicum") / "kernels"


def _kernel_key(folder: Path, variant: str) -> str:
    """What decides the objects: sources, rules, compilers, flags from outside, this processor."""
    digest = hashlib.sha256(variant.encode())
    for path in [folder / "Makefile", *sorted((folder / "kernels").glob("*.[ch]"))]:
        digest.update(path.name.encode())
        digest.update(path.read_bytes() if path.is_file() else b"")
    for name in ("CC", "CROSS", "CFLAGS", "OPT", "PORT_OPT", "WERROR"):
        digest.update(f"{name}={os.environ.get(name)}".encode())
    digest.update(_machine(os.environ.get("CC") or "cc", os.environ.get("CROSS")).encode())
    return digest.hexdigest()[:32]


@functools.cache
def _machine(cc: str, cross: str | None) -> str:
    """The versions of both compilers and what -march=native stands for."""
    said = []
    for tool in (cc.split()[0], f"{cross or 'arm-none-eabi-'}gcc"):
        if shutil.which(tool):
            done = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False)
            said.append(done.stdout)
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        said += [next((x for x in lines if x.startswith(k)), "") for k in ("model name", "flags")]
    return "\n".join(said)


def _lend(kept: Path, objects: Path) -> None:
    if objects.exists() or not kept.is_dir():
        return
    shutil.copytree(kept, objects)
    for path in objects.rglob("*"):
        os.utime(path)  # newer than the sources, which were just written


def _keep(objects: Path, kept: Path) -> None:
    """All or nothing; who comes second finds it done."""
    if kept.exists() or not (objects / "kernels").is_dir():
        return
    kept.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=kept.parent))
    try:
        shutil.copytree(objects / "kernels", scratch / "kernels")
        shutil.copy(objects / "flags", scratch)
        scratch.rename(kept)
    except OSError:
        shutil.rmtree(scratch, ignore_errors=True)
