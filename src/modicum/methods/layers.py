"""The layers of a graph as selecting methods see them: weight, norm and activation together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from modicum.blocks import ACTIVATIONS, find_blocks
from modicum.errors import UsageError
from modicum.graph import Graph, Node
from modicum.methods.base import Observed
from modicum.ops import OPS
from modicum.ops.base import Wanted
from modicum.ops.conv2d import is_depthwise
from modicum.selection import Slice, Update

NORMS = ("batch_norm", "group_norm")
PER_BLOCK = 3  # layers of an inverted residual block


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer, and what directly follows it.

    `value` is where its activation is read: after its norm and non-linearity.  `biases` are its
    bias and the shift of its norm.
    """

    graph: Graph
    node: Node
    value: str
    biases: tuple[str, ...]
    others: tuple[str, ...]  # the norm's scale

    @property
    def weight(self) -> str:
        return self.node.params["weight"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.graph.params[self.weight].shape

    @property
    def depthwise(self) -> bool:
        return self.node.op == "conv2d" and is_depthwise(self.graph, self.node)

    @cached_property
    def params(self) -> int:
        """Parameters in all: weight, bias, norm."""
        names = (self.weight, *self.biases, *self.others)
        return sum(self.graph.params[n].size for n in names)

    @cached_property
    def macs(self) -> int:
        """Of a forward pass."""
        return OPS[self.node.op].macs(self.graph, self.node, Wanted((False,))).forward

    def norms(self, seen: Observed, axis: str) -> tuple[float, ...]:
        """L2 norms of the channels that `channels` counts.

        Raises UsageError unless they were observed, of a weight of this shape.
        """
        norms = seen.norms.get(self.weight, ((), ()))
        if tuple(map(len, norms)) != self.shape[:2]:
            raise UsageError(
                f"no norms of {self.weight} were observed",
                why="what was observed is of another model",
                hint="plan(..., samples=observe(model, graph, method))",
            )
        return norms[0 if axis == "out" or self.depthwise else 1]

    def channels(self, axis: str) -> int:
        """How many there are to choose from; a depthwise layer has its channels on either axis."""
        return self.shape[0 if axis == "out" or self.depthwise else 1]

    def update(self, channels: tuple[int, ...], axis: str, bias: bool = False) -> list[Update]:
        """Train these channels of the weight, and with `bias` the biases that belong to them."""
        out = axis == "out" or self.depthwise
        part = Slice(out=channels) if out else Slice(inp=channels)
        updates = [Update(param=self.weight, slice=part)]
        if bias:
            rows = Slice(out=channels) if out else Slice()
            updates += [Update(param=b, slice=rows) for b in self.biases]
        return updates


def layers(graph: Graph) -> list[Layer]:
    """All convolutions and linear layers with a weight of their own to train, in order."""
    global _latest
    known = _latest
    if known is None or known[0] is not graph:
        known = _latest = graph, [_layer(graph, n) for n in graph.nodes if _is_layer(graph, n)]
    return list(known[1])


# a method asks a dozen times while it selects, a tenth of the time that selecting takes
_latest: tuple[Graph, list[Layer]] | None = None


def _is_layer(graph: Graph, node: Node) -> bool:
    if node.op not in ("conv2d", "linear"):
        return False
    weight = node.params["weight"]
    return graph.params[weight].trainable and len(graph.users_of(weight)) == 1


def _layer(graph: Graph, node: Node) -> Layer:
    biases = [node.params["bias"]] if "bias" in node.params else []
    others = []
    value = node.name
    while len(users := graph.consumers[value]) == 1 and users[0].op in (*NORMS, *ACTIVATIONS):
        value = users[0].name
        if users[0].op in NORMS:
            biases += [p for role, p in users[0].params.items() if role == "bias"]
            others += [p for role, p in users[0].params.items() if role == "weight"]
        else:
            break
    trainable = graph.params
    return Layer(
        graph,
        node,
        value,
        tuple(b for b in biases if trainable[b].trainable),
        tuple(o for o in others if trainable[o].trainable),
    )


def head_of(graph: Graph) -> Layer | None:
    """The linear layer that makes the output, if there is one; a cosine head is not trained.

    A norm or activation may follow it.
    """
    last = [x for x in layers(graph) if x.value == graph.output]
    return last[-1] if last and last[-1].node.op == "linear" else None


def inner_layers(graph: Graph) -> list[Layer]:
    """All but the linear layer that makes the output; raises UsageError where there is none."""
    found = [x for x in layers(graph) if x.value != graph.output]
    if not found:
        raise UsageError(
            "the model has no convolution or linear layer before its output",
            why=f"its operators are {', '.join(dict.fromkeys(n.op for n in graph.nodes))}",
            hint="the method last trains the head alone",
        )
    return found


def last_layers(graph: Graph, blocks: int) -> list[Layer]:
    """The inner layers of the last `blocks` inverted residual blocks and of all that follows them.

    Without such blocks, three layers for each.
    """
    found = inner_layers(graph)
    known = find_blocks(graph)
    if not known:
        return found[-PER_BLOCK * blocks :]
    first = known[-min(blocks, len(known))].nodes[0]
    position = {n.name: i for i, n in enumerate(graph.nodes)}
    return [x for x in found if position[x.node.name] >= position[first]]
