"""Methods on the same few-shot tasks, as data, in tables and in a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from modicum.graph import Frozen
from modicum.methods import AnyMethod
from modicum.optim import Optimizer
from modicum.report.comparison import interval, save_all, write
from modicum.report.pictures.pareto import Point, picture
from modicum.report.runs import plain
from modicum.tasks import EpisodeRule, FixedEpisodes, Preprocess
from modicum.units import count, duration, kib

VERSION: Literal[2] = 2
NAME = "tasks"


class TaskRow(Frozen):
    """A method from one model's weights: accuracy on each task, by domain, and what it costs.

    `head` says under what, `tune` and `rate` how it learns (None: nothing is trained), `tried`
    has the validation accuracy of each rate.  Costs are the largest over the tasks.  `saved`
    (from the forward to the backward pass), `dynamic` (the arena without what is persistent)
    and `ram` are bytes of the whole plan, a sample at a time.  In the papers' convention
    (`backward_cost`) `memory_one` is that of a sample, `memory` that of `batch` samples at
    once; `macs` are of a sample's backward pass.  `seconds` of fine-tuning and `selection` are
    means.  `failed` says of which tasks nothing was learned, and why: their accuracy is that of
    a guess.
    """

    model: str
    label: str
    method: AnyMethod | None
    head: Literal["cosine", "linear"] = "cosine"
    tune: dict[str, Any] | None
    rate: float | None
    tried: dict[str, float] = {}
    accuracies: dict[str, tuple[float, ...]]
    trained: int
    saved: int
    dynamic: int
    ram: int
    memory_one: int
    batch: int
    memory: int
    macs: int
    seconds: float
    selection: float
    failed: dict[str, str] = {}

    @property
    def key(self) -> tuple[str, str]:
        return self.model, self.label


class Estimate(Frozen):
    """A mean over tasks, and half of its 95 % interval (Student's t); None for one task."""

    mean: float
    half: float | None

    def __str__(self) -> str:
        return _points(f"{100 * self.mean:.1f}", self.half)

    @property
    def signed(self) -> str:
        """As a difference."""
        return _points(f"{100 * self.mean:+.1f}", self.half)


class TaskComparison(Frozen):
    """Methods that have learned the same tasks from the same weights.

    `validation` names the domains that rates were chosen on; `left_out` maps methods that did not
    apply to the reason.
    """

    version: Literal[2] = VERSION
    tasks: int
    rule: EpisodeRule
    optimizer: Optimizer
    preprocess: Preprocess
    seed: int
    validation: tuple[str, ...] = ()
    validation_tasks: int = 0
    rows: tuple[TaskRow, ...]
    left_out: dict[str, str] = {}

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self.rows[0].accuracies)

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.model for row in self.rows))

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

    def front(self, model: str) -> tuple[str, ...]:
        """Labels of a model's Pareto front of accuracy and `memory_one`, from the least on."""
        best, labels = -1.0, []
        rows = [(r.memory_one, -self.accuracy(r).mean, r.label) for r in self.rows_of(model)]
        for _, lost, label in sorted(rows):
            if -lost > best:
                best = -lost
                labels.append(label)
        return tuple(labels)

    def rows_of(self, model: str) -> tuple[TaskRow, ...]:
        return tuple(row for row in self.rows if row.model == model)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        means = [
            {
                "model": row.model,
                "label": row.label,
                "accuracy": {d: self.accuracy(row, [d]).model_dump() for d in self.domains},
                "all": self.accuracy(row).model_dump(),
                "differences": {k: e.model_dump() for k, e in self._differences(row).items()},
                "front": row.label in self.front(row.model),
            }
            for row in self.rows
        ]
        return {**self.model_dump(mode="json"), "means": means}

    def _differences(self, row: TaskRow) -> dict[str, Estimate]:
        """Less the first method from the same weights, and less this method from the first."""
        others = {}
        first = self.rows_of(row.model)[0]
        if first is not row:
            others[first.label] = first
        for other in self.rows_of(self.models[0]):
            if other.label == row.label and other.model != row.model:
                others[other.model] = other
        return {name: self.difference(row, other) for name, other in others.items()}

    def __str__(self) -> str:
        lines = [*self._title(), "", *self._accuracies(), "", *self._costs(), "", *self._notes()]
        failed = {
            f"{self._name(row)}, {where}": why
            for row in self.rows
            for where, why in row.failed.items()
        }
        for head, reasons in (("not learned:", failed), ("left out:", self.left_out)):
            if reasons:
                wide = max(map(len, reasons))
                lines += ["", head]
                lines += [f"  {plain(k):<{wide}}  {plain(v)}" for k, v in reasons.items()]
        return "\n".join(lines)

    def _title(self) -> list[str]:
        rule = self.rule
        low, high = rule.range
        ways = f"{low}" if low == high else f"{low} to {high}"
        shots = "various shots"
        if isinstance(rule, FixedEpisodes):
            shots = f"{rule.shots} shots, {rule.queries} queries"
        n = len(self.domains)
        each = f"tasks of each of {n} domains" if n > 1 else f"tasks of {plain(self.domains[0])}"
        optimizer = str(self.optimizer)
        rates = dict.fromkeys(row.rate for row in self.rows if row.rate is not None)
        (rate,) = rates if len(rates) == 1 else (None,)
        shown = "best" if rate is None else f"{rate:g}"
        optimizer = optimizer.replace(f"lr={self.optimizer.lr:g}", f"lr={shown}")
        steps = sorted({row.tune["iterations"] for row in self.rows if row.tune})
        many = f"{' or '.join(map(str, steps))} iterations, " if steps else ""
        return [
            f"{self.tasks} {each}: {ways} ways, {shots}, seed {self.seed}",
            f"{many}{optimizer}, images {'x'.join(map(str, self.preprocess.shape))}",
        ]

    def _accuracies(self) -> list[str]:
        first = self.rows[0]
        heads = ["accuracy in %", *map(plain, self.domains)]
        heads += ["all"] if len(self.domains) > 1 else []
        less_method = any(len(self.rows_of(m)) > 1 for m in self.models)
        less_model = len(self.models) > 1
        heads += [f"less {plain(first.label)}"] if less_method else []
        heads += [f"less {plain(self.models[0])}"] if less_model else []
        lines = []
        for row in self.rows:
            mark = "* " if row.label in self.front(row.model) else "  "
            cells = [mark + self._name(row)]
            cells += [str(self.accuracy(row, [d])) for d in self.domains]
            cells += [str(self.accuracy(row))] if len(self.domains) > 1 else []
            less = self._differences(row)
            others = [first.label] if less_method else []
            others += [self.models[0]] if less_model else []
            cells += [less[name].signed if name in less else "-" for name in others]
            cells.append("-" if row.rate is None else f"{row.rate:g}")
            lines.append(cells)
        return _aligned([[*heads, "lr"], *lines])

    def _costs(self) -> list[str]:
        heads = ["a sample at a time", "trains", "saved", "dynamic", "RAM", "backward",
                 "papers' batch", "MACs bwd", "select", "learn"]  # fmt: skip
        lines = []
        for row in self.rows:
            if row.method is None:
                lines.append([f"  {self._name(row)}", *["-"] * 9])
                continue
            times = f" x{row.batch}" if row.batch > 1 else ""
            sizes = (row.saved, row.dynamic, row.ram, row.memory_one)
            lines.append([
                f"  {self._name(row)}", count(row.trained), *map(kib, sizes),
                kib(row.memory) + times, count(row.macs), duration(row.selection),
                duration(row.seconds),
            ])  # fmt: skip
        return _aligned([heads, *lines])

    def _notes(self) -> list[str]:
        lines = ["* on the Pareto front of accuracy and backward memory"]
        if self.tasks > 1:
            lines[0] += "; ± is the 95 % interval of the mean over the tasks"
        lines += [
            "saved, dynamic, RAM: of the whole plan; saved from the forward to the backward pass",
            "backward: memory in the papers' convention, for one sample and for a batch as they "
            "have it",
        ]
        if self.validation:
            names = ", ".join(map(plain, self.validation))
            lines.append(f"lr: the best on {self.validation_tasks} tasks of {names}")
        return lines

    def _name(self, row: TaskRow) -> str:
        label = plain(row.label)
        return label if len(self.models) == 1 else f"{plain(row.model)}: {label}"

    def picture(self, path: str | Path) -> None:
        """Draw accuracy over all tasks against backward memory, as .svg or .png."""
        points = []
        for row in self.rows:
            mean = self.accuracy(row)
            points.append(
                Point(
                    label=self._name(row) if not row.memory_one else plain(row.label),
                    memory=row.memory_one,
                    accuracy=mean.mean,
                    interval=mean.half,
                    macs=row.macs,
                    front=row.label in self.front(row.model),
                    series=plain(row.model) if len(self.models) > 1 else "",
                )
            )
        n = len(self.domains) * self.tasks
        spread = f", mean of {n} tasks with its 95 % interval" if n > 1 else ""
        title = f"accuracy on queries in %{spread}"
        axis = (
            "backward memory of one sample in KiB: activations, trained weights, gradients, "
            "optimiser state"
        )
        write(Path(path), picture(points, title, axis, Path(path).suffix))

    def save(self, folder: Path) -> None:
        """Write tasks.json, .txt, .svg and .png."""
        save_all(self, folder, NAME)


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95 % interval of independent values."""
    return Estimate(mean=statistics.fmean(values), half=interval(values))


def _points(mean: str, half: float | None) -> str:
    return mean if half is None else f"{mean} ± {100 * half:.1f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [f"{c:>{w}}" for c, w in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([f"{first:<{widths[0]}}", *cells]).rstrip())
    return lines
