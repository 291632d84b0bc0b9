"""Report: what we say of a plan and of its runs, as text, as JSON, and as one HTML page.

Memory is planned by the plan and measured by a run; work on an emulated board is counted in
executed instructions, which are not time.  The page is self-contained: its pictures are inline
SVG whose colours are the page's, so that they follow it into the dark and onto paper.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modicum.errors import InvalidInput, UsageError
from modicum.plan import Plan, render
from modicum.report.page import html_of
from modicum.report.runs import Row, Runs, plain, run_dict, run_rows
from modicum.trace import Trace

__all__ = ["Report", "report"]

VERSION = 1
SUFFIXES = (".html", ".json", ".txt")


def report(plan: Plan, *traces: Trace, out: str | Path | None = None) -> Report:
    """Report on a plan and on what happened in its runs.

    Every further trace is compared with the first.  `out` writes the report, all or nothing, in
    the format of its suffix: .html, .json or .txt.  Raises UsageError for another suffix, and
    InvalidInput for a trace of another plan or a file that cannot be written.

    >>> import modicum as mo, torch
    >>> model = torch.nn.Linear(8, 4)
    >>> plan = mo.plan(mo.capture(model, torch.zeros(1, 8)), "nano33ble")
    >>> print(mo.report(plan).text().splitlines()[0])
    full on nano33ble (Arduino Nano 33 BLE (Sense)), input 1x8, SGD(lr=0.01)
    """
    if out is not None:
        _check_suffix(out)
    for trace in traces:
        if not isinstance(trace, Trace):
            hint = f"out={str(trace)!r}" if isinstance(trace, str | Path) else None
            raise UsageError(f"{type(trace).__name__} is not a Trace", hint=hint)
        if trace.plan_hash != plan.hash:
            raise InvalidInput(
                f"the trace of {plain(trace.where)} is of another plan",
                why=f"it has plan {trace.plan_hash[:12]}, this is plan {plan.hash[:12]}",
                hint="the plan.json of the folder that was run",
            )
    made = Report(plan, traces)
    if out is not None:
        made.save(out)
    return made


@dataclass(frozen=True, eq=False)
class Report(Runs):
    """A plan, its traces, and how each further trace compares with the first."""

    def text(self) -> str:
        """The plan's table, then the runs side by side, for a terminal."""
        parts = ["\n".join(map(plain, render(self.plan, layers=False).split("\n")))]
        if self.traces:
            rows: list[Row] = [("", list(self.names)), *run_rows(self)]
            first = max(len(name) for name, _ in rows)
            widths = [max(len(cells[i]) for _, cells in rows) for i in range(len(self.traces))]
            lines = []
            for name, cells in rows:
                padded = [f"{c:>{w}}" for c, w in zip(cells, widths, strict=True)]
                lines.append("  ".join([f"  {name:<{first}}", *padded]))
            parts.append("\n".join(lines))
        if self.comparisons:
            parts.append("\n".join(f"  {c}" for c in self.comparisons))
        return "\n\n".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; what is not finite is None."""
        p = self.plan
        fields = {"method", "optimizer", "loss", "accumulate", "ram", "flash", "cost", "steps"}
        data: dict[str, Any] = {
            "version": VERSION,
            "plan": {
                "hash": p.hash,
                "board": p.board.name if p.board else None,
                "input": list(p.graph.shape(p.graph.input)),
                **p.model_dump(mode="json", include=fields),
                "layers": [layer.model_dump(mode="json") for layer in p.layers],
            },
            "runs": [run_dict(n, t) for n, t in zip(self.names, self.traces, strict=True)],
            "comparisons": [
                {"not_compared": c} if isinstance(c, str) else c.as_dict() for c in self.comparisons
            ],
        }
        finite: dict[str, Any] = _finite(data)
        return finite

    def html(self) -> str:
        """One page with tables and pictures that needs nothing else."""
        return html_of(self)

    def save(self, path: str | Path) -> None:
        """Write the report, all or nothing, in the format of the path's suffix."""
        suffix = _check_suffix(path)
        if suffix == ".html":
            text = self.html()
        elif suffix == ".json":
            text = json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n"
        else:
            text = self.text() + "\n"
        _write(Path(path), text)

    def __str__(self) -> str:
        return self.text()


def _check_suffix(path: str | Path) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(
            f"a report is not written as {suffix or 'a file without a suffix'}",
            where=str(path),
            hint="a name that ends in " + ", ".join(SUFFIXES),
        )
    return suffix


def _write(path: Path, text: str) -> None:
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise InvalidInput(f"cannot write {path}", why=error.strerror or str(error)) from None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
