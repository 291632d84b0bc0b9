"""Emitted folders whose kernels are compiled once: they are the same for every net."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
from cases import Built

import modicum as mo
from modicum.job import Job, Result, decode
from modicum.trace import Trace


class Workshop:
    """Makes folders under `root`; `pool` holds compiled kernels, shared by all test processes."""

    def __init__(self, root: Path, pool: Path) -> None:
        self.root, self.pool = root, pool

    def emit(self, built: Built, name: str = "model") -> Path:
        folder = Path(tempfile.mkdtemp(dir=self.root)) / "net"
        return mo.emit(built.model, built.plan, folder, name=name)

    def make(self, folder: Path, variant: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Run make with the kernels of `variant` (a folder under build/) taken from the pool."""
        self.lend(folder, variant)
        command = ["make", "-s", *words]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            self.keep(folder, variant)
        return done

    def run(self, folder: Path, on: str = "host", **more: object) -> Trace:
        """A parity build, on the host without optimisation: its bits do not depend on it."""
        self.lend(folder, f"{on}-parity")
        with pytest.MonkeyPatch.context() as patch:
            if on == "host":
                patch.setenv("OPT", "-O0")
            trace = mo.run(folder, on=on, **more)  # type: ignore[arg-type]
        self.keep(folder, f"{on}-parity")
        return trace

    def lend(self, folder: Path, variant: str) -> None:
        source, target = self.pool / variant, folder / "build" / variant
        if source.is_dir() and not target.exists():
            shutil.copytree(source, target)
            for path in [target / "flags", *target.rglob("*.d"), *target.rglob("*.o")]:
                os.utime(path)  # newer than the sources, which were just written

    def keep(self, folder: Path, variant: str) -> None:
        if (self.pool / variant).exists():
            return
        self.pool.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=self.pool))
        made = folder / "build" / variant
        shutil.copytree(made / "kernels", scratch / "kernels")
        shutil.copy(made / "flags", scratch)
        try:
            scratch.rename(self.pool / variant)
        except OSError:  # another test process was first
            shutil.rmtree(scratch)


def execute(program: Path, job: Job, scratch: Path) -> tuple[Result | None, str]:
    """Run a job; the trace, or None where the program refused, and what it printed."""
    (scratch / "job.bin").write_bytes(job.encode())
    (scratch / "trace.bin").unlink(missing_ok=True)
    done = subprocess.run(
        [str(program)], cwd=scratch, capture_output=True, text=True, timeout=120, check=False
    )
    said = done.stdout + done.stderr
    if done.returncode != 0:
        return None, said
    return decode((scratch / "trace.bin").read_bytes()), said


def part(a: Trace, b: Trace) -> tuple[float, str]:
    """The largest relative difference over all steps, and where."""
    assert len(a.losses) == len(b.losses) and a.tensors.keys() == b.tensors.keys()
    worst = (0.0, "")
    for i, (p, q) in enumerate(zip(a.losses, b.losses, strict=True)):
        worst = max(worst, (abs(p - q) / max(abs(p), abs(q), 1e-2), f"loss of step {i}"))
    for name, p in a.tensors.items():
        q = b.tensors[name]
        assert p.shape == q.shape, name
        for i in range(len(p)):
            scale = max(float(np.abs(p[i]).max()), 1e-3)
            worst = max(worst, (float(np.abs(p[i] - q[i]).max()) / scale, f"{name}, step {i}"))
    return worst
