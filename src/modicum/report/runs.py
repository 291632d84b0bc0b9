"""Runs: a plan's traces side by side, as rows of a table and as plain data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from modicum.errors import InvalidInput
from modicum.plan import Plan
from modicum.trace import Comparison, Trace, compare
from modicum.units import duration, kib, percent, size

Row = tuple[str, list[str]]


@dataclass(frozen=True, eq=False)
class Runs:
    """A plan and its traces: each has a name, and is compared with the first."""

    plan: Plan
    traces: tuple[Trace, ...] = ()

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Where each trace ran, numbered where two ran in one place."""
        names: list[str] = []
        for trace in self.traces:
            name = short(plain(trace.where), 40) or "run"
            again = sum(t.where == trace.where for t in self.traces[: len(names)])
            names.append(f"{name} ({again + 1})" if again else name)
        return tuple(names)

    @cached_property
    def comparisons(self) -> tuple[Comparison | str, ...]:
        """Each further trace against the first; a text where they cannot be compared."""
        return tuple(self._compare(i) for i in range(1, len(self.traces)))

    def _compare(self, i: int) -> Comparison | str:
        a, b = self.names[0], self.names[i]
        try:
            return replace(compare(self.traces[0], self.traces[i]), a=a, b=b)
        except InvalidInput as error:
            why = "; ".join(error.details.get("why", ()))
            return f"{a} and {b} are not compared: {error.what}" + (f" ({why})" if why else "")


def run_rows(r: Runs) -> list[Row]:
    """What each run measured, one row per figure, one cell per run; no row without a figure."""

    def row(name: str, cell: Callable[[Trace], str | None]) -> Row:
        return name, [cell(t) or "-" for t in r.traces]

    def figure(name: str, key: str, form: Callable[[float], str]) -> Row:
        def cell(t: Trace) -> str | None:
            value = figure_of(t, key)
            return None if value is None else form(value)

        return row(name, cell)

    def measured(name: str, key: str, planned: int) -> Row:
        return figure(name, key, lambda n: f"{kib(n)} of {kib(planned)}")

    c = r.plan.cost
    rows = [
        row("how", _how),
        row("training samples", lambda t: f"{len(t.losses):,}"),
        row("loss, first -> last sample", lambda t: arrow(t.losses[:1], t.losses[-1:])),
        row("loss, first -> last tenth", _tenths),
        row("accuracy, before -> after", accuracy_change),
        measured("arena, high water of planned", "arena_high_water", c.arena),
        figure(".data + .bss beside the arena", "static", kib),
        measured("stack, high water of planned", "stack_high_water", c.stack),
        measured("RAM, measured of planned", "ram", c.ram),
        row("flash, code (.text)", lambda t: _section(t, "text")),
        row("flash, weights", lambda t: _section(t, "weights")),
        figure("executed instructions per training step", "instructions_train", _whole),
        figure("executed instructions per inference", "instructions_predict", _whole),
        figure("time per training step, C on this host", "microseconds_train", _micro),
        figure("time per inference, C on this host", "microseconds_predict", _micro),
        figure("time of all training, PyTorch", "seconds", duration),
        figure("peak memory of the whole process", "peak_rss", size),
    ]
    return [(name, cells) for name, cells in rows if any(cell != "-" for cell in cells)]


def figure_of(t: Trace, key: str) -> float | None:
    """A figure if it was measured and is finite."""
    value = t.figures.get(key)
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _section(t: Trace, key: str) -> str | None:
    """Not of a host: its program has more in it than the net."""
    value = figure_of(t, key)
    return kib(value) if value is not None and emulated(t) else None


def emulated(t: Trace) -> bool:
    """It ran on an emulated board: its work is counted in instructions."""
    return "instructions_train" in t.figures or "instructions_predict" in t.figures


def _how(t: Trace) -> str | None:
    if emulated(t):
        return "C, emulated"
    if "microseconds_train" in t.figures or "microseconds_predict" in t.figures:
        return "C, host"
    return "PyTorch" if t.where == "torch" else None


def arrow(before: Sequence[float], after: Sequence[float]) -> str | None:
    if not len(before) or not len(after):
        return None
    return f"{np.mean(before):.4f} -> {np.mean(after):.4f}"


def _tenths(t: Trace) -> str | None:
    tenth = len(t.losses) // 10
    return arrow(t.losses[:tenth], t.losses[-tenth:]) if tenth > 1 else None


def accuracy_change(t: Trace) -> str | None:
    if t.accuracy_before is None or t.accuracy_after is None:
        return None
    return f"{percent(t.accuracy_before)} -> {percent(t.accuracy_after)}"


def _whole(n: float) -> str:
    return f"{n:,.0f}"


def _micro(n: float) -> str:
    return f"{n:,.0f} µs"


def run_dict(name: str, t: Trace) -> dict[str, Any]:
    return {
        "name": name,
        "where": t.where,
        "how": _how(t),
        "seed": t.seed,
        "steps": len(t.losses),
        "loss_first": t.losses[0] if t.losses else None,
        "loss_last": t.losses[-1] if t.losses else None,
        "accuracy_before": t.accuracy_before,
        "accuracy_after": t.accuracy_after,
        "figures": dict(t.figures),
        "losses": list(t.losses),
    }


def plain(text: str) -> str:
    """Text from outside without control characters: it goes to a terminal and into XML."""
    return "".join(c if c.isprintable() else "?" for c in text)


def short(text: str, most: int = 26) -> str:
    if len(text) <= most:
        return text
    return f"{text[: most // 2 - 1]}…{text[-(most - most // 2) :]}"


def listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
