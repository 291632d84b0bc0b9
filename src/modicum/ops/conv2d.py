"""2-D convolution: any kernel, stride, padding (each side), dilation and groups.

y[o, p] = b[o] + sum_{t, i} w[o, i, t] x[g(o), i, p * stride + t * dilation - pad]
dx = conv^T(dy, w); dw[o, i, t] = sum_p dy[o, p] x[i, p + t]; db[o] = sum_p dy[o, p]

With the attribute `standardise`, an eps, w is the standardised v (Qiao et al., arXiv 1903.10520),
over the n entries (i, t) of each output channel: w = (v - mean v) r, r = 1 / sqrt(var v + eps);
dv = r (dw - mean dw - w mean(w dw)).
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from modicum.graph import Graph, Node
from modicum.ops.base import Buf, Call, Expr, GradCall, Kept, Macs, Op, Struct, Wanted, count
from modicum.selection import Slice


class Conv2d(Op):
    name = "conv2d"
    roles: ClassVar[tuple[str, ...]] = ("weight", "bias")
    clamps = True
    accumulates = True

    def shape(self, node, inputs, params):
        (n, c, h, w) = inputs[0]
        out_c, in_g, kh, kw = params[node.params["weight"]].shape
        (sh, sw), (dh, dw), groups = node.attrs["stride"], node.attrs["dilation"], _groups(node)
        top, left, bottom, right = node.attrs["padding"]
        if c != in_g * groups or out_c % groups:
            raise ValueError(f"{c} channels do not fit {groups} groups of weight {in_g} -> {out_c}")
        if "bias" in node.params and params[node.params["bias"]].shape != (out_c,):
            raise ValueError("the bias does not have one entry per output channel")
        if "standardise" in node.attrs and not standardised(node) > 0:
            raise ValueError("a weight is standardised with an eps above 0")
        if min(sh, sw, dh, dw) < 1 or min(top, left, bottom, right) < 0:
            raise ValueError("strides and dilations are at least 1, paddings at least 0")
        out_h = (h + top + bottom - dh * (kh - 1) - 1) // sh + 1
        out_w = (w + left + right - dw * (kw - 1) - 1) // sw + 1
        return (n, out_c, out_h, out_w)

    def saved(self, graph, node, wanted):
        s = wanted.params.get("weight")
        if s is None:
            return ()
        x = graph.values[node.inputs[0]]
        channels = s.out if is_depthwise(graph, node) else s.inp if _groups(node) == 1 else None
        if channels is None:
            return (Kept("value", x.name, x.bytes, why="input, for the weight gradient"),)
        return (
            Kept(
                "channels",
                x.name,
                x.bytes // x.shape[1] * len(channels),
                channels=channels,
                why=f"{len(channels)} of {x.shape[1]} input channels, for the weight gradient",
            ),
        )

    def macs(self, graph, node, wanted):
        out_c, in_g, kh, kw = _weight(graph, node)
        _, _, out_h, out_w = graph.shape(node.name)
        full = out_c * in_g * kh * kw * out_h * out_w
        s = wanted.params.get("weight")
        dw = 0
        if s is not None:
            share = count(s.out, out_c) * count(s.inp, in_g)
            dw = share * kh * kw * out_h * out_w
        return Macs(forward=full, dx=full if wanted.dx[0] else 0, dw=dw)

    def elementwise(self, graph, node, wanted):
        return (0, int("bias" in wanted.params))

    def layout(self, graph, node, role):
        if role != "weight":
            return "plain"
        return "hwc" if is_depthwise(graph, node) else "ohwi"

    def forward(self, node, x, p):
        import torch.nn.functional as F

        image, padding = _padded(node, x[0])
        return F.conv2d(
            image,
            _standardise(node, p["weight"]),
            p.get("bias"),
            node.attrs["stride"],
            padding,
            node.attrs["dilation"],
            _groups(node),
        )

    def backward(self, node, dy, kept, p, wanted, x_shapes):
        padding, slices = _symmetric(node), wanted.params
        if (
            wanted.dx[0]
            and "weight" in slices
            and all(s.whole for s in slices.values())
            and padding is not None
            and not node.attrs.get("standardise")
        ):  # all of it in one call
            mask = (True, True, "bias" in slices)
            args = (node, dy, kept[0], p["weight"], _groups(node), padding, mask)
            dx, dw, db = _convolution_backward(*args)
            return [dx], {"weight": dw, **({"bias": db} if "bias" in slices else {})}
        grads = {}
        if "bias" in wanted.params:
            db = dy.sum((0, 2, 3))
            s = wanted.params["bias"]
            grads["bias"] = db if s.out is None else db[list(s.out)]
        if "weight" in wanted.params:
            dw = self._weight_grad(node, dy, kept[0], p["weight"], wanted)
            grads["weight"] = _standardise_dw(node, dw, p["weight"])
        dx = None
        if wanted.dx[0]:
            top, left, bottom, right = node.attrs["padding"]
            n, c, h, w = x_shapes[0]
            padding = _symmetric(node)
            if padding is None:
                h_all, w_all, padding = h + top + bottom, w + left + right, (0, 0)
            else:
                h_all, w_all, top, left = h, w, 0, 0
            like = dy.new_empty(1).expand(n, c, h_all, w_all)
            wanted_dx = (True, False)
            weight, groups = _standardise(node, p["weight"]), _groups(node)
            dx = _convolution_backward(node, dy, like, weight, groups, padding, wanted_dx)[0]
            if (h_all, w_all) != (h, w):
                dx = dx[:, :, top : top + h, left : left + w]
        return [dx], grads

    def _weight_grad(self, node, dy, x, w, wanted):
        s = wanted.params["weight"]
        groups = _groups(node)
        depthwise = groups > 1 and w.shape[1] == 1 and w.shape[0] == groups
        out = None if s.out is None else list(s.out)
        image, padding = _padded(node, x)
        if depthwise:
            dy = dy if out is None else dy[:, out]
            like = w if out is None else w[out]
            groups = like.shape[0]
            return _convolution_backward(node, dy, image, like, groups, padding, (False, True))[1]
        if groups == 1:
            dy = dy if out is None else dy[:, out]
            like = w.new_empty(1).expand(s.shape(tuple(w.shape)))
            return _convolution_backward(node, dy, image, like, 1, padding, (False, True))[1]
        dw = _convolution_backward(node, dy, image, w, groups, padding, (False, True))[1]
        dw = dw if out is None else dw[out]
        return dw if s.inp is None else dw[:, list(s.inp)]

    def c_forward(self, f):
        fn = "mo_depthwise_forward" if is_depthwise(f.graph, f.node) else "mo_conv2d_forward"
        macs = self.macs(f.graph, f.node, Wanted((False,))).forward
        args = (Buf(f.y, "w"), Buf(f.x[0]), f.params["weight"], f.params.get("bias"))
        return [Call(fn, (*args, geometry(f.graph, f.node), *f.clamp), macs)]

    def c_dx(self, b, i):
        fn = "mo_depthwise_dx" if is_depthwise(b.graph, b.node) else "mo_conv2d_dx"
        macs = self.macs(b.graph, b.node, Wanted((True,))).dx
        out = Buf(b.dx, "rw" if b.accumulate else "w")
        geo = geometry(b.graph, b.node)
        return Call(fn, (out, Buf(b.dy), b.params["weight"], geo, int(b.accumulate)), macs)

    def c_grad(self, b, role, s, grad, acc):
        out_c, in_g, kh, kw = _weight(b.graph, b.node)
        _, _, h, w = b.out_shape
        n_out = count(s.out, out_c)
        if role == "bias":
            call = Call("mo_bias_grad", (grad, Buf(b.dy), h * w, n_out, int(acc)))
            return GradCall((call,), 1, n_out)
        macs = self.macs(b.graph, b.node, Wanted((False,), {"weight": s})).dw
        geo = geometry(b.graph, b.node, s)
        if self.slices_rows(b.graph, b.node, s):
            calls, row_elems, done = [], kh * kw * in_g, 0
            for first, last in runs(s.out):
                dst = replace(grad, offset=done * row_elems)
                part = (dst, Buf(b.dy), Buf(b.kept[0]), geo, first, last, int(acc))
                calls.append(Call("mo_conv2d_dw", part, macs * (last - first) // n_out))
                done += last - first
            return GradCall(tuple(calls), 1, n_out * row_elems)
        rows = (Expr("row"), Expr("row_end"), int(acc))
        args = (grad, Buf(b.dy), Buf(b.kept[0]), geo, *rows)
        if is_depthwise(b.graph, b.node):
            return GradCall((Call("mo_depthwise_dw", args, macs),), kh, kw * n_out)
        row_elems = kh * kw * count(s.inp, in_g)
        return GradCall((Call("mo_conv2d_dw", args, macs),), n_out, row_elems)

    def slices_rows(self, graph, node, s):
        grouped = _groups(node) > 1 and not is_depthwise(graph, node)
        return grouped and s.out is not None


def is_depthwise(graph: Graph, node: Node) -> bool:
    out_c, in_g, _, _ = _weight(graph, node)
    return in_g == 1 and out_c == _groups(node) and out_c > 1


def geometry(graph: Graph, node: Node, s: Slice | None = None) -> Struct:
    """mo_conv_t; with a slice, of the dense convolution between the sliced channels."""
    out_c, _, kh, kw = _weight(graph, node)
    _, in_c, h, w = graph.shape(node.inputs[0])
    _, _, out_h, out_w = graph.shape(node.name)
    groups = _groups(node)
    if s is not None and is_depthwise(graph, node):
        in_c = out_c = groups = count(s.out, out_c)
    elif s is not None and groups == 1:
        out_c, in_c = count(s.out, out_c), count(s.inp, in_c)
    top, left, _, _ = node.attrs["padding"]
    fields = (h, w, in_c, out_h, out_w, out_c, kh, kw, *node.attrs["stride"])
    return Struct("mo_conv_t", (*fields, top, left, *node.attrs["dilation"], groups))


def runs(channels: tuple[int, ...]) -> list[tuple[int, int]]:
    """Ascending channels as half-open runs: (0, 1, 4) -> [(0, 2), (4, 5)]."""
    ranges: list[tuple[int, int]] = []
    for c in channels:
        if ranges and ranges[-1][1] == c:
            ranges[-1] = (ranges[-1][0], c + 1)
        else:
            ranges.append((c, c + 1))
    return ranges


def standardised(node: Node) -> float:
    """The eps with which a convolution's weight is standardised; 0 where it is not."""
    return node.attrs.get("standardise", 0.0)


