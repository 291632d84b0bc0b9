"""Update the norms, and the last layers whole."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from modicum.errors import UsageError
from modicum.graph import Graph
from modicum.methods.base import Method
from modicum.methods.last import Last
from modicum.selection import Selection, Update

NORMS = ("batch_norm", "group_norm")


class Norm(Method):
    """Train the scale and shift of every norm, and the last `head` layers whole."""

    kind: Literal["norm"] = "norm"
    head: Annotated[int, Field(ge=0)] = 1

    def select(self, graph: Graph) -> Selection:
        norms = {p for n in graph.nodes if n.op in NORMS for p in n.params.values()}
        if not norms:
            raise UsageError(
                "the model has no norms to train",
                why="they may have been folded into the convolutions",
                hint="the method bias trains what is left of them, their shifts",
            )
        last = [u.param for u in Last(n=self.head).select(graph).updates] if self.head else []
        chosen = [p for p in graph.trainable() if p in {*norms, *last}]
        return Selection(updates=tuple(Update(param=p) for p in chosen))

    def smaller(self) -> Method | None:
        return Last(n=self.head) if self.head else None
