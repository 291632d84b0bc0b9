"""Score channels by Fisher information, and train nothing."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from modicum.graph import Graph
from modicum.methods.base import Method
from modicum.selection import Selection


class Inspect(Method):
    """Score the channels of the named values; one backward pass that stops at the first of them.

    The scores are the "gradients" of the plan: a step with SGD and a rate of 1 takes them from 0.
    It is what TinyTrain does before it selects; as a plan its memory and work are known too.
    """

    kind: Literal["inspect"] = "inspect"
    values: Annotated[tuple[str, ...], Field(min_length=1)]

    def select(self, graph: Graph) -> Selection:
        return Selection(updates=(), probes=self.values)
