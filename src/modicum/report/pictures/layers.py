"""Picture: which layers are updated, and what that costs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from modicum.plan import Plan
from modicum.report.palette import STATUS
from modicum.report.pictures.canvas import KEYS, WIDTH, Drawn, axes, canvas, ink, kib_axis
from modicum.report.runs import short
from modicum.report.tables import Layer, Numbers, picture_layers
from modicum.units import count


def draw(p: Plan) -> Drawn:
    """A row per layer, a panel per figure; of very many layers only some are named."""
    rows = picture_layers(p)
    n = len(rows)
    high = 0.26 if n <= 12 else 0.165 if n <= 48 else max(0.03, 8.0 / n)
    every = max(1, round(0.12 / high))
    names = [short(row.name, 28) for row in rows]
    font = min(7.5, 64 * high * every)
    left = 0.2 + 0.6 * font / 72 * max(len(name) for name in names)
    figure = canvas(n * high + 0.95)
    wide = (WIDTH - left - 0.15) / 3
    y = np.arange(n)
    panels = []
    for i, title in enumerate(("parameters (log axis)", "multiply-accumulates", "kept, KiB")):
        ax = axes(figure, left + i * wide, 0.35, 0.15 + (2 - i) * wide + 0.3, 0.6)
        ax.set_title(title, loc="left", color=ink("ink"))
        ax.set_ylim(n - 0.4, -0.6)
        ax.set_yticks(y[::every], names[::every] if i == 0 else [], fontsize=font)
        ax.tick_params(length=0)
        ax.grid(axis="x")
        ax.spines["bottom"].set_visible(False)
        panels.append(ax)
    params, macs, kept = panels
    total, trained = _ints(rows, "params"), _ints(rows, "trained")
    least = min(v for v in [*total, *trained, 1e9] if v > 0)
    params.set_xscale("log")
    params.set_xlim(10 ** math.floor(math.log10(least) - 0.01), 1.5 * max(*total, 1.0))
    _bars(params, y, total, rows, faint=True)
    _bars(params, y, trained, rows)
    _log_counts(params.xaxis)
    forward, backward = _ints(rows, "forward"), _ints(rows, "backward")
    _bars(macs, y, forward + backward, rows, faint=True)
    _bars(macs, y, forward, rows)
    _count_axis(macs.xaxis)
    _bars(kept, y, _ints(rows, "kept") / 1024, rows)
    kib_axis(kept.xaxis)
    if not any(row.kept for row in rows):
        kept.set_xlim(0, 1)
    _status_legend(figure, rows, left)
    number = sum(row.status == "trained" for row in rows)
    alt = f"{number} of {n} layers are trained."
    caption = (
        "Planned, per layer. Parameters: strong the trained ones, faint the others. "
        "Multiply-accumulates: strong forward, faint backward. Kept: from the forward to the "
        "backward pass, with what the activations and poolings after the layer keep."
        + (f" One layer in {every} is named." if every > 1 else "")
    )
    return figure, alt, caption


def _ints(rows: list[Layer], field: str) -> Numbers:
    return np.array([getattr(row, field) for row in rows], dtype=np.float64)


def _bars(ax: Any, y: Any, values: Numbers, rows: list[Layer], faint: bool = False) -> None:
    """Bars in the colours of their status, without the grid showing through the faint ones."""
    colours = [ink(STATUS[row.status]) for row in rows]
    if faint:
        ax.barh(y, values, 0.76, color=ink("page"), linewidth=0)
    ax.barh(y, values, 0.76, color=colours, alpha=0.38 if faint else None, linewidth=0)


def _count_axis(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda v, _: count(v) if v >= 1 or v == 0 else ""))


def _log_counts(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(numticks=5))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}" if v < 1e6 else count(v)))


def _status_legend(figure: Any, rows: list[Layer], left: float) -> None:
    from matplotlib.patches import Patch

    present = [s for s in STATUS if any(row.status == s for row in rows)]
    handles = [Patch(color=ink(STATUS[s]), label=s) for s in present]
    high = figure.get_size_inches()[1]
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(left / WIDTH, 1 - 0.06 / high),
                  ncols=3, borderaxespad=0, **KEYS)  # fmt: skip
