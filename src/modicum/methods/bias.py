"""Update biases (and norm shifts), and the last layers whole."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from modicum.graph import Graph
from modicum.methods.base import Method
from modicum.methods.last import Last
from modicum.selection import Selection, Update


class Bias(Method):
    """Train every bias and norm shift, and the last `head` layers whole (0: not even the head).

    A bias's gradient is the sum of its output's gradient, so nothing but activation masks is
    kept for it (TinyTL, Cai et al., NeurIPS 2020).
    """

    kind: Literal["bias"] = "bias"
    head: Annotated[int, Field(ge=0)] = 1

    def select(self, graph: Graph) -> Selection:
        biases = [p for n in graph.nodes for role, p in n.params.items() if role == "bias"]
        names = [p for p in dict.fromkeys(biases) if graph.params[p].trainable]
        last = [u.param for u in Last(n=self.head).select(graph).updates] if self.head else []
        chosen = [p for p in graph.trainable() if p in {*names, *last}]
        return Selection(updates=tuple(Update(param=p) for p in chosen))

    def smaller(self) -> Method | None:
        return Last(n=self.head) if self.head else None
