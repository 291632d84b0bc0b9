"""Trace: what happened in one run, on whatever it ran; and where two runs part."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modicum.errors import InvalidInput

Array = NDArray[np.float32]

VERSION = 1
# Below this a loss is compared absolutely: -log p of p near 1 has only the rounding of p.
LOSS_FLOOR = 1e-2


@dataclass
class Trace:
    """One run of training and prediction.

    losses[i] is the loss of the i-th training sample, taken before the update that it causes.
    `order` gives the indices of the samples that were used.  `logits_before` and `logits_after`
    are the outputs on the test set, `tensors[name][i]` a trained slice after step i (only if
    asked for), in PyTorch's layout.  `figures` holds what was measured, with its unit in the
    name: arena_high_water, stack_high_water, text, data, bss, ram (bytes), instructions_train,
    instructions_predict, seconds, peak_rss (bytes).
    """

    where: str
    plan_hash: str
    seed: int = 0
    losses: list[float] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    logits_before: Array | None = None
    logits_after: Array | None = None
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    tensors: dict[str, Array] = field(default_factory=dict)
    state: dict[str, Array] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    def as_dict(self, arrays: bool = True) -> dict[str, Any]:
        """Plain data; arrays as base64 of little-endian float32 with their shape."""
        data: dict[str, Any] = {"version": VERSION}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, np.ndarray):
                value = _pack(value) if arrays else None
            elif f.name in ("tensors", "state"):
                value = {k: _pack(v) for k, v in value.items()} if arrays else {}
            data[f.name] = value
        return data

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.as_dict()) + "\n")

    @staticmethod
    def load(path: str | Path) -> Trace:
        """Raises InvalidInput for a file that is not a trace of this version."""
        try:
            data = json.loads(Path(path).read_text())
            if data.pop("version") != VERSION:
                raise ValueError("another version")
            for name in ("logits_before", "logits_after"):
                data[name] = _unpack(data[name]) if data[name] is not None else None
            for name in ("tensors", "state"):
                data[name] = {k: _unpack(v) for k, v in data[name].items()}
            trace = Trace(**data)
            trace.losses = [float(x) for x in trace.losses]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidInput(f"{path} is not a trace", why=str(error)) from None
        return trace


@dataclass(frozen=True)
class Comparison:
    """Where two traces part.  `first` is (step, tensor) or None; steps count from 0."""

    a: str
    b: str
    steps: int
    tolerance: float
    first: tuple[int, str] | None
    largest: float
    bitwise: bool

    @property
    def same(self) -> bool:
        return self.first is None

    def __str__(self) -> str:
        what = f"{self.a} and {self.b}, {self.steps} steps: "
        if self.bitwise:
            return what + "bit-identical"
        size = f"largest relative difference {self.largest:.1e}"
        if self.first is None:
            return what + f"agree within {self.tolerance:g}, {size}"
        return what + f"part at step {self.first[0]} in {self.first[1]}; {size}"

    def as_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "same": self.same}


def compare(a: Trace, b: Trace, tolerance: float = 1e-4) -> Comparison:
    """Compare two traces of one plan over the same samples, step by step.

    Losses differ relative to the larger of the two (absolutely below LOSS_FLOOR); tensors
    relative to the largest magnitude of the tensor.  Raises InvalidInput when the traces are not
    of the same plan, length and sample order.
    """
    if a.plan_hash != b.plan_hash:
        raise InvalidInput("the traces are of different plans", where=f"{a.where} and {b.where}")
    if len(a.losses) != len(b.losses) or (a.order and b.order and a.order != b.order):
        raise InvalidInput(
            "the traces did not train on the same samples",
            why=f"{len(a.losses)} and {len(b.losses)} steps, or another order",
        )
    first: tuple[int, str] | None = None
    largest, bitwise = 0.0, True
    names = [n for n in a.tensors if n in b.tensors]
    for i, (x, y) in enumerate(zip(a.losses, b.losses, strict=True)):
        bitwise &= x == y
        differences = [("loss", abs(x - y) / max(abs(x), abs(y), LOSS_FLOOR))]
        for name in names:
            p, q = a.tensors[name][i], b.tensors[name][i]
            bitwise &= bool((p == q).all())
            scale = max(float(np.abs(p).max()), float(np.abs(q).max()), 1e-12)
            differences.append((name, float(np.abs(p - q).max()) / scale))
        for name, difference in differences:
            largest = max(largest, difference) if difference == difference else float("inf")
            if first is None and not difference <= tolerance:
                first = (i, name)
    if a.logits_after is not None and b.logits_after is not None:
        bitwise &= np.array_equal(a.logits_after, b.logits_after)
    return Comparison(a.where, b.where, len(a.losses), tolerance, first, largest, bool(bitwise))


def _pack(a: Array) -> dict[str, Any]:
    raw = np.ascontiguousarray(a, dtype="<f4").tobytes()
    return {"shape": list(a.shape), "f32": base64.b64encode(raw).decode()}


def _unpack(d: dict[str, Any]) -> Array:
    raw = base64.b64decode(d["f32"], validate=True)
    return np.frombuffer(raw, dtype="<f4").reshape(d["shape"]).copy()
