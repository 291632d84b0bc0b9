"""Methods on the same tasks, as data and in tables: means, intervals, paired differences."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from modicum.graph import Frozen
from modicum.methods import AnyMethod
from modicum.report.comparison import interval, write
from modicum.units import count, duration, kib


class TaskRow(Frozen):
    """A method from one model's weights: accuracy on each task, by domain, and what it costs.

    Bytes and MACs are the largest over the tasks, of one sample; `memory` is that of the papers'
    convention for `batch` samples at once, the `plan` figures are of the whole program.  Seconds
    are means over the tasks.  `tried` has the validation accuracy of each rate.
    """

    model: str
    label: str
    method: AnyMethod | None
    rate: float
    tried: dict[str, float] = {}
    accuracies: dict[str, tuple[float, ...]]
    batch: int
    trained: int
    saved: int
    memory: int
    macs: int
    plan_saved: int
    plan_dynamic: int
    plan_ram: int
    seconds: float
    selection: float
    failed: int = 0

    @property
    def key(self) -> tuple[str, str]:
        return self.model, self.label


class Estimate(Frozen):
    """A mean over tasks, and half of its 95 % interval (Student's t); None for one task."""

    mean: float
    half: float | None

    def __str__(self) -> str:
        half = "" if self.half is None else f" ± {100 * self.half:.1f}"
        return f"{100 * self.mean:.1f}{half}"


class TaskComparison(Frozen):
    """The rows, and from them what a table says."""

    rows: tuple[TaskRow, ...]

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self.rows[0].accuracies)

    def accuracy(self, row: TaskRow, domains: Sequence[str] | None = None) -> Estimate:
        """Over all tasks of these domains."""
        return estimate([a for d in domains or self.domains for a in row.accuracies[d]])

    def difference(
        self, one: TaskRow, other: TaskRow, domains: Sequence[str] | None = None
    ) -> Estimate:
        """How much more accurate `one` is, task by task: the same tasks for both."""
        names = domains or self.domains
        pairs = [(one.accuracies[d], other.accuracies[d]) for d in names]
        return estimate([a - b for x, y in pairs for a, b in zip(x, y, strict=True)])

    def row(self, model: str, label: str) -> TaskRow:
        return next(r for r in self.rows if r.key == (model, label))

    def save(self, folder: Path) -> None:
        write(folder / "tasks.json", (self.model_dump_json(indent=1) + "\n").encode())
        write(folder / "tasks.txt", (str(self) + "\n").encode())

    def __str__(self) -> str:
        heads = ["", *self.domains, "all", "backward memory", "MACs", "select", "learn"]
        lines: list[list[str]] = []
        for row in self.rows:
            cells = [str(self.accuracy(row, [d])) for d in self.domains]
            cost = [kib(row.memory), count(row.macs), duration(row.selection),
                    duration(row.seconds)]  # fmt: skip
            title = f"{row.model}: {row.label}"
            lines.append([title, *cells, str(self.accuracy(row)), *cost])
        widths = [max(len(r[i]) for r in [heads, *lines]) for i in range(len(heads))]
        return "\n".join(
            "  ".join(
                c.ljust(w) if i == 0 else c.rjust(w)
                for i, (c, w) in enumerate(zip(r, widths, strict=True))
            )
            for r in [heads, *lines]
        )


def summarise(rows: Sequence[TaskRow]) -> TaskComparison:
    return TaskComparison(rows=tuple(rows))


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95 % interval of independent values."""
    return Estimate(mean=statistics.fmean(values), half=interval(values))
