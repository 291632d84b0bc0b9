"""Plan: the decision what to update on a board, where every buffer lies, and what it costs.

A plan is frozen, versioned and hashed JSON.  Everything before it makes one; everything after it
only reads one.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from modicum import board as catalogue
from modicum.board import Board
from modicum.cost import Cost, LayerCost, cost, layer_costs
from modicum.errors import DoesNotFit, InvalidInput, ModicumError, UsageError
from modicum.graph import Frozen, Graph
from modicum.lower import Loss, Order, Program, lower
from modicum.memory import Placement, place, verify
from modicum.methods import AnyMethod, Full, Limits, Method, Observed, ObservingMethod
from modicum.ops import check_graph
from modicum.optim import SGD, Adam, Optimizer
from modicum.selection import Selection
from modicum.units import count, kib, percent, size

VERSION: Literal[2] = 2
MOST_ACCUMULATED = 65535
ORDERS: tuple[Order, ...] = ("dx-first", "dw-first")


class Plan(Frozen):
    """What to update, with which optimiser, where each buffer lies, and the cost.

    `graph` is the captured model.  `accumulate` samples make one update.  `ram` and `flash` are
    the limits in bytes that the plan keeps (None: no limit).
    """

    version: Literal[2] = VERSION
    graph: Graph
    board: Board | None = None
    ram: int | None = None
    flash: int | None = None
    method: AnyMethod
    selection: Selection
    optimizer: Optimizer
    loss: Loss = "cross_entropy"
    accumulate: Annotated[int, Field(ge=1, le=MOST_ACCUMULATED)] = 1
    order: Order = "dx-first"
    offsets: dict[str, int]
    cost: Cost
    layers: tuple[LayerCost, ...]

    @cached_property
    def program(self) -> Program:
        """The steps that the plan stands for; derived, so it is not stored."""
        return lower(
            self.graph, self.selection, self.optimizer, self.loss, self.accumulate, self.order
        )

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON: the identity that state blobs and traces carry."""
        return _digest(self.model_dump(mode="json"))

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, all or nothing."""
        data = {**self.model_dump(mode="json"), "hash": self.hash}
        target = Path(path)
        temporary = target.with_name(target.name + ".part")
        temporary.write_text(json.dumps(data, indent=1) + "\n")
        temporary.replace(target)

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan and check all of it: fields, hash, graph, placement and costs.

        Raises InvalidInput for anything that is wrong.
        """
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInput(f"cannot read plan {path}", why=str(error)) from None
        return Plan.from_json(text, where=str(path))

    @staticmethod
    def from_json(text: str, where: str = "plan") -> Plan:
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidInput(
                "not a plan: the JSON is broken", where=where, why=str(error)
            ) from None
        if not isinstance(data, dict) or data.get("version") != VERSION:
            version = data.get("version") if isinstance(data, dict) else None
            raise InvalidInput(
                f"not a plan of version {VERSION}", where=where, why=f"its version is {version!r}"
            )
        digest = data.pop("hash", None)
        try:
            plan = Plan.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            place_ = ".".join(str(p) for p in first["loc"])
            raise InvalidInput(
                "not a valid plan", where=f"{where}: {place_}", why=str(first["msg"])
            ) from None
        if digest != plan.hash:
            raise InvalidInput(
                "the plan was changed after it was made",
                where=where,
                why="its contents do not have the hash that it carries",
                hint="make the plan again",
            )
        plan.check()
        return plan

    def check(self) -> None:
        """Raise InvalidInput unless graph, placement and cost agree with each other."""
        check_graph(self.graph)
        try:
            program = self.program
        except UsageError as error:
            raise InvalidInput(
                "the plan's selection does not fit its graph", why=error.what
            ) from None
        except (ValueError, LookupError, TypeError, ArithmeticError) as error:
            raise InvalidInput("the plan's graph is malformed", why=repr(error)) from None
        verify(program, self.offsets, self.cost.arena)
        placement = _placement(program, self.offsets)
        same_cost = cost(program, placement, self.board) == self.cost
        if not same_cost or layer_costs(program) != self.layers:
            raise InvalidInput(
                "the plan's costs are not those of its program", hint="make it again"
            )

    def __str__(self) -> str:
        return render(self)


