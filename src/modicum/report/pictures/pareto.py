"""Picture: accuracy against memory, a point per method.

A file of its own, on a page-coloured ground; filled points are on the front and hollow ones are
not, and each series has a mark of its own, so that it reads without colours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from modicum.report.palette import SERIES
from modicum.report.pictures.canvas import apart, as_file, axes, beside, canvas, ink
from modicum.units import count

MARKS = ("o", "s", "^", "D", "v")
APART = 1.035
LARGEST = 260.0  # square points
SMALLEST = 12.0


@dataclass(frozen=True)
class Point:
    """memory in bytes; accuracy and the half width of its interval as shares; MACs of backward.

    A method that needs no memory is a level line.  Each series has a front of its own.
    """

    label: str
    memory: int
    accuracy: float
    interval: float | None
    macs: int
    front: bool
    series: str = ""


@dataclass(frozen=True)
class Look:
    """Colour and mark of a series."""

    colour: str
    mark: str


def picture(points: Sequence[Point], title: str, axis: str, suffix: str) -> bytes:
    """The picture as a file; `title` says what is drawn, `axis` against what.

    Raises UsageError for a suffix other than .svg and .png.
    """
    return as_file(lambda: draw(points, title, axis), suffix)


def draw(points: Sequence[Point], title: str, axis: str) -> Any:
    """The figure; every text that `place` put is an artist of its axes."""
    looks = _looks(points)
    placed = _beside_each_other([p for p in points if p.memory], list(looks))
    level = [p for p in points if not p.memory]
    figure = canvas(4.7 if len(looks) == 1 else 4.9, 7.2)
    longest = max((len(p.label) for p in level), default=0)
    ax = axes(figure, 0.65, 1.0 if len(looks) == 1 else 1.2, 0.25 + 0.065 * longest, 0.35)
    most = max(*(p.macs for p in points), 1)
    _limits(ax, placed, points)
    _levels(ax, level, looks)
    for name, look in looks.items():
        _front(ax, [p for p in placed if p.front and p.series == name], look)
    for p in placed:
        look = looks[p.series]
        colour = ink(look.colour if p.front or len(looks) > 1 else "soft")
        if p.interval:
            ax.errorbar(p.memory / 1024, 100 * p.accuracy, 100 * p.interval, color=colour,
                        linewidth=0.9, capsize=2.5, zorder=2)  # fmt: skip
        ax.scatter(p.memory / 1024, 100 * p.accuracy, _area(p.macs, most), zorder=3, linewidth=1.1,
                   color=colour if p.front else ink("page"), edgecolor=colour,
                   marker=look.mark, alpha=0.85)  # fmt: skip
    ax.grid(axis="both")
    ax.tick_params(length=0, which="both")
    ax.set_title(title, loc="left", color=ink("ink"))
    ax.set_xlabel(axis, loc="left")
    _keys(ax, most, looks)
    _place(ax, placed, most)
    return figure


def _looks(points: Sequence[Point]) -> dict[str, Look]:
    names = dict.fromkeys(p.series for p in points)
    return {n: Look(SERIES[i % len(SERIES)], MARKS[i % len(MARKS)]) for i, n in enumerate(names)}


def _beside_each_other(points: Sequence[Point], series: list[str]) -> list[Point]:
    """Points of several series that have the same memory would hide each other's intervals."""
    return [replace(p, memory=round(p.memory * APART ** series.index(p.series))) for p in points]


def _area(macs: int, most: int) -> float:
    return max(SMALLEST, LARGEST * macs / most)


