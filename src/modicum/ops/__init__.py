"""One file per operator: shape rule, torch forward and backward, saved(wanted), cost, C calls."""

from __future__ import annotations

from modicum.errors import InvalidInput
from modicum.graph import Graph
from modicum.ops.activation import HardSigmoid, HardSwish, Sigmoid, SiLU
from modicum.ops.add import Add
from modicum.ops.base import Op
from modicum.ops.batch_norm import BatchNorm, BatchStatNorm
from modicum.ops.clamp import Clamp
from modicum.ops.concat import Concat
from modicum.ops.conv2d import Conv2d
from modicum.ops.cosine import Cosine
from modicum.ops.group_norm import GroupNorm
from modicum.ops.linear import Linear
from modicum.ops.mul import Mul
from modicum.ops.norm_conv2d import NormConv2d
from modicum.ops.pool import AdaptiveAvgPool2d, AvgPool2d, MaxPool2d
from modicum.ops.probe import Probe
from modicum.ops.reshape import Reshape
from modicum.ops.resize import Resize

_ALL = (
    *(Conv2d, Linear, NormConv2d),
    *(BatchNorm, BatchStatNorm, GroupNorm),
    *(Clamp, HardSwish, HardSigmoid, Sigmoid, SiLU),
    *(MaxPool2d, AvgPool2d, AdaptiveAvgPool2d, Resize),
    *(Add, Mul, Concat, Reshape),
    *(Cosine, Probe),
)

OPS: dict[str, Op] = {cls.name: cls() for cls in _ALL}


def check_graph(graph: Graph) -> None:
    """Raise InvalidInput unless every node is a known operator with a consistent shape."""
    for node in graph.nodes:
        op = OPS.get(node.op)
        if op is None:
            raise InvalidInput(f"the graph has an unknown operator {node.op!r}", where=node.name)
        try:
            if len(node.inputs) != (op.arity or len(node.inputs)):
                raise ValueError(f"takes {op.arity} inputs, not {len(node.inputs)}")
            shape = op.shape(node, [graph.shape(x) for x in node.inputs], graph.params)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise InvalidInput(
                f"node {node.name!r} ({node.op}) is malformed", where=node.module, why=str(error)
            ) from None
        if shape != graph.shape(node.name):
            raise InvalidInput(
                f"node {node.name!r} has the wrong shape",
                why=f"the graph says {graph.shape(node.name)}, the operator computes {shape}",
            )
