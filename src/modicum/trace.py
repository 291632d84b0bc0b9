"""Trace: what happened in one run, on whatever it ran; and where two runs part."""

from __future__ import annotations

import base64
import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from modicum.errors import InvalidInput

Array = NDArray[np.float32]
T = TypeVar("T")

VERSION = 1
# Below this a loss is compared absolutely: -log p of p near 1 has only the rounding of p.
LOSS_FLOOR = 1e-2
# A shift that a later norm with batch statistics takes out again has no gradient but rounding.
TENSOR_FLOOR = 1e-5


@dataclass
class Trace:
    """One run of training and prediction.

    losses[i] is the loss of the i-th training sample, taken before the update that it causes.
    `order` gives the indices of the samples that were used; it is empty where a stream made
    them.  `logits_before` and `logits_after` are the outputs on the test set, `tensors[name][i]`
    a trained slice after step i (only if asked for), in PyTorch's layout.  `figures` holds what
    was measured, with its unit in the name: arena_high_water, stack_high_water, text, data, bss,
    ram (bytes), instructions_train, instructions_predict, instructions_prototype (medians of a
    call), instructions_train_all (of all training calls together), seconds, seconds_per_step
    (median), peak_rss (bytes).
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
        """Raises InvalidInput for a file that is not a trace of this version, field by field."""
        try:
            return _trace(json.loads(Path(path).read_text()))
        except (OSError, ValueError, OverflowError, RecursionError) as error:
            raise InvalidInput(f"{path} is not a trace", why=str(error)) from None


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
    relative to the largest magnitude of the tensor, at least TENSOR_FLOOR.  Raises InvalidInput
    when the traces are not of the same plan, length and sample order, or hold tensors of other
    steps or shapes.
    """
    if a.plan_hash != b.plan_hash:
        raise InvalidInput("the traces are of different plans", where=f"{a.where} and {b.where}")
    if len(a.losses) != len(b.losses) or (a.order and b.order and a.order != b.order):
        raise InvalidInput(
            "the traces did not train on the same samples",
            why=f"{len(a.losses)} and {len(b.losses)} steps, or another order",
        )
    names = [n for n in a.tensors if n in b.tensors]
    for name in names:
        p, q = a.tensors[name], b.tensors[name]
        if p.shape != q.shape or p.shape[:1] != (len(a.losses),):
            raise InvalidInput(
                f"the traces do not hold {name} after every step",
                where=f"{a.where} and {b.where}",
                why=f"shapes {p.shape} and {q.shape}, {len(a.losses)} steps",
            )
    first: tuple[int, str] | None = None
    largest, bitwise = 0.0, True
    for i, (x, y) in enumerate(zip(a.losses, b.losses, strict=True)):
        bitwise &= x == y
        differences = [("loss", abs(x - y) / max(abs(x), abs(y), LOSS_FLOOR))]
        for name in names:
            p, q = a.tensors[name][i], b.tensors[name][i]
            bitwise &= bool((p == q).all())
            scale = max(float(np.abs(v).max(initial=0.0)) for v in (p, q))
            part = float(np.abs(p - q).max(initial=0.0)) / max(scale, TENSOR_FLOOR)
            differences.append((name, part))
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


def _trace(data: Any) -> Trace:
    """A trace from plain data; ValueError names the first field that is not as it should be."""
    if not isinstance(data, dict) or data.get("version") != VERSION:
        raise ValueError(f"it has no version {VERSION}")
    wanted = {"version", *(f.name for f in fields(Trace))}
    for words, names in (("lacks", wanted - set(data)), ("has also", set(data) - wanted)):
        if names:
            raise ValueError(f"it {words} {', '.join(sorted(names))}")
    trace = Trace(
        where=_of(str, "where", data["where"]),
        plan_hash=_of(str, "plan_hash", data["plan_hash"]),
        seed=_of(int, "seed", data["seed"]),
        losses=[_number("losses", x) for x in _of(list, "losses", data["losses"])],
        order=[_of(int, "order", i) for i in _of(list, "order", data["order"])],
    )
    for name in ("logits_before", "logits_after"):
        if data[name] is not None:
            setattr(trace, name, _unpack(name, data[name]))
    for name in ("accuracy_before", "accuracy_after"):
        if data[name] is not None:
            setattr(trace, name, _finite(name, data[name]))
    for name in ("tensors", "state"):
        arrays = _of(dict, name, data[name])
        setattr(trace, name, {k: _unpack(f"{name} {k}", v) for k, v in arrays.items()})
    figures = _of(dict, "figures", data["figures"])
    trace.figures = {k: _finite(f"figures {k}", v) for k, v in figures.items()}
    for name, array in trace.tensors.items():
        if array.shape[:1] != (len(trace.losses),):
            raise ValueError(f"tensors {name}: shape {array.shape}, {len(trace.losses)} losses")
    return trace


def _unpack(name: str, data: Any) -> Array:
    packed = _of(dict, name, data)
    if set(packed) != {"shape", "f32"}:
        raise ValueError(f"{name}: not an array")
    shape = [_of(int, name, n) for n in _of(list, name, packed["shape"])]
    raw = base64.b64decode(_of(str, name, packed["f32"]), validate=True)
    if min(shape, default=1) < 0 or len(raw) != 4 * math.prod(shape):
        raise ValueError(f"{name}: {len(raw)} bytes for shape {shape}")
    return np.frombuffer(raw, dtype="<f4").reshape(shape).copy()


def _of(kind: type[T], name: str, value: Any) -> T:
    if type(value) is not kind:
        raise ValueError(f"{name}: {type(value).__name__} instead of {kind.__name__}")
    return value


def _number(name: str, value: Any) -> float:
    return float(value) if type(value) is int else _of(float, name, value)


def _finite(name: str, value: Any) -> float:
    if not math.isfinite(_number(name, value)):
        raise ValueError(f"{name}: {value} is not finite")
    number: float = value  # a whole number stays one
    return number