def _limits(ax: Any, placed: Sequence[Point], points: Sequence[Point]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    x = [p.memory / 1024 for p in placed] or [1.0]
    low, high = min(x), max(x)
    margin = max((high / low) ** 0.12, 1.5)
    low, high = low / margin, high * margin
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    steps = (1, 2, 5) if high / low < 300 else (1,)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks = [s * 10.0**e for e in range(first, last + 1) for s in steps]
    ax.xaxis.set_major_locator(FixedLocator([t for t in ticks if low <= t <= high]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}" if v >= 1000 else f"{v:g}"))
    ends = [100 * (p.accuracy + s * (p.interval or 0.0)) for p in points for s in (-1, 1)]
    bottom, top = min(ends), max(ends)
    room = max(0.12 * (top - bottom), 1.0)
    ax.set_ylim(max(bottom - room, -2.0), min(top + room, 104.0))


def _levels(ax: Any, points: Sequence[Point], looks: dict[str, Look]) -> None:
    """A level line for each point that has no place on the axis, and its label beside it."""
    low, high = ax.get_ylim()
    heights = [100 * p.accuracy for p in points]
    places = apart(heights, 0.045 * (high - low)) if points else []
    for p, y, place in zip(points, heights, places, strict=True):
        colour = looks[p.series].colour
        ax.axhline(y, color=ink(colour), linewidth=0.9, linestyle=":", zorder=1)
        beside(ax, p.label, place, colour)


def _front(ax: Any, points: Sequence[Point], look: Look) -> None:
    """A line that shows the best accuracy for so much memory."""
    if not points:
        return
    ordered = sorted(points, key=lambda p: p.memory)
    x, y = [p.memory / 1024 for p in ordered], [100 * p.accuracy for p in ordered]
    x.append(ax.get_xlim()[1])
    y.append(y[-1])
    ax.step(x, y, where="post", color=ink(look.colour), linewidth=1.0, alpha=0.6, zorder=1,
            linestyle=(0, (4, 2)))  # fmt: skip


def _keys(ax: Any, most: int, looks: dict[str, Look]) -> None:
    from matplotlib.lines import Line2D

    def dot(area: float, colour: str, filled: bool, text: str, mark: str = "o") -> Any:
        return Line2D([], [], linestyle="none", marker=mark, markersize=math.sqrt(area),
                      color=ink(colour), markerfacecolor=ink(colour if filled else "page"),
                      label=text)  # fmt: skip

    first = next(iter(looks.values()))
    line = Line2D([], [], color=ink(first.colour), linewidth=1.0, linestyle=(0, (4, 2)),
                  label="Pareto front")  # fmt: skip
    sizes = [most, most // 4, most // 16]
    keys = [line, dot(36, first.colour, True, "on it"), dot(36, "soft", False, "not")]
    keys += [dot(_area(n, most), "soft", False, count(n)) for n in sizes if n]
    text = f"MACs backward: {count(most)}"
    keys[3:4] = [dot(_area(most, most), "soft", False, text)]
    high = ax.get_position().height * ax.figure.get_size_inches()[1]
    shared = {"loc": "upper left", "borderaxespad": 0, "borderpad": 0.4, "columnspacing": 1.6,
              "handletextpad": 0.8}  # fmt: skip
    if len(looks) > 1:
        series = [dot(36, look.colour, True, n, look.mark) for n, look in looks.items()]
        ax.add_artist(ax.legend(handles=series, bbox_to_anchor=(-0.005, -0.72 / high),
                                ncols=len(series), **shared))  # fmt: skip
    ax.legend(handles=keys, bbox_to_anchor=(-0.005, -0.43 / high), ncols=6, **shared)


# ---- labels that do not lie on each other ------------------------------------------------------

Box = tuple[float, float, float, float]  # left, bottom, right, top in pixels


def _place(ax: Any, points: Sequence[Point], most: int) -> None:
    """Put each label at the nearest free place beside its point, with a line where that is far."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import IdentityTransform

    renderer = FigureCanvasAgg(ax.figure).get_renderer()
    scale = ax.figure.dpi / 72
    frame = ax.get_window_extent(renderer)
    marks = [_mark(ax, p, most, scale) for p in points]
    taken = [box for boxes in marks for box in boxes] + _steps(ax, points, scale)
    for p, boxes in sorted(zip(points, marks, strict=True), key=lambda pair: -pair[0].accuracy):
        text = ax.text(0, 0, p.label, fontsize=7.5, color=ink("ink"), zorder=4, va="bottom",
                       transform=IdentityTransform())  # fmt: skip
        extent = text.get_window_extent(renderer)

        def cost(place: tuple[Box, int]) -> tuple[float, int]:
            box, far = place
            return sum(_overlap(box, other) for other in taken) + _outside(box, frame.extents), far

        places = _places(boxes[0], extent.width, extent.height, scale)
        box, far = min(places, key=cost)
        nearest = min(marks, key=lambda mark: _distance(mark[0], box))
        taken.append(box)
        text.set_transform(ax.transData)
        text.set_position(ax.transData.inverted().transform(box[:2]))
        if far > 1 or nearest is not boxes:
            _leader(ax, boxes[0], box)


def _mark(ax: Any, p: Point, most: int, scale: float) -> list[Box]:
    """The point, and its error bar."""
    x, y = ax.transData.transform((p.memory / 1024, 100 * p.accuracy))
    r = math.sqrt(_area(p.macs, most)) / 2 * scale
    boxes = [(x - r, y - r, x + r, y + r)]
    if p.interval:
        ends = [100 * (p.accuracy + s * p.interval) for s in (-1, 1)]
        low, high = (ax.transData.transform((p.memory / 1024, end))[1] for end in ends)
        boxes.append((x - 3 * scale, low, x + 3 * scale, high))
    return boxes


def _steps(ax: Any, points: Sequence[Point], scale: float) -> list[Box]:
    """The lines of the fronts, level part after level part."""
    boxes = []
    for name in dict.fromkeys(p.series for p in points):
        corners = [
            ax.transData.transform((p.memory / 1024, 100 * p.accuracy))
            for p in sorted(points, key=lambda p: p.memory)
            if p.front and p.series == name
        ]
        ends = [*(x for x, _ in corners[1:]), ax.transAxes.transform((1, 0))[0]]
        parts = zip(corners, ends[: len(corners)], strict=True)
        boxes += [(x, y - scale, end, y + scale) for (x, y), end in parts]
    return boxes


def _places(own: Box, wide: float, high: float, scale: float) -> list[tuple[Box, int]]:
    """(box, how far away it is): right, left, above, below and the corners, ever further out."""
    left, bottom, right, top = own
    middle_x, middle_y = (left + right) / 2, (bottom + top) / 2
    places = []
    for far in range(1, 9):
        gap = (3 + 9 * (far - 1)) * scale
        across = {1: right + gap, 0: middle_x - wide / 2, -1: left - gap - wide}
        along = {1: top + gap, 0: middle_y - high / 2, -1: bottom - gap - high}
        sides = [(1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1)]
        for h, v in sides:
            x, y = across[h], along[v]
            places.append(((x, y, x + wide, y + high), far))
    return places


def _overlap(a: Box, b: Box, room: float = 1.5) -> float:
    across = min(a[2], b[2]) - max(a[0], b[0]) + room
    along = min(a[3], b[3]) - max(a[1], b[1]) + room
    return across * along if across > 0 and along > 0 else 0.0


def _outside(box: Box, frame: Box) -> float:
    over = (frame[0] - box[0], frame[1] - box[1], box[2] - frame[2], box[3] - frame[3])
    return 1000 * sum(max(0.0, o) for o in over)


def _leader(ax: Any, own: Box, box: Box) -> None:
    """A line from the point to the nearest edge of its label."""
    ends = ax.transData.inverted().transform(_ends(own, box))
    ax.plot(ends[:, 0], ends[:, 1], color=ink("ink"), linewidth=0.6, zorder=3.5)


def _distance(own: Box, box: Box) -> float:
    return math.dist(*_ends(own, box))


def _ends(own: Box, box: Box) -> tuple[tuple[float, float], tuple[float, float]]:
    """The middle of a point, and what of its label is nearest to it."""
    x, y = (own[0] + own[2]) / 2, (own[1] + own[3]) / 2
    return (x, y), (min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3]))
