"""Report: what we say of a plan and of its runs, as text, as JSON, and as one HTML page.

Memory is planned by the plan and measured by a run; work on an emulated board is counted in
executed instructions, which are not time.  The page is self-contained: its pictures are inline
SVG whose colours are the page's, so that they follow it into the dark and onto paper.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modicum.cost import LayerCost
from modicum.errors import InvalidInput, UsageError
from modicum.lower import Program
from modicum.plan import Plan, render
from modicum.trace import LOSS_FLOOR, Comparison, Trace, compare
from modicum.units import count, duration, kib, percent, size

VERSION = 1
SUFFIXES = (".html", ".json", ".txt")

Numbers = NDArray[np.float64]
Row = tuple[str, list[str]]


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
                f"the trace of {_plain(trace.where)} is of another plan",
                why=f"it has plan {trace.plan_hash[:12]}, this is plan {plan.hash[:12]}",
                hint="the plan.json of the folder that was run",
            )
    made = Report(plan, traces)
    if out is not None:
        made.save(out)
    return made


@dataclass(frozen=True, eq=False)
class Report:
    """A plan, its traces, and how each further trace compares with the first."""

    plan: Plan
    traces: tuple[Trace, ...] = ()

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Where each trace ran, numbered where two ran in one place."""
        names: list[str] = []
        for trace in self.traces:
            name = _short(_plain(trace.where), 40) or "run"
            again = sum(t.where == trace.where for t in self.traces[: len(names)])
            names.append(f"{name} ({again + 1})" if again else name)
        return tuple(names)

    @cached_property
    def comparisons(self) -> tuple[Comparison | str, ...]:
        """Each further trace against the first; a text where they cannot be compared."""
        return tuple(self._compare(i) for i in range(1, len(self.traces)))

    def _compare(self, i: int) -> Comparison | str:
        a, b = self.names[0], self.names[i]
        try:
            return replace(compare(self.traces[0], self.traces[i]), a=a, b=b)
        except InvalidInput as error:
            why = "; ".join(error.details.get("why", ()))
            return f"{a} and {b} are not compared: {error.what}" + (f" ({why})" if why else "")

    def text(self) -> str:
        """The plan's table, then the runs side by side, for a terminal."""
        parts = ["\n".join(map(_plain, render(self.plan, layers=False).split("\n")))]
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
        fields = {"method", "optimizer", "loss", "accumulate", "ram", "flash", "cost", "layers"}
        data: dict[str, Any] = {
            "version": VERSION,
            "plan": {
                "hash": p.hash,
                "board": p.board.name if p.board else None,
                "input": list(p.graph.shape(p.graph.input)),
                **p.model_dump(mode="json", include=fields),
            },
            "runs": [_run_dict(n, t) for n, t in zip(self.names, self.traces, strict=True)],
            "comparisons": [
                {"not_compared": c} if isinstance(c, str) else c.as_dict() for c in self.comparisons
            ],
        }
        finite: dict[str, Any] = _finite(data)
        return finite

    def html(self) -> str:
        """One page with tables and pictures that needs nothing else."""
        import jinja2

        environment = jinja2.Environment(
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        source = resources.files("modicum").joinpath("report.html.j2").read_text("utf-8")
        return environment.from_string(source).render(_page(self))

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


# ---- the runs --------------------------------------------------------------------------------


def run_rows(r: Report) -> list[Row]:
    """What each run measured, one row per figure, one cell per run; no row without a figure."""

    def row(name: str, cell: Callable[[Trace], str | None]) -> Row:
        return name, [cell(t) or "-" for t in r.traces]

    def figure(name: str, key: str, form: Callable[[float], str]) -> Row:
        def cell(t: Trace) -> str | None:
            value = _figure(t, key)
            return None if value is None else form(value)

        return row(name, cell)

    def measured(name: str, key: str, planned: int) -> Row:
        return figure(name, key, lambda n: f"{kib(n)} of {kib(planned)}")

    c = r.plan.cost
    rows = [
        row("how", _how),
        row("training samples", lambda t: f"{len(t.losses):,}"),
        row("loss, first -> last sample", lambda t: _arrow(t.losses[:1], t.losses[-1:])),
        row("loss, first -> last tenth", _tenths),
        row("accuracy, before -> after", _accuracy),
        measured("arena, high water of planned", "arena_high_water", c.arena),
        figure(".data + .bss beside the arena", "static", kib),
        measured("stack, high water of planned", "stack_high_water", c.stack),
        measured("RAM, measured of planned", "ram", c.ram),
        row("flash, code (.text)", lambda t: _section(t, "text")),
        row("flash, weights", lambda t: _section(t, "weights")),
        figure("executed instructions per training step", "instructions_train", _whole),
        figure("executed instructions per inference", "instructions_predict", _whole),
        figure("time per training step, C on this host", "microseconds_train", _micro),
        figure("time per inference, C on this host", "microseconds_predict", _micro),
        figure("time of all training, PyTorch", "seconds", duration),
        figure("peak memory of the whole process", "peak_rss", size),
    ]
    return [(name, cells) for name, cells in rows if any(cell != "-" for cell in cells)]


def _figure(t: Trace, key: str) -> float | None:
    value = t.figures.get(key)
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _section(t: Trace, key: str) -> str | None:
    """Not of a host: its program has more in it than the net."""
    value = _figure(t, key)
    return kib(value) if value is not None and _emulated(t) else None


def _emulated(t: Trace) -> bool:
    return "instructions_train" in t.figures or "instructions_predict" in t.figures


def _how(t: Trace) -> str | None:
    if _emulated(t):
        return "C, emulated"
    if "microseconds_train" in t.figures or "microseconds_predict" in t.figures:
        return "C, host"
    return "PyTorch" if t.where == "torch" else None


def _arrow(before: Sequence[float], after: Sequence[float]) -> str | None:
    if not len(before) or not len(after):
        return None
    return f"{np.mean(before):.4f} -> {np.mean(after):.4f}"


def _tenths(t: Trace) -> str | None:
    tenth = len(t.losses) // 10
    return _arrow(t.losses[:tenth], t.losses[-tenth:]) if tenth > 1 else None


def _accuracy(t: Trace) -> str | None:
    if t.accuracy_before is None or t.accuracy_after is None:
        return None
    return f"{percent(t.accuracy_before)} -> {percent(t.accuracy_after)}"


def _whole(n: float) -> str:
    return f"{n:,.0f}"


def _micro(n: float) -> str:
    return f"{n:,.0f} µs"


def _run_dict(name: str, t: Trace) -> dict[str, Any]:
    return {
        "name": name,
        "where": t.where,
        "how": _how(t),
        "seed": t.seed,
        "steps": len(t.losses),
        "loss_first": t.losses[0] if t.losses else None,
        "loss_last": t.losses[-1] if t.losses else None,
        "accuracy_before": t.accuracy_before,
        "accuracy_after": t.accuracy_after,
        "figures": dict(t.figures),
        "losses": list(t.losses),
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(text: str) -> str:
    """Text from outside without control characters: it goes to a terminal and into XML."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _short(text: str, most: int = 26) -> str:
    if len(text) <= most:
        return text
    return f"{text[: most // 2 - 1]}…{text[-(most - most // 2) :]}"


# ---- what the plan says, as tables -----------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """The arena in its two parts, and the bytes live during every step by kind."""

    persistent: int
    dynamic: int
    live: Mapping[str, Numbers]

    @property
    def total(self) -> Numbers:
        total: Numbers = np.sum(list(self.live.values()), axis=0)
        return total


def memory_of(p: Plan) -> Memory:
    program = p.program
    ends = [p.offsets[n] + b.bytes for n, b in program.buffers.items() if b.persistent]
    persistent = max(ends, default=0)
    live: dict[str, Numbers] = {}
    for name, (first, last) in program.lifetimes.items():
        buffer = program.buffers[name]
        live.setdefault(buffer.kind, np.zeros(len(program.steps)))[first : last + 1] += buffer.bytes
    return Memory(persistent, p.cost.arena - persistent, {k: live[k] for k in KINDS if k in live})


@dataclass(frozen=True)
class Layer:
    """A layer with parameters and what follows it up to the next one, for the picture."""

    name: str
    status: str
    params: int
    trained: int
    forward: int
    backward: int
    kept: int


def status_of(program: Program, row: LayerCost) -> str:
    if row.trained:
        return "trained"
    return "passes gradient" if any(program.wanted[row.name].dx) else "frozen"


def picture_layers(p: Plan) -> list[Layer]:
    """One row per layer with parameters; nodes without any are counted with the layer before."""
    program = p.program
    in_ram = {t.param: t.size for t in program.trained}
    rows: list[Layer] = []
    for row, node in zip(p.layers, program.graph.nodes, strict=True):
        names = [node.params[role] for role in ("weight", "bias") if role in node.params]
        layer = Layer(
            name=_plain(row.name),
            status=status_of(program, row),
            params=sum(program.graph.params[n].size for n in names),
            trained=sum(in_ram.get(n, 0) for n in names),
            forward=row.macs_forward,
            backward=row.macs_dx + row.macs_dw,
            kept=sum(n for _, n, _ in row.kept),
        )
        if names or not rows:
            rows.append(layer)
        else:
            before = rows[-1]
            rows[-1] = replace(
                before,
                forward=before.forward + layer.forward,
                backward=before.backward + layer.backward,
                kept=before.kept + layer.kept,
            )
    return rows


def _plan_rows(p: Plan, m: Memory) -> list[tuple[str, str, str, int]]:
    """(name, figure, words, depth) for every figure of the plan."""
    c = p.cost
    rows = [
        ("Arena", kib(c.arena), "Planned. One static array, as placed: total of the two parts "
         f"below, {percent(c.arena / c.lower_bound - 1)} above the lower bound.", 0),
        ("persistent", kib(m.persistent), "Lives from the first call on.", 1),
        ("trained weights", kib(c.trained_bytes), f"{c.trained_params:,} parameters that are "
         "updated, so they are in RAM.", 2),
        ("optimiser state", kib(c.optimizer_bytes), str(p.optimizer), 2),
    ]  # fmt: skip
    if c.accumulator_bytes:
        text = f"Gradients summed over {p.accumulate} samples until the update."
        rows.append(("accumulated gradients", kib(c.accumulator_bytes), text, 2))
    peak = int(np.argmax(m.total))
    step = p.program.steps[peak]
    rows += [
        ("dynamic", kib(m.dynamic), "Shared by activations, saved values, gradients and "
         "workspace, each for as long as it lives.", 1),
        ("of it saved", kib(c.saved), "Kept from the forward to the backward pass, one sample. "
         "Not to be added: it lies in the dynamic part.", 2),
        ("Lower bound", kib(c.lower_bound), "Most bytes live at once in a training step, "
         f"persistent ones included: {_phase(step.phase)} of {_plain(step.node)}. "
         "No placement is smaller.", 0),
        ("Floor", kib(c.floor), "Most bytes live at once in inference alone, at "
         f"{_plain(c.floor_at)}. No choice of layers goes below it.", 0),
        (".data + .bss", kib(c.static), "Planned, beside the arena.", 0),
        ("Stack", kib(c.stack), "Allowance, beside the arena.", 0),
        ("RAM", kib(c.ram), "Total: arena + .data + .bss + stack. " + _limit(c.ram, p.ram), 0),
        ("Flash", kib(c.flash), "Total: constants and code. " + _limit(c.flash, p.flash), 0),
        ("weights", kib(c.flash_weights), "Frozen weights, and the initial values of the "
         "trained ones.", 1),
        ("code", kib(c.flash_code), "An estimate.", 1),
        ("MACs forward", count(c.macs_forward), "Multiply-accumulates of one inference.", 0),
        ("MACs backward", count(c.macs_backward), "Of all gradients of one sample.", 0),
        ("Upload", kib(c.upload), "The trained parameters, if a device sends them whole.", 0),
    ]  # fmt: skip
    return rows


def _limit(n: int, limit: int | None) -> str:
    return "No limit was given." if limit is None else f"Limit {kib(limit)}: {percent(n / limit)}."


def _phase(phase: str) -> str:
    return "saving" if phase == "save" else phase


def _buffer_rows(p: Plan, most: int = 12) -> list[tuple[str, str, str, str, str]]:
    """The largest buffers of the arena: name, kind, bytes, offset, and when they live."""
    program, rows = p.program, []
    largest = sorted(program.buffers.values(), key=lambda b: -b.bytes)[:most]
    for b in largest:
        first, last = program.lifetimes[b.name]
        lives = f"step {first}" if first == last else f"steps {first} to {last}"
        lives = "always" if b.persistent else lives
        kind = KINDS[b.kind][0]
        rows.append((_plain(b.value), kind, kib(b.bytes), f"{p.offsets[b.name]:,}", lives))
    return rows


def _layer_rows(p: Plan) -> tuple[int, list[dict[str, str]]]:
    """How many nodes come before the first that takes part in the backward pass; the others."""
    program = p.program
    status = [status_of(program, row) for row in p.layers]
    first = next((i for i, s in enumerate(status) if s != "frozen" or p.layers[i].kept), 0)
    rows = []
    for row, state in list(zip(p.layers, status, strict=True))[first:]:
        kept = [f"{kind} {size(n)}: {why}" if n else f"{kind}: {why}" for kind, n, why in row.kept]
        rows.append(
            {
                "name": _plain(row.name),
                "op": row.op,
                "shape": " × ".join(map(str, row.shape[1:])),
                "status": state,
                "trains": ", ".join(row.trained),
                "macs": count(row.macs_forward) if row.macs_forward else "",
                "backward": count(row.macs_dx + row.macs_dw) if row.macs_dx + row.macs_dw else "",
                "kept": "; ".join(kept),
            }
        )
    return first, rows


# ---- the page --------------------------------------------------------------------------------

# Names of colours: light, dark.  Hues are Okabe and Ito's, which colour-blind readers tell apart.
PALETTE = {
    "page": ("#fefefe", "#14171b"),
    "ink": ("#1c2127", "#e4e7ea"),
    "soft": ("#5a636e", "#9ba5b0"),
    "line": ("#d8dde3", "#363d45"),
    "blue": ("#0072b2", "#3089c8"),
    "sky": ("#7fbfe6", "#8ac4e8"),
    "pale": ("#b7c9d8", "#5c7489"),
    "orange": ("#e69f00", "#e8ab2c"),
    "green": ("#009e73", "#27b08a"),
    "pink": ("#cc79a7", "#d48db3"),
    "red": ("#d55e00", "#ee7d33"),
    "grey": ("#a3abb4", "#737c86"),
}

# Kinds of buffers from the bottom of the stack to its top: words, colour.
KINDS = {
    "weight": ("trained weights", "blue"),
    "optimizer": ("optimiser state", "sky"),
    "accumulator": ("accumulated gradients", "pale"),
    "saved": ("saved for backward", "orange"),
    "activation": ("activations", "green"),
    "gradient": ("gradients", "pink"),
    "workspace": ("workspace", "grey"),
}
STATUS = {"trained": "blue", "passes gradient": "orange", "frozen": "grey"}
SERIES = ("blue", "red", "green", "pink", "orange", "sky", "grey", "ink")


def _page(r: Report) -> dict[str, Any]:
    """Everything that the template shows."""
    p, m = r.plan, memory_of(r.plan)
    first, layers = _layer_rows(p)
    facts = [
        f"method {_short(_method(p), 80)}",
        "input " + " × ".join(map(str, p.graph.shape(p.graph.input)[1:])),
        str(p.optimizer),
        f"{p.accumulate} samples per update" if p.accumulate > 1 else "one sample per update",
        p.loss.replace("_", " ") + " loss",
    ]
    return {
        "title": "Training on " + _plain(p.board.title) if p.board else "Training, no board given",
        "facts": facts,
        "hash": p.hash,
        "palette": PALETTE,
        "tiles": _tiles(r),
        "names": r.names,
        "runs": [(_typeset(n), [_typeset(c) for c in cells]) for n, cells in run_rows(r)],
        "comparisons": [str(c) for c in r.comparisons],
        "emulated": any(_emulated(t) for t in r.traces),
        "plan_rows": _plan_rows(p, m),
        "buffers": _buffer_rows(p),
        "buffer_count": len(p.program.buffers),
        "step_count": len(p.program.steps),
        "first": first,
        "node_count": len(p.layers),
        "layers": layers,
        "status": STATUS,
        "pictures": pictures(r, m),
    }


def _method(p: Plan) -> str:
    fields = p.method.model_dump(mode="json", exclude={"kind"}, exclude_none=True)
    plain = {k: v for k, v in fields.items() if isinstance(v, int | float | str)}
    given = ", ".join(f"{name}={value}" for name, value in plain.items())
    return _plain(f"{p.method.kind} ({given})" if given else p.method.kind)


def _tiles(r: Report) -> list[tuple[str, str, str]]:
    """The figures that a reader looks for first: label, figure, words."""
    p, c = r.plan, r.plan.cost
    total = sum(p.graph.params[n].size for n in p.graph.trainable())
    ram = [n for n in (_figure(t, "ram") for t in r.traces) if n is not None]
    tiles = [
        (
            "RAM, planned",
            kib(c.ram),
            (f"of {kib(p.ram)}" if p.ram is not None else "no limit")
            + (f"; measured {kib(max(ram))}" if ram else ""),
        ),
        (
            "Flash, planned",
            kib(c.flash),
            f"of {kib(p.flash)}" if p.flash is not None else "no limit",
        ),
        ("Trained", f"{c.trained_params:,}", f"of {total:,} parameters"),
    ]
    scored = [(n, t) for n, t in zip(r.names, r.traces, strict=True) if _accuracy(t)]
    if scored:
        name, t = scored[-1]
        before, after = percent(t.accuracy_before or 0.0), percent(t.accuracy_after or 0.0)
        tiles.append(("Accuracy", after, f"{before} before; {_short(name)}"))
    compared = [x for x in r.comparisons if isinstance(x, Comparison) and x.steps]
    if compared:
        tiles.append((f"Against {_short(r.names[0])}", *_worst(compared)))
    return tiles


def _worst(compared: list[Comparison]) -> tuple[str, str]:
    """The comparison that is least alike: figure, words."""
    parted = [c for c in compared if c.first is not None]
    if parted:
        worst = min(parted, key=lambda c: c.first or (0, ""))
        return (
            f"step {(worst.first or (0, ''))[0]}",
            f"parts above {worst.tolerance:g}: {_short(worst.b)}",
        )
    if all(c.bitwise for c in compared):
        return "same bits", f"{compared[0].steps:,} steps"
    worst = max(compared, key=lambda c: c.largest)
    return f"{worst.largest:.1e}", f"largest difference; agrees within {worst.tolerance:g}"


def _typeset(text: str) -> str:
    """Our own ASCII signs as the ones that print well."""
    return "–" if text == "-" else text.replace("->", "→")


# ---- pictures --------------------------------------------------------------------------------

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


_KEYS: dict[str, float] = {"handlelength": 0.9, "handleheight": 0.9, "borderpad": 0}


@dataclass(frozen=True)
class Picture:
    """Inline SVG, marked safe, with the words that stand for it."""

    svg: Any
    alt: str
    caption: str


Bars = list[tuple[str, list[float]]]
Drawn = tuple[Any, str, str]  # figure, alternative text, caption


def pictures(r: Report, m: Memory) -> dict[str, Picture]:
    """The pictures that the plan and the traces have data for."""
    made = {
        "budget": _picture("budget", lambda: _budget(r, m)),
        "memory": _picture("memory", lambda: _memory(r.plan, m)),
        "layers": _picture("layers", lambda: _layers(r.plan)),
        "losses": _picture("losses", lambda: _losses(r)),
        "parity": _picture("parity", lambda: _parity(r)),
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


def _canvas(height: float, width: float = WIDTH) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def _axes(figure: Any, left: float, bottom: float, right: float, top: float) -> Any:
    """Axes with margins in inches."""
    w, h = figure.get_size_inches()
    return figure.add_axes((left / w, bottom / h, (w - left - right) / w, (h - bottom - top) / h))


def _ink(name: str) -> str:
    return PALETTE[name][0]


def _kib_axis(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(
        FuncFormatter(lambda v, _: f"{v:,.0f}" if abs(v) >= 1000 else f"{v:g}")
    )


def _count_axis(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda v, _: count(v) if v >= 1 or v == 0 else ""))


def _legend_below(ax: Any, columns: int, **more: Any) -> None:
    """A legend under the axis' label, from the left."""
    high = ax.get_position().height * ax.figure.get_size_inches()[1]
    ax.legend(loc="upper left", bbox_to_anchor=(-0.005, -0.43 / high), ncols=columns,
              borderaxespad=0, columnspacing=1.3, **{**_KEYS, **more})  # fmt: skip


def _beside(ax: Any, text: str, y: float, colour: str = "ink") -> None:
    """A label to the right of the axes, at the height of a value."""
    at = ax.get_yaxis_transform()
    ax.text(1.012, y, text, transform=at, va="center", color=_ink(colour), fontsize=7.5)


def _apart(values: Sequence[float], gap: float) -> list[float]:
    """Places for labels at `values` or below, at least `gap` from each other, in the same order."""
    order = sorted(range(len(values)), key=values.__getitem__, reverse=True)
    places = list(values)
    for above, below in itertools.pairwise(order):
        places[below] = min(places[below], places[above] - gap)
    return places


# ---- picture: RAM and flash against their limits ----


def _budget(r: Report, m: Memory) -> Drawn:
    p, c = r.plan, r.plan.cost
    ram: Bars = [("planned", [m.persistent, m.dynamic, c.static, c.stack])]
    flash: Bars = [("planned", [c.flash_weights, c.flash_code])]
    for name, t in zip(r.names, r.traces, strict=True):
        label = _short(name, 16)
        high, static, stack, text, weights = (
            _figure(t, key)
            for key in ("arena_high_water", "static", "stack_high_water", "text", "weights")
        )
        if high is not None and static is not None and stack is not None:
            ram.append((label, [m.persistent, high - m.persistent, static, stack]))
        if text is not None and weights is not None:
            flash.append((label, [weights, text + (_figure(t, "data") or 0)]))
    heights = [0.3 * len(ram), 0.3 * len(flash)]
    figure = _canvas(sum(heights) + 1.75)
    words = ("arena, persistent", "arena, dynamic", ".data + .bss", "stack")
    upper = _axes(figure, 1.15, heights[1] + 1.3, 1.6, 0.3)
    _stacked(upper, "RAM", ram, words, ("blue", "green", "orange", "pink"), p.ram)
    lower = _axes(figure, 1.15, 0.45, 1.6, heights[0] + 1.15)
    _stacked(lower, "Flash", flash, ("weights", "code"), ("blue", "grey"), p.flash)
    alt = (
        f"RAM {kib(c.ram)}, {_limit(c.ram, p.ram)} Flash {kib(c.flash)}, {_limit(c.flash, p.flash)}"
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
            ax.barh(y, wide, left=left, height=0.68, color=_ink(colour), edgecolor=_ink("page"),
                    linewidth=0.8, label=word if y == 0 else None)  # fmt: skip
            left += wide
        if limit is not None and limit / 1024 > left:
            ax.barh(y, end - left, left=left, height=0.68, color="none", edgecolor=_ink("line"),
                    linewidth=0.8, label="free" if y == 0 else None)  # fmt: skip
        share = "" if limit is None else f", {percent(1024 * left / limit)}"
        ax.text(1.012 * end, y, f"{kib(1024 * left)}{share}", va="center", color=_ink("ink"))
    ax.set_yticks(range(len(bars)), [name for name, _ in bars])
    ax.set_ylim(len(bars) - 0.5, -0.5)
    ax.set_xlim(0, end * 1.002)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(length=0)
    _kib_axis(ax.xaxis)
    note = "" if limit is None else f", limit {kib(limit)}"
    note += ", axis cut" if 1024 * end < full else ""
    ax.set_title(f"{what} in KiB{note}", loc="left", color=_ink("ink"))
    ax.legend(loc="lower right", bbox_to_anchor=(1.005, 0.97), ncols=5, borderaxespad=0.25,
              columnspacing=1.4, **_KEYS)  # fmt: skip


# ---- picture: memory over one training step ----


def _memory(p: Plan, m: Memory) -> Drawn:
    program, c = p.program, p.cost
    steps = len(program.steps)
    figure = _canvas(3.9)
    ax = _axes(figure, 0.7, 0.8, 1.75, 0.35)
    x = np.arange(steps + 1)
    base = np.zeros(steps + 1)
    for kind, live in m.live.items():
        words, colour = KINDS[kind]
        top = base + np.append(live, live[-1]) / 1024
        ax.fill_between(x, base, top, step="post", color=_ink(colour), linewidth=0, label=words)
        if bool((base > 0).any()):
            ax.step(x, base, where="post", color=_ink("page"), linewidth=0.5)
        base = top
    room = None if p.ram is None else p.ram - c.static - c.stack
    high = 1.06 * c.arena / 1024
    lines = [("floor: inference alone", c.floor, "ink"), ("arena, as placed", c.arena, "ink")]
    near = room is not None and room / 1024 < 1.5 * high
    if room is not None and near:
        lines.append(("room for the arena", room, "red"))
        high = max(high, 1.04 * room / 1024)
    places = _apart([n / 1024 for _, n, _ in lines], 0.1 * high)
    for (words, n, colour), place in zip(lines, places, strict=True):
        ax.axhline(n / 1024, color=_ink(colour), linewidth=0.9, linestyle=(0, (4, 2)))
        _beside(ax, f"{words}\n{kib(n)}", place, colour)
    if room is not None and not near:
        ax.text(1.012, 1.03, f"room for the arena\n{kib(room)} ↑", transform=ax.transAxes,
                va="bottom", color=_ink("red"), fontsize=7.5)  # fmt: skip
    _phases(ax, program)
    peak = int(np.argmax(m.total))
    ax.plot(
        peak + 0.5, m.total[peak] / 1024, marker="v", markersize=4, color=_ink("ink"), clip_on=False
    )
    ax.set_xlim(0, steps)
    ax.set_ylim(0, high)
    _kib_axis(ax.yaxis)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_ylabel("live bytes, KiB")
    ax.yaxis.set_label_coords(-0.58 / (WIDTH - 2.45), 0.5)
    ax.set_xlabel("step of the program, in order (not time)", loc="left")
    _legend_below(ax, 7)
    step = program.steps[peak]
    where = f"{_phase(step.phase)} of {_plain(step.node)}, step {peak}"
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
    ax.axvline(at[0], color=_ink("ink"), linewidth=0.7)
    ax.axvspan(at[0], at[-1] + 1, color=_ink("ink"), alpha=0.15, linewidth=0)
    backward = steps - at[-1] - 1
    labels = [(0.0, "left", "forward"), (at[0], "right", "loss, then backward and update ▸")]
    if at[0] < 0.12 * steps:
        labels = [(at[0], "left", "loss"), (steps, "right", "backward and update")]
    elif backward > 0.25 * steps:
        middle = (at[0] + at[-1] + 1) / 2
        labels = [labels[0], (middle, "center", "loss"), (steps, "right", "backward and update")]
    for x, side, text in labels:
        ax.text(x, 1.025, text, transform=ax.get_xaxis_transform(), ha=side, color=_ink("soft"))


# ---- picture: which layers are updated ----


def _layers(p: Plan) -> Drawn:
    """A row per layer, a panel per figure; of very many layers only some are named."""
    rows = picture_layers(p)
    n = len(rows)
    high = 0.26 if n <= 12 else 0.165 if n <= 48 else max(0.03, 8.0 / n)
    every = max(1, round(0.12 / high))
    names = [_short(row.name, 28) for row in rows]
    font = min(7.5, 64 * high * every)
    left = 0.2 + 0.6 * font / 72 * max(len(name) for name in names)
    figure = _canvas(n * high + 0.95)
    wide = (WIDTH - left - 0.15) / 3
    y = np.arange(n)
    panels = []
    for i, title in enumerate(("parameters (log axis)", "multiply-accumulates", "kept, KiB")):
        ax = _axes(figure, left + i * wide, 0.35, 0.15 + (2 - i) * wide + 0.3, 0.6)
        ax.set_title(title, loc="left", color=_ink("ink"))
        ax.set_ylim(n - 0.4, -0.6)
        ax.set_yticks(y[::every], names[::every] if i == 0 else [], fontsize=font)
        ax.tick_params(length=0)
        ax.grid(axis="x")
        ax.spines["bottom"].set_visible(False)
        panels.append(ax)
    params, macs, kept = panels
    total, trained = _ints(rows, "params"), _ints(rows, "trained")
    least = min(v for v in [*total, *trained, 1e9] if v > 0)
    params.set_xscale("log")
    params.set_xlim(10 ** math.floor(math.log10(least) - 0.01), 1.5 * max(*total, 1.0))
    _bars(params, y, total, rows, faint=True)
    _bars(params, y, trained, rows)
    _log_counts(params.xaxis)
    forward, backward = _ints(rows, "forward"), _ints(rows, "backward")
    _bars(macs, y, forward + backward, rows, faint=True)
    _bars(macs, y, forward, rows)
    _count_axis(macs.xaxis)
    _bars(kept, y, _ints(rows, "kept") / 1024, rows)
    _kib_axis(kept.xaxis)
    if not any(row.kept for row in rows):
        kept.set_xlim(0, 1)
    _status_legend(figure, rows, left)
    number = sum(row.status == "trained" for row in rows)
    alt = f"{number} of {n} layers are trained."
    caption = (
        "Planned, per layer. Parameters: strong the trained ones, faint the others. "
        "Multiply-accumulates: strong forward, faint backward. Kept: from the forward to the "
        "backward pass, with what the activations and poolings after the layer keep."
        + (f" One layer in {every} is named." if every > 1 else "")
    )
    return figure, alt, caption


def _ints(rows: list[Layer], field: str) -> Numbers:
    return np.array([getattr(row, field) for row in rows], dtype=np.float64)


def _bars(ax: Any, y: Any, values: Numbers, rows: list[Layer], faint: bool = False) -> None:
    """Bars in the colours of their status, without the grid showing through the faint ones."""
    colours = [_ink(STATUS[row.status]) for row in rows]
    if faint:
        ax.barh(y, values, 0.76, color=_ink("page"), linewidth=0)
    ax.barh(y, values, 0.76, color=colours, alpha=0.38 if faint else None, linewidth=0)


def _log_counts(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(numticks=5))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}" if v < 1e6 else count(v)))


def _status_legend(figure: Any, rows: list[Layer], left: float) -> None:
    from matplotlib.patches import Patch

    present = [s for s in STATUS if any(row.status == s for row in rows)]
    handles = [Patch(color=_ink(STATUS[s]), label=s) for s in present]
    high = figure.get_size_inches()[1]
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(left / WIDTH, 1 - 0.06 / high),
                  ncols=3, borderaxespad=0, **_KEYS)  # fmt: skip


# ---- picture: loss and accuracy ----


def _losses(r: Report) -> Drawn | None:
    shown = [i for i, t in enumerate(r.traces) if len(t.losses) > 1]
    scored = [i for i, t in enumerate(r.traces) if _accuracy(t)]
    if not shown and not scored:
        return None
    bottom = 0.55 + 0.17 * -(-len(shown) // 4)
    figure = _canvas(2.7 + bottom)
    right = 0.2
    if scored:
        right = min(5.0, 1.3 + 0.75 * len(scored)) if shown else 0.2
        left = WIDTH - right + 0.75 if shown else 0.6
        _accuracy_bars(_axes(figure, left, bottom, 0.2, 0.4), r, scored)
    caption = ""
    if shown:
        ax = _axes(figure, 0.55, bottom, right, 0.4)
        caption = _loss_curves(ax, r, shown)
    ends = [
        f"{r.names[i]} {_arrow(r.traces[i].losses[:1], r.traces[i].losses[-1:])}" for i in shown
    ]
    return figure, "Loss: " + "; ".join(ends), caption


def _loss_curves(ax: Any, r: Report, shown: list[int]) -> str:
    """Faint: every sample; strong: a moving mean.  Curves that coincide are drawn as dashes."""
    from matplotlib.lines import Line2D

    smooth = {i: _smooth(_finite_numbers(r.traces[i].losses)) for i in shown}
    groups = _groups([smooth[i] for i in shown])
    high, largest = 0.0, 0.0
    for members in groups:
        for k, member in enumerate(members):
            i = shown[member]
            colour, raw = _ink(SERIES[i % len(SERIES)]), _finite_numbers(r.traces[i].losses)
            if k == 0:
                ax.plot(*_thin(raw), color=colour, linewidth=0.5, alpha=0.3)
            dash: Any = "-" if k == 0 else (6 * (k - 1), (6, 6 * (len(members) - 1)))
            width = 2.6 if k == 0 and len(members) > 1 else 1.4
            ax.plot(*_thin(smooth[i]), color=colour, linewidth=width, linestyle=dash,
                    dash_capstyle="butt")  # fmt: skip
            known = raw[np.isfinite(raw)]
            if len(known):
                high = max(high, float(np.quantile(known, 0.98)), float(np.nanmax(smooth[i])))
                largest = max(largest, float(known.max()))
    ax.set_ylim(0, 1.08 * high if high > 0 else 1)
    ax.set_xlim(0, 1.01 * max(len(r.traces[i].losses) for i in shown))
    _sample_axis(ax)
    ax.tick_params(length=0)
    ax.grid(axis="y")
    ax.set_title("loss", loc="left", color=_ink("ink"))
    colours = [_ink(SERIES[i % len(SERIES)]) for i in shown]
    handles = [Line2D([], [], color=colour, linewidth=2) for colour in colours]
    labels = [_short(r.names[i], 18) for i in shown]
    _legend_below(ax, 4, handles=handles, labels=labels, handlelength=1.6)
    lie = [
        f"{_listed([r.names[shown[k]] for k in members[1:]])} "
        f"{'lies' if len(members) == 2 else 'lie'} on {r.names[shown[members[0]]]} (dashed)"
        for members in groups
        if len(members) > 1
    ]
    window = max(_window(len(r.traces[i].losses)) for i in shown)
    caption = (
        f"Measured. Strong: mean over {window} samples. Faint: every sample, before its update."
    )
    if largest > ax.get_ylim()[1]:
        caption += " The largest losses are above the axis."
    return caption + (f" {'; '.join(lie)}." if lie else "")


def _sample_axis(ax: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
    ax.set_xlabel("training samples", loc="left")


def _accuracy_bars(ax: Any, r: Report, scored: list[int]) -> None:
    x = np.arange(len(scored))
    before = [100 * (r.traces[i].accuracy_before or 0.0) for i in scored]
    after = [100 * (r.traces[i].accuracy_after or 0.0) for i in scored]
    colours = [_ink(SERIES[i % len(SERIES)]) for i in scored]
    ax.bar(x - 0.21, before, 0.38, color=colours, alpha=0.38, linewidth=0)
    ax.bar(x + 0.21, after, 0.38, color=colours, linewidth=0)
    font = 7.5 if len(scored) <= 5 else 6
    for at, value in [*zip(x - 0.21, before, strict=True), *zip(x + 0.21, after, strict=True)]:
        ax.text(at, value + 1.5, f"{value:.0f}", ha="center", va="bottom", fontsize=font)
    most = max(6, 34 // len(scored))
    ax.set_xticks(x, [_short(r.names[i], most) for i in scored])
    ax.set_xlim(-0.6, max(len(scored), 2) - 0.4)
    ax.set_ylim(0, 108)
    ax.set_yticks([0, 25, 50, 75, 100])
    ax.tick_params(length=0)
    ax.grid(axis="y")
    ax.set_title("accuracy in %, before (faint) and after", loc="left", color=_ink("ink"))


def _window(n: int) -> int:
    return max(1, n // 20)


def _smooth(y: Numbers) -> Numbers:
    """Centred moving mean over a twentieth of the samples; what is not finite is left out."""
    window = np.ones(_window(len(y)))
    known = np.isfinite(y)
    total = np.convolve(np.where(known, y, 0.0), window, "same")
    weight = np.convolve(known.astype(float), window, "same")
    return np.where(weight > 0, total / np.maximum(weight, 1.0), np.nan)


def _finite_numbers(values: Sequence[float]) -> Numbers:
    y = np.asarray(values, dtype=np.float64)
    return np.where(np.isfinite(y), y, np.nan)


def _thin(y: Numbers, most: int = 1500) -> tuple[Numbers, Numbers]:
    """(x, y) for a line of at most about `most` points: least and largest of every bin."""
    if len(y) <= most:
        return np.arange(float(len(y))), y
    parts = np.array_split(y, most // 2)
    ends = np.cumsum([len(part) for part in parts])
    lows = [np.fmin.reduce(part) for part in parts]
    highs = [np.fmax.reduce(part) for part in parts]
    x = np.repeat(ends - (len(parts[0]) + 1) / 2, 2)
    return x, np.ravel(np.column_stack([lows, highs]))


def _groups(curves: list[Numbers]) -> list[list[int]]:
    """Curves that nobody could tell apart in the picture, together; the first one leads."""
    top = max((float(np.nanmax(c)) for c in curves if np.isfinite(c).any()), default=0.0)
    groups: list[list[int]] = []
    for i, curve in enumerate(curves):
        for members in groups:
            first = curves[members[0]]
            if len(first) == len(curve) and np.allclose(
                first, curve, rtol=0, atol=0.006 * top, equal_nan=True
            ):
                members.append(i)
                break
        else:
            groups.append([i])
    return groups


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# ---- picture: where two runs part ----


def _parity(r: Report) -> Drawn | None:
    """Relative differences of the losses; runs that are the same bits need no line."""
    series: dict[bytes, tuple[list[str], Numbers, int]] = {}
    tolerance = 0.0
    for i, c in enumerate(r.comparisons, start=1):
        if isinstance(c, str) or c.bitwise:
            continue
        tolerance = max(tolerance, c.tolerance)
        a, b = (np.asarray(r.traces[k].losses, dtype=np.float64) for k in (0, i))
        scale = np.maximum(np.maximum(np.abs(a), np.abs(b)), LOSS_FLOOR)
        names, _, _ = series.setdefault(b.tobytes(), ([], np.abs(a - b) / scale, i))
        names.append(r.names[i])
    known = [d[np.isfinite(d) & (d > 0)] for _, d, _ in series.values()]
    least = min((float(d.min()) for d in known if len(d)), default=0.0)
    if least == 0.0:
        return None
    margin = 0.55 + 0.17 * -(-len(series) // 4)
    figure = _canvas(2.15 + margin)
    ax = _axes(figure, 0.7, margin, 1.75, 0.4)
    bottom = 10.0 ** (math.floor(math.log10(least)) - 1)
    equal = []
    for names, d, i in series.values():
        colour = _ink(SERIES[i % len(SERIES)])
        label = _short(_listed(names), 60 if len(series) < 3 else 24)
        ax.plot(*_thin(np.where(d > 0, d, np.nan)), ".", color=colour, alpha=0.75, label=label,
                markersize=max(2.0, 5.0 - len(d) / 400), markeredgewidth=0)  # fmt: skip
        zero = np.flatnonzero(d == 0)
        zero = zero[:: 1 + len(zero) // 1500]
        ax.plot(zero, np.full(len(zero), bottom), "|", markersize=6, color=colour,
                markeredgewidth=0.6, clip_on=False)  # fmt: skip
        if len(zero):
            equal.append(f"{int((d == 0).sum())} of {len(d)} losses of {_listed(names)}")
    ax.axhline(tolerance, color=_ink("ink"), linewidth=0.9, linestyle=(0, (4, 2)))
    _beside(ax, f"tolerance\n{tolerance:g}", tolerance)
    if equal:
        _beside(ax, "equal bits", bottom, "soft")
    ax.set_yscale("log")
    largest = max(float(d.max()) for d in known if len(d))
    ax.set_ylim(bottom, 4 * max(tolerance, largest))
    ax.set_xlim(0, 1.01 * max(len(d) for _, d, _ in series.values()))
    _powers(ax.yaxis)
    ax.tick_params(length=0, which="both")
    ax.grid(axis="y")
    _sample_axis(ax)
    ax.set_title(f"relative difference of the loss from {_short(r.names[0])}", loc="left",
                 color=_ink("ink"))  # fmt: skip
    _legend_below(ax, 4, markerscale=2)
    caption = (
        "Measured. Each point is one training sample; the difference is relative to the larger "
        f"loss, absolute below {LOSS_FLOOR:g}."
        + (f" The same bits as {r.names[0]}: {'; '.join(equal)}." if equal else "")
    )
    return figure, f"Relative loss differences, at most {largest:.1e}", caption


def _powers(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    superscript = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    axis.set_major_locator(LogLocator(numticks=7))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(
        FuncFormatter(lambda v, _: "10" + f"{round(math.log10(v))}".translate(superscript))
    )
