"""Update every parameter."""

from __future__ import annotations

from typing import Literal

from modicum.graph import Graph
from modicum.methods.base import Method
from modicum.methods.last import Last
from modicum.selection import Selection, Update


class Full(Method):
    """Train all weights, biases and norm scales: the reference, and the most expensive."""

    kind: Literal["full"] = "full"

    def select(self, graph: Graph) -> Selection:
        return tuple(Update(param=name) for name in graph.trainable())

    def smaller(self) -> Method | None:
        return Last(n=8)
