"""What of a plan travels: the shared parameters, side by side in one vector."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from modicum.errors import InvalidInput, UsageError
from modicum.lower import Trained
from modicum.ops.base import Layout as Order
from modicum.plan import Plan
from modicum.selection import some
from modicum.state import from_c, to_c

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Part:
    """One shared parameter slice: its place in the vector, and its index on the C side."""

    name: str
    shape: tuple[int, ...]
    order: Order
    start: int
    index: int

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def range(self) -> slice:
        return slice(self.start, self.start + self.size)


@dataclass(frozen=True)
class Layout:
    """The trained slices of a plan, those that are shared and those that stay with the client.

    A shared vector (size,) holds the shared slices one after the other, each flat in PyTorch's
    order, in the order of the plan.  `model` identifies what travels: two clients with the same
    one understand each other, whatever their plans are otherwise (batches, boards, C or PyTorch).

    >>> layout = Layout.of(plan, local=("head.*",))     # doctest: +SKIP
    """

    parts: tuple[Part, ...]
    local: tuple[Part, ...]
    model: bytes

    @staticmethod
    def of(plan: Plan, local: Sequence[str] = ()) -> Layout:
        """`local` are patterns of the parameters that never leave the client.

        Raises UsageError for a pattern without a match, and where nothing is left to share.
        """
        trained = plan.program.trained
        if plan.program.statistics:
            raise UsageError(
                "norms that follow batch statistics are not shared between clients",
                hint="group norms, frozen statistics, or a network without norms",
            )
        names = [t.param for t in trained]
        for pattern in local:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UsageError(
                    f"no trained parameter matches {pattern!r}, which is to stay with the client",
                    hint="the trained parameters are " + some(names),
                )
        stays = [any(fnmatchcase(t.param, p) for p in local) for t in trained]
        if all(stays):
            raise UsageError("every parameter stays with the client: nothing is left to share")
        parts, kept, start = [], [], 0
        for index, (t, stay) in enumerate(zip(trained, stays, strict=True)):
            if stay:
                kept.append(Part(t.param, t.shape, t.layout, 0, index))
            else:
                parts.append(Part(t.param, t.shape, t.layout, start, index))
                start += t.size
        shared = [t for t, stay in zip(trained, stays, strict=True) if not stay]
        return Layout(tuple(parts), tuple(kept), _identity(plan, shared))

    @cached_property
    def size(self) -> int:
        """The length of the vector."""
        return sum(p.size for p in self.parts)

    def join(self, values: Mapping[str, Array]) -> Array:
        """The vector of slices by name.  Raises InvalidInput where one is missing or misshapen."""
        flat = np.empty(self.size, np.float32)
        for part in self.parts:
            value = values.get(part.name)
            if value is None or tuple(value.shape) != part.shape:
                found = "nothing" if value is None else f"shape {tuple(value.shape)}"
                raise InvalidInput(
                    f"the shared parameter {part.name!r} has shape {part.shape}, found {found}"
                )
            flat[part.range] = np.asarray(value, np.float32).ravel()
        return flat

    def split(self, vector: Array) -> dict[str, Array]:
        """The slices of a vector by name, in PyTorch's shapes."""
        vector = self.check(vector)
        return {p.name: vector[p.range].reshape(p.shape) for p in self.parts}

    def to_c(self, vector: Array) -> dict[int, Array]:
        """The slices by their index on the C side, flat in the kernels' order."""
        vector = self.check(vector)
        return {
            p.index: to_c(vector[p.range].reshape(p.shape), p.order).ravel() for p in self.parts
        }

    def from_c(self, slices: Mapping[int, Array]) -> Array:
        """The inverse of `to_c`; slices that are not shared may be left out."""
        return self.join({p.name: from_c(slices[p.index], p.shape, p.order) for p in self.parts})

    def check(self, vector: Array) -> Array:
        """The vector, if it has the size and is finite; raises InvalidInput otherwise."""
        if vector.shape != (self.size,):
            raise InvalidInput(
                f"a vector of shared parameters has shape {vector.shape}",
                why=f"{self.size} parameters are shared",
            )
        if not np.isfinite(vector).all():
            raise InvalidInput("a vector of shared parameters has values that are not finite")
        return vector


def _identity(plan: Plan, shared: Sequence[Trained]) -> bytes:
    """16 bytes of SHA-256 over the model and what of it is shared."""
    what = [[t.param, t.slice.model_dump(mode="json"), t.shape] for t in shared]
    graph = plan.graph.model_dump(mode="json")
    text = json.dumps([graph, plan.loss, what], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()[:16]