def _groups(node: Node) -> int:
    return node.attrs["groups"]


def _weight(graph: Graph, node: Node):
    return graph.params[node.params["weight"]].shape


def _symmetric(node):
    """(height, width) of a padding that is the same on both sides, else None."""
    top, left, bottom, right = node.attrs["padding"]
    return (top, left) if (top, left) == (bottom, right) else None


def _padded(node, x):
    """The image and the padding that is left to the convolution."""
    import torch.nn.functional as F

    padding = _symmetric(node)
    if padding is not None:
        return x, padding
    top, left, bottom, right = node.attrs["padding"]
    return F.pad(x, (left, right, top, bottom)), (0, 0)


def _standardise(node, v):
    import torch.nn.functional as F

    eps = standardised(node)
    return F.layer_norm(v, v.shape[1:], None, None, eps) if eps else v


def _standardise_dw(node, dw, v):
    """The gradient of v from that of the standardised weight."""
    eps = standardised(node)
    if not eps:
        return dw
    axes = (1, 2, 3)
    centred = v - v.mean(axes, keepdim=True)
    r = (centred.square().mean(axes, keepdim=True) + eps).rsqrt()
    w = centred * r
    return r * (dw - dw.mean(axes, keepdim=True) - w * (w * dw).mean(axes, keepdim=True))


def _convolution_backward(node, dy, x, w, groups, padding, wanted):
    """(dx, dw, db), None for what is not wanted."""
    import torch

    with_bias = len(wanted) > 2 and wanted[2]

    return torch.ops.aten.convolution_backward(
        dy,
        x,
        w,
        [w.shape[0]] if with_bias else None,
        node.attrs["stride"],
        padding,
        node.attrs["dilation"],
        False,
        (0, 0),
        groups,
        (*wanted[:2], with_bias),
    )
