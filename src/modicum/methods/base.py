"""What every method is: a frozen config whose `select` fills the selection of a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from modicum.errors import UsageError
from modicum.graph import Frozen, Graph
from modicum.optim import SGD, Adam
from modicum.selection import Selection


class Method(Frozen):
    """Choose what to update.  A method only selects; budgets, placement and cost are the plan's."""

    def select(self, graph: Graph) -> Selection:
        raise NotImplementedError

    def smaller(self) -> Method | None:
        """A variant of this method that updates less, tried when a plan does not fit."""
        return None


class Observed(Frozen):
    """What a method saw of a model and of a few samples.

    fisher: probed value -> a score per channel, the mean over `samples` samples; norms: weight ->
    the L2 norms of its (output, input) channels; seconds: what it took.
    """

    fisher: Mapping[str, tuple[float, ...]] = {}
    norms: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = {}
    samples: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Limits:
    """What a selection is made for: the optimiser, and whether a selection fits the board."""

    optimizer: SGD | Adam
    fits: Callable[[Selection], bool] = lambda _: True


class ObservingMethod(Method):
    """A method that looks at the model's weights, or at samples, before it selects."""

    def probes(self, graph: Graph) -> tuple[str, ...]:
        """The values whose channels are to be scored on samples; none where weights are enough."""
        return ()

    @property
    def weighs(self) -> bool:
        """Whether it looks at the norms of the weights' channels."""
        return True

    def select(self, graph: Graph) -> Selection:
        raise UsageError(
            f"{type(self).__name__} has to see {'samples' if self.probes(graph) else 'the weights'}"
            " before it selects",
            hint="plan(..., samples=observe(model, graph, method, support)), or --samples",
        )

    def select_for(self, graph: Graph, seen: Observed, limits: Limits) -> Selection:
        raise NotImplementedError
