"""Shared weights and their changes as bytes: values, and the cheapest way to say of which entries.

A message is little-endian:

    'MOFU' | version u8 | kind u8 | values u8 | index u8 | round u32 | base u32 | model, 8 bytes |
    size u32 | count u32 | index | values | CRC-32 of all before, u32

`size` is the length of the vector, `count` the number of entries that follow.  index: none (all
entries, in order), u16 or u32 (their positions, ascending), or bitmap (bit i of byte i / 8, the
lowest first); the encoder takes the smallest.  values: float32; float16; or int8, before which
stands a float32 scale: value = scale * q, scale = max |value| / 127.
"""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from modicum.errors import InvalidInput, UsageError

Array = NDArray[np.float32]
Values = Literal["float32", "float16", "int8"]
Kind = Literal["weights", "delta"]

MAGIC, VERSION = b"MOFU", 1
HEAD = struct.Struct("<4sBBBBII8sII")
TAIL = 4
KINDS: tuple[Kind, ...] = ("weights", "delta")
VALUES: tuple[Values, ...] = ("float32", "float16", "int8")
INDEXES = ("none", "u16", "u32", "bitmap")
OVERHEAD = HEAD.size + TAIL
"""Bytes of a message beside index and values."""
WIDTH = {"float32": 4, "float16": 2, "int8": 1}


@dataclass(frozen=True)
class Message:
    """Entries of a shared vector: the weights themselves, or by how much a client changed them.

    `where` are ascending positions, None for all.  `round` is the round that the message belongs
    to, `base` the one whose weights the others keep (of sparse weights).
    """

    kind: Kind
    model: bytes
    round: int
    size: int
    values: Array
    where: NDArray[np.int64] | None = None
    base: int = 0

    def dense(self) -> Array:
        """The whole vector, 0 where nothing was said."""
        return self.laid_over(np.zeros(self.size, np.float32))

    def laid_over(self, vector: Array) -> Array:
        """A copy of the vector with these entries in it."""
        if self.where is None:
            return self.values.copy()
        out = vector.copy()
        out[self.where] = self.values
        return out


def largest(delta: Array, share: float) -> NDArray[np.int64] | None:
    """The positions of the ceil(share * size) entries of largest magnitude, ascending.

    Of equal ones the first; entries that are 0 say nothing and are left out.  None: all of them.
    """
    if share >= 1:
        return None
    count = math.ceil(share * len(delta))
    size = np.abs(delta)
    first = np.argsort(-size, kind="stable")[:count]
    return np.sort(first[size[first] > 0])


def encode(message: Message, values: Values = "float32") -> bytes:
    """The bytes of a message.  Raises InvalidInput for values that are not finite.

    float16 and int8 round; values beyond float16 become the largest that it has.
    """
    where = message.where
    count = message.size if where is None else len(where)
    if message.values.shape != (count,):
        raise UsageError(f"{count} entries have {message.values.shape} values")
    if not np.isfinite(message.values).all():
        raise InvalidInput("a message has values that are not finite")
    index = "none" if where is None else cheapest_index(message.size, count)
    head = HEAD.pack(
        MAGIC, VERSION, KINDS.index(message.kind), VALUES.index(values), INDEXES.index(index),
        message.round, message.base, message.model[:8], message.size, count,
    )  # fmt: skip
    body = head + _index_bytes(index, where, message.size) + _value_bytes(values, message.values)
    return body + struct.pack("<I", zlib.crc32(body))


