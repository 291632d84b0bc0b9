"""2-D convolution: any kernel, stride, padding (each side), dilation and groups.

y[o, p] = b[o] + sum_{t, i} w[o, i, t] x[g(o), i, p * stride + t * dilation - pad]
dx = conv^T(dy, w); dw[o, i, t] = sum_p dy[o, p] x[i, p + t]; db[o] = sum_p dy[o, p]

With the attribute `standardise`, an eps, w is the standardised v (Qiao et al., arXiv 1903.10520),
over the n entries (i, t) of each output channel: w = (v - mean v) r, r = 1 / sqrt(var v + eps);
dv = r (dw - mean dw - w mean(w dw)).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from typing import ClassVar

from modicum.graph import Graph, Node, Shape
from modicum.ops import attention
from modicum.ops.attributes import SMALLEST, number, whole, wholes
from modicum.ops.base import (
    Buf,
    Call,
    Expr,
    GradCall,
    Indices,
    Kept,
    Macs,
    Op,
    Struct,
    Wanted,
    bias_grad,
    count,
)
from modicum.selection import Slice


class Conv2d(Op):
    name = "conv2d"
    roles: ClassVar[tuple[str, ...]] = ("weight", "bias")
    clamps = True
    accumulates = True

    def shape(self, node, inputs, params):
        (n, c, h, w) = inputs[0]
        out_c, in_g, kh, kw = params[node.params["weight"]].shape
        (sh, sw), (dh, dw) = wholes(node, "stride"), wholes(node, "dilation")
        top, left, bottom, right = wholes(node, "padding", 4, least=0)
        groups = whole(node, "groups")
        if c != in_g * groups or out_c % groups:
            raise ValueError(f"{c} channels do not fit {groups} groups of weight {in_g} -> {out_c}")
        if "bias" in node.params and params[node.params["bias"]].shape != (out_c,):
            raise ValueError("the bias does not have one entry per output channel")
        if "standardise" in node.attrs:
            number(node, "standardise", SMALLEST)
        attention.check(node, params, c, out_c, groups)
        out_h = (h + top + bottom - dh * (kh - 1) - 1) // sh + 1
        out_w = (w + left + right - dw * (kw - 1) - 1) // sw + 1
        return (n, out_c, out_h, out_w)

    def saved(self, graph, node, wanted):
        s = wanted.params.get("weight")
        if s is None:
            return ()
        x, shape = graph.values[node.inputs[0]], _weight(graph, node)
        if "fw" in attention.sides(node):
            return (attention.kept(graph, node),)
        inside, chosen = range(shape[1]) if s.inp is None else s.inp, by_group(node, shape, s)
        if len(inside) * len(chosen) == x.shape[1]:
            return (Kept("value", x.name, x.bytes, why="input, for the weight gradient"),)
        channels = inputs_of(node, shape, s)
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
        if attention.gated(node, wanted):
            s = attention.worst(graph, node)
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
        """Of the kept channels of x and the sliced ones of dy: one convolution, or one a group."""
        import torch

        s = wanted.params["weight"]
        shape = s.shape(tuple(w.shape))
        image, padding = _padded(node, x)

        def part(dy, image, out, groups):
            like = w.new_empty(1).expand(out, *shape[1:])
            return _convolution_backward(node, dy, image, like, groups, padding, (False, True))[1]

        chosen = by_group(node, w.shape, s)
        if alike(chosen):
            dy = dy if s.out is None else dy[:, list(s.out)]
            return part(dy, image, shape[0], len(chosen))
        images = image.split(shape[1], 1)
        pairs = zip(chosen.values(), images, strict=True)
        return torch.cat([part(dy[:, list(out)], each, len(out), 1) for out, each in pairs])

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
        if role == "bias":
            return bias_grad(b, s, grad, acc)
        out_c, in_g, kh, kw = _weight(b.graph, b.node)
        n_out = count(s.out, out_c)
        macs = self.macs(b.graph, b.node, Wanted((False,), {"weight": s})).dw
        chosen, n_in = by_group(b.node, (out_c, in_g), s), count(s.inp, in_g)
        if not alike(chosen):
            return self._grad_by_group(b, s, grad, acc, macs)
        geo = geometry(b.graph, b.node, (len(chosen) * n_in, n_out, len(chosen)))
        args = (grad, Buf(b.dy), Buf(b.kept[0]), geo, Expr("row"), Expr("row_end"), int(acc))
        if is_depthwise(b.graph, b.node):
            return GradCall((Call("mo_depthwise_dw", args, macs),), kh, kw * n_out)
        return GradCall((Call("mo_conv2d_dw", args, macs),), n_out, kh * kw * n_in)

    def _grad_by_group(self, b, s, grad, acc, macs):
        """For each group its part of x and of dy into ``b.space``, then their dense gradient."""
        out_c, in_g, kh, kw = _weight(b.graph, b.node)
        (_, _, in_h, in_w), (_, _, h, w) = b.shape(), b.out_shape
        chosen, n_in = by_group(b.node, (out_c, in_g), s), count(s.inp, in_g)
        x, dy = Buf(b.space), Buf(b.space, offset=in_h * in_w * n_in)
        row_elems, each = kh * kw * n_in, macs // count(s.out, out_c)
        calls, done = [], 0
        for i, out in enumerate(chosen.values()):
            n, mine = len(out), Buf(b.kept[0], offset=i * n_in)
            copy = (replace(x, mode="w"), n_in, mine, len(chosen) * n_in, in_h * in_w, n_in, 0)
            gather = (replace(dy, mode="w"), Buf(b.dy), Indices(out), h * w, out_c, n)
            geo = geometry(b.graph, b.node, (n_in, n, 1))
            dw = (replace(grad, offset=done * row_elems), dy, x, geo, 0, n, int(acc))
            calls += [Call("mo_copy_blocks", copy), Call("mo_gather", gather)]
            calls += [Call("mo_conv2d_dw", dw, n * each)]
            done += n
        return GradCall(tuple(calls), 1, done * row_elems)

    def c_gated(self, b, role, grad, acc):
        macs = self.macs(b.graph, b.node, b.wanted).dw
        return attention.c_gradient(b, role, grad, acc, geometry(b.graph, b.node), macs)

    def gathers_gated(self, node):
        return _groups(node) == 1

    def slices_rows(self, graph, node, wanted):
        return not alike(by_group(node, _weight(graph, node), wanted.params["weight"]))

    def workspace(self, graph, node, wanted):
        """One group's part of x and of dy."""
        if not self.slices_rows(graph, node, wanted):
            return 0
        (out_c, in_g, _, _), s = _weight(graph, node), wanted.params["weight"]
        (_, _, in_h, in_w), (_, _, h, w) = graph.shape(node.inputs[0]), graph.shape(node.name)
        most = max(map(len, by_group(node, (out_c, in_g), s).values()))
        return in_h * in_w * count(s.inp, in_g) + h * w * most


