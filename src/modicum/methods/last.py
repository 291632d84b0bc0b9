"""Update the last n layers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from modicum.errors import UsageError
from modicum.graph import Graph
from modicum.methods.base import Method
from modicum.selection import Selection, Update


class Last(Method):
    """Train all parameters of the last `n` convolutions and linear layers.

    A norm belongs to the layer whose output it normalises.
    """

    kind: Literal["last"] = "last"
    n: Annotated[int, Field(ge=1)] = 1

    def select(self, graph: Graph) -> Selection:
        starts = [i for i, node in enumerate(graph.nodes) if "weight" in node.params]
        starts = [i for i in starts if graph.nodes[i].op in ("conv2d", "linear")]
        if not starts:
            raise UsageError("the model has no convolution or linear layer to train")
        first = starts[-min(self.n, len(starts))]
        names = [p for node in graph.nodes[first:] for p in node.params.values()]
        chosen = [p for p in dict.fromkeys(names) if graph.params[p].trainable]
        return Selection(updates=tuple(Update(param=p) for p in chosen))

    def smaller(self) -> Method | None:
        return Last(n=max(1, self.n // 2)) if self.n > 1 else None
