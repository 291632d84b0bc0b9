"""A trained convolution and the norm after it, whose statistics are frozen, as one operator.

With s = scale * rstd: y = conv(x, w) s + (bias - mean) s + shift, computed as one convolution with
the weight w s.  With G = dL/d(w s), the weight gradient of the plain convolution of x and dy:

dw = s G;  dshift = sum dy;  dscale = rstd ((bias - mean) sum dy + sum_i w G);  dx = conv^T(dy, w s)

So the scale's gradient needs nothing but x, which the weight's gradient needs anyway: the norm's
own input, which autograd would keep, is not kept.  So where the scale is trained, the weight is.
"""

from __future__ import annotations

from dataclasses import replace

from modicum.ops.base import Buf, Call, Wanted, bias_grad, channels_last
from modicum.ops.conv2d import Conv2d, is_depthwise


class NormConv2d(Conv2d):
    """Convolution, then batch norm with frozen statistics; made when a program is prepared."""

    name = "norm_conv2d"
    roles = ("weight", "scale", "shift")

    def elementwise(self, graph, node, wanted):
        """The affine map; the scaling of dy, and the sum of dy that shift and scale share."""
        scaled = wanted.dx[0] or "weight" in wanted.params
        return (2, scaled + bool({"scale", "shift"} & wanted.params.keys()))

    def forward(self, node, x, p):
        weight, shift = _folded(p)
        return super().forward(node, x, {"weight": weight, "bias": shift})

    def backward(self, node, dy, kept, p, wanted, x_shapes):
        weight, _ = _folded(p)
        as_conv = Wanted(wanted.dx, {r: s for r, s in wanted.params.items() if r == "weight"})
        dx, grads = super().backward(node, dy, kept, {"weight": weight}, as_conv, x_shapes)
        total = dy.sum((0, 2, 3)) if {"scale", "shift"} & wanted.params.keys() else None
        if "shift" in wanted.params:
            grads["shift"] = total
        if "scale" in wanted.params:
            inner = (p["weight"] * grads["weight"]).flatten(1).sum(1)
            centre = p["bias"] - p["mean"] if "bias" in p else -p["mean"]
            grads["scale"] = p["rstd"] * (centre * total + inner)
        if "weight" in wanted.params:
            grads["weight"] = grads["weight"] * (p["scale"] * p["rstd"]).view(-1, 1, 1, 1)
        return dx, grads

    def c_forward(self, f):
        (conv,) = super().c_forward(replace(f, lo=None, hi=None))
        y, p = f.y, f.params
        norm = (Buf(y, "w"), Buf(y), p["scale"], p["shift"], p["mean"], p["rstd"])
        affine = Call("mo_affine_forward", (*norm, *channels_last(f.out_shape), *f.clamp))
        return [conv, affine]

    def c_grad(self, b, role, s, grad, acc):
        """The weight's gradient is G where the scale is trained, else that of a scaled dy."""
        if role == "shift":
            return bias_grad(b, s, grad, acc)
        return super().c_grad(b, role, s, grad, acc)

    def c_scaled(self, b) -> Call:
        """dy * scale * rstd, the gradient of the convolution's output, into ``b.dx``."""
        args = (Buf(b.dx, "w"), Buf(b.dy), b.params["scale"], b.params["rstd"])
        return Call("mo_affine_dx", (*args, *channels_last(b.out_shape)))

    def c_scale_grad(self, b, grad, acc) -> Call:
        """The part of the scale's gradient that comes from dy alone."""
        args = (grad, Buf(b.dy), b.params["mean"], b.params["rstd"], b.params.get("bias"))
        return Call("mo_norm_dgamma_start", (*args, *channels_last(b.out_shape), int(acc)))

    def c_finish(self, b, g, w, scale_grad, rows) -> Call:
        """Adds sum w G to the scale's gradient, then turns G into the weight's gradient.

        `rows` are the first and last row of the block as C expressions, and its taps.
        """
        scale, rstd = b.params["scale"], b.params["rstd"]
        first, last, taps = rows
        args = (g, scale_grad, w, scale, rstd)
        if is_depthwise(b.graph, b.node):
            return Call("mo_norm_dw_channels", (*args, taps, b.out_shape[1]))
        _, in_g, kh, kw = b.graph.params[b.node.params["weight"]].shape
        return Call("mo_norm_dw_rows", (*args, first, last, in_g * kh * kw))


def _folded(p):
    """The weight and shift of the one convolution that both are."""
    s = p["scale"] * p["rstd"]
    centre = p["bias"] - p["mean"] if "bias" in p else -p["mean"]
    return p["weight"] * s.view(-1, 1, 1, 1), p["shift"] + centre * s
