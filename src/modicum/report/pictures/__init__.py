"""Pictures: inline SVG in the page's colours, one module per picture.

Only drawing loads matplotlib.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from modicum.report.palette import PALETTE
from modicum.report.pictures import budget, layers, losses, memory, parity
from modicum.report.pictures.canvas import STYLE, Drawn
from modicum.report.runs import Runs
from modicum.report.tables import Memory


@dataclass(frozen=True)
class Picture:
    """Inline SVG, marked safe, with the words that stand for it."""

    svg: Any
    alt: str
    caption: str


def pictures(r: Runs, m: Memory) -> dict[str, Picture]:
    """The pictures that the plan and the traces have data for."""
    made = {
        "budget": _picture("budget", lambda: budget.draw(r, m)),
        "memory": _picture("memory", lambda: memory.draw(r.plan, m)),
        "layers": _picture("layers", lambda: layers.draw(r.plan)),
        "losses": _picture("losses", lambda: losses.draw(r)),
        "parity": _picture("parity", lambda: parity.draw(r)),
    }
    return {name: picture for name, picture in made.items() if picture is not None}


def _picture(name: str, draw: Callable[[], Drawn | None]) -> Picture | None:
    """Draw in our style whatever the user's is; a glyph that a font lacks is no matter."""
    import matplotlib
    from markupsafe import Markup

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        drawn = draw()
        if drawn is None:
            return None
        figure, alt, caption = drawn
        buffer = io.StringIO()
        none = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=none)
    return Picture(Markup(_inline(buffer.getvalue(), name)), alt, caption)


def _inline(svg: str, name: str) -> str:
    """The <svg> element alone, its ids not those of other pictures, colours and font the page's."""
    svg = svg[svg.index("<svg ") :]
    svg = re.sub(r'(<[^>]*?\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font-family: [^;\"]*; ", "", svg)
    svg = re.sub(r' (?:d|x|y)="[^"]*"', lambda m: re.sub(r"(\.\d\d)\d+", r"\1", m[0]), svg)
    for colour, (light, _) in PALETTE.items():
        svg = re.sub(rf"(?<=: ){light}(?=[;\"])", f"var(--{colour})", svg)
    return svg
