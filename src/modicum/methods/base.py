"""What every method is: a frozen config whose `select` fills the selection of a plan."""

from __future__ import annotations

from modicum.graph import Frozen, Graph
from modicum.selection import Selection


class Method(Frozen):
    """Choose what to update.  A method only selects; budgets, placement and cost are the plan's."""

    def select(self, graph: Graph) -> Selection:
        raise NotImplementedError

    def smaller(self) -> Method | None:
        """A variant of this method that updates less, tried when a plan does not fit."""
        return None
