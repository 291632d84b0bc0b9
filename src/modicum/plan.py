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
from modicum.cost import Cost, LayerCost, StepCost, layer_costs, step_costs, worst_cost
from modicum.errors import DoesNotFit, InvalidInput, ModicumError, UsageError
from modicum.graph import Frozen, Graph
from modicum.lower import Loss, Order, Program, lower
from modicum.memory import Placement, lower_bound, place, verify_together
from modicum.methods import AnyMethod, Full, Limits, Method, Observed, ObservingMethod
from modicum.ops import check_graph
from modicum.optim import SGD, Adam, Optimizer
from modicum.selection import Selection, some
from modicum.units import count, kib, percent, size

VERSION: Literal[4] = 4
MOST_ACCUMULATED = 65535
ORDERS: tuple[Order, ...] = ("dx-first", "dw-first")


class Pattern(Frozen):
    """The inner steps that update the same parameters, and where their program has its buffers.

    `look` says it of the program of their first pass, where layers have channel attention.
    """

    steps: tuple[int, ...]
    order: Order = "dx-first"
    offsets: dict[str, int]
    look: dict[str, int] | None = None
    layers: tuple[LayerCost, ...]

    def placement(self, program: Program) -> Placement:
        """Of its program, or of that of its first pass."""
        offsets = (self.look or {}) if program.looks else self.offsets
        ends = (offsets[n] + b.bytes for n, b in program.buffers.items() if n in offsets)
        return Placement(offsets, max(ends), 0, lower_bound(program))


class Plan(Frozen):
    """What to update, with which optimiser, where each buffer lies, and the cost.

    `graph` is the captured model.  `accumulate` samples make one update, which is an inner step.
    `ram` and `flash` are the limits in bytes that the plan keeps (None: no limit).

    Most plans update the same in every inner step: then there is one pattern.  Where step sizes of
    the selection are 0 in some steps there are several, each with a program of its own over one
    arena, in which all that persists lies at one place.  `steps` tells what each step costs.
    """

    version: Literal[4] = VERSION
    graph: Graph
    board: Board | None = None
    ram: int | None = None
    flash: int | None = None
    method: AnyMethod
    selection: Selection
    optimizer: Optimizer
    loss: Loss = "cross_entropy"
    accumulate: Annotated[int, Field(ge=1, le=MOST_ACCUMULATED)] = 1
    patterns: Annotated[tuple[Pattern, ...], Field(min_length=1)]
    cost: Cost
    steps: tuple[StepCost, ...]

    @property
    def inner_steps(self) -> int:
        """Inner steps with step sizes of their own; all later ones are as the last of them."""
        return self.selection.inner_steps

    def pattern_of(self, step: int) -> int:
        """The index of the pattern of an inner step.  Raises UsageError for one below 0."""
        if step < 0:
            raise UsageError(f"there is no inner step {step}", hint="they are counted from 0")
        return self.steps[min(step, len(self.steps) - 1)].pattern

    @cached_property
    def programs(self) -> tuple[Program, ...]:
        """What the plan stands for, pattern by pattern; derived, so it is not stored."""
        how = (self.graph, self.selection, self.optimizer, self.loss, self.accumulate)
        return tuple(lower(*how, p.order, p.steps[0]) for p in self.patterns)

    @cached_property
    def looks(self) -> tuple[Program | None, ...]:
        """The program of the first pass of each pattern in which attention chooses channels."""
        how = (self.graph, self.selection, self.optimizer, self.loss, self.accumulate, ORDERS[0])
        both = zip(self.patterns, self.programs, strict=True)
        return tuple(lower(*how, p.steps[0], look=True) if q.attends else None for p, q in both)

    @property
    def attends(self) -> bool:
        """Whether the samples of some update pass twice, first to choose channels."""
        return any(look is not None for look in self.looks)

    @cached_property
    def worst(self) -> int:
        """The index of the pattern that needs most memory."""
        placed = zip(self.patterns, self.programs, strict=True)
        arenas = [pattern.placement(program).arena for pattern, program in placed]
        return arenas.index(max(arenas))

    def check_updates(self, samples: int) -> None:
        """Raise UsageError for samples left over from the last update, where attention chooses by
        all samples of one."""
        if self.attends and samples % self.accumulate:
            raise UsageError(
                f"{samples} samples are not whole updates of {self.accumulate}",
                why="channel attention chooses by all samples of an update",
                hint="another number of samples, or of epochs",
            )

    @property
    def program(self) -> Program:
        """That of the pattern which needs most memory.

        The graph, what is in RAM from step to step, and the sizes of inputs and outputs are the
        same in all of them.
        """
        return self.programs[self.worst]

    @property
    def offsets(self) -> dict[str, int]:
        """Of the pattern that needs most memory."""
        return self.patterns[self.worst].offsets

    @property
    def layers(self) -> tuple[LayerCost, ...]:
        """Of the pattern that needs most memory."""
        return self.patterns[self.worst].layers

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
        if tuple(p.steps for p in self.patterns) != self.selection.patterns:
            raise InvalidInput(
                "the plan's patterns are not those of its step sizes", hint="make it again"
            )
        try:
            programs, looks = self.programs, self.looks
        except UsageError as error:
            raise InvalidInput(
                "the plan's selection does not fit its graph", why=error.what
            ) from None
        except (ValueError, LookupError, TypeError, ArithmeticError) as error:
            raise InvalidInput("the plan's graph is malformed", why=repr(error)) from None
        both = list(zip(self.patterns, programs, strict=True))
        first = list(zip(self.patterns, looks, strict=True))
        if any((p.look is None) != (look is None) for p, look in first):
            raise InvalidInput(
                "the plan's patterns do not attend where its layers do", hint="make it again"
            )
        offsets = [(program, p.offsets) for p, program in both]
        offsets += [(look, p.look) for p, look in first if look is not None and p.look is not None]
        verify_together(offsets, self.cost.arena)
        placed = [(program, p.placement(program)) for p, program in both]
        looking = [None if look is None else (look, p.placement(look)) for p, look in first]
        if (
            worst_cost(placed, self.board, looking) != self.cost
            or step_costs(placed, looking) != self.steps
            or any(layer_costs(program) != p.layers for p, program in both)
        ):
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
    if samples is not None and not isinstance(samples, Observed):
        raise UsageError(
            f"samples of type {type(samples).__name__} have not been looked at",
            hint="plan(..., samples=observe(model, graph, method, samples))",
        )
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
        moving = selection.without_idle()
        return _placed(graph, board, method, moving, optimizer, loss, accumulate, ram, flash)

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
    placed: list[tuple[Program, Placement]] = []
    looking: list[tuple[Program, Placement] | None] = []
    for step, *_ in selection.patterns:
        best: tuple[Program, Placement] | None = None
        for order in ORDERS:
            if best is not None and not best[0].either:
                break
            program = lower(graph, selection, optimizer, loss, accumulate, order, step)
            if best is None or lower_bound(program) < best[1].arena:
                at = place(program)
                best = (program, at) if best is None or at.arena < best[1].arena else best
        assert best is not None
        placed.append(best)
        look = None
        if best[0].attends:
            look = lower(graph, selection, optimizer, loss, accumulate, step=step, look=True)
        looking.append(None if look is None else (look, place(look)))
    total = worst_cost(placed, board, looking)
    every = [*placed, *(look for look in looking if look)]
    verify_together([(program, at.offsets) for program, at in every], total.arena)
    made = Plan(
        graph=graph,
        board=board,
        ram=ram,
        flash=flash,
        method=method,
        selection=selection,
        optimizer=optimizer,
        loss=loss,
        accumulate=accumulate,
        patterns=tuple(
            Pattern(
                steps=program.inner,
                order=program.order,
                offsets=dict(at.offsets),
                look=None if look is None else dict(look[1].offsets),
                layers=layer_costs(program),
            )
            for (program, at), look in zip(placed, looking, strict=True)
        ),
        cost=total,
        steps=step_costs(placed, looking),
    )
    # what `programs` and `looks` would lower again
    made.__dict__["programs"] = tuple(program for program, _ in placed)
    made.__dict__["looks"] = tuple(look and look[0] for look in looking)
    return made


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
        text = f"gradients of {p.accumulate} samples" if p.accumulate > 1 else ""
        if p.attends:
            text += f"{', ' if text else ''}magnitudes and gates of channels"
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
    if c.macs_look:
        rows.append(("  look", count(c.macs_look), "of the pass that chooses channels, before it"))
    title = f"{p.method.kind} on {board}, input {_x(p.graph)}, {p.optimizer}"
    if p.accumulate > 1:
        title += f", {p.accumulate} samples per update"
    wide = max(len(r[1]) for r in rows)
    lines = [title, *(f"  {a:<13} {b:>{wide}}  {text}".rstrip() for a, b, text in rows)]
    if p.inner_steps > 1:
        lines += _step_lines(p)
    return "\n".join(lines + (_layer_lines(p) if layers else []))


