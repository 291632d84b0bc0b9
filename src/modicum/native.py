"""The emitted C as a shared library: predict and train without torch in the process."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modicum.errors import InvalidInput, ModicumError, UsageError
from modicum.toolchain import build, net_name

Array = NDArray[np.float32]

ALWAYS = ("init", "input", "predict", "train", "export_state", "import_state", "trained", "size",
          "error")  # fmt: skip
SOMETIMES = ("prototypes_clear", "prototypes_add", "steps_clear", "attend", "select", "selected")
LACKING = {
    "prototypes_clear": "prototypes",
    "prototypes_add": "prototypes",
    "steps_clear": "step sizes that differ by inner step",
    "attend": "channel attention",
}


class Native:
    """One net of an emitted folder, loaded into this process with ctypes and numpy alone.

    >>> net = Native("out/")            # doctest: +SKIP
    >>> loss = net.train(image, label)  # doctest: +SKIP

    Inputs are one sample in C order, images [height][width][channel].  The library is built on
    first use, for this machine; `parity` builds it for the same bits as on the boards.
    `members` is the number of plans of a candidate set, 0 of a net with one plan.
    """

    def __init__(self, folder: str | Path, parity: bool = False) -> None:
        folder = Path(folder)
        if not (folder / "net.mk").is_file():
            raise InvalidInput(f"{folder} is not an emitted folder", why="it has no net.mk")
        name = net_name(folder)
        self._lib = ctypes.CDLL(str(build(folder, "lib", parity).resolve()))
        self._call = {
            call: getattr(self._lib, f"{name}_{call}")
            for call in (*ALWAYS, *SOMETIMES)
            if call in ALWAYS or hasattr(self._lib, f"{name}_{call}")
        }
        self._call["size"].restype = ctypes.c_size_t
        self._call["export_state"].restype = ctypes.c_size_t
        self._call["trained"].restype = ctypes.POINTER(ctypes.c_float)
        self._call["error"].restype = ctypes.c_char_p
        numbers = _header_numbers(folder / f"{name}.h", name.upper())
        self.inputs, self.outputs = numbers["INPUTS"], numbers["OUTPUTS"]
        self.targets, self.members = numbers["TARGETS"], numbers.get("MEMBERS", 0)
        self._memory = ctypes.create_string_buffer(self._call["size"]() + 64)
        start = ctypes.addressof(self._memory)
        self._net = ctypes.c_void_p(start + -start % 64)
        self.reset()

    def predict(self, x: Array) -> Array:
        """Outputs for one sample."""
        x = self._floats(x, self.inputs, "the input")
        out = np.empty(self.outputs, np.float32)
        self._check(self._call["predict"](self._net, _pointer(x), _pointer(out)))
        return out

    def train(self, x: Array, target: Any) -> float:
        """One sample forward and backward; returns its loss.  `target` is the label, or for mse
        the target values."""
        x, wanted, loss = (
            self._floats(x, self.inputs, "the input"),
            self._wanted(target),
            ctypes.c_float(),
        )
        self._check(self._call["train"](self._net, _pointer(x), wanted, ctypes.byref(loss)))
        return float(loss.value)

    def attend(self, x: Array, target: Any) -> None:
        """One sample of the next update, of which all pass here before the first is trained on.

        Raises UsageError for a net without channel attention.
        """
        x = self._floats(x, self.inputs, "the input")
        self._check(self._optional("attend")(self._net, _pointer(x), self._wanted(target)))

    def _wanted(self, target: Any) -> Any:
        """A label, or a pointer to targets, which keeps them."""
        if not self.targets:
            return ctypes.c_int32(int(target))
        return self._floats(target, self.targets, "the target").ctypes.data_as(ctypes.c_void_p)

    def clear_prototypes(self) -> None:
        """Forget the prototypes of all classes.  Raises UsageError for a net that has none."""
        self._check(self._optional("prototypes_clear")(self._net))

    def add_prototype(self, x: Array, label: int) -> None:
        """Add the features of one support sample to the prototype of its class."""
        x = self._floats(x, self.inputs, "the input")
        call = self._optional("prototypes_add")
        self._check(call(self._net, _pointer(x), ctypes.c_int32(int(label))))

    def clear_steps(self) -> None:
        """For a new task: the next update is the first inner step, from the weights that there are.

        Raises UsageError for a net whose updates are all alike.
        """
        self._check(self._optional("steps_clear")(self._net))

    def select(self, member: int) -> None:
        """Go on with a plan of a candidate set, in its initial state."""
        self._check(self._optional("select")(self._net, ctypes.c_int32(int(member))))

    @property
    def selected(self) -> int:
        return int(self._optional("selected")(self._net))

    def trained(self) -> list[Array]:
        """Copies of the trained slices, flat, in the kernels' layout."""
        slices: list[Array] = []
        count = ctypes.c_int32()
        while True:
            start = self._call["trained"](self._net, len(slices), ctypes.byref(count))
            if not start:
                return slices
            slices.append(np.ctypeslib.as_array(start, (count.value,)).copy())

    def reset(self) -> None:
        """The initial weights again, and nothing learned."""
        self._check(self._call["init"](self._net))

    def set_trained(self, index: int, values: Any) -> None:
        """Overwrite a trained slice, flat, in the kernels' layout.

        Raises InvalidInput, and changes nothing, for another number of values, or such as are not
        finite; UsageError for a slice that there is not.
        """
        count = ctypes.c_int32()
        start = self._call["trained"](self._net, ctypes.c_int32(index), ctypes.byref(count))
        if not start:
            raise UsageError(f"the net has no trained slice {index}")
        array = self._floats(values, count.value, f"slice {index}")
        if not np.isfinite(array).all():
            raise InvalidInput(f"slice {index} has values that are not finite")
        ctypes.memmove(start, array.ctypes.data, array.nbytes)

    def export_state(self) -> bytes:
        """What was learned, as a blob that any build of the same plan imports."""
        capacity = self._call["size"]() + 64
        blob = ctypes.create_string_buffer(capacity)
        length = self._call["export_state"](self._net, blob, ctypes.c_size_t(capacity))
        return blob.raw[:length]

    def import_state(self, blob: bytes) -> None:
        """Take over a blob, all or nothing; raises InvalidInput for one that is not valid."""
        status = self._call["import_state"](self._net, blob, ctypes.c_size_t(len(blob)))
        if status != 0:
            raise InvalidInput("the state was refused", why=self._error(status))

    def _floats(self, values: Any, n: int, what: str) -> Array:
        array = np.ascontiguousarray(values, dtype=np.float32)
        if array.size != n:
            raise InvalidInput(f"{what} has {array.size} values, the net takes {n}")
        return array

    def _optional(self, call: str) -> Any:
        if call not in self._call:
            raise UsageError(f"the net has no {LACKING.get(call, 'plans to select from')}")
        return self._call[call]

    def _check(self, status: int) -> None:
        if status == 0:
            return
        kind = InvalidInput if status in (-2, -3, -4, -10, -11) else ModicumError
        raise kind(f"the net answered: {self._error(status)}")

    def _error(self, status: int) -> str:
        return str(self._call["error"](status).decode())


def _pointer(array: Array) -> Any:
    return array.ctypes.data_as(ctypes.c_void_p)


def _header_numbers(header: Path, prefix: str) -> dict[str, int]:
    """The plain numbers that the header defines."""
    numbers = {}
    for line in header.read_text().splitlines():
        words = line.split()
        if len(words) > 2 and words[0] == "#define" and words[2].isdigit():
            numbers[words[1].removeprefix(prefix + "_")] = int(words[2])
    return numbers