def decode(
    blob: bytes, *, model: bytes, size: int, kind: Kind, round: int | None = None,
    limit: float = math.inf,
) -> Message:  # fmt: skip
    """Read a message that has to be of this model, size and kind, and of this round if given.

    Raises InvalidInput that says why for anything else: damaged or cut short, another version,
    positions out of order, values not finite or larger than `limit`.
    """
    if len(blob) < OVERHEAD:
        raise _refused("it is cut short", f"{len(blob)} bytes")
    magic, version, kind_, values_, index_, round_, base, model_, size_, count = HEAD.unpack_from(
        blob
    )
    if magic != MAGIC or version != VERSION:
        raise _refused("it is not a message of this version")
    if struct.unpack("<I", blob[-TAIL:])[0] != zlib.crc32(blob[:-TAIL]):
        raise _refused("it is damaged", "its CRC is another")
    if kind_ >= len(KINDS) or values_ >= len(VALUES) or index_ >= len(INDEXES):
        raise _refused("it has an unknown kind of contents")
    if model_ != model[:8]:
        raise _refused("it is of another model", f"{model_.hex()} instead of {model[:8].hex()}")
    if size_ != size:
        raise _refused("it is of another size", f"{size_} parameters instead of {size}")
    if KINDS[kind_] != kind:
        raise _refused(f"it holds {KINDS[kind_]}", f"{kind} was due")
    if round is not None and round_ != round:
        raise _refused("it is of another round", f"{round_} instead of {round}")
    index, values = INDEXES[index_], VALUES[values_]
    if count > size or (index == "none" and count != size):
        raise _refused("it has an impossible number of entries", f"{count} of {size}")
    start = HEAD.size + index_size(index, size, count)
    if len(blob) != start + value_size(values, count) + TAIL:
        raise _refused("it has the wrong length", f"{len(blob)} bytes for {count} entries")
    where = _read_index(index, blob[HEAD.size : start], size, count)
    found = _read_values(values, blob[start:-TAIL])
    if not np.isfinite(found).all():
        raise _refused("it has values that are not finite")
    if found.size and float(np.abs(found).max()) > limit:
        raise _refused("a value is out of range", f"{np.abs(found).max():.3g}, at most {limit:g}")
    return Message(kind, model_, round_, size, found, where, base)


def encoded_size(size: int, count: int, values: Values = "float32", dense: bool = False) -> int:
    """Bytes of a message with `count` of `size` entries."""
    index = "none" if dense else cheapest_index(size, count)
    return OVERHEAD + index_size(index, size, count) + value_size(values, count)


def cheapest_index(size: int, count: int) -> str:
    """Bitmap, or positions of 16 bits where that is enough, or of 32."""
    kinds = ["u16" if size <= 1 << 16 else "u32", "bitmap"]
    return min(kinds, key=lambda kind: index_size(kind, size, count))


def index_size(index: str, size: int, count: int) -> int:
    """Bytes that say of which entries the values are."""
    return {"none": 0, "u16": 2 * count, "u32": 4 * count, "bitmap": -(-size // 8)}[index]


def value_size(values: Values, count: int) -> int:
    """Bytes of the values themselves."""
    return WIDTH[values] * count + (4 if values == "int8" else 0)


def _index_bytes(index: str, where: NDArray[np.int64] | None, size: int) -> bytes:
    if where is None:
        return b""
    if len(where) and (where[0] < 0 or where[-1] >= size or (np.diff(where) <= 0).any()):
        raise UsageError("the positions of entries are ascending, from 0 on, below the size")
    if index == "bitmap":
        bits = np.zeros(size, np.uint8)
        bits[where] = 1
        return np.packbits(bits, bitorder="little").tobytes()
    return where.astype("<u2" if index == "u16" else "<u4").tobytes()


def _read_index(index: str, raw: bytes, size: int, count: int) -> NDArray[np.int64] | None:
    if index == "none":
        return None
    if index == "bitmap":
        bits = np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little")
        where = np.flatnonzero(bits)
    else:
        where = np.frombuffer(raw, "<u2" if index == "u16" else "<u4").astype(np.int64)
    ordered = len(where) == count and not (np.diff(where) <= 0).any()
    if not ordered or (count and where[-1] >= size):
        raise _refused("its positions are not ascending ones of the vector, as many as its values")
    return where.astype(np.int64)


def _value_bytes(values: Values, v: Array) -> bytes:
    if values == "float32":
        return v.astype("<f4").tobytes()
    if values == "float16":
        most = float(np.finfo(np.float16).max)
        return v.clip(-most, most).astype("<f2").tobytes()
    scale = np.float32(np.abs(v).max(initial=0.0) / 127)
    q = np.rint(v / scale).clip(-127, 127) if scale > 0 else np.zeros(len(v))
    return struct.pack("<f", scale) + q.astype(np.int8).tobytes()


def _read_values(values: Values, raw: bytes) -> Array:
    with np.errstate(all="ignore"):  # what is not finite is refused by the caller
        if values == "int8":
            scale = np.frombuffer(raw[:4], "<f4")[0]
            found: NDArray[Any] = scale * np.frombuffer(raw[4:], np.int8).astype(np.float32)
        else:
            found = np.frombuffer(raw, "<f4" if values == "float32" else "<f2")
    return cast(Array, found.astype(np.float32))


def _refused(what: str, why: str | None = None) -> InvalidInput:
    return InvalidInput(f"the update is refused: {what}", why=why)
