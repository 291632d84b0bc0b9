"""Picture: what the weight of each layer and the last k biases add to accuracy, layer by layer.

A file of its own, on a page-coloured ground; what was chosen is filled and the rest is hollow, and
a larger share has a larger mark, so that it reads without colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from modicum.report.palette import SERIES
from modicum.report.pictures.canvas import KEYS, WIDTH, as_file, axes, canvas, ink
from modicum.report.runs import short

LEFT, GAP, RIGHT = 0.35, 0.35, 0.2  # inches beside names, panels, the edge
ROW = 0.19
MOST = 0.13  # of a mark
BIASES = "red"


@dataclass(frozen=True)
class Mark:
    """A gain and the half width of its interval, as shares."""

    gain: float
    interval: float | None
    chosen: bool


@dataclass(frozen=True)
class Row:
    """A layer: the gain of its weight by share; of the biases from this layer on, if known."""

    label: str
    shares: dict[str, Mark]
    biases: Mark | None


def picture(rows: Sequence[Row], title: str, suffix: str) -> bytes:
    """The picture as a file.  Raises UsageError for a suffix other than .svg and .png."""
    return as_file(lambda: draw(rows, title), suffix)


def draw(rows: Sequence[Row], title: str) -> Any:
    """A row per layer; the weights' gains in the left panel, the biases' in the right one."""
    names = [short(row.label, 34) for row in rows]
    left = LEFT + 0.058 * max(map(len, names))
    figure = canvas(max(len(rows) * ROW, 0.8) + 1.25)
    wide = (WIDTH - left - GAP - RIGHT) / 3
    weights = axes(figure, left, 0.75, RIGHT + GAP + wide, 0.5)
    biases = axes(figure, left + 2 * wide + GAP, 0.75, RIGHT, 0.5)
    _weights(weights, rows)
    _biases(biases, rows)
    for ax in (weights, biases):
        ax.set_ylim(len(rows) - 0.4, -0.6)
        ax.set_yticks(range(len(rows)), names if ax is weights else [])
        ax.axvline(0, color=ink("ink"), linewidth=0.7, zorder=1)
        ax.grid(axis="x")
        ax.grid(axis="y", alpha=0.5)
        ax.tick_params(length=0)
        ax.spines[["left", "bottom"]].set_visible(False)
        _points_axis(ax.xaxis)
    weights.set_title("gain of a layer's weight, in points", loc="left", color=ink("ink"))
    biases.set_title("gain of the biases from a layer on", loc="left", color=ink("ink"))
    high = figure.get_size_inches()[1]
    figure.text(left / WIDTH, 1 - 0.17 / high, title, va="center", color=ink("ink"))
    _keys(figure, rows, left / WIDTH, 0.3 / high)
    return figure


def _weights(ax: Any, rows: Sequence[Row]) -> None:
    for share, (colour, size) in _looks(rows).items():
        for y, row in enumerate(rows):
            if mark := row.shares.get(share):
                _mark(ax, y, mark, colour, size)


def _biases(ax: Any, rows: Sequence[Row]) -> None:
    known = [(y, row.biases) for y, row in enumerate(rows) if row.biases is not None]
    ax.plot([100 * m.gain for _, m in known], [y for y, _ in known], color=ink(BIASES),
            linewidth=1.0, zorder=2)  # fmt: skip
    for y, mark in known:
        _mark(ax, y, mark, BIASES, 0.6 * MOST, whisker=True)
        if mark.chosen:
            ax.axhspan(y - 0.5, len(rows) - 0.5, color=ink(BIASES), alpha=0.08, linewidth=0)


def _mark(ax: Any, y: int, mark: Mark, colour: str, size: float, whisker: bool = False) -> None:
    """Hollow, or filled and with its interval where it was chosen."""
    if mark.interval and (mark.chosen or whisker):
        ax.errorbar(100 * mark.gain, y, xerr=100 * mark.interval, color=ink(colour),
                    linewidth=0.9, capsize=2.0, zorder=3)  # fmt: skip
    ax.scatter(100 * mark.gain, y, (72 * size) ** 2, zorder=4 if mark.chosen else 3,
               color=ink(colour if mark.chosen else "page"), edgecolor=ink(colour),
               linewidth=1.1)  # fmt: skip


def _looks(rows: Sequence[Row]) -> dict[str, tuple[str, float]]:
    """Colour and size of the marks of each share, the largest first: it lies below the others."""
    shares = sorted({s for row in rows for s in row.shares}, key=Fraction, reverse=True)
    hues = [name for name in SERIES if name != BIASES]
    return {s: (hues[i % len(hues)], MOST * 0.8**i) for i, s in enumerate(shares)}


def _points_axis(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:+g}".replace("-", "−") if v else "0"))


def _keys(figure: Any, rows: Sequence[Row], left: float, bottom: float) -> None:
    from matplotlib.lines import Line2D

    def dot(colour: str, size: float, filled: bool, text: str) -> Any:
        return Line2D([], [], linestyle="none", marker="o", markersize=72 * size, color=ink(colour),
                      markerfacecolor=ink(colour if filled else "page"), label=text)  # fmt: skip

    looks = list(_looks(rows).items())
    keys = [dot(c, size, False, s) for s, (c, size) in looks]
    if keys:
        keys[0].set_label(f"share of the input channels: {looks[0][0]}")
    keys.append(dot(BIASES, 0.6 * MOST, False, "biases"))
    keys.append(dot("soft", 0.6 * MOST, True, "chosen; bars are 95 % intervals"))
    figure.legend(handles=keys, loc="upper left", bbox_to_anchor=(left, bottom), ncols=len(keys),
                  borderaxespad=0, columnspacing=1.4, **{**KEYS, "handletextpad": 0.6})  # fmt: skip
