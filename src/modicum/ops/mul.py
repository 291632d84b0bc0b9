"""Product of two values of one shape, or of a gate per channel and an image (squeeze-and-excite).

y = gate * x; dx = dy * gate; dgate = dy * x, summed over the pixels that the gate is spread over.
"""

from __future__ import annotations

from modicum.ops.base import Buf, Call, Kept, Op, channels_last


class Mul(Op):
    """Product of two values of one shape, or of a gate per channel and an image."""

    name = "mul"
    arity = 2

    def shape(self, node, inputs, params):
        gate, x = inputs
        if gate != x and (len(x) != 4 or gate != (*x[:2], 1, 1)):
            raise ValueError(f"multiplies one shape, or a gate per channel, not {gate} and {x}")
        return x

    def saved(self, graph, node, wanted):
        gate, x = (graph.values[v] for v in node.inputs)
        kept = []
        if wanted.dx[0]:
            kept.append(Kept("value", x.name, x.bytes, why="input, for the gate's gradient"))
        if wanted.dx[1]:
            kept.append(Kept("value", gate.name, gate.bytes, why="gate, for the input's gradient"))
        return tuple(kept)

    def elementwise(self, graph, node, wanted):
        return (1, 2 * wanted.dx[0] + wanted.dx[1])

    def forward(self, node, x, p):
        return x[0] * x[1]

    def backward(self, node, dy, kept, p, wanted, x_shapes):
        gate, x = self._kept(kept, wanted)
        dgate = dx = None
        if wanted.dx[0]:
            dgate = dy * x
            if x_shapes[0] != x_shapes[1]:
                dgate = dgate.sum((2, 3), keepdim=True)
        if wanted.dx[1]:
            dx = dy * gate
        return [dgate, dx], {}

    def _kept(self, kept, wanted):
        """(gate, x) of those that are kept."""
        return (kept[-1] if wanted.dx[1] else None), (kept[0] if wanted.dx[0] else None)

    def inplace(self, graph, node):
        return (1,)

    def dx_inplace(self, graph, node, i):
        return i == 1  # the gate's gradient, which comes first, still reads dy

    def c_forward(self, f):
        return [Call("mo_mul", (Buf(f.y, "w"), Buf(f.x[1]), Buf(f.x[0]), *self._sizes(f)))]

    def c_dx(self, b, i):
        pixels, c, gate_pixels = self._sizes(b)
        if i == 1:
            gate = Buf(b.kept[-1])
            return Call("mo_mul", (Buf(b.dx, "w"), Buf(b.dy), gate, pixels, c, gate_pixels))
        x = Buf(b.kept[0])
        if gate_pixels == pixels:
            return Call("mo_mul", (Buf(b.dx, "w"), Buf(b.dy), x, pixels, c, pixels))
        return Call("mo_mul_dgate", (Buf(b.dx, "w"), Buf(b.dy), x, pixels, c))

    def _sizes(self, f):
        pixels, c = channels_last(f.out_shape)
        gate_pixels, _ = channels_last(f.shape(0))
        return pixels, c, gate_pixels
