"""Federations of several seeds as one curve each: quality of new clients and what it cost."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from modicum.report.comparison import interval, write
from modicum.report.pictures.federation import Curve, picture

Points = Sequence[tuple[int, float, float, float]]
"""(round, bytes, joules, quality) after each judged round of one run."""


def curve(label: str, runs: Sequence[Points]) -> Curve:
    """The mean over runs that were judged after the same rounds, with its 95 % interval."""
    rounds, spent, joules, quality, low, high = [], [], [], [], [], []
    for points in zip(*runs, strict=True):
        q = [p[3] for p in points]
        middle = statistics.fmean(q)
        half = interval(q) or 0.0
        rounds.append(points[0][0])
        spent.append(statistics.fmean(p[1] for p in points))
        joules.append(statistics.fmean(p[2] for p in points))
        quality.append(middle)
        low.append(middle - half)
        high.append(middle + half)
    known = joules if any(joules) else []
    return Curve(label, rounds, spent, known, quality, low, high)


def save_curves(
    path: str | Path, runs: Mapping[str, Sequence[Points]], quality: str, title: str
) -> None:
    """Draw a curve for each method as .svg or .png."""
    made = [curve(label, of) for label, of in runs.items()]
    write(Path(path), picture(made, quality, title, Path(path).suffix))
