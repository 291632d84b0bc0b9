"""hardswish, hardsigmoid, sigmoid and silu.

hardswish    y = x clip(x + 3, 0, 6) / 6; exact dx = dy (0 below -3, 1 above 3, else x / 3 + 1 / 2)
hardsigmoid  y = clip(x + 3, 0, 6) / 6;   dx = dy / 6 where -3 < x < 3, else 0: one bit is kept
sigmoid      y = 1 / (1 + exp(-x));       dx = dy y (1 - y)
silu         y = x s(x), s the sigmoid;   exact dx = dy s (1 + x (1 - s))

With `sign` (MobileTL) hardswish and silu have dx = dy where x >= 0, else 0.  The sign bit of their
output is that of their input, so one bit per element of the output is kept, and none where the
output is kept anyway.
"""

from __future__ import annotations

from modicum.ops.base import Buf, Call, Kept, Op, mask_bytes
from modicum.ops.clamp import not_negative, sign_backward


class _Elementwise(Op):
    """What the four have in common; `forward_kernel` and `backward_kernel` are their C names."""

    forward_kernel = ""
    backward_kernel = ""
    costs = (0, 0)  # operations per element, forward and exact backward

    def elementwise(self, graph, node, wanted):
        forward, backward = self.costs
        return (forward, (1 if node.attrs.get("sign") else backward) if wanted.dx[0] else 0)

    def shape(self, node, inputs, params):
        return inputs[0]

    def inplace(self, graph, node):
        return (0,)

    def dx_inplace(self, graph, node, i):
        return True

    def c_forward(self, f):
        n = f.graph.values[f.node.name].size
        return [Call(self.forward_kernel, (Buf(f.y, "w"), Buf(f.x[0]), n))]

    def c_dx(self, b, i):
        n = b.graph.values[b.node.name].size
        return Call(self.backward_kernel, (Buf(b.dx, "w"), Buf(b.dy), Buf(b.kept[0]), n))


class _Swish(_Elementwise):
    """x times a gate of x: keeps x for the exact derivative, a bit for the sign mask."""

    def takes_sign(self, node):
        return True

    def function(self, x):
        raise NotImplementedError

    def exact(self, dy, x):
        """dx of the exact derivative."""
        raise NotImplementedError

    def saved(self, graph, node, wanted):
        if not wanted.dx[0]:
            return ()
        if node.attrs.get("sign"):
            y = graph.values[node.name]
            return (Kept("mask", y.name, mask_bytes(y.size), bits=1, why="1 bit per element"),)
        x = graph.values[node.inputs[0]]
        return (Kept("value", x.name, x.bytes, why="input, for the exact derivative"),)

    def forward(self, node, x, p):
        if not node.attrs.get("sign"):
            return self.function(x[0])
        return self.function(x[0]).copysign_(x[0] + 0.0)

    def mask(self, node, source):
        return not_negative(source)

    def backward(self, node, dy, kept, p, wanted, x_shapes):
        """From the input, or with `sign` from the mask or the output that has its signs."""
        import torch

        (k,) = kept
        if not node.attrs.get("sign"):
            return [self.exact(dy, k)], {}
        return [dy * k if k.dtype == torch.bool else sign_backward(dy, k)], {}

    def c_mask(self, graph, node, mask, source):
        return Call("mo_sign_pack", (mask, source, graph.values[node.name].size))

    def c_dx(self, b, i):
        if not b.node.attrs.get("sign"):
            return super().c_dx(b, i)
        kernel = "mo_mask_backward" if b.kept[0].startswith("mask:") else "mo_sign_backward"
        n = b.graph.values[b.node.name].size
        return Call(kernel, (Buf(b.dx, "w"), Buf(b.dy), Buf(b.kept[0]), n))


class HardSwish(_Swish):
    """Hard swish: x * clip(x + 3, 0, 6) / 6."""

    name = "hardswish"
    forward_kernel = "mo_hardswish_forward"
    backward_kernel = "mo_hardswish_backward"
    costs = (5, 5)

    def function(self, x):
        import torch.nn.functional as F

        return F.hardswish(x)

    def exact(self, dy, x):
        import torch

        return torch.ops.aten.hardswish_backward(dy, x)


class SiLU(_Swish):
    """Swish: x * sigmoid(x)."""

    name = "silu"
    forward_kernel = "mo_silu_forward"
    backward_kernel = "mo_silu_backward"
    costs = (5, 8)

    def function(self, x):
        import torch.nn.functional as F

        return F.silu(x)

    def exact(self, dy, x):
        import torch

        return torch.ops.aten.silu_backward(dy, x)


class HardSigmoid(_Elementwise):
    """Hard sigmoid: clip(x + 3, 0, 6) / 6."""

    name = "hardsigmoid"
    forward_kernel = "mo_hardsigmoid_forward"
    backward_kernel = "mo_hardsigmoid_backward"
    costs = (4, 2)

    def saved(self, graph, node, wanted):
        if not wanted.dx[0]:
            return ()
        x = graph.values[node.inputs[0]]
        return (Kept("mask", x.name, mask_bytes(x.size), bits=1, why="1 bit per element"),)

    def forward(self, node, x, p):
        import torch.nn.functional as F

        return F.hardsigmoid(x[0])

    def mask(self, node, source):
        return (source > -3.0) & (source < 3.0)

    def backward(self, node, dy, kept, p, wanted, x_shapes):
        return [dy * kept[0] / 6.0], {}

    def c_mask(self, graph, node, mask, source):
        n = graph.values[node.name].size
        return Call("mo_mask_pack", (mask, source, n, -3.0, 3.0))


class Sigmoid(_Elementwise):
    """Sigmoid: 1 / (1 + exp(-x))."""

    name = "sigmoid"
    forward_kernel = "mo_sigmoid_forward"
    backward_kernel = "mo_sigmoid_backward"
    costs = (4, 3)

    def saved(self, graph, node, wanted):
        if not wanted.dx[0]:
            return ()
        y = graph.values[node.name]
        return (Kept("value", y.name, y.bytes, why="output, for the derivative"),)

    def forward(self, node, x, p):
        import torch

        return torch.sigmoid(x[0])

    def backward(self, node, dy, kept, p, wanted, x_shapes):
        import torch

        return [torch.ops.aten.sigmoid_backward(dy, kept[0])], {}
