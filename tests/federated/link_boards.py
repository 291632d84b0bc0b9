"""Nets with a link, boards that run them, and lines that damage what they carry."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from emit.folders import Workshop
from torch import nn

import modicum as mo
from modicum.federated.board import Emulated
from modicum.federated.learner import Learner, NativeLearner
from modicum.federated.link import Line
from modicum.federated.rules import TinyMetaFed
from modicum.models import SineNet

LOCAL = ("layers.4.*",)
SUPPORT = 16  # samples that the local parameters learn from, before the shared ones do


class Boards:
    """Emitted folders and what runs them, with kernels that are compiled once."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        base = factory.getbasetemp()
        pool = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
        self.root = Path(tempfile.mkdtemp(dir=base))
        self.workshop = Workshop(self.root, pool / "compiled-kernels")

    def sine(self, rate: float = 0.02) -> Path:
        """SineNet under TinyMetaFed, its last layer local."""
        torch.manual_seed(0)
        net = SineNet()
        graph = mo.capture(net, torch.zeros(1, 1))
        method, optimizer = TinyMetaFed(local=LOCAL, support=SUPPORT, rate=rate).training(graph)
        plan = mo.plan(graph, "nano33ble", method, optimizer, loss="mse")
        return mo.emit(net, plan, Path(tempfile.mkdtemp(dir=self.root)) / "net")

    def images(self) -> Path:
        """Labels of images that do not fit a frame, and neither do the outputs."""
        torch.manual_seed(1)
        net = nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 70)
        )
        graph = mo.capture(net, torch.zeros(1, 2, 8, 8))
        plan = mo.plan(graph, "nano33ble", optimizer=mo.SGD(lr=0.05, momentum=0.9), accumulate=3)
        return mo.emit(net, plan, Path(tempfile.mkdtemp(dir=self.root)) / "net")

    def native(self, folder: Path, local: tuple[str, ...] = LOCAL) -> NativeLearner:
        """In this process, with the bits of the boards."""
        with self._kernels(folder, "lib"):
            return NativeLearner(folder, local, parity=True)

    def board(self, folder: Path, on: str = "host", local: tuple[str, ...] = LOCAL) -> Emulated:
        with self._kernels(folder, on):
            return Emulated(folder, on, local)

    @contextmanager
    def _kernels(self, folder: Path, on: str) -> Iterator[None]:
        with self.workshop.kernels(folder, f"{on}-parity"), pytest.MonkeyPatch.context() as patch:
            if on in ("lib", "host"):  # sooner built, with the same bits
                patch.setenv("OPT", "-O0")
            yield


def sines(n: int, seed: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    for _ in range(n):
        x = rng.uniform(-5, 5, 1).astype(np.float32)
        yield x, np.sin(x)


def agree(a: Learner, b: Learner, shared: np.ndarray, samples: list) -> None:
    """Both learn the same task, to the same bits."""
    a.begin(shared)
    b.begin(shared)
    assert [a.learn(x, y) for x, y in samples] == [b.learn(x, y) for x, y in samples]
    assert np.array_equal(a.predict(samples[0][0]), b.predict(samples[0][0]))
    assert np.array_equal(a.shared(), b.shared())
    assert not np.array_equal(a.shared(), shared)


class Damaging:
    """Loses, cuts, flips, doubles and adds to what goes through, in both directions."""

    def __init__(self, line: Line, seed: int, rate: float) -> None:
        self.line, self.rng, self.rate = line, Random(seed), rate

    def read(self, timeout: float) -> bytes:
        return self._damage(self.line.read(timeout))

    def write(self, data: bytes) -> None:
        self.line.write(self._damage(data))

    def close(self) -> None:
        self.line.close()

    def _damage(self, data: bytes) -> bytes:
        if not data or self.rng.random() > self.rate:
            return data
        at = self.rng.randrange(len(data))
        flipped = data[:at] + bytes([data[at] ^ 1 << self.rng.randrange(8)]) + data[at + 1 :]
        garbage = self.rng.randbytes(at)
        return self.rng.choice([b"", data[:at], flipped, data + data, garbage + data])


class Deaf:
    """Loses the first answer to every request."""

    def __init__(self, line: Line) -> None:
        self.line, self.last = line, b""

    def read(self, timeout: float) -> bytes:
        data = self.line.read(timeout)
        return data if self.again else b""

    def write(self, data: bytes) -> None:
        self.again, self.last = data == self.last, data
        self.line.write(data)

    def close(self) -> None:
        self.line.close()


class Echoing:
    """Brings back what was written, and whatever the board says goes to the board again."""

    def __init__(self, line: Line) -> None:
        self.line, self.echo = line, b""

    def read(self, timeout: float) -> bytes:
        echo, self.echo = self.echo, b""
        if echo:
            return echo
        data = self.line.read(timeout)
        self.line.write(data)
        return data

    def write(self, data: bytes) -> None:
        self.echo += data
        self.line.write(data)

    def close(self) -> None:
        self.line.close()
