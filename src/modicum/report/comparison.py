"""Comparison: methods in one table, and in one picture of accuracy against memory."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from modicum.graph import Frozen
from modicum.methods import AnyMethod
from modicum.optim import SGD, Optimizer
from modicum.report.pictures.pareto import Point, picture
from modicum.report.runs import plain
from modicum.tasks import Augment, Preprocess
from modicum.units import count, duration, kib

VERSION: Literal[1] = 1
NAME = "comparison"


class Budget(Frozen):
    """What is the same for all methods, but for a learning rate that is chosen for each."""

    epochs: int
    batch: int
    optimizer: Optimizer = SGD()
    schedule: Literal["constant", "cosine"] = "cosine"
    augment: Augment | None = None
    preprocess: Preprocess


class Row(Frozen):
    """One method: accuracy over the seeds, and what it costs.

    interval: half of the 95 % interval of the mean accuracy (Student's t), None for one seed.
    validation: accuracy on held-out training data by learning rate, where one was chosen.  Bytes:
    `saved` from forward to backward pass for a sample, `saved_batch` for the batch, `dynamic`
    the arena without what is persistent, `ram` and `flash` all of a board's.  `memory` is what
    training a batch at once adds to inference: saved_batch, gradients, optimiser state.  MACs are
    of one sample; `seconds` of one training, `seconds_per_step` of one batch.
    """

    label: str
    method: AnyMethod
    rate: float
    validation: dict[str, float | None] = {}
    accuracies: tuple[float, ...]
    accuracy: float
    interval: float | None
    trained_params: int
    saved: int
    saved_batch: int
    memory: int
    dynamic: int
    ram: int
    flash: int
    fits: bool | None
    macs_forward: int
    macs_backward: int
    seconds: float
    seconds_per_step: float


class Comparison(Frozen):
    """Methods that were trained on the same data with the same budget.

    `rates` are the learning rates that were tried; `left_out` maps methods that did not apply or
    diverged to the reason.
    """

    version: Literal[1] = VERSION
    graph: str
    input: tuple[int, ...]
    classes: tuple[str, ...]
    train: int
    test: int
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    board: str | None
    budget: Budget
    rows: tuple[Row, ...]
    left_out: dict[str, str]

    @property
    def front(self) -> tuple[str, ...]:
        """Labels of the Pareto front, from the least memory on: more accurate than all before."""
        best, labels = -1.0, []
        for row in sorted(self.rows, key=lambda r: (r.memory, -r.accuracy)):
            if row.accuracy > best:
                best = row.accuracy
                labels.append(row.label)
        return tuple(labels)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**self.model_dump(mode="json"), "front": list(self.front)}

    def __str__(self) -> str:
        rows = [self._cells(row) for row in self.rows]
        head = ("", "accuracy", "lr", "trains", "saved", f"saved x{self.budget.batch}", "memory",
                "dynamic", "RAM", "MACs fwd", "bwd", "training", "step")  # fmt: skip
        table = [head, *rows]
        widths = [max(len(r[i]) for r in table) for i in range(len(head))]
        lines = [*self._title(), ""]
        for r in table:
            right = [f"{c:>{w}}" for c, w in zip(r[1:], widths[1:], strict=True)]
            lines.append("  ".join([f"{r[0]:<{widths[0]}}", *right]).rstrip())
        lines += ["", *self._notes()]
        if self.left_out:
            wide = max(map(len, self.left_out))
            lines += ["", "left out:"]
            lines += [f"  {plain(k):<{wide}}  {plain(v)}" for k, v in self.left_out.items()]
        return "\n".join(lines)

    def _title(self) -> list[str]:
        b = self.budget
        shape = "x".join(map(str, self.input[1:]))
        augment = "no augmentation" if b.augment is None else f"augmented ({b.augment.crop})"
        optimizer = str(b.optimizer)
        if len(self.rates) > 1:
            optimizer = optimizer.replace(f"lr={b.optimizer.lr:g}", "lr=best")
        return [
            f"{len(self.classes)} classes, {self.train:,} training and {self.test:,} test images, "
            f"{shape}",
            f"seeds {', '.join(map(str, self.seeds))}; epochs {b.epochs}, batch {b.batch}, "
            f"{optimizer}, {b.schedule} rate, {augment}",
        ]

    def _cells(self, row: Row) -> tuple[str, ...]:
        mark = "* " if row.label in self.front else "  "
        spread = "" if row.interval is None else f" ± {100 * row.interval:.1f}"
        misfit = " !" if row.fits is False else ""
        return (
            mark + plain(row.label),
            f"{100 * row.accuracy:.1f}{spread} %",
            f"{row.rate:g}",
            count(row.trained_params),
            *(kib(n) for n in (row.saved, row.saved_batch, row.memory, row.dynamic)),
            kib(row.ram) + misfit,
            count(row.macs_forward),
            count(row.macs_backward),
            duration(row.seconds),
            duration(row.seconds_per_step),
        )

    def _notes(self) -> list[str]:
        lines = ["* on the Pareto front of accuracy and memory"]
        if len(self.seeds) > 1:
            lines[0] += "; ± is the 95 % interval of the mean over the seeds"
        if any(row.fits is False for row in self.rows):
            lines.append(f"! does not fit {self.board}")
        lines.append(
            f"memory: saved for a batch of {self.budget.batch} at once, gradients, optimiser state"
        )
        if len(self.rates) > 1:
            tried = ", ".join(f"{rate:g}" for rate in self.rates)
            lines.append(f"lr: the best of {tried} on a fifth of the training set")
        return lines

    def picture(self, path: str | Path) -> None:
        """Draw accuracy against memory, as .svg or .png."""
        points = [
            Point(
                label=plain(row.label),
                memory=row.memory,
                accuracy=row.accuracy,
                interval=row.interval,
                macs=row.macs_backward,
                front=row.label in self.front,
            )
            for row in self.rows
        ]
        seeds = len(self.seeds)
        spread = f", mean of {seeds} seeds with its 95 % interval" if seeds > 1 else ""
        axis = (
            f"memory that training adds in KiB: saved for a batch of {self.budget.batch}, "
            "gradients, optimiser state"
        )
        title = f"test accuracy in %{spread}"
        write(Path(path), picture(points, title, axis, Path(path).suffix))

    def save(self, folder: Path) -> None:
        """Write comparison.json, .txt, .svg and .png."""
        save_all(self, folder, NAME)


class Shown(Protocol):
    """What has plain data, a text and a picture."""

    def as_dict(self) -> dict[str, Any]: ...

    def picture(self, path: Path) -> None: ...


def save_all(made: Shown, folder: Path, name: str) -> None:
    """Write name.json, .txt, .svg and .png."""
    write(folder / f"{name}.json", (json.dumps(made.as_dict(), indent=1) + "\n").encode())
    write(folder / f"{name}.txt", (str(made) + "\n").encode())
    for suffix in ("svg", "png"):
        made.picture(folder / f"{name}.{suffix}")


def write(path: Path, data: bytes) -> None:
    """Write a file, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.write_bytes(data)
    temporary.replace(path)


def interval(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % interval of the mean; None for fewer than two values.

    >>> round(interval((0.90, 0.92, 0.94)), 4)
    0.0497
    """
    if len(values) < 2:
        return None
    return t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def t_quantile(freedom: int, inside: float = 0.95) -> float:
    """t with P(-t < T < t) = `inside`, for Student's T with so many degrees of freedom.

    >>> [round(t_quantile(n), 3) for n in (1, 2, 10)]
    [12.706, 4.303, 2.228]
    """
    low, high = 0.0, math.pi / 2  # of the angle arctan(t / sqrt(freedom))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_inside(middle, freedom) < inside else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _t_inside(angle: float, freedom: int) -> float:
    """P(-t < T < t) for t = sqrt(freedom) tan(angle): Abramowitz and Stegun 26.7.3 and 26.7.4."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = cosine if odd else 1.0, 0.0
    for k in range(2 + odd, freedom + 1, 2):
        total += term
        term *= cosine**2 * (k - 1) / k
    if odd:
        return 2 / math.pi * (angle + sine * total)
    return sine * total
