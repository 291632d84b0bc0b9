"""Emitted folders whose kernels are compiled once: they are the same for every net."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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
        command = ["make", "-s", *words]
        with self.kernels(folder, variant):
            return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)

    def run(self, folder: Path, on: str = "host", **more: object) -> Trace:
        """A parity build, on the host without optimisation: its bits do not depend on it."""
        with self.kernels(folder, f"{on}-parity"), pytest.MonkeyPatch.context() as patch:
            if on == "host":
                patch.setenv("OPT", "-O0")
            return mo.run(folder, on=on, **more)  # type: ignore[arg-type]

    def native(self, folder: Path) -> mo.Native:
        """The net in this process, with the bits of a parity build."""
        with self.kernels(folder, "lib-parity"), pytest.MonkeyPatch.context() as patch:
            patch.setenv("OPT", "-O0")
            return mo.Native(folder, parity=True)

    @contextmanager
    def kernels(self, folder: Path, variant: str) -> Iterator[None]:
        """Lend the compiled kernels to the folder; who comes first compiles, the others wait."""
        self.pool.mkdir(parents=True, exist_ok=True)
        made, kept = folder / "build" / variant, self.pool / variant
        with (self.pool / f"{variant}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not kept.exists():
                yield
                if (made / "kernels").is_dir():
                    scratch = Path(tempfile.mkdtemp(dir=self.pool))
                    shutil.copytree(made / "kernels", scratch / "kernels")
                    shutil.copy(made / "flags", scratch)
                    scratch.rename(kept)
                return
        if not made.exists():
            shutil.copytree(kept, made)
            for path in [made / "flags", *made.rglob("*.d"), *made.rglob("*.o")]:
                os.utime(path)  # newer than the sources, which were just written
        yield


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


def same_on_board(workshop: Workshop, folder: Path, x: np.ndarray, y: np.ndarray) -> Trace:
    """Train on the host and on an emulated M4F, bit by bit alike; the trace of the latter."""
    job = {"train": (x, y), "test": (x, y), "record": True}
    host, there = (workshop.run(folder, on=on, **job) for on in ("host", "m4f"))
    assert there.losses == host.losses
    for name, tensor in host.tensors.items():
        assert there.tensors[name].tobytes() == tensor.tobytes(), name
    assert there.logits_after.tobytes() == host.logits_after.tobytes()
    return there


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
