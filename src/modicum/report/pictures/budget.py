"""Picture: RAM and flash against their limits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modicum.report.pictures.canvas import KEYS, Drawn, axes, canvas, ink, kib_axis
from modicum.report.runs import Runs, figure_of, short
from modicum.report.tables import Memory, limit_words
from modicum.units import kib, percent

Bars = list[tuple[str, list[float]]]


def draw(r: Runs, m: Memory) -> Drawn:
    p, c = r.plan, r.plan.cost
    ram: Bars = [("planned", [m.persistent, m.dynamic, c.static, c.stack])]
    flash: Bars = [("planned", [c.flash_weights, c.flash_code])]
    for name, t in zip(r.names, r.traces, strict=True):
        label = short(name, 16)
        high, static, stack, text, weights = (
            figure_of(t, key)
            for key in ("arena_high_water", "static", "stack_high_water", "text", "weights")
        )
        if high is not None and static is not None and stack is not None:
            ram.append((label, [m.persistent, high - m.persistent, static, stack]))
        if text is not None and weights is not None:
            flash.append((label, [weights, text + (figure_of(t, "data") or 0)]))
    heights = [0.3 * len(ram), 0.3 * len(flash)]
    figure = canvas(sum(heights) + 1.75)
    words = ("arena, persistent", "arena, dynamic", ".data + .bss", "stack")
    upper = axes(figure, 1.15, heights[1] + 1.3, 1.6, 0.3)
    _stacked(upper, "RAM", ram, words, ("blue", "green", "orange", "pink"), p.ram)
    lower = axes(figure, 1.15, 0.45, 1.6, heights[0] + 1.15)
    _stacked(lower, "Flash", flash, ("weights", "code"), ("blue", "grey"), p.flash)
    alt = (
        f"RAM {kib(c.ram)}, {limit_words(c.ram, p.ram)} "
        f"Flash {kib(c.flash)}, {limit_words(c.flash, p.flash)}"
    )
    caption = "Planned: worked out before anything ran; the size of the code is an estimate."
    if len(ram) > 1:
        caption += (
            " The other bars were measured on the emulated board: the bytes of arena and stack "
            "that were written, and the sections of the program."
        )
    return figure, alt, caption


def _stacked(
    ax: Any,
    what: str,
    bars: Bars,
    words: Sequence[str],
    colours: Sequence[str],
    limit: int | None,
) -> None:
    """Horizontal bars of parts; the axis ends at the limit, or is cut where that is far away."""
    used = max(sum(parts) for _, parts in bars)
    full = max(used, limit or 0)
    end = min(full, 4 * used) / 1024
    for y, (_, parts) in enumerate(bars):
        left = 0.0
        for part, colour, word in zip(parts, colours, words, strict=True):
            wide = part / 1024
            ax.barh(y, wide, left=left, height=0.68, color=ink(colour), edgecolor=ink("page"),
                    linewidth=0.8, label=word if y == 0 else None)  # fmt: skip
            left += wide
        if limit is not None and limit / 1024 > left:
            ax.barh(y, end - left, left=left, height=0.68, color="none", edgecolor=ink("line"),
                    linewidth=0.8, label="free" if y == 0 else None)  # fmt: skip
        share = "" if limit is None else f", {percent(1024 * left / limit)}"
        ax.text(1.012 * end, y, f"{kib(1024 * left)}{share}", va="center", color=ink("ink"))
    ax.set_yticks(range(len(bars)), [name for name, _ in bars])
    ax.set_ylim(len(bars) - 0.5, -0.5)
    ax.set_xlim(0, end * 1.002)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(length=0)
    kib_axis(ax.xaxis)
    note = "" if limit is None else f", limit {kib(limit)}"
    note += ", axis cut" if 1024 * end < full else ""
    ax.set_title(f"{what} in KiB{note}", loc="left", color=ink("ink"))
    ax.legend(loc="lower right", bbox_to_anchor=(1.005, 0.97), ncols=5, borderaxespad=0.25,
              columnspacing=1.4, **KEYS)  # fmt: skip
