"""Passes a value on, and in the backward pass scores its channels by Fisher information.

y = x; dx = dy; for one sample, with a = x and g = dL/dx over the pixels d of channel o:
fisher_o = (sum_d a_od g_od)^2 / 2, summed over samples (Theis et al., arXiv 1801.05787; TinyTrain,
ICML 2024, eq. 2, is the mean).  The score is treated as the gradient of a parameter `fisher`, so
that what a pass computes, keeps and costs is known as for any other.
"""

from __future__ import annotations

from typing import ClassVar

from modicum.ops.base import Buf, Call, GradCall, Kept, Op, channels_last


class Probe(Op):
    name = "probe"
    roles: ClassVar[tuple[str, ...]] = ("fisher",)

    def shape(self, node, inputs, params):
        channels = inputs[0][1] if len(inputs[0]) == 4 else inputs[0][-1]
        if params[node.params["fisher"]].shape != (channels,):
            raise ValueError(f"a score per channel, and there are {channels}")
        return inputs[0]

    def saved(self, graph, node, wanted):
        if "fisher" not in wanted.params:
            return ()
        x = graph.values[node.inputs[0]]
        return (Kept("value", x.name, x.bytes, why="activation, for its Fisher information"),)

    def elementwise(self, graph, node, wanted):
        return (0, 2 if "fisher" in wanted.params else 0)

    def forward(self, node, x, p):
        return x[0]

    def backward(self, node, dy, kept, p, wanted, x_shapes):
        grads = {}
        if "fisher" in wanted.params:
            product = kept[0] * dy
            if product.dim() == 4:
                inner = product.sum((2, 3))
            else:
                inner = product.flatten(1, -2).sum(1) if product.dim() > 2 else product
            grads["fisher"] = inner.square().sum(0) / 2
        return [dy if wanted.dx[0] else None], grads

    def view(self, graph, node):
        return True

    def c_grad(self, b, role, s, grad, acc):
        rows, channels = channels_last(b.out_shape)
        call = Call("mo_fisher", (grad, Buf(b.dy), Buf(b.kept[0]), rows, channels, int(acc)))
        return GradCall((call,), 1, channels)
