"""Residual addition of two values of one shape: y = a + b; both gradients are dy."""

from __future__ import annotations

from modicum.ops.base import Buf, Call, Op


class Add(Op):
    name = "add"
    arity = 2
    plain_autograd = True
    clamps = True

    def shape(self, node, inputs, params):
        if inputs[0] != inputs[1]:
            raise ValueError(f"adds values of one shape, not {inputs[0]} and {inputs[1]}")
        return inputs[0]

    def elementwise(self, graph, node, wanted):
        return (1, 0)

    def forward(self, node, x, p):
        return x[0] + x[1]

    def backward(self, node, dy, kept, p, wanted, x_shapes):
        return [dy if w else None for w in wanted.dx], {}

    def inplace(self, graph, node):
        return (1, 0)

    def passes_gradient(self, graph, node):
        return True

    def c_forward(self, f):
        n = f.graph.values[f.node.name].size
        return [Call("mo_add", (Buf(f.y, "w"), Buf(f.x[0]), Buf(f.x[1]), n, *f.clamp))]
