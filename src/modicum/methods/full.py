"""Update every parameter."""

from __future__ import annotations

from typing import Literal

from modicum.graph import Graph
from modicum.methods.base import Method
from modicum.methods.last import Last
from modicum.methods.mobiletl import Norms, exact
from modicum.selection import Selection


class Full(Method):
    """Train all weights, biases and norm scales: the reference, and the most expensive.

    `norms`: "affine" keeps the norms' statistics frozen; "batch" uses and follows those of the
    batch, as PyTorch does in training mode.
    """

    kind: Literal["full"] = "full"
    norms: Norms = "affine"

    def select(self, graph: Graph) -> Selection:
        return exact(graph, graph.nodes, self.norms)

    def smaller(self) -> Method | None:
        return Last(n=8)
