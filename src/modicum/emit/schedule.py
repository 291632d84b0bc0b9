"""Program + weights -> the C text of one net: header, schedule and constant weights.

Only the schedule is generated: a list of kernel calls at arena offsets that a person can read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np

from modicum.graph import Graph
from modicum.lower import Buffer, Program, Step, Trained
from modicum.ops import OPS
from modicum.ops.base import Arg, Buf, Call, Const, Expr, Indices, Struct
from modicum.optim import Adam
from modicum.plan import Plan
from modicum.state import Array, cut, to_c
from modicum.units import kib

API = (
    *("t", "init", "input", "predict", "train", "export_state", "import_state", "trained"),
    *("size", "error"),
)


class Source:
    """The C files of one net; used once.  `values` are the parameters of the prepared graph."""

    def __init__(self, plan: Plan, name: str, values: Mapping[str, Array]) -> None:
        self.plan, self.name, self.values = plan, name, values
        self.program = plan.program
        self.macro = name.upper()
        self.symbols = _symbols(self.program.buffers)
        self.taken = {f"{name}_{word}" for word in API}
        self.consts: dict[Const, str] = {}
        self.initial: dict[str, str] = {}
        self.tables: dict[Struct | Indices, str] = {}
        self.spans = self.program.lifetimes

    # ---- header ----

    def header(self) -> str:
        graph, plan = self.program.graph, self.plan
        outputs = graph.values[graph.output].size
        return render(
            "net.h.j2",
            net=self.name,
            NET=self.macro,
            plan=plan,
            inputs=graph.values[graph.input].size,
            outputs=outputs,
            targets=outputs if plan.loss == "mse" else 0,
            target=self._target(),
            image_order=_image_order(graph),
            learned=self._persistent(),
            learned_floats=sum(t.size for t in self.program.learned),
        )

    def _target(self) -> str:
        return "const float *target" if self.plan.loss == "mse" else "int32_t label"

    def _persistent(self) -> int:
        ends = [
            self.plan.offsets[b.name] + b.bytes
            for b in self.program.buffers.values()
            if b.persistent
        ]
        return max(ends)

    # ---- schedule ----

    def schedule(self) -> str:
        """The net's .c file.  Call before `weights`: it collects the constants."""
        steps, plan = self.program.steps, self.plan
        forward = self._steps(s for s in steps if s.phase in ("forward", "save"))
        loss = "\n".join(self._loss(s) for s in steps if s.phase == "loss")
        backward = self._steps(s for s in steps if s.phase in ("backward", "update"))
        runs = self._not_negative()
        not_negative = ", ".join(f"{{{first}u, {n}u}}" for first, n in runs)
        adam = plan.optimizer if isinstance(plan.optimizer, Adam) else None
        return render(
            "net.c.j2",
            net=self.name,
            NET=self.macro,
            plan=plan,
            arena_map=self._arena_map(),
            tables=self._table_text(),
            hash_bytes=", ".join(f"0x{plan.hash[i : i + 2]}" for i in range(0, 32, 2)),
            not_negative=not_negative,
            runs=f"not_negative, {len(runs)}" if runs else "NULL, 0",
            lr=_float(plan.optimizer.lr),
            initial_values=self._initial_values(),
            betas=[_float(1.0 - b) for b in adam.betas] if adam else None,
            input=self._float(self.program.input_buffer),
            output=self._float(self.program.output_buffer),
            forward=forward,
            loss=loss,
            backward=backward,
            mse=plan.loss == "mse",
            target=self._target(),
            trained_cases=self._trained_cases(),
        )

    def _arena_map(self) -> str:
        """The offset of every buffer, as an enum with what lives there and when."""
        rows = []
        order = sorted(self.plan.offsets.items(), key=lambda kv: (self.spans[kv[0]][0], kv[1]))
        for name, offset in order:
            buffer = self.program.buffers[name]
            first, last = self.spans[name]
            when = "always" if buffer.persistent else f"steps {first}-{last}"
            what = f"{buffer.kind}, {buffer.bytes} bytes, {when}"
            rows.append(f"  {self.symbols[name]} = {offset}, /* {what} */")
        size = kib(self.plan.cost.arena)
        return f"/* Byte offsets in the arena of {size}. */\nenum {{\n" + "\n".join(rows) + "\n};\n"

    def _table_text(self) -> str:
        lines = []
        for table, name in self.tables.items():
            if isinstance(table, Struct):
                fields = ", ".join(map(str, table.fields))
                lines.append(f"static const {table.ctype} {name} = {{{fields}}};")
            else:
                channels = table.channels or ()
                body = ", ".join(map(str, channels))
                lines.append(f"static const uint16_t {name}[{len(channels)}] = {{{body}}};")
        return "\n".join(lines) + "\n"

    def _initial_values(self) -> str:
        lines = []
        for t in self.program.learned:
            size = 4 * t.size
            lines.append(f"  memcpy(F({self.symbols[t.buffer]}), {self._initial(t)}, {size});")
        return "\n".join(lines)

    def _initial(self, t: Trained) -> str:
        if t.param not in self.initial:
            wanted = f"{self.name}_initial_{_identifier(t.param)}"
            self.initial[t.param] = self._symbol(wanted)
        return self.initial[t.param]

    def _not_negative(self) -> list[tuple[int, int]]:
        """(first, count) of what cannot be negative: running variances, Adam's second moments."""
        offsets, program = self.plan.offsets, self.program
        variances = [n.params["var"] for n in program.graph.nodes if "var" in OPS[n.op].states]
        runs = [
            (offsets[t.buffer] // 4, t.size) for t in program.statistics if t.param in variances
        ]
        if isinstance(self.plan.optimizer, Adam):
            runs += [(offsets[f"v:{t.param}"] // 4, t.size) for t in program.trained]
        return runs

    def _trained_cases(self) -> str:
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
            return self._const(a)
        if isinstance(a, Struct):
            return "&" + self.tables.setdefault(a, f"geometry{len(self.tables)}")
        if isinstance(a, Indices):
            return "NULL" if a.channels is None else self._indices(a)
        if isinstance(a, Expr):
            return a.text if looped else _unlooped(a.text, step.rows)
        if a is None:
            return "NULL"
        return _float(a) if isinstance(a, float) else str(a)

    def _indices(self, a: Indices) -> str:
        return self.tables.setdefault(a, f"channels{len(self.tables)}")

    def _buf(self, a: Buf, looped: bool) -> str:
        kind = "U" if a.name.startswith(("mask:", "code:")) else "F"
        text = f"{kind}({self.symbols[a.name]})"
        if a.offset:
            text += f" + {a.offset}"
        if a.rows and looped:
            text += f" + row * {a.rows}"
        return f"training ? {text} : NULL" if a.training else text

    def _float(self, buffer: str) -> str:
        return f"F({self.symbols[buffer]})"

    def _const(self, a: Const) -> str:
        if a not in self.consts:
            tail = f"_part{len(self.consts)}" if a.channels is not None else ""
            if a.channels is None and any(c.param == a.param for c in self.consts):
                tail = f"_{a.layout}"
            self.consts[a] = self._symbol(f"{self.name}_{_identifier(a.param)}{tail}")
        return self.consts[a]

    def _symbol(self, wanted: str) -> str:
        """`wanted`, with a number where another name became the same identifier."""
        symbol, k = wanted, 2
        while symbol in self.taken:
            symbol, k = f"{wanted}_{k}", k + 1
        self.taken.add(symbol)
        return symbol

    def _loss(self, step: Step) -> str:
        lines = []
        for call in step.calls:
            text = self._call(call, step, False)
            is_loss = call.fn in ("mo_cross_entropy", "mo_mse")
            lines.append(f"  *loss = {text}" if is_loss else f"  {text}")
        return "\n".join(lines)

    # ---- weights ----

    def weights(self) -> tuple[str, str]:
        """(declarations, definitions) of the constants that `schedule` used."""
        arrays: dict[str, tuple[Array, str]] = {}
        for const, symbol in self.consts.items():
            value = self.values[const.param]
            if const.channels is not None:
                value = value[list(const.channels)]
            arrays[symbol] = (to_c(value, const.layout), const.param)
        for t in self.program.learned:
            part = to_c(cut(self.values[t.param], t.slice), t.layout)
            arrays[self._initial(t)] = (part, f"{t.param}, before training")
        guard = f"{self.macro}_WEIGHTS_H"
        declared = "\n".join(f"extern const float {s}[{a.size}];" for s, (a, _) in arrays.items())
        header = f"#ifndef {guard}\n#define {guard}\n\n{declared}\n\n#endif\n"
        parts = [f'#include "{self.name}_weights.h"\n']
        for symbol, (array, comment) in arrays.items():
            shape = " x ".join(map(str, array.shape))
            parts.append(f"/* {comment}: {shape} */\n{c_array(symbol, array)}\n")
        return header, "\n".join(parts)

    def shim(self) -> str:
        """net.h: the generic names that the port uses."""
        macros = ("INPUTS", "OUTPUTS", "TARGETS", "ARENA", "STATE", "TRAINED")
        lines = ["/* The generic names that the port uses, mapped to those of this net. */"]
        lines += ["#ifndef NET_H", "#define NET_H", "", f'#include "{self.name}.h"', ""]
        lines += [f"#define MO_NET_{x} {self.macro}_{x}" for x in macros]
        lines += [f"#define mo_net_{x} {self.name}_{x}" for x in API if x != "size"]
        return "\n".join([*lines, "", "#endif", ""])


def render(template: str, **values: object) -> str:
    """A template of this package, filled in; an unknown name in it is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("modicum.emit", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # C and Markdown, not HTML
    )
    return environment.get_template(template).render(**values)


def operators(program: Program) -> set[str]:
    """The C kernels that a program calls."""
    return {call.fn for step in program.steps for call in step.calls}


def c_array(symbol: str, array: Array, storage: str = "const float") -> str:
    flat = np.asarray(array, dtype=np.float32).ravel()
    rows = [", ".join(_float(v) for v in flat[i : i + 8]) for i in range(0, flat.size, 8)]
    return f"{storage} {symbol}[{flat.size}] = {{\n  " + ",\n  ".join(rows) + "};"


def _float(v: float) -> str:
    """A C literal that reads back as the same float32."""
    text = repr(float(np.format_float_scientific(np.float32(v), trim="0")))
    return f"{text}f" if "." in text or "e" in text or "n" in text else f"{text}.0f"


def _unlooped(text: str, rows: int) -> str:
    """Row expressions of a step that is not a loop."""
    match = re.fullmatch(r"\(row_end - row\) \* (\d+)", text)
    if match:
        return str(max(rows, 1) * int(match[1]))
    whole = {"row": "0", "row_end": str(rows), "row_end - row": str(rows)}
    return whole.get(text, text)


def _identifier(name: str) -> str:
    text = re.sub(r"[^0-9a-zA-Z]+", "_", name).strip("_")
    return text if text and not text[0].isdigit() else f"p_{text}"


def _symbols(buffers: Mapping[str, Buffer]) -> dict[str, str]:
    symbols: dict[str, str] = {}
    taken: set[str] = set()
    for name in buffers:
        base = symbol = "AT_" + _identifier(name.replace("'", "_b"))
        k = 2
        while symbol in taken:
            symbol, k = f"{base}_{k}", k + 1
        taken.add(symbol)
        symbols[name] = symbol
    return symbols


def _image_order(graph: Graph) -> str:
    shape = graph.shape(graph.input)
    return f", [{shape[2]}][{shape[3]}][{shape[1]}]" if len(shape) == 4 else ""


__all__ = ["Source", "c_array", "operators"]
