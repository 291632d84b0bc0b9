"""Canvas: the style of all pictures, their axes, and how they write numbers and labels."""

from __future__ import annotations

import io
import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from modicum.errors import UsageError
from modicum.report.palette import PALETTE
from modicum.report.tables import Numbers

Drawn = tuple[Any, str, str]  # figure, alternative text, caption

WIDTH = 10.0  # inches; the page scales a picture to its own width
STYLE = {
    "font.size": 8.0,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8.0,
    "legend.fontsize": 8.0,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "text.color": PALETTE["ink"][0],
    "axes.labelcolor": PALETTE["soft"][0],
    "axes.edgecolor": PALETTE["line"][0],
    "xtick.color": PALETTE["line"][0],
    "ytick.color": PALETTE["line"][0],
    "xtick.labelcolor": PALETTE["soft"][0],
    "ytick.labelcolor": PALETTE["soft"][0],
    "grid.color": PALETTE["line"][0],
    "grid.linewidth": 0.5,
    "axes.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text; the page chooses its font
    "svg.hashsalt": "modicum",  # the same report has the same bytes
    "text.parse_math": False,  # a $ in a name is a $
}
SUFFIXES = (".svg", ".png")
DPI = 160
KEYS: dict[str, float] = {"handlelength": 0.9, "handleheight": 0.9, "borderpad": 0}


def canvas(height: float, width: float = WIDTH) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def axes(figure: Any, left: float, bottom: float, right: float, top: float) -> Any:
    """Axes with margins in inches."""
    w, h = figure.get_size_inches()
    return figure.add_axes((left / w, bottom / h, (w - left - right) / w, (h - bottom - top) / h))


def as_file(draw: Callable[[], Any], suffix: str) -> bytes:
    """A figure as a file of its own, in our style whatever the user's is.

    Raises UsageError for a suffix other than .svg and .png.
    """
    import matplotlib

    if suffix not in SUFFIXES:
        raise UsageError(f"a picture is not written as {suffix!r}", hint=", ".join(SUFFIXES))
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph that the font lacks
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = draw()
        buffer = io.BytesIO()
        keys = ("Creator", "Date", "Format", "Type") if suffix == ".svg" else ("Software",)
        figure.savefig(
            buffer, format=suffix[1:], dpi=DPI, facecolor=ink("page"),
            metadata=dict.fromkeys(keys),
        )  # fmt: skip
    return buffer.getvalue()


def ink(name: str) -> str:
    return PALETTE[name][0]


def kib_axis(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(
        FuncFormatter(lambda v, _: f"{v:,.0f}" if abs(v) >= 1000 else f"{v:g}")
    )


def sample_axis(ax: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
    ax.set_xlabel("training samples", loc="left")


def legend_below(ax: Any, columns: int, **more: Any) -> None:
    """A legend under the axis' label, from the left."""
    high = ax.get_position().height * ax.figure.get_size_inches()[1]
    ax.legend(loc="upper left", bbox_to_anchor=(-0.005, -0.43 / high), ncols=columns,
              borderaxespad=0, columnspacing=1.3, **{**KEYS, **more})  # fmt: skip


def beside(ax: Any, text: str, y: float, colour: str = "ink") -> None:
    """A label to the right of the axes, at the height of a value."""
    at = ax.get_yaxis_transform()
    ax.text(1.012, y, text, transform=at, va="center", color=ink(colour), fontsize=7.5)


def apart(values: Sequence[float], gap: float) -> list[float]:
    """Places for labels at `values` or below, at least `gap` from each other, in the same order."""
    order = sorted(range(len(values)), key=values.__getitem__, reverse=True)
    places = list(values)
    for above, below in itertools.pairwise(order):
        places[below] = min(places[below], places[above] - gap)
    return places


def thin(y: Numbers, most: int = 1500) -> tuple[Numbers, Numbers]:
    """(x, y) for a line of at most about `most` points: least and largest of every bin."""
    if len(y) <= most:
        return np.arange(float(len(y))), y
    parts = np.array_split(y, most // 2)
    ends = np.cumsum([len(part) for part in parts])
    lows = [np.fmin.reduce(part) for part in parts]
    highs = [np.fmax.reduce(part) for part in parts]
    x = np.repeat(ends - (len(parts[0]) + 1) / 2, 2)
    return x, np.ravel(np.column_stack([lows, highs]))