def step_rows(p: Plan) -> list[tuple[str, str, str, str, str, str]]:
    """Per inner step: its number, its pattern, and what that trains, keeps, needs, computes."""
    rows = []
    for s in p.steps:
        number = f"{s.step} on" if s.step == p.inner_steps - 1 else str(s.step)
        figures = (size(s.saved), size(s.dynamic), count(s.macs_backward))
        rows.append((number, str(s.pattern), some(list(s.trains), 4), *figures))
    return rows


def _step_lines(p: Plan) -> list[str]:
    cells = [("step", "pattern", "trains", "saved", "dynamic", "MACs bwd"), *step_rows(p)]
    widths = [max(len(r[i]) for r in cells) for i in range(6)]
    lines = ["", "  inner steps differ; each figure above is that of the step with the most:"]
    for r in cells:
        left = [f"{r[i]:<{widths[i]}}" for i in range(3)]
        right = [f"{r[i]:>{widths[i]}}" for i in range(3, 6)]
        lines.append("  " + "  ".join(left + right))
    return lines


def _layer_lines(p: Plan) -> list[str]:
    """Layers from the deepest that takes part in the backward pass on."""
    first = next(
        (i for i, r in enumerate(p.layers) if r.trained or r.macs_dx or r.kept), len(p.layers)
    )
    lines = ["", f"  {first} of {len(p.layers)} nodes are frozen and keep nothing; the others:"]
    if len(p.patterns) > 1:
        lines.insert(1, f"  pattern {p.worst}, which needs most memory:")
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