def plan(
    graph: Graph,
    board: Board | str | None = None,
    method: Method | None = None,
    optimizer: SGD | Adam | None = None,
    *,
    samples: Observed | None = None,
    loss: Loss = "cross_entropy",
    accumulate: int = 1,
    ram: int | None = None,
    flash: int | None = None,
) -> Plan:
    """Decide what to update on a board, and prove that it fits.

    `board` is a name of the catalogue or a Board; `ram` and `flash` (bytes) replace its limits.
    Without a board there are no limits.  `samples` is what a method that decides by samples or
    weights saw of them: ``observe(model, graph, method, support)``.  Raises DoesNotFit with the
    nearest plan that fits, and UsageError for a method that does not apply to the graph.

    >>> import modicum as mo, torch
    >>> graph = mo.capture(torch.nn.Linear(8, 4), torch.zeros(1, 8))
    >>> p = mo.plan(graph, "nano33ble", mo.Full(), mo.SGD(lr=0.1))
    >>> p.cost.trained_params
    36
    """
    method = method or Full()
    optimizer = optimizer or SGD()
    target = catalogue.get(board) if isinstance(board, str) else board
    if not 1 <= accumulate <= MOST_ACCUMULATED:
        raise UsageError(
            f"cannot accumulate {accumulate} samples", hint=f"1 to {MOST_ACCUMULATED:,}"
        )
    if (ram is not None and ram < 1) or (flash is not None and flash < 1):
        raise UsageError("limits of RAM and flash are positive numbers of bytes")
    made = _make(graph, target, method, optimizer, loss, accumulate, ram, flash, samples)
    if not fits(made):
        raise _does_not_fit(made, samples)
    return made


def fits(p: Plan) -> bool:
    return (p.ram is None or p.cost.ram <= p.ram) and (p.flash is None or p.cost.flash <= p.flash)


def _make(
    graph: Graph,
    board: Board | None,
    method: Method,
    optimizer: SGD | Adam,
    loss: Loss,
    accumulate: int,
    ram: int | None,
    flash: int | None,
    samples: Observed | None,
) -> Plan:
    ram = ram if ram is not None else (board.available if board else None)
    flash = flash if flash is not None else (board.flash if board else None)

    def made(selection: Selection) -> Plan:
        return _placed(graph, board, method, selection, optimizer, loss, accumulate, ram, flash)

    if not isinstance(method, ObservingMethod) or samples is None:
        return made(method.select(graph))

    def within(selection: Selection) -> bool:
        return (ram is None and flash is None) or fits(made(selection))

    return made(method.select_for(graph, samples, Limits(optimizer, within)))


def _placed(
    graph: Graph,
    board: Board | None,
    method: Method,
    selection: Selection,
    optimizer: SGD | Adam,
    loss: Loss,
    accumulate: int,
    ram: int | None,
    flash: int | None,
) -> Plan:
    candidates = []
    for order in ORDERS:
        program = lower(graph, selection, optimizer, loss, accumulate, order)
        candidates.append((place(program), program))
        if candidates[0][1].steps == program.steps and order != ORDERS[0]:
            candidates.pop()
    placement, program = min(candidates, key=lambda c: c[0].arena)
    verify(program, placement.offsets, placement.arena)
    return Plan(
        graph=graph,
        board=board,
        ram=ram,
        flash=flash,
        method=method,
        selection=selection,
        optimizer=optimizer,
        loss=loss,
        accumulate=accumulate,
        order=program.order,
        offsets=dict(placement.offsets),
        cost=cost(program, placement, board),
        layers=layer_costs(program),
    )


def _placement(program: Program, offsets: dict[str, int]) -> Placement:
    from modicum.memory import lower_bound

    end = max(offsets[n] + b.bytes for n, b in program.buffers.items() if n in offsets)
    return Placement(offsets, end, 0, lower_bound(program))


def _does_not_fit(p: Plan, samples: Observed | None) -> DoesNotFit:
    """The error, with the table and the nearest method and board that fit."""
    c = p.cost
    where = p.board.name if p.board else "the limit"
    short = []
    if p.ram is not None and c.ram > p.ram:
        short.append(f"needs {kib(c.ram)} of RAM, {where} has {kib(p.ram)} for it")
    if p.flash is not None and c.flash > p.flash:
        short.append(f"needs {kib(c.flash)} of flash, {where} has {kib(p.flash)}")
    floor = p.ram is not None and c.floor + c.static + c.stack > p.ram
    return DoesNotFit(
        f"{p.method.kind} {' and '.join(short)}.",
        floor=f"{kib(c.floor)} (inference alone) at {c.floor_at}, input {_x(p.graph)}",
        why="no choice of updated layers goes below the inference peak" if floor else None,
        table=[line for line in render(p, layers=False).splitlines()[1:]],
        hint=_nearest(p, samples),
    )


