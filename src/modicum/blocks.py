"""Inverted residual blocks, found by their structure in the graph, whatever the model calls them.

expand 1x1 [- norm] [- act] - depthwise [- norm] [- act] [- squeeze-and-excite] - project 1x1
[- norm] [- add of the block's input]

A norm is missing where it was folded into its convolution before the capture; then its shift is
the convolution's bias.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from modicum.graph import Frozen, Graph, Node
from modicum.ops.conv2d import is_depthwise

ACTIVATIONS = ("clamp", "hardswish", "hardsigmoid", "sigmoid", "silu")


class Block(Frozen):
    """One inverted residual block; all fields are names of nodes.

    `nodes` are all of its nodes in order, the residual add included, `internal_norms` those
    after expansion and depthwise convolution, `last_norm` the one after the projection,
    `activations` those on its main path, `gate` its squeeze-and-excite nodes.
    """

    name: str
    expand: str
    depthwise: str
    project: str
    internal_norms: tuple[str, ...]
    last_norm: str | None
    activations: tuple[str, ...]
    gate: tuple[str, ...]
    nodes: tuple[str, ...]

    @property
    def residual(self) -> bool:
        return self.nodes[-1] not in (self.project, self.last_norm)


def find_blocks(graph: Graph) -> tuple[Block, ...]:
    """The inverted residual blocks of a graph, in order."""
    blocks = (_block(graph, node) for node in graph.nodes if _pointwise(graph, node))
    return tuple(b for b in blocks if b is not None)


def _block(graph: Graph, expand: Node) -> Block | None:
    """The block that begins with this 1x1 convolution, if one does."""
    path = [expand]
    norms: list[str] = []
    activations: list[str] = []
    gate: list[str] = []
    while not _depthwise(graph, path[-1]):  # norm and activation after the expansion
        node = _only_consumer(graph, path[-1])
        if node is None or not (_is_norm_or_act(node) or _depthwise(graph, node)):
            return None
        path.append(node)
    depthwise = path[-1]
    while True:  # norm, activation, gate after the depthwise convolution
        node = _only_consumer(graph, path[-1])
        if node is None:
            found = _gate(graph, path[-1])
            if found is None:
                return None
            gate, node = found
        if _pointwise(graph, node):
            break
        if node.op != "mul" and not _is_norm_or_act(node):
            return None
        path.append(node)
    project = node
    for node in path:
        if node.op in ("batch_norm", "group_norm"):
            norms.append(node.name)
        elif node.op in ACTIVATIONS:
            activations.append(node.name)
    path.append(project)
    after = _only_consumer(graph, project)
    last_norm = after if after is not None and after.op in ("batch_norm", "group_norm") else None
    path += [last_norm] if last_norm is not None else []
    end = _only_consumer(graph, path[-1])
    if end is not None and end.op == "add" and expand.inputs[0] in end.inputs:
        path.append(end)
    inside = {n.name for n in path} | set(gate)
    return Block(
        name=_common(expand.module, project.module) or f"{expand.name} to {project.name}",
        expand=expand.name,
        depthwise=depthwise.name,
        project=project.name,
        internal_norms=tuple(norms),
        last_norm=last_norm.name if last_norm is not None else None,
        activations=tuple(activations),
        gate=tuple(gate),
        nodes=tuple(n.name for n in graph.nodes if n.name in inside),
    )


def _gate(graph: Graph, node: Node) -> tuple[list[str], Node] | None:
    """Squeeze-and-excite on a value: the nodes of the gate's branch, and the product."""
    for product in graph.consumers[node.name]:
        if product.op == "mul":  # of one pixel, either factor may come first
            (other,) = [v for v in product.inputs if v != node.name] or [node.name]
            branch = _between(graph, node.name, other)
            others = [c.name for c in graph.consumers[node.name] if c.name != product.name]
            if branch is not None and set(others) <= set(branch):
                return branch, product
    return None


def _between(graph: Graph, source: str, end: str) -> list[str] | None:
    """The nodes on a chain from `source` to `end`, both values; None if there is none."""
    chain: list[str] = []
    value = end
    while value != source:
        node = graph.by_name.get(value)
        if node is None or len(node.inputs) != 1:
            return None
        chain.append(value)
        value = node.inputs[0]
    return chain[::-1] or None


def _only_consumer(graph: Graph, node: Node) -> Node | None:
    users = graph.consumers[node.name]
    return users[0] if len(users) == 1 and node.name != graph.output else None


def _is_norm_or_act(node: Node) -> bool:
    return node.op in ("batch_norm", "group_norm", *ACTIVATIONS)


def _depthwise(graph: Graph, node: Node) -> bool:
    return node.op == "conv2d" and is_depthwise(graph, node)


def _pointwise(graph: Graph, node: Node) -> bool:
    if node.op != "conv2d" or node.attrs["groups"] != 1:
        return False
    return graph.params[node.params["weight"]].shape[2:] == (1, 1)


def _common(a: str, b: str) -> str:
    """The module that contains both, such as ``blocks.3`` of its ``expand`` and ``project``."""
    same = itertools.takewhile(
        lambda pair: pair[0] == pair[1], zip(a.split("."), b.split("."), strict=False)
    )
    return ".".join(part for part, _ in same)


def describe(blocks: Sequence[Block]) -> str:
    """What was found, for an error message."""
    if not blocks:
        return "none: no expand 1x1 - depthwise - project 1x1 was found"
    return f"{len(blocks)}: " + ", ".join(b.name for b in blocks)
