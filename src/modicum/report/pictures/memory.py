"""Picture: memory over one training step."""

from __future__ import annotations

from typing import Any

import numpy as np

from modicum.lower import Program
from modicum.plan import Plan
from modicum.report.palette import KINDS
from modicum.report.pictures.canvas import (
    WIDTH,
    Drawn,
    apart,
    axes,
    beside,
    canvas,
    ink,
    kib_axis,
    legend_below,
)
from modicum.report.runs import plain
from modicum.report.tables import Memory, phase_words
from modicum.units import kib


def draw(p: Plan, m: Memory) -> Drawn:
    program, c = p.program, p.cost
    steps = len(program.steps)
    figure = canvas(3.9)
    ax = axes(figure, 0.7, 0.8, 1.75, 0.35)
    x = np.arange(steps + 1)
    base = np.zeros(steps + 1)
    for kind, live in m.live.items():
        words, colour = KINDS[kind]
        top = base + np.append(live, live[-1]) / 1024
        ax.fill_between(x, base, top, step="post", color=ink(colour), linewidth=0, label=words)
        if bool((base > 0).any()):
            ax.step(x, base, where="post", color=ink("page"), linewidth=0.5)
        base = top
    room = None if p.ram is None else p.ram - c.static - c.stack
    high = 1.06 * c.arena / 1024
    lines = [("floor: inference alone", c.floor, "ink"), ("arena, as placed", c.arena, "ink")]
    near = room is not None and room / 1024 < 1.5 * high
    if room is not None and near:
        lines.append(("room for the arena", room, "red"))
        high = max(high, 1.04 * room / 1024)
    places = apart([n / 1024 for _, n, _ in lines], 0.1 * high)
    for (words, n, colour), place in zip(lines, places, strict=True):
        ax.axhline(n / 1024, color=ink(colour), linewidth=0.9, linestyle=(0, (4, 2)))
        beside(ax, f"{words}\n{kib(n)}", place, colour)
    if room is not None and not near:
        ax.text(1.012, 1.03, f"room for the arena\n{kib(room)} ↑", transform=ax.transAxes,
                va="bottom", color=ink("red"), fontsize=7.5)  # fmt: skip
    _phases(ax, program)
    peak = int(np.argmax(m.total))
    ax.plot(
        peak + 0.5, m.total[peak] / 1024, marker="v", markersize=4, color=ink("ink"), clip_on=False
    )
    ax.set_xlim(0, steps)
    ax.set_ylim(0, high)
    kib_axis(ax.yaxis)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_ylabel("live bytes, KiB")
    ax.yaxis.set_label_coords(-0.58 / (WIDTH - 2.45), 0.5)
    ax.set_xlabel("step of the program, in order (not time)", loc="left")
    legend_below(ax, 7)
    step = program.steps[peak]
    where = f"{phase_words(step.phase)} of {plain(step.node)}, step {peak}"
    alt = f"Bytes live during each of {steps} steps; at most {kib(int(m.total[peak]))}, at {where}."
    caption = (
        f"Planned. Live bytes by kind over the {steps} steps of one training sample; ▾ marks the "
        f"peak, {kib(int(m.total[peak]))} at {where}. An activation that the backward pass needs "
        "counts as saved from where it is made."
    )
    if room is not None:
        caption += " Room for the arena is the RAM limit less .data, .bss and stack."
    return figure, alt, caption


def _phases(ax: Any, program: Program) -> None:
    """Forward, loss and backward, marked above the axes."""
    steps = len(program.steps)
    at = [i for i, step in enumerate(program.steps) if step.phase == "loss"]
    ax.axvline(at[0], color=ink("ink"), linewidth=0.7)
    ax.axvspan(at[0], at[-1] + 1, color=ink("ink"), alpha=0.15, linewidth=0)
    backward = steps - at[-1] - 1
    labels = [(0.0, "left", "forward"), (at[0], "right", "loss, then backward and update ▸")]
    if at[0] < 0.12 * steps:
        labels = [(at[0], "left", "loss"), (steps, "right", "backward and update")]
    elif backward > 0.25 * steps:
        middle = (at[0] + at[-1] + 1) / 2
        labels = [labels[0], (middle, "center", "loss"), (steps, "right", "backward and update")]
    for x, side, text in labels:
        ax.text(x, 1.025, text, transform=ax.get_xaxis_transform(), ha=side, color=ink("soft"))