def _nearest(p: Plan, samples: Observed | None) -> list[str]:
    hints = []
    method: Method | None = p.method
    while method is not None and (method := method.smaller()) is not None:
        try:
            smaller = _make(
                *(p.graph, p.board, method, p.optimizer, p.loss, p.accumulate, p.ram, p.flash),
                samples,
            )
        except ModicumError:
            break
        if fits(smaller):
            hints.append(f"--method {_flags(method)}, which needs {kib(smaller.cost.ram)}")
            break
    boards = [b for b in catalogue.boards().values() if b.kind == "mcu" or not hints]
    others = [b for b in boards if p.board is None or b.name != p.board.name]
    able = [b for b in others if p.cost.ram <= b.available and p.cost.flash <= b.flash]
    if able:
        nearest = min(able, key=lambda b: b.available)
        hints.append(f"--board {nearest.name}, which has {size(nearest.available)}")
    if len(p.graph.shape(p.graph.input)) == 4:
        hints.append("a smaller input or a narrower model")
    return hints


def _flags(method: Method) -> str:
    fields = method.model_dump(exclude={"kind"})
    return " ".join(
        [str(getattr(method, "kind", "")), *(f"--set {k}={v}" for k, v in fields.items())]
    )


def _digest(data: dict[str, Any]) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


# ---- the printed plan ------------------------------------------------------------------------


def render(p: Plan, layers: bool = True) -> str:
    """The plan as text: the memory table, then what each layer keeps and why."""
    c = p.cost
    board = f"{p.board.name} ({p.board.title})" if p.board else "no board"
    rows = [
        ("floor", kib(c.floor), f"live bytes of inference alone, at {c.floor_at}"),
        ("lower bound", kib(c.lower_bound), "most bytes live at once; no placement is smaller"),
        (
            "arena",
            kib(c.arena),
            f"as placed, {percent(c.arena / c.lower_bound - 1)} above the bound",
        ),
        ("  trained", kib(c.trained_bytes), f"{c.trained_params:,} parameters in RAM"),
        ("  optimiser", kib(c.optimizer_bytes), str(p.optimizer)),
    ]
    if c.accumulator_bytes:
        text = f"gradients of {p.accumulate} samples"
        rows.append(("  accumulated", kib(c.accumulator_bytes), text))
    rows += [
        ("  saved", kib(c.saved), "kept from forward to backward pass, one sample"),
        (".data + .bss", kib(c.static), "beside the arena"),
        ("stack", kib(c.stack), ""),
        ("RAM", kib(c.ram), f"of {kib(p.ram)}" if p.ram is not None else "no limit"),
        (
            "flash",
            kib(c.flash),
            f"weights {kib(c.flash_weights)}, code about {kib(c.flash_code)}"
            + (f"; of {kib(p.flash)}" if p.flash is not None else ""),
        ),
        ("MACs", count(c.macs_forward), f"forward; backward {count(c.macs_backward)}"),
    ]
    title = f"{p.method.kind} on {board}, input {_x(p.graph)}, {p.optimizer}"
    if p.accumulate > 1:
        title += f", {p.accumulate} samples per update"
    wide = max(len(r[1]) for r in rows)
    lines = [title, *(f"  {a:<13} {b:>{wide}}  {text}".rstrip() for a, b, text in rows)]
    return "\n".join(lines + (_layer_lines(p) if layers else []))


def _layer_lines(p: Plan) -> list[str]:
    """Layers from the deepest that takes part in the backward pass on."""
    first = next(
        (i for i, r in enumerate(p.layers) if r.trained or r.macs_dx or r.kept), len(p.layers)
    )
    lines = ["", f"  {first} of {len(p.layers)} nodes are frozen and keep nothing; the others:"]
    cells = []
    for row in p.layers[first:]:
        kept = "; ".join(f"{kind} {size(n)}: {why}" for kind, n, why in row.kept) or "nothing"
        trained = ", ".join(row.trained) or "-"
        macs = f"{count(row.macs_forward)} + {count(row.macs_dx + row.macs_dw)}"
        cells.append((row.name, row.op, trained, macs, kept))
    head = ("layer", "op", "trains", "MACs fwd + bwd", "keeps")
    widths = [max(len(r[i]) for r in [head, *cells]) for i in range(4)]
    for r in [head, *cells]:
        lines.append("  " + "  ".join(f"{r[i]:<{widths[i]}}" for i in range(4)) + "  " + r[4])
    return lines


def _x(graph: Graph) -> str:
    return "x".join(map(str, graph.shape(graph.input)))
