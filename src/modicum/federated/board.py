"""A client that trains on a microcontroller, which a gateway drives over the link."""

from __future__ import annotations

import os
import shutil
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modicum.emit import link_config
from modicum.errors import InvalidInput, ToolMissing, UsageError
from modicum.federated import link as wire
from modicum.federated.layout import Layout
from modicum.federated.link import Link, Program
from modicum.plan import Plan
from modicum.run import MACHINES
from modicum.state import image_to_c
from modicum.toolchain import build

Array = NDArray[np.float32]


class BoardLearner:
    """See `Learner`.  The board runs the link firmware of the same plan.

    `plan` is a plan or the emitted folder; `local` the parameters that the firmware was built to
    keep to itself.  Raises InvalidInput for a board with another plan or other private parameters,
    BoardSilent for one that does not answer.

    A board that restarts in a task has lost it: `learn` raises BoardRestarted, and only `begin`
    goes on, since no sample is kept that could be learned again.
    """

    def __init__(self, link: Link, plan: Plan | str | Path, local: Sequence[str] = ()) -> None:
        self.plan = plan if isinstance(plan, Plan) else Plan.load(Path(plan) / "plan.json")
        self.layout = Layout.of(self.plan, local)
        self.link = link
        self._meet()
        self._check_private()
        link.request(wire.BEGIN)

    def begin(self, shared: Array) -> None:
        slices = self.layout.to_c(shared)
        self._meet()
        self.link.request(wire.BEGIN)
        crc, room = 0, wire.WORDS - 2
        for index, values in sorted(slices.items()):
            values = np.ascontiguousarray(values, np.float32)
            crc = zlib.crc32(values.tobytes(), crc)
            for at in range(0, values.size, room):
                piece = values[at : at + room].tobytes()
                self.link.request(wire.WRITE, struct.pack("<II", index, at) + piece)
        self.link.request(wire.COMMIT, struct.pack("<I", crc))

    def learn(self, x: Array, target: Any) -> float:
        row, label = self._row(x), b""
        if self.plan.loss == "mse":
            values = np.asarray(target, np.float32).ravel()
            row = np.concatenate(
                [row, _sized(values, self._size(self.plan.graph.output), "target")]
            )
        else:
            label = struct.pack("<i", int(target))
        return float(_fields("<f", self._with_sample(wire.LEARN, label, row))[0])

    def learn_own(self, samples: int) -> tuple[int, float]:
        """The board learns so many samples from its own sensor, which do not leave it.

        Returns how many there were, and their mean loss.  Raises InvalidInput where there is no
        sensor, or no sample.
        """
        answer = self.link.request(wire.LEARN_OWN, struct.pack("<I", samples))
        taken, loss = _fields("<If", answer)
        return taken, loss

    def predict(self, x: Array) -> Array:
        out = self._with_sample(wire.PREDICT, b"", self._row(x))
        size = 4 * self._size(self.plan.graph.output)
        while len(out) < size:
            more = self.link.request(wire.OUTPUT, struct.pack("<I", len(out) // 4))
            if not more:
                raise _misfit(len(out), size)
            out += more
        return np.frombuffer(_exactly(out, size), np.float32).copy()

    def shared(self) -> Array:
        return self.layout.from_c({p.index: self._read(p.index, p.size) for p in self.layout.parts})

    def figures(self) -> Figures:
        """Memory and instructions, as the board itself measured them."""
        return Figures(*_fields("<11I", self.link.request(wire.STATS)))

    def _meet(self) -> None:
        """A new session with a board that has this plan."""
        hello = self.link.open()
        version = _fields("<I", hello[:4])[0]
        if version != wire.VERSION:
            raise InvalidInput(
                f"the board speaks version {version} of the link", why=f"this is {wire.VERSION}"
            )
        found, wanted = hello[4:20].hex(), self.plan.hash[:32]
        if found != wanted:
            raise InvalidInput(
                "the board has another plan",
                why=f"its plan is {found}, this one {wanted}",
                hint="flash the firmware of this plan, or load the board's",
            )
        self.slices = _fields("<I", hello[36:40])[0]
        if self.slices != len(self.plan.program.trained):
            raise InvalidInput(
                f"the board has {self.slices} trained slices",
                why=f"its plan has {len(self.plan.program.trained)}",
            )

    def _check_private(self) -> None:
        local = {p.index for p in self.layout.local}
        private = set()
        for index in range(self.slices):
            answer = self.link.request(wire.SLICE, struct.pack("<I", index))
            if _fields("<II", answer)[1]:
                private.add(index)
        if private != local:
            names = [t.param for t in self.plan.program.trained]
            raise InvalidInput(
                "the board keeps other parameters to itself",
                why=[
                    f"the firmware: {', '.join(names[i] for i in sorted(private)) or 'none'}",
                    f"this learner: {', '.join(names[i] for i in sorted(local)) or 'none'}",
                ],
                hint="keep_private(folder, local), and build and flash the firmware again",
            )

    def _with_sample(self, kind: int, head: bytes, row: Array) -> bytes:
        """The last piece of a sample travels with the request that it is for."""
        room, at = wire.WORDS - len(head) // 4, 0
        while row.size - at > room:
            piece = row[at : at + wire.WORDS - 1]
            self.link.request(wire.SAMPLE, struct.pack("<I", at) + piece.tobytes())
            at += piece.size
        return self.link.request(kind, head + row[at:].tobytes())

    def _row(self, x: Array) -> Array:
        """One sample as the C side reads it."""
        return _sized(image_to_c(x[None]).ravel(), self._size(self.plan.graph.input), "input")

    def _size(self, value: str) -> int:
        return self.plan.graph.values[value].size

    def _read(self, index: int, size: int) -> Array:
        out = b""
        for at in range(0, size, wire.WORDS):
            count = min(wire.WORDS, size - at)
            answer = self.link.request(wire.READ, struct.pack("<III", index, at, count))
            out += _exactly(answer, 4 * count)
        return np.frombuffer(out, np.float32)


@dataclass(frozen=True)
class Figures:
    """Bytes of RAM, instructions of the last call (on the host microseconds), frames."""

    net: int
    arena_high_water: int
    data: int
    bss: int
    stack: int
    stack_high_water: int
    link: int
    learn: int
    predict: int
    damaged: int
    repeated: int

    @property
    def ram(self) -> int:
        """All of it; the link's own is in .bss."""
        return self.net + self.data + self.bss + self.stack


def keep_private(folder: str | Path, local: Sequence[str] = ()) -> None:
    """Write `link_config.h`: firmware built from the folder keeps these parameters to itself.

    Raises InvalidInput for a folder without a link.
    """
    file = Path(folder) / "link" / "link_config.h"
    if not file.is_file():
        raise InvalidInput(
            f"{folder} has no link",
            why="it has no link/link_config.h",
            hint="emit(model, plan, folder)",
        )
    plan = Plan.load(Path(folder) / "plan.json")
    text = link_config(plan, {p.index for p in Layout.of(plan, local).local})
    if file.read_text() != text:  # make builds again what is newer
        file.write_text(text)


class Emulated:
    """A board under QEMU, with the link firmware of an emitted folder, and the link to it.

    `on` is m4f, m7 or m55, or host: the same firmware as a program of this machine.  With `parity`
    its bits are those of `NativeLearner(parity=True)`.

    >>> with Emulated("out/", local=("head.*",)) as board:              # doctest: +SKIP
    ...     learner = BoardLearner(board.link, "out/", ("head.*",))
    """

    def __init__(
        self,
        folder: str | Path,
        on: str = "m4f",
        local: Sequence[str] = (),
        parity: bool = True,
    ) -> None:
        if on != "host" and on not in MACHINES:
            raise UsageError(f"cannot emulate {on!r}", hint="host, " + ", ".join(MACHINES))
        keep_private(folder, local)
        self.line = Program(_command(Path(folder), on, parity))
        self.link = Link(self.line)

    def __enter__(self) -> Emulated:
        return self

    def __exit__(self, *error: object) -> None:
        self.link.close()

    def power_off(self) -> None:
        """As if the plug were pulled; the next request starts it again."""
        self.line.close()


def _command(folder: Path, on: str, parity: bool) -> list[str]:
    build(folder, f"link-{on}", parity)
    made = folder.resolve() / "build" / f"{on}-{'parity' if parity else 'fast'}"
    if on == "host":
        return [str(made / "linked")]
    qemu = shutil.which(os.environ.get("QEMU", "qemu-system-arm"))
    if qemu is None:
        raise ToolMissing("QEMU is not installed", hint="apt install qemu-system-arm")
    return [
        *(qemu, "-M", MACHINES[on].qemu, "-display", "none", "-monitor", "none"),
        *("-serial", "stdio", "-icount", "shift=6,sleep=off"),
        *("-semihosting-config", "enable=on,target=native"),
        *("-kernel", str(made / "linked.elf")),
    ]


def _fields(form: str, answer: bytes) -> tuple[Any, ...]:
    """What an answer says, if it has the length for it: a peer may be anything."""
    return struct.unpack(form, _exactly(answer, struct.calcsize(form)))


def _exactly(answer: bytes, size: int) -> bytes:
    if len(answer) != size:
        raise _misfit(len(answer), size)
    return answer


def _misfit(found: int, size: int) -> InvalidInput:
    return InvalidInput(
        "the board's answer does not fit its question", why=f"{found} bytes instead of {size}"
    )


def _sized(values: Array, size: int, what: str) -> Array:
    if values.size != size:
        raise InvalidInput(f"the {what} has {values.size} values, the net takes {size}")
    return values
