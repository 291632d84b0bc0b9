"""Resizing of images, nearest or bilinear, as torch.nn.functional.interpolate does it.

nearest   y[i] = x[min(floor(i * scale), h - 1)]
bilinear  the source of row i is i * scale with aligned corners, else
          max((i + 1/2) * scale - 1/2, 0); y is the weighted mean of the four pixels around it
Both are linear, so dx spreads dy with the same weights, and nothing is kept.
"""

from __future__ import annotations

from modicum.ops.attributes import MOST, flag, wholes
from modicum.ops.base import Buf, Call, Op


class Resize(Op):
    """Nearest or bilinear resizing; `scales` are interpolate's scale factors, 0 for none."""

    name = "resize"

    def shape(self, node, inputs, params):
        n, c, *before = inputs[0]
        if len(before) != 2:
            raise ValueError(f"resizes images, not {inputs[0]}")
        if node.attrs["mode"] not in ("nearest", "bilinear"):
            raise ValueError(f"resizes nearest or bilinear, not {node.attrs['mode']}")
        flag(node, "align")
        size, factors = wholes(node, "size"), node.attrs["scales"]
        for m, out, factor in zip(before, size, factors, strict=True):
            if not 0.0 <= factor <= MOST or (factor and int(m * factor) != out):
                raise ValueError(f"scales {factors} of {tuple(before)} do not make {size}")
        return (n, c, *size)

    def elementwise(self, graph, node, wanted):
        each = 7 if node.attrs["mode"] == "bilinear" else 0
        return (each, (each or 1) * wanted.dx[0])

    def forward(self, node, x, p):
        import torch

        a = node.attrs
        size, scales = list(a["size"]), [s or None for s in a["scales"]]
        if a["mode"] == "nearest":
            return torch.ops.aten.upsample_nearest2d(x[0], size, *scales)
        return torch.ops.aten.upsample_bilinear2d(x[0], size, a["align"], *scales)

    def backward(self, node, dy, kept, p, wanted, x_shapes):
        import torch

        a = node.attrs
        size, scales = list(a["size"]), [s or None for s in a["scales"]]
        shape = list(x_shapes[0])
        if a["mode"] == "nearest":
            return [torch.ops.aten.upsample_nearest2d_backward(dy, size, shape, *scales)], {}
        backward = torch.ops.aten.upsample_bilinear2d_backward
        return [backward(dy, size, shape, a["align"], *scales)], {}

    def c_forward(self, f):
        return [self._call("forward", Buf(f.y, "w"), Buf(f.x[0]), f)]

    def c_dx(self, b, i):
        return self._call("backward", Buf(b.dx, "w"), Buf(b.dy), b)

    def _call(self, direction, dst, src, f):
        a = f.node.attrs
        _, c, h, w = f.shape()
        out = f.out_shape[2:]
        scales = [
            _scale(n, m, s, a["align"]) for n, m, s in zip((h, w), out, a["scales"], strict=True)
        ]
        more = (int(a["align"]),) if a["mode"] == "bilinear" else ()
        return Call(f"mo_resize_{a['mode']}_{direction}", (dst, src, h, w, *out, c, *scales, *more))


def _scale(n, out, given, align):
    """Source pixels per output pixel; `given` is interpolate's scale_factor, or 0."""
    if align:
        return (n - 1) / (out - 1) if out > 1 else 0.0
    return 1.0 / given if given else n / out
