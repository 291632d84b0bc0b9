"""flatten, reshape and view: the same elements under another shape, batch kept.

In C an image is stored [h][w][c], so reshaping one with several channels and pixels moves its
elements into PyTorch's order; otherwise the output is the input's memory.
"""

from __future__ import annotations

import math

from modicum.ops.attributes import wholes
from modicum.ops.base import Buf, Call, Op


class Reshape(Op):
    name = "reshape"
    plain_autograd = True

    def shape(self, node, inputs, params):
        shape = wholes(node, "shape", 0, most=2**31 - 1)
        if len(shape) < 2 or shape[0] != inputs[0][0] or math.prod(shape) != math.prod(inputs[0]):
            raise ValueError(f"{inputs[0]} does not reshape to {shape} with the batch kept")
        if _moves(inputs[0]) and _moves(shape) and inputs[0] != shape:
            raise ValueError("reshaping an image to another image is not supported")
        return shape

    def forward(self, node, x, p):
        return x[0].reshape(x[0].shape[0], *node.attrs["shape"][1:])

    def backward(self, node, dy, kept, p, wanted, x_shapes):
        return [dy.reshape(x_shapes[0])], {}

    def view(self, graph, node):
        a, b = graph.shape(node.inputs[0]), graph.shape(node.name)
        return a == b or not (_moves(a) or _moves(b))

    def c_forward(self, f):
        return [_transpose(Buf(f.y, "w"), Buf(f.x[0]), f.shape(), f.out_shape)]

    def c_dx(self, b, i):
        return _transpose(Buf(b.dx, "w"), Buf(b.dy), b.out_shape, b.shape())


def _moves(shape):
    """True for an image whose channels-last order differs from PyTorch's."""
    return len(shape) == 4 and shape[1] > 1 and shape[2] * shape[3] > 1


def _transpose(dst, src, src_shape, dst_shape):
    if _moves(src_shape):  # [h w][c] -> [c][h w]
        return Call("mo_transpose", (dst, src, src_shape[2] * src_shape[3], src_shape[1]))
    return Call("mo_transpose", (dst, src, dst_shape[1], dst_shape[2] * dst_shape[3]))
