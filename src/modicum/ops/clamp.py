"""relu, relu6 and hardtanh: y = min(max(x, lo), hi), either side may be open.

dx = dy where lo < x < hi, else 0.  Since lo < x < hi exactly when lo < y < hi, one bit per
element is enough; where the output is kept anyway for another gradient, not even that.
"""

from __future__ import annotations

from modicum.ops.base import Buf, Call, Kept, Op, clamp_args, mask_bytes


class Clamp(Op):
    name = "clamp"

    def shape(self, node, inputs, params):
        lo, hi = node.attrs["lo"], node.attrs["hi"]
        if lo is not None and hi is not None and not lo < hi:
            raise ValueError(f"needs lo < hi, not {lo} and {hi}")
        return inputs[0]

    def saved(self, graph, node, wanted):
        if not wanted.dx[0]:
            return ()
        y = graph.values[node.name]
        return (Kept("mask", y.name, mask_bytes(y.size), bits=1, why="1 bit per element"),)

    def forward(self, node, x, p):
        import torch

        if node.attrs["lo"] == 0 and node.attrs["hi"] is None:
            return torch.relu(x[0])
        return torch.clamp(x[0], node.attrs["lo"], node.attrs["hi"])

    def passes(self, node, y):
        """Where gradient passes, from the output."""
        import torch

        lo, hi = node.attrs["lo"], node.attrs["hi"]
        inside = torch.ones_like(y, dtype=torch.bool) if lo is None else y > lo
        return inside if hi is None else inside & (y < hi)

    def backward(self, node, dy, kept, p, wanted, x_shapes):
        return [dy * kept[0]], {}

    def inplace(self, graph, node):
        return (0,)

    def dx_inplace(self, graph, node):
        return True

    def c_forward(self, f):
        n = f.graph.values[f.node.name].size
        lo_hi = clamp_args(f.node.attrs["lo"], f.node.attrs["hi"])
        return [Call("mo_clamp_forward", (Buf(f.y, "w"), Buf(f.x[0]), n, *lo_hi))]

    def c_dx(self, b, i):
        """From the mask, or from the output itself when that is what was kept."""
        n = b.graph.values[b.node.name].size
        dx, dy, kept = Buf(b.dx, "w"), Buf(b.dy), Buf(b.kept[0])
        if b.kept[0].startswith("mask:"):
            return Call("mo_mask_backward", (dx, dy, kept, n))
        lo_hi = clamp_args(b.node.attrs["lo"], b.node.attrs["hi"])
        return Call("mo_clamp_backward", (dx, dy, kept, n, *lo_hi))
