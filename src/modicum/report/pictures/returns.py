"""Picture: the returns of a policy while it is meta-trained, and while it adapts to new tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from modicum.report.palette import SERIES
from modicum.report.pictures.canvas import WIDTH, as_file, axes, canvas, ink, legend_below

LEFT, GAP, RIGHT, BOTTOM, TOP = 0.65, 0.75, 0.25, 0.85, 0.55  # inches
HEIGHT, SHARE = 3.4, 0.62  # of the left panel


@dataclass(frozen=True)
class Step:
    """The mean return after an inner step, and half of its interval."""

    mean: float
    half: float | None


def picture(
    iterations: Sequence[Sequence[float]], steps: Sequence[Step], tasks: int, title: str,
    suffix: str,
) -> bytes:  # fmt: skip
    """The picture as a file.  Raises UsageError for a suffix other than .svg and .png."""
    return as_file(lambda: draw(iterations, steps, tasks, title), suffix)


def draw(
    iterations: Sequence[Sequence[float]], steps: Sequence[Step], tasks: int, title: str
) -> Any:
    """Left: the return of each iteration, a curve per inner step; right: those of new tasks."""
    figure = canvas(HEIGHT)
    wide = (WIDTH - LEFT - GAP - RIGHT) * (SHARE if steps else 1.0)
    right = WIDTH - LEFT - wide
    _curves(axes(figure, LEFT, BOTTOM, right if steps else RIGHT, TOP), iterations)
    if steps:
        _bars(axes(figure, LEFT + wide + GAP, BOTTOM, RIGHT, TOP), steps, tasks)
    figure.text(LEFT / WIDTH, 1 - 0.17 / HEIGHT, title, va="center", color=ink("ink"))
    return figure


def _curves(ax: Any, iterations: Sequence[Sequence[float]]) -> None:
    x = range(1, len(iterations) + 1)
    last = len(iterations[0]) - 1
    for k, curve in enumerate(zip(*iterations, strict=True)):
        label = f"after inner step {k}" if k else "before adaptation"
        width = 1.6 if k in (0, last) else 0.9
        ax.plot(x, curve, color=ink(_colour(k)), linewidth=width, linestyle="-" if k else "--",
                label=label, marker="o" if len(iterations) == 1 else None)  # fmt: skip
    _plain(ax, "in training, mean over its tasks")
    ax.set_xlabel("iteration", loc="left")
    legend_below(ax, last + 1, handlelength=2.2)


def _bars(ax: Any, steps: Sequence[Step], tasks: int) -> None:
    for k, step in enumerate(steps):
        ax.errorbar(k, step.mean, yerr=step.half, color=ink(_colour(k)), marker="o", capsize=3.0,
                    markersize=5, linewidth=1.2)  # fmt: skip
    ax.plot(range(len(steps)), [s.mean for s in steps], color=ink("soft"), linewidth=0.8, zorder=1)
    spread = " with 95 % interval" if tasks > 1 else ""
    _plain(ax, f"{tasks} other tasks, mean{spread}")
    ax.set_xlim(-0.4, len(steps) - 0.6)
    ax.set_xlabel("inner steps", loc="left")


def _plain(ax: Any, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
    ax.tick_params(length=0)
    ax.grid(axis="y")
    ax.set_title(title, loc="left", color=ink("ink"))


def _colour(k: int) -> str:
    return SERIES[k % len(SERIES)]
