"""relu, relu6 and hardtanh: y = min(max(x, lo), hi), either side may be open.

dx = dy where lo < x < hi, else 0.  Since lo < x < hi exactly when lo < y < hi, one bit per
element is enough; where the output is kept anyway for another gradient, not even that.

With `sign` (MobileTL; lo is 0): dx = dy where x >= 0, else 0.  What is clamped from below zero is
stored as -0.0 then, so that the output tells the sign of the input, and the same rule holds.
"""

from __future__ import annotations

import math
from typing import Any

from modicum.graph import Node
from modicum.ops.attributes import number
from modicum.ops.base import Buf, Call, Kept, Op, clamp_args, mask_bytes


def clamp_bounds(node: Node) -> tuple[Any, Any]:
    """(lo, hi) as the kernels take them: -0.0 where the sign of the input is to be told."""
    lo, hi = node.attrs["lo"], node.attrs["hi"]
    return (-0.0 if node.attrs.get("sign") else lo), hi


def not_negative(t):
    """Where the sign bit is clear; in one pass, which ~signbit is not."""
    import torch

    return t.view({4: torch.int32, 8: torch.int64}[t.element_size()]) >= 0


def sign_backward(dy, k):
    """dy * 1[the sign bit of k is clear], to the bit; several times as fast as with booleans."""
    import torch

    return dy * torch.copysign(torch.ones_like(k), k).relu_()


class Clamp(Op):
    name = "clamp"

    def shape(self, node, inputs, params):
        bounds = {k: number(node, k) for k in ("lo", "hi") if node.attrs[k] is not None}
        if not bounds or not bounds.get("lo", -math.inf) < bounds.get("hi", math.inf):
            raise ValueError(f"needs lo < hi, not {node.attrs['lo']} and {node.attrs['hi']}")
        if node.attrs.get("sign") and not self.takes_sign(node):
            raise ValueError("a sign mask needs a clamp from 0 on")
        return inputs[0]

    def elementwise(self, graph, node, wanted):
        bounds = sum(b is not None for b in (node.attrs["lo"], node.attrs["hi"]))
        return (bounds, 1 if wanted.dx[0] else 0)

    def takes_sign(self, node):
        return bool(node.attrs["lo"] == 0)

    def saved(self, graph, node, wanted):
        if not wanted.dx[0]:
            return ()
        y = graph.values[node.name]
        return (Kept("mask", y.name, mask_bytes(y.size), bits=1, why="1 bit per element"),)

    def forward(self, node, x, p):
        import torch

        if node.attrs["lo"] == 0 and node.attrs["hi"] is None:
            y = torch.relu(x[0])
        else:
            y = torch.clamp(x[0], node.attrs["lo"], node.attrs["hi"])
        return y.copysign_(x[0] + 0.0) if node.attrs.get("sign") else y

    def mask(self, node, source):
        import torch

        if node.attrs.get("sign"):
            return not_negative(source)
        lo, hi = node.attrs["lo"], node.attrs["hi"]
        inside = torch.ones_like(source, dtype=torch.bool) if lo is None else source > lo
        return inside if hi is None else inside & (source < hi)

    def backward(self, node, dy, kept, p, wanted, x_shapes):
        """From the mask, or from the output itself when that is what was kept."""
        import torch

        (k,) = kept
        if k.dtype == torch.bool:
            return [dy * k], {}
        if node.attrs.get("sign"):
            return [sign_backward(dy, k)], {}
        lo, hi = node.attrs["lo"], node.attrs["hi"]
        if lo is None or (hi is None and lo != 0):
            return [dy * self.mask(node, k)], {}
        if hi is None:
            return [torch.ops.aten.threshold_backward(dy, k, 0.0)], {}
        return [torch.ops.aten.hardtanh_backward(dy, k, lo, hi)], {}

    def inplace(self, graph, node):
        return (0,)

    def dx_inplace(self, graph, node, i):
        return True

    def c_forward(self, f):
        n = f.graph.values[f.node.name].size
        lo_hi = clamp_args(*clamp_bounds(f.node))
        return [Call("mo_clamp_forward", (Buf(f.y, "w"), Buf(f.x[0]), n, *lo_hi))]

    def c_mask(self, graph, node, mask, source):
        n = graph.values[node.name].size
        if node.attrs.get("sign"):
            return Call("mo_sign_pack", (mask, source, n))
        lo_hi = clamp_args(node.attrs["lo"], node.attrs["hi"])
        return Call("mo_mask_pack", (mask, source, n, *lo_hi))

    def c_dx(self, b, i):
        """From the mask, or from the output itself when that is what was kept."""
        n = b.graph.values[b.node.name].size
        dx, dy, kept = Buf(b.dx, "w"), Buf(b.dy), Buf(b.kept[0])
        if b.kept[0].startswith("mask:"):
            return Call("mo_mask_backward", (dx, dy, kept, n))
        if b.node.attrs.get("sign"):
            return Call("mo_sign_backward", (dx, dy, kept, n))
        lo_hi = clamp_args(b.node.attrs["lo"], b.node.attrs["hi"])
        return Call("mo_clamp_backward", (dx, dy, kept, n, *lo_hi))
