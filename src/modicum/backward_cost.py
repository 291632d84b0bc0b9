"""The backward pass in the papers' convention: what their budgets and tables count.

memory = max(I/O peak, saved) + (2 + states) 4 W (TinyTrain, ICML 2024, appendix A.4), where the
I/O peak is the largest input + output of a layer (what is kept shares their room), saved is what
the forward pass keeps for one sample, W counts the updated parameters, each with its gradient and
the optimiser's states.  Frozen weights are left out: they are in flash.  Our own figures, which
`Plan.cost` has, are of the whole program instead, with all that lives at one time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from modicum.graph import Frozen, Graph
from modicum.lower import choose_saved, prepare, saved_bytes, updates_of, wanted_gradients
from modicum.ops import OPS
from modicum.ops.base import Wanted
from modicum.ops.conv2d import is_depthwise
from modicum.optim import SGD, Adam
from modicum.selection import Selection, Update


class BackwardCost(Frozen):
    """Bytes for one sample, and multiply-accumulates of its backward pass.

    Where inner steps differ in what they update, kept bytes and MACs are those of the step with the
    most, and the updated parameters those of all.  io: the largest input + output of a layer;
    saved: kept from the forward to the backward pass; updated: parameters; copies: floats held for
    each of them (itself, gradient, states).
    """

    io: int
    saved: int
    updated: int
    copies: int
    macs: int

    @property
    def weights(self) -> int:
        """The updated weights and their gradients come once each in the papers: here the first."""
        return 4 * self.updated

    @property
    def optimizer(self) -> int:
        """Gradients and states."""
        return 4 * self.updated * (self.copies - 1)

    @property
    def activation(self) -> int:
        return max(self.io, self.saved)

    @property
    def memory(self) -> int:
        return self.activation + self.weights + self.optimizer

    def batch_memory(self, batch: int) -> int:
        """With so many samples at once."""
        return max(self.io, batch * self.saved) + self.weights + self.optimizer


def backward_cost(graph: Graph, selection: Selection, optimizer: SGD | Adam) -> BackwardCost:
    """What a selection costs; a pure function of the graph, quick enough for a search."""
    selection = selection.without_idle()
    prepared = prepare(graph, selection)
    updates = updates_of(selection)
    steps = [wanted_gradients(prepared, updates, step) for step, *_ in selection.patterns]
    return BackwardCost(
        io=io_peak(prepared),
        saved=max(saved_bytes(prepared, choose_saved(prepared, wanted)) for wanted in steps),
        updated=sum(_size(prepared, n, u) for n, u in updates.items()),
        copies=2 + len(optimizer.states),
        macs=max(_macs(prepared, wanted) for wanted in steps),
    )


def _macs(graph: Graph, wanted: Mapping[str, Wanted]) -> int:
    owing = (n for n in graph.nodes if wanted[n.name].any)
    macs = (OPS[n.op].macs(graph, n, wanted[n.name]) for n in owing)
    return sum(m.dx + m.dw for m in macs)


def io_peak(graph: Graph) -> int:
    """The largest input + output of a convolution or linear layer, in bytes.

    Of a depthwise convolution the output counts once per group: it can be computed channel by
    channel into its input (TinyTL's profiler counts so, and gives the papers' 896 KB for
    MobileNetV2 of width 0.35 at 128x128).
    """
    peak = 0
    for node in graph.nodes:
        if node.op in ("conv2d", "norm_conv2d", "linear"):
            out = graph.values[node.name].bytes
            both = graph.values[node.inputs[0]].bytes + out
            if both > peak and node.op != "linear" and is_depthwise(graph, node):
                both -= out - out // graph.shape(node.name)[1]
            peak = max(peak, both)
    return peak


def _size(graph: Graph, name: str, update: Update) -> int:
    return math.prod(update.slice.shape(graph.params[name].shape))
