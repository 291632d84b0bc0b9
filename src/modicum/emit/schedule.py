"""Program + weights -> the C text of one plan, or of one of its patterns: its schedule.

Only the schedule is generated: a list of kernel calls at arena offsets that a person can read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cached_property

from modicum.emit.constants import Constants, c_float, identifier
from modicum.lower import Buffer, Step
from modicum.memory import persistent_bytes
from modicum.ops import OPS
from modicum.ops.base import Arg, Buf, Call, Const, Expr, Indices, Struct
from modicum.optim import Adam
from modicum.plan import Plan
from modicum.units import kib


class Schedule:
    """The parts of schedule.c.j2 for one pattern of a plan, or with `look` for its first pass.

    What it reads from flash goes to `constants`.
    """

    def __init__(
        self, plan: Plan, constants: Constants, pattern: int = 0, look: bool = False
    ) -> None:
        self.plan, self.constants = plan, constants
        program = plan.looks[pattern] if look else plan.programs[pattern]
        assert program is not None
        self.program, self.offsets = program, plan.patterns[pattern].placement(program).offsets
        self.symbols = _symbols(self.program.buffers)
        self.spans = self.program.lifetimes
        steps = self.program.steps
        self.forward = self._steps(s for s in steps if s.phase in ("forward", "save"))
        self.loss = "\n".join(self._loss(s) for s in steps if s.phase == "loss")
        self.backward = self._steps(s for s in steps if s.phase in ("backward", "update"))
        self.initial_values = self._initial_values()
        self.lr = c_float(plan.optimizer.lr)
        self.hash_bytes = ", ".join(f"0x{plan.hash[i : i + 2]}" for i in range(0, 32, 2))

    @property
    def learned(self) -> int:
        """Bytes of the arena that live on from step to step."""
        return persistent_bytes(self.program, self.offsets)

    @property
    def learned_floats(self) -> int:
        return sum(t.size for t in self.program.learned)

    @property
    def input_at(self) -> str:
        return self.symbols[self.program.input_buffer]

    @property
    def output_at(self) -> str:
        return self.symbols[self.program.output_buffer]

    @property
    def input(self) -> str:
        return f"F({self.input_at})"

    @property
    def output(self) -> str:
        return f"F({self.output_at})"

    @property
    def betas(self) -> list[str] | None:
        """1 - beta of Adam, where all that is trained is updated every time."""
        adam = self.plan.optimizer
        alike = len(self.plan.patterns) == 1
        return [c_float(1.0 - b) for b in adam.betas] if isinstance(adam, Adam) and alike else None

    @property
    def tables(self) -> set[str]:
        """The types of the constants by inner step that the updates read."""
        args = (a for s in self.program.steps for call in s.calls for a in call.args)
        return {a.table.ctype for a in args if isinstance(a, Expr) and a.table}

    @property
    def forget(self) -> str:
        """The calls that clear what training keeps beside the weights."""
        passing = (b for b in self.program.buffers.values() if b.persistent and b.kind != "weight")
        return "\n".join(f"  memset(F({self.symbols[b.name]}), 0, {b.bytes});" for b in passing)

    @property
    def clear_sums(self) -> str:
        """The calls that let the magnitudes by which attention chooses begin anew."""
        sums = (b for name, b in self.program.buffers.items() if name.startswith("sums:"))
        return "\n".join(f"  memset(F({self.symbols[b.name]}), 0, {b.bytes});" for b in sums)

    @property
    def not_negative(self) -> str:
        return ", ".join(f"{{{first}u, {n}u}}" for first, n in self._not_negative)

    @property
    def runs(self) -> str:
        runs = self._not_negative
        return f"not_negative, {len(runs)}" if runs else "NULL, 0"

    @property
    def add_prototype(self) -> str:
        """The call that a forward pass is followed by; empty without prototypes."""
        call = self.program.refresh
        return "" if call is None else self._call(call, self.program.steps[-1], False).rstrip(";")

    @property
    def clear_prototypes(self) -> str:
        assert self.program.refresh is not None
        target = self.program.refresh.args[0]
        assert isinstance(target, Buf)
        size = self.program.buffers[target.name].bytes
        return f"memset(F({self.symbols[target.name]}), 0, {size});"

    @property
    def arena_map(self) -> str:
        """The offset of every buffer, as an enum with what lives there and when."""
        return self._map(self.offsets)

    @property
    def learned_map(self) -> str:
        """`arena_map` of what lives on from step to step."""
        return self._map(
            {n: at for n, at in self.offsets.items() if self.program.buffers[n].persistent}
        )

    def _map(self, offsets: Mapping[str, int]) -> str:
        rows = []
        order = sorted(offsets.items(), key=lambda kv: (self.spans[kv[0]][0], kv[1]))
        for name, offset in order:
            buffer = self.program.buffers[name]
            first, last = self.spans[name]
            when = "always" if buffer.persistent else f"steps {first}-{last}"
            what = f"{buffer.kind}, {buffer.bytes} bytes, {when}"
            rows.append(f"  {self.symbols[name]} = {offset}, /* {what} */")
        size = kib(self.plan.cost.arena)
        return f"/* Byte offsets in the arena of {size}. */\nenum {{\n" + "\n".join(rows) + "\n};\n"

    def _initial_values(self) -> str:
        lines = []
        for t in self.program.learned:
            start = self.constants.initial(t)
            lines.append(f"  memcpy(F({self.symbols[t.buffer]}), {start}, {4 * t.size});")
        return "\n".join(lines)

    @cached_property
    def _not_negative(self) -> list[tuple[int, int]]:
        """(first, count) of what cannot be negative: running variances, Adam's second moments,
        and what attention chooses by."""
        offsets, program = self.offsets, self.program
        variances = [n.params["var"] for n in program.graph.nodes if "var" in OPS[n.op].states]
        runs = [
            (offsets[t.buffer] // 4, t.size) for t in program.statistics if t.param in variances
        ]
        if isinstance(self.plan.optimizer, Adam):
            runs += [(offsets[f"v:{t.param}"] // 4, t.size) for t in program.trained]
        chosen = [b for n, b in program.buffers.items() if n.startswith(("sums:", "gates:"))]
        return runs + [(offsets[b.name] // 4, b.bytes // 4) for b in chosen]

    @property
    def trained_cases(self) -> str:
        lines = []
        for i, t in enumerate(self.program.learned):
            lines.append(f"  case {i}: /* {t.param} */\n    *count = {t.size};")
            lines.append(f"    return F({self.symbols[t.buffer]});")
        return "\n".join(lines)

    # ---- steps and calls ----

    def _steps(self, steps: Iterable[Step]) -> str:
        lines: list[str] = []
        node = None
        for step in steps:
            if step.node != node:
                node = step.node
                lines.append(f"\n  /* {node} */")
            lines += self._step(step)
        return "\n".join(lines)

    def _step(self, step: Step) -> list[str]:
        guard = "training" if step.phase == "save" else ""
        if step.phase == "update" and self.plan.accumulate > 1:
            guard = "last"
        looped = step.rows > step.block > 0
        calls = [self._call(c, step, looped) for c in step.calls]
        if looped:
            head = f"for (int32_t row = 0; row < {step.rows}; row += {step.block}) {{"
            end = f"row + {step.block} < {step.rows} ? row + {step.block} : {step.rows}"
            calls = [head, f"  const int32_t row_end = {end};", *("  " + c for c in calls), "}"]
        if guard:
            calls = [f"if ({guard}) {{", *("  " + c for c in calls), "}"]
        return ["  " + c for c in calls]

    def _call(self, call: Call, step: Step, looped: bool) -> str:
        args = [self._arg(a, step, looped) for a in call.args]
        return f"{call.fn}({', '.join(args)});"

    def _arg(self, a: Arg, step: Step, looped: bool) -> str:
        if isinstance(a, Buf):
            return self._buf(a, looped)
        if isinstance(a, Const):
            return self.constants.weight(a)
        if isinstance(a, Struct):
            return "&" + self.constants.table(a)
        if isinstance(a, Indices):
            return "NULL" if a.channels is None else self.constants.table(a)
        if isinstance(a, Expr) and a.table:
            return a.text.format(table=self.constants.table(a.table))
        if isinstance(a, Expr):
            return a.text if looped else _unlooped(a.text, step.rows)
        if a is None:
            return "NULL"
        return c_float(a) if isinstance(a, float) else str(a)

    def _buf(self, a: Buf, looped: bool) -> str:
        kind = "U" if a.name.startswith(("mask:", "code:")) else "F"
        text = f"{kind}({self.symbols[a.name]})"
        if a.offset:
            text += f" + {a.offset}"
        if a.rows and looped:
            text += f" + row * {a.rows}"
        return f"training ? {text} : NULL" if a.training else text

    def _loss(self, step: Step) -> str:
        lines = []
        for call in step.calls:
            text = self._call(call, step, False)
            is_loss = call.fn in ("mo_cross_entropy", "mo_mse")
            lines.append(f"  return {text}" if is_loss else f"  {text}")
        return "\n".join(lines)


def _unlooped(text: str, rows: int) -> str:
    """Row expressions of a step that is not a loop."""
    match = re.fullmatch(r"\(row_end - row\) \* (\d+)", text)
    if match:
        return str(max(rows, 1) * int(match[1]))
    whole = {"row": "0", "row_end": str(rows), "row_end - row": str(rows)}
    return whole.get(text, text)


def _symbols(buffers: Mapping[str, Buffer]) -> dict[str, str]:
    symbols: dict[str, str] = {}
    taken: set[str] = set()
    for name in buffers:
        base = symbol = "AT_" + identifier(name.replace("'", "_b"))
        k = 2
        while symbol in taken:
            symbol, k = f"{base}_{k}", k + 1
        taken.add(symbol)
        symbols[name] = symbol
    return symbols
