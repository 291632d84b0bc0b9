"""Page: what report.html.j2 shows of a plan and of its runs."""

from __future__ import annotations

from importlib import resources
from typing import Any

from modicum.plan import Plan, step_rows
from modicum.report.palette import PALETTE, STATUS
from modicum.report.pictures import pictures
from modicum.report.runs import Runs, accuracy_change, emulated, figure_of, plain, run_rows, short
from modicum.report.tables import buffer_rows, layer_rows, memory_of, plan_rows
from modicum.trace import Comparison
from modicum.units import kib, percent


def html_of(r: Runs) -> str:
    """One page with tables and pictures that needs nothing else."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    source = resources.files("modicum.report").joinpath("report.html.j2").read_text("utf-8")
    return environment.from_string(source).render(_shown(r))


def _shown(r: Runs) -> dict[str, Any]:
    """Everything that the template shows."""
    p, m = r.plan, memory_of(r.plan)
    first, layers = layer_rows(p)
    facts = [
        f"method {short(_method(p), 80)}",
        "input " + " × ".join(map(str, p.graph.shape(p.graph.input)[1:])),
        str(p.optimizer),
        f"{p.accumulate} samples per update" if p.accumulate > 1 else "one sample per update",
        *([f"{p.inner_steps} inner steps that differ"] if p.inner_steps > 1 else []),
        p.loss.replace("_", " ") + " loss",
    ]
    return {
        "title": "Training on " + plain(p.board.title) if p.board else "Training, no board given",
        "facts": facts,
        "hash": p.hash,
        "palette": PALETTE,
        "tiles": _tiles(r),
        "names": r.names,
        "runs": [(_typeset(n), [_typeset(c) for c in cells]) for n, cells in run_rows(r)],
        "comparisons": [str(c) for c in r.comparisons],
        "emulated": any(emulated(t) for t in r.traces),
        "plan_rows": plan_rows(p, m),
        "step_rows": step_rows(p) if p.inner_steps > 1 else [],
        "pattern": p.worst if len(p.patterns) > 1 else None,
        "buffers": buffer_rows(p),
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
    simple = {k: v for k, v in fields.items() if isinstance(v, int | float | str)}
    given = ", ".join(f"{name}={value}" for name, value in simple.items())
    return plain(f"{p.method.kind} ({given})" if given else p.method.kind)


def _tiles(r: Runs) -> list[tuple[str, str, str]]:
    """The figures that a reader looks for first: label, figure, words."""
    p, c = r.plan, r.plan.cost
    total = sum(p.graph.params[n].size for n in p.graph.trainable())
    ram = [n for n in (figure_of(t, "ram") for t in r.traces) if n is not None]
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
    scored = [(n, t) for n, t in zip(r.names, r.traces, strict=True) if accuracy_change(t)]
    if scored:
        name, t = scored[-1]
        before, after = percent(t.accuracy_before or 0.0), percent(t.accuracy_after or 0.0)
        tiles.append(("Accuracy", after, f"{before} before; {short(name)}"))
    compared = [x for x in r.comparisons if isinstance(x, Comparison) and x.steps]
    if compared:
        tiles.append((f"Against {short(r.names[0])}", *_worst(compared)))
    return tiles


def _worst(compared: list[Comparison]) -> tuple[str, str]:
    """The comparison that is least alike: figure, words."""
    parted = [c for c in compared if c.first is not None]
    if parted:
        worst = min(parted, key=lambda c: c.first or (0, ""))
        return (
            f"step {(worst.first or (0, ''))[0]}",
            f"parts above {worst.tolerance:g}: {short(worst.b)}",
        )
    if all(c.bitwise for c in compared):
        return "same bits", f"{compared[0].steps:,} steps"
    worst = max(compared, key=lambda c: c.largest)
    return f"{worst.largest:.1e}", f"largest difference; agrees within {worst.tolerance:g}"


def _typeset(text: str) -> str:
    """Our own ASCII signs as the ones that print well."""
    return "–" if text == "-" else text.replace("->", "→")
