"""Runs a lowered program call by call with the compiled kernels, in an arena full of NaN.

What the emitted schedule does in C, written a second time: thousands of generated programs run in
the time that a few compile in.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import numpy as np
from c.kernels import Geometry, Kernels, Window

from modicum.lower import Program, Step
from modicum.memory import Placement
from modicum.ops.base import Arg, Buf, Call, Const, Expr, Indices, Struct
from modicum.state import cut, from_c, image_to_c, to_c

STRUCTS = {"mo_conv_t": Geometry, "mo_pool_t": Window}


class Machine:
    """One net's arena, poisoned but for what init sets."""

    def __init__(
        self,
        kernels: Kernels,
        program: Program,
        placement: Placement,
        values: Mapping[str, np.ndarray],
        arena: int = 0,
    ) -> None:
        self.kernels, self.program, self.offsets = kernels, program, placement.offsets
        self.values = {k: np.asarray(v, np.float32) for k, v in values.items()}
        arena = max(placement.arena, arena)
        room = np.full(arena + 32, 0xFF, np.uint8)  # all bits set is a NaN
        start = -room.ctypes.data % 16
        self.arena = room[start : start + arena]
        self.keep: list[object] = []
        for name, buffer in program.buffers.items():
            if buffer.persistent:
                self.bytes_of(name)[:] = 0
        for t in program.learned:
            part = to_c(cut(self.values[t.param], t.slice), t.layout)
            self.floats(t.buffer)[:] = part.ravel()

    def bytes_of(self, name: str) -> np.ndarray:
        at = self.offsets[name]
        return self.arena[at : at + self.program.buffers[name].bytes]

    def floats(self, name: str) -> np.ndarray:
        return self.bytes_of(name).view(np.float32)

    def trained(self) -> dict[str, np.ndarray]:
        return {
            t.param: from_c(self.floats(t.buffer).copy(), t.shape, t.layout)
            for t in self.program.learned
        }

    def go_on(self, program: Program, placement: Placement) -> None:
        """With another pattern of the same plan, over what the arena has; the rest is spoiled."""
        self.program, self.offsets = program, placement.offsets
        lasting = [self.bytes_of(b.name) for b in program.buffers.values() if b.persistent]
        kept = [part.copy() for part in lasting]
        self.arena[:] = 0xFF
        for part, old in zip(lasting, kept, strict=True):
            part[:] = old

    def train(
        self, x: np.ndarray, y: object, lr: float, last: bool = True, update: int = 0
    ) -> float:
        """One sample (without the batch dimension); `last` of the update with that number."""
        self.load(x)
        inner = min(update, max(i for t in self.program.trained for i in range(len(t.rates))))
        self.names |= {"lr": lr, "inner": inner, "beyond": update - inner}
        if self.program.loss == "mse":
            self.names["target"] = np.ascontiguousarray(y, np.float32)
        else:
            self.names["label"] = int(y)
        loss = float("nan")
        for step in self.program.steps:
            if step.phase == "update" and self.program.accumulate > 1 and not last:
                continue
            result = self.step(step)
            loss = result if step.phase == "loss" and result is not None else loss
        return loss

    def load(self, x: np.ndarray, training: bool = True) -> None:
        self.floats(self.program.input_buffer)[:] = image_to_c(x[None]).ravel()
        self.names = {"MO_NO_LO": -np.inf, "MO_NO_HI": np.inf}
        self.training = training

    def clear_prototypes(self) -> None:
        self.bytes_of(self.program.refresh.args[0].name)[:] = 0

    def add_prototype(self, x: np.ndarray, label: int) -> None:
        """A forward pass that keeps nothing, and then the embedding."""
        self.load(x, training=False)
        for step in self.program.steps:
            if step.phase == "forward":
                self.step(step)
        self.names["label"] = label
        assert self.call(self.program.refresh, 0) == 1

    def step(self, step: Step) -> float | None:
        result = None
        blocks = range(0, max(step.rows, 1), max(step.block, 1))
        for row in blocks:
            self.names |= {"row": row, "row_end": min(row + step.block, step.rows)}
            for call in step.calls:
                result = self.call(call, row)
        return result

    def call(self, call: Call, row: int) -> float | None:
        if call.fn == "memset":
            buffer, value, size = call.args
            self.bytes_of(buffer.name)[:size] = value
            return None
        function = getattr(self.kernels, call.fn)
        return function(*(self.argument(a, row) for a in call.args))

    def argument(self, a: Arg, row: int) -> object:
        if isinstance(a, Buf):
            if a.training and not self.training:
                return None
            at = self.offsets[a.name] + 4 * (a.offset + row * a.rows)
            return self.arena[at:]
        if isinstance(a, Const):
            value = self.values[a.param]
            value = value if a.channels is None else value[list(a.channels)]
            self.keep.append(to_c(value, a.layout))
            return self.keep[-1]
        if isinstance(a, Struct):
            return STRUCTS[a.ctype](*a.fields)
        if isinstance(a, Indices):
            if a.channels is None:
                return None
            self.keep.append(np.array(a.channels, np.uint16))
            return self.keep[-1]
        if isinstance(a, Expr):
            text = a.text.replace("f *", " *")
            if a.table:
                text = text.format(table=a.table.values)
            value = eval(text, {}, dict(self.names))
            return ctypes.c_float(value) if isinstance(value, float) else value
        return a
