"""Picture: where two runs part."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from modicum.report.palette import SERIES
from modicum.report.pictures.canvas import (
    Drawn,
    axes,
    beside,
    canvas,
    ink,
    legend_below,
    sample_axis,
    thin,
)
from modicum.report.runs import Runs, listed, short
from modicum.report.tables import Numbers
from modicum.trace import LOSS_FLOOR


def draw(r: Runs) -> Drawn | None:
    """Relative differences of the losses; runs that are the same bits need no line."""
    series: dict[bytes, tuple[list[str], Numbers, int]] = {}
    tolerance = 0.0
    for i, c in enumerate(r.comparisons, start=1):
        if isinstance(c, str) or c.bitwise:
            continue
        tolerance = max(tolerance, c.tolerance)
        a, b = (np.asarray(r.traces[k].losses, dtype=np.float64) for k in (0, i))
        scale = np.maximum(np.maximum(np.abs(a), np.abs(b)), LOSS_FLOOR)
        names, _, _ = series.setdefault(b.tobytes(), ([], np.abs(a - b) / scale, i))
        names.append(r.names[i])
    known = [d[np.isfinite(d) & (d > 0)] for _, d, _ in series.values()]
    least = min((float(d.min()) for d in known if len(d)), default=0.0)
    if least == 0.0:
        return None
    margin = 0.55 + 0.17 * -(-len(series) // 4)
    figure = canvas(2.15 + margin)
    ax = axes(figure, 0.7, margin, 1.75, 0.4)
    bottom = 10.0 ** (math.floor(math.log10(least)) - 1)
    equal = []
    for names, d, i in series.values():
        colour = ink(SERIES[i % len(SERIES)])
        label = short(listed(names), 60 if len(series) < 3 else 24)
        ax.plot(*thin(np.where(d > 0, d, np.nan)), ".", color=colour, alpha=0.75, label=label,
                markersize=max(2.0, 5.0 - len(d) / 400), markeredgewidth=0)  # fmt: skip
        zero = np.flatnonzero(d == 0)
        zero = zero[:: 1 + len(zero) // 1500]
        ax.plot(zero, np.full(len(zero), bottom), "|", markersize=6, color=colour,
                markeredgewidth=0.6, clip_on=False)  # fmt: skip
        if len(zero):
            equal.append(f"{int((d == 0).sum())} of {len(d)} losses of {listed(names)}")
    ax.axhline(tolerance, color=ink("ink"), linewidth=0.9, linestyle=(0, (4, 2)))
    beside(ax, f"tolerance\n{tolerance:g}", tolerance)
    if equal:
        beside(ax, "equal bits", bottom, "soft")
    ax.set_yscale("log")
    largest = max(float(d.max()) for d in known if len(d))
    ax.set_ylim(bottom, 4 * max(tolerance, largest))
    ax.set_xlim(0, 1.01 * max(len(d) for _, d, _ in series.values()))
    _powers(ax.yaxis)
    ax.tick_params(length=0, which="both")
    ax.grid(axis="y")
    sample_axis(ax)
    ax.set_title(f"relative difference of the loss from {short(r.names[0])}", loc="left",
                 color=ink("ink"))  # fmt: skip
    legend_below(ax, 4, markerscale=2)
    caption = (
        "Measured. Each point is one training sample; the difference is relative to the larger "
        f"loss, absolute below {LOSS_FLOOR:g}."
        + (f" The same bits as {r.names[0]}: {'; '.join(equal)}." if equal else "")
    )
    return figure, f"Relative loss differences, at most {largest:.1e}", caption


def _powers(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    superscript = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    axis.set_major_locator(LogLocator(numticks=7))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(
        FuncFormatter(lambda v, _: "10" + f"{round(math.log10(v))}".translate(superscript))
    )
