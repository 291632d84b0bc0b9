"""Picture: the loss of every training sample, and accuracy before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from modicum.report.palette import SERIES
from modicum.report.pictures.canvas import (
    WIDTH,
    Drawn,
    axes,
    canvas,
    ink,
    legend_below,
    sample_axis,
    thin,
)
from modicum.report.runs import Runs, accuracy_change, arrow, listed, short
from modicum.report.tables import Numbers


def draw(r: Runs) -> Drawn | None:
    shown = [i for i, t in enumerate(r.traces) if len(t.losses) > 1]
    scored = [i for i, t in enumerate(r.traces) if accuracy_change(t)]
    if not shown and not scored:
        return None
    bottom = 0.55 + 0.17 * -(-len(shown) // 4)
    figure = canvas(2.7 + bottom)
    right = 0.2
    if scored:
        right = min(5.0, 1.3 + 0.75 * len(scored)) if shown else 0.2
        left = WIDTH - right + 0.75 if shown else 0.6
        _accuracy_bars(axes(figure, left, bottom, 0.2, 0.4), r, scored)
    caption = ""
    if shown:
        ax = axes(figure, 0.55, bottom, right, 0.4)
        caption = _loss_curves(ax, r, shown)
    ends = [f"{r.names[i]} {arrow(r.traces[i].losses[:1], r.traces[i].losses[-1:])}" for i in shown]
    return figure, "Loss: " + "; ".join(ends), caption


def _loss_curves(ax: Any, r: Runs, shown: list[int]) -> str:
    """Faint: every sample; strong: a moving mean.  Curves that coincide are drawn as dashes."""
    from matplotlib.lines import Line2D

    smooth = {i: _smooth(_finite_numbers(r.traces[i].losses)) for i in shown}
    groups = _groups([smooth[i] for i in shown])
    high, largest = 0.0, 0.0
    for members in groups:
        for k, member in enumerate(members):
            i = shown[member]
            colour, raw = ink(SERIES[i % len(SERIES)]), _finite_numbers(r.traces[i].losses)
            if k == 0:
                ax.plot(*thin(raw), color=colour, linewidth=0.5, alpha=0.3)
            dash: Any = "-" if k == 0 else (6 * (k - 1), (6, 6 * (len(members) - 1)))
            width = 2.6 if k == 0 and len(members) > 1 else 1.4
            ax.plot(*thin(smooth[i]), color=colour, linewidth=width, linestyle=dash,
                    dash_capstyle="butt")  # fmt: skip
            known = raw[np.isfinite(raw)]
            if len(known):
                high = max(high, float(np.quantile(known, 0.98)), float(np.nanmax(smooth[i])))
                largest = max(largest, float(known.max()))
    ax.set_ylim(0, 1.08 * high if high > 0 else 1)
    ax.set_xlim(0, 1.01 * max(len(r.traces[i].losses) for i in shown))
    sample_axis(ax)
    ax.tick_params(length=0)
    ax.grid(axis="y")
    ax.set_title("loss", loc="left", color=ink("ink"))
    colours = [ink(SERIES[i % len(SERIES)]) for i in shown]
    handles = [Line2D([], [], color=colour, linewidth=2) for colour in colours]
    labels = [short(r.names[i], 18) for i in shown]
    legend_below(ax, 4, handles=handles, labels=labels, handlelength=1.6)
    lie = [
        f"{listed([r.names[shown[k]] for k in members[1:]])} "
        f"{'lies' if len(members) == 2 else 'lie'} on {r.names[shown[members[0]]]} (dashed)"
        for members in groups
        if len(members) > 1
    ]
    window = max(_window(len(r.traces[i].losses)) for i in shown)
    caption = (
        f"Measured. Strong: mean over {window} samples. Faint: every sample, before its update."
    )
    if largest > ax.get_ylim()[1]:
        caption += " The largest losses are above the axis."
    return caption + (f" {'; '.join(lie)}." if lie else "")


def _accuracy_bars(ax: Any, r: Runs, scored: list[int]) -> None:
    x = np.arange(len(scored))
    before = [100 * (r.traces[i].accuracy_before or 0.0) for i in scored]
    after = [100 * (r.traces[i].accuracy_after or 0.0) for i in scored]
    colours = [ink(SERIES[i % len(SERIES)]) for i in scored]
    ax.bar(x - 0.21, before, 0.38, color=colours, alpha=0.38, linewidth=0)
    ax.bar(x + 0.21, after, 0.38, color=colours, linewidth=0)
    font = 7.5 if len(scored) <= 5 else 6
    for at, value in [*zip(x - 0.21, before, strict=True), *zip(x + 0.21, after, strict=True)]:
        ax.text(at, value + 1.5, f"{value:.0f}", ha="center", va="bottom", fontsize=font)
    most = max(6, 34 // len(scored))
    ax.set_xticks(x, [short(r.names[i], most) for i in scored])
    ax.set_xlim(-0.6, max(len(scored), 2) - 0.4)
    ax.set_ylim(0, 108)
    ax.set_yticks([0, 25, 50, 75, 100])
    ax.tick_params(length=0)
    ax.grid(axis="y")
    ax.set_title("accuracy in %, before (faint) and after", loc="left", color=ink("ink"))


def _window(n: int) -> int:
    return max(1, n // 20)


def _smooth(y: Numbers) -> Numbers:
    """Centred moving mean over a twentieth of the samples; what is not finite is left out."""
    window = np.ones(_window(len(y)))
    known = np.isfinite(y)
    total = np.convolve(np.where(known, y, 0.0), window, "same")
    weight = np.convolve(known.astype(float), window, "same")
    return np.where(weight > 0, total / np.maximum(weight, 1.0), np.nan)


def _finite_numbers(values: Sequence[float]) -> Numbers:
    y = np.asarray(values, dtype=np.float64)
    return np.where(np.isfinite(y), y, np.nan)


def _groups(curves: list[Numbers]) -> list[list[int]]:
    """Curves that nobody could tell apart in the picture, together; the first one leads."""
    top = max((float(np.nanmax(c)) for c in curves if np.isfinite(c).any()), default=0.0)
    groups: list[list[int]] = []
    for i, curve in enumerate(curves):
        for members in groups:
            first = curves[members[0]]
            if len(first) == len(curve) and np.allclose(
                first, curve, rtol=0, atol=0.006 * top, equal_nan=True
            ):
                members.append(i)
                break
        else:
            groups.append([i])
    return groups
