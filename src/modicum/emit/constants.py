"""What an emitted net has in flash: weights, initial values, geometry; each thing once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np

from modicum.lower import Trained
from modicum.ops.base import ByStep, Const, Indices, Layout, Struct
from modicum.selection import Slice
from modicum.state import Array, cut, to_c

Initial = tuple[str, Layout, Slice]
Table = Struct | Indices | ByStep


class Constants:
    """Names the constants of a net as schedules ask for them.

    `values` are the parameters of the prepared graphs, `taken` the symbols that there are.
    `shared`: several schedules, in files of their own, read them.
    """

    def __init__(
        self, name: str, values: Mapping[str, Array], taken: Iterable[str], shared: bool = False
    ) -> None:
        self.name, self.values, self.taken = name, values, set(taken)
        self.shared, self.prefix = shared, f"{name}_" if shared else ""
        self.weights: dict[Const, str] = {}
        self.initials: dict[Initial, str] = {}
        self.tables: dict[Table, str] = {}

    def weight(self, a: Const) -> str:
        """A frozen parameter, or a part of it."""
        if a not in self.weights:
            tail = f"_part{len(self.weights)}" if a.channels is not None else ""
            if a.channels is None and any(c.param == a.param for c in self.weights):
                tail = f"_{a.layout}"
            self.weights[a] = self._symbol(f"{self.name}_{identifier(a.param)}{tail}")
        return self.weights[a]

    def initial(self, t: Trained) -> str:
        """What a trained slice starts from; another schedule may have it frozen."""
        if t.slice.whole and self.shared:
            return self.weight(Const(t.param, t.layout))
        key: Initial = (t.param, t.layout, t.slice)
        if key not in self.initials:
            self.initials[key] = self._symbol(f"{self.name}_initial_{identifier(t.param)}")
        return self.initials[key]

    def table(self, a: Table) -> str:
        if a not in self.tables:
            kind = {Struct: "geometry", Indices: "channels", ByStep: "by_step"}[type(a)]
            self.tables[a] = self._symbol(f"{self.prefix}{kind}{len(self.tables)}")
        return self.tables[a]

    def _symbol(self, wanted: str) -> str:
        """`wanted`, with a number where another name became the same identifier."""
        symbol, k = wanted, 2
        while symbol in self.taken:
            symbol, k = f"{wanted}_{k}", k + 1
        self.taken.add(symbol)
        return symbol

    @property
    def arrays(self) -> dict[str, tuple[Array, str]]:
        """Symbol -> the values in the kernels' layout, and what they are."""
        arrays: dict[str, tuple[Array, str]] = {}
        for a, symbol in self.weights.items():
            value = self.values[a.param]
            if a.channels is not None:
                value = value[list(a.channels)]
            arrays[symbol] = (to_c(value, a.layout), a.param)
        for (param, layout, part), symbol in self.initials.items():
            value = to_c(cut(self.values[param], part), layout)
            arrays[symbol] = (value, f"{param}, before training")
        return arrays

    def declarations(self) -> str:
        return "\n".join(f"extern const float {s}[{a.size}];" for s, (a, _) in self.arrays.items())

    def definitions(self) -> str:
        parts = []
        for symbol, (array, comment) in self.arrays.items():
            shape = " x ".join(map(str, array.shape))
            parts.append(f"/* {comment}: {shape} */\n{c_array(symbol, array)}\n")
        return "\n".join(parts)

    def table_declarations(self) -> str:
        return "\n".join(f"extern const {_declared(a, s)};" for a, s in self.tables.items())

    def table_definitions(self, storage: str) -> str:
        lines = []
        for a, symbol in self.tables.items():
            fields = ", ".join(_fields(a))
            lines.append(f"{storage} {_declared(a, symbol)} = {{{fields}}};")
        return "\n".join(lines) + "\n"


def _fields(a: Table) -> Iterable[str]:
    if isinstance(a, ByStep):
        return map(c_float if a.ctype == "float" else str, a.values)
    return map(str, a.fields if isinstance(a, Struct) else a.channels or ())


def _declared(a: Table, symbol: str) -> str:
    if isinstance(a, Struct):
        return f"{a.ctype} {symbol}"
    if isinstance(a, ByStep):
        return f"{a.ctype} {symbol}[{len(a.values)}]"
    return f"uint16_t {symbol}[{len(a.channels or ())}]"


def c_array(symbol: str, array: Array, storage: str = "const float") -> str:
    flat = np.asarray(array, dtype=np.float32).ravel()
    rows = [", ".join(c_float(v) for v in flat[i : i + 8]) for i in range(0, flat.size, 8)]
    return f"{storage} {symbol}[{flat.size}] = {{\n  " + ",\n  ".join(rows) + "};"


def c_float(v: float) -> str:
    """A C literal that reads back as the same float32."""
    text = repr(float(np.format_float_scientific(np.float32(v), trim="0")))
    return f"{text}f" if "." in text or "e" in text or "n" in text else f"{text}.0f"


def identifier(name: str) -> str:
    text = re.sub(r"[^0-9a-zA-Z]+", "_", name).strip("_")
    return text if text and not text[0].isdigit() else f"p_{text}"
