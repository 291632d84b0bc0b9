"""The job and trace files of an emitted net: words of 32 bits, little-endian.

The format is described at the top of emit/port/main.c.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from modicum.errors import InvalidInput

Array = NDArray[np.float32]

PREDICT, TRAIN, EXPORT, IMPORT, CLEAR, ADD, SELECT, CLEAR_STEPS, ATTEND = range(9)
PARAMETERS, PAINT, MICROSECONDS = 1, 2, 256
JOB, TRACE, END = b"MOJB", b"MOTR", b"MOND"


@dataclass
class Record:
    """What came of one record: status 0 is success; elapsed in instructions or microseconds."""

    kind: int
    status: int
    loss: float
    elapsed: int
    values: Array = field(default_factory=lambda: np.zeros(0, np.float32))
    blob: bytes = b""


@dataclass
class Result:
    """A whole trace file."""

    records: list[Record]
    arena: int
    arena_high_water: int
    stack_high_water: int
    stack_size: int
    data: int
    bss: int
    net: int
    microseconds: bool
    peak_rss: int


class Job:
    """Records to carry out, in order."""

    def __init__(self, inputs: int, targets: int, flags: int = PAINT) -> None:
        self.inputs, self.targets, self.flags = inputs, targets, flags
        self.parts: list[bytes] = []

    def predict(self, x: Array) -> None:
        target = np.zeros(self.targets, np.float32)
        self._sample(PREDICT, 0, x, target)

    def train(self, x: Array, label: int = 0, target: Array | None = None) -> None:
        none = np.zeros(self.targets, np.float32)
        self._sample(TRAIN, label, x, none if target is None else target)

    def attend(self, x: Array, label: int = 0, target: Array | None = None) -> None:
        """A sample of the next update, by which attention chooses channels."""
        none = np.zeros(self.targets, np.float32)
        self._sample(ATTEND, label, x, none if target is None else target)

    def clear_prototypes(self) -> None:
        self.parts.append(_words(CLEAR, 0))

    def add_prototype(self, x: Array, label: int) -> None:
        self._sample(ADD, label, x, np.zeros(self.targets, np.float32))

    def select(self, member: int) -> None:
        """Go on with a member of a candidate set, in its initial state."""
        self.parts.append(_words(SELECT, member))

    def clear_steps(self) -> None:
        """The next update is the first inner step again, from the weights that there are."""
        self.parts.append(_words(CLEAR_STEPS, 0))

    def export_state(self) -> None:
        self.parts.append(_words(EXPORT, 0))

    def import_state(self, blob: bytes) -> None:
        padded = blob + bytes(-len(blob) % 4)
        self.parts.append(_words(IMPORT, 0) + _words(len(blob)) + padded)

    def _sample(self, kind: int, label: int, x: Array, target: Array) -> None:
        if x.size != self.inputs or target.size != self.targets:
            raise InvalidInput(
                f"a sample has {x.size} values and {target.size} targets",
                why=f"the net takes {self.inputs} and {self.targets}",
            )
        body = np.ascontiguousarray(target, "<f4").tobytes()
        body += np.ascontiguousarray(x, "<f4").tobytes()
        self.parts.append(_words(kind, label) + body)

    def encode(self) -> bytes:
        head = JOB + _words(1, self.inputs, self.targets, self.flags, len(self.parts))
        return head + b"".join(self.parts)


def _words(*values: int) -> bytes:
    return np.array([v & 0xFFFFFFFF for v in values], "<u4").tobytes()


def decode(data: bytes) -> Result:
    """Read a trace file; raises InvalidInput when it is cut short or not one."""
    take = _Reader(data).take
    if take(4) != TRACE:
        raise InvalidInput("the run left no trace", why="its file is not a trace file")
    _, outputs, trained, arena, flags = _ints(take(20))
    records: list[Record] = []
    while (word := take(4)) != END:
        records.append(_record(take, word, outputs, trained, flags))
        if records[-1].kind == SELECT and records[-1].status == 0:
            trained = _ints(take(4))[0]
    high, stack, size, data_bytes, bss, net, _, _, rss = _ints(take(36))
    timed = bool(flags & MICROSECONDS)
    return Result(records, arena, high, stack, size, data_bytes, bss, net, timed, 1024 * rss)


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, n: int) -> bytes:
        part = self.data[self.at : self.at + n]
        if len(part) < n:
            raise InvalidInput("the run's trace is cut short", hint="see what it printed")
        self.at += n
        return part


def _record(
    take: Callable[[int], bytes], word: bytes, outputs: int, trained: int, flags: int
) -> Record:
    kind = _ints(word)[0]
    head = take(12)
    status = int(np.frombuffer(head[:4], "<i4")[0])
    loss = float(np.frombuffer(head[4:8], "<f4")[0])
    record = Record(kind, status, loss, _ints(head[8:])[0])
    if kind == PREDICT and status == 0:
        record.values = np.frombuffer(take(4 * outputs), "<f4").copy()
    elif kind == TRAIN and flags & PARAMETERS:
        record.values = np.frombuffer(take(4 * trained), "<f4").copy()
    elif kind == EXPORT and status == 0:
        length = _ints(take(4))[0]
        record.blob = take((length + 3) // 4 * 4)[:length]
    return record


def _ints(raw: bytes) -> list[int]:
    return [int(v) for v in np.frombuffer(raw, "<u4")]