def inputs_of(node: Node, weight: Shape, s: Slice) -> tuple[int, ...]:
    """The input channels that the gradient of a slice of a weight is made of."""
    inside = range(weight[1]) if s.inp is None else s.inp
    return tuple(g * weight[1] + i for g in by_group(node, weight, s) for i in inside)


def by_group(node: Node, weight: Shape, s: Slice) -> dict[int, tuple[int, ...]]:
    """The chosen output channels of each group that has one, both ascending."""
    each = weight[0] // _groups(node)
    out = range(weight[0]) if s.out is None else s.out
    if each == weight[0]:  # searches ask often
        return {0: tuple(out)} if out else {}
    if each == 1:
        return {o: (o,) for o in out}
    return {group: tuple(some) for group, some in groupby(out, lambda o: o // each)}


def alike(chosen: dict[int, tuple[int, ...]]) -> bool:
    """Whether as many channels are chosen in each: they are the groups of one convolution."""
    return len(set(map(len, chosen.values()))) == 1


def is_depthwise(graph: Graph, node: Node) -> bool:
    out_c, in_g, _, _ = _weight(graph, node)
    return in_g == 1 and out_c == _groups(node) and out_c > 1


def geometry(graph: Graph, node: Node, channels: tuple[int, int, int] | None = None) -> Struct:
    """mo_conv_t; with `channels`, of so many input and output channels in so many groups."""
    out_c, _, kh, kw = _weight(graph, node)
    _, in_c, h, w = graph.shape(node.inputs[0])
    _, _, out_h, out_w = graph.shape(node.name)
    in_c, out_c, groups = channels or (in_c, out_c, _groups(node))
    top, left, _, _ = node.attrs["padding"]
    fields = (h, w, in_c, out_h, out_w, out_c, kh, kw, *node.attrs["stride"])
    return Struct("mo_conv_t", (*fields, top, left, *node.attrs["dilation"], groups))


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
