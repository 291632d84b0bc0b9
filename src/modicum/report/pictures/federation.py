"""Picture: how new clients do, against rounds, bytes and modelled energy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from modicum.report.palette import SERIES
from modicum.report.pictures.canvas import WIDTH, as_file, axes, canvas, ink, legend_below

LEFT, GAP, RIGHT, BOTTOM, TOP = 0.65, 0.45, 0.2, 0.95, 0.55  # inches
HEIGHT = 3.6


@dataclass(frozen=True)
class Curve:
    """One method: after each judged round what it had cost, and the quality of new clients.

    `bytes` are the codec's of all clients, both ways; `joules` of all clients by the model of their
    board, empty where there is none.  `low` and `high` are the interval over seeds, or `quality`.
    """

    label: str
    rounds: Sequence[int]
    bytes: Sequence[float]
    joules: Sequence[float]
    quality: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def picture(curves: Sequence[Curve], quality: str, title: str, suffix: str) -> bytes:
    """The picture as a file.  Raises UsageError for a suffix other than .svg and .png."""
    return as_file(lambda: draw(curves, quality, title), suffix)


def draw(curves: Sequence[Curve], quality: str, title: str) -> Any:
    """A panel for each cost that is known; they share the axis of quality."""
    costs: list[tuple[str, Callable[[Curve], Sequence[float]]]] = [
        ("rounds", lambda c: c.rounds),
        ("MB sent and received (codec)", lambda c: [b / 1e6 for b in c.bytes]),
    ]
    if any(len(c.joules) for c in curves):
        costs.append(("J, modelled", lambda c: c.joules))
    figure = canvas(HEIGHT)
    wide = (WIDTH - LEFT - RIGHT - GAP * (len(costs) - 1)) / len(costs)
    shared: Any = None
    for k, (name, cost) in enumerate(costs):
        left = LEFT + k * (wide + GAP)
        ax = axes(figure, left, BOTTOM, WIDTH - left - wide, TOP)
        _panel(ax, curves, cost, logarithmic=k > 0)
        ax.set_xlabel(name, loc="left")
        if k:
            ax.set_ylim(shared.get_ylim())
            ax.tick_params(labelleft=False)
        else:
            shared = ax
            ax.set_title(quality, loc="left", color=ink("ink"))
            legend_below(ax, min(len(curves), 9), handlelength=1.6)
    figure.text(LEFT / WIDTH, 1 - 0.17 / HEIGHT, title, va="center", color=ink("ink"))
    return figure


def _panel(
    ax: Any, curves: Sequence[Curve], cost: Callable[[Curve], Sequence[float]], logarithmic: bool
) -> None:
    for k, curve in enumerate(curves):
        colour = ink(SERIES[k % len(SERIES)])
        dashed = "--" if k >= len(SERIES) else "-"
        x = cost(curve)
        if not len(x):
            continue
        start = 1 if logarithmic else 0  # nothing was spent before the first round
        ax.fill_between(
            x[start:], curve.low[start:], curve.high[start:], color=colour, alpha=0.12, linewidth=0
        )
        ax.plot(x[start:], curve.quality[start:], color=colour, linewidth=1.3, linestyle=dashed,
                label=curve.label)  # fmt: skip
    if logarithmic:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
    else:
        ax.set_xlim(left=0)
    ax.tick_params(length=0)
    ax.grid(axis="y")
