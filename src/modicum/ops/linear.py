"""Fully connected layer over the last dimension.

y = x w^T + b; dx = dy w; dw = dy^T x; db = sum dy
"""

from __future__ import annotations

from modicum.ops import attention
from modicum.ops.base import (
    Buf,
    Call,
    Expr,
    GradCall,
    Kept,
    Macs,
    Op,
    Struct,
    Wanted,
    bias_grad,
    channels_last,
    count,
)


class Linear(Op):
    name = "linear"
    roles = ("weight", "bias")
    clamps = True
    accumulates = True

    def shape(self, node, inputs, params):
        *lead, features = inputs[0]
        out, inp = params[node.params["weight"]].shape
        if len(inputs[0]) not in (2, 3):
            raise ValueError(f"takes inputs of rank 2 or 3, not {len(inputs[0])}")
        if features != inp:
            raise ValueError(f"{features} features do not fit a weight of {out} x {inp}")
        if "bias" in node.params and params[node.params["bias"]].shape != (out,):
            raise ValueError("the bias does not have one entry per output")
        if attention.sides(node) and len(inputs[0]) != 2:
            raise ValueError("attention to the channels of rows: it takes inputs of rank 2")
        attention.check(node, params, inp, out, 1)
        return (*lead, out)

    def saved(self, graph, node, wanted):
        s = wanted.params.get("weight")
        if s is None:
            return ()
        x = graph.values[node.inputs[0]]
        if "fw" in attention.sides(node):
            return (attention.kept(graph, node),)
        if s.inp is None:
            return (Kept("value", x.name, x.bytes, why="input, for the weight gradient"),)
        part = x.bytes // x.shape[-1] * len(s.inp)
        why = f"{len(s.inp)} of {x.shape[-1]} input features, for the weight gradient"
        return (Kept("channels", x.name, part, channels=s.inp, why=why),)

    def macs(self, graph, node, wanted):
        out, inp = graph.params[node.params["weight"]].shape
        rows, _ = channels_last(graph.shape(node.name))
        full = rows * out * inp
        s = wanted.params.get("weight")
        if attention.gated(node, wanted):
            s = attention.worst(graph, node)
        dw = 0 if s is None else rows * count(s.out, out) * count(s.inp, inp)
        return Macs(forward=full, dx=full if wanted.dx[0] else 0, dw=dw)

    def elementwise(self, graph, node, wanted):
        return (0, int("bias" in wanted.params))

    def forward(self, node, x, p):
        import torch.nn.functional as F

        return F.linear(x[0], p["weight"], p.get("bias"))

    def backward(self, node, dy, kept, p, wanted, x_shapes):
        grads = {}
        flat = dy.reshape(-1, dy.shape[-1])
        if "bias" in wanted.params:
            s = wanted.params["bias"]
            db = flat.sum(0)
            grads["bias"] = db if s.out is None else db[list(s.out)]
        if "weight" in wanted.params:
            s = wanted.params["weight"]
            rows = flat if s.out is None else flat[:, list(s.out)]
            grads["weight"] = rows.T @ kept[0].reshape(-1, kept[0].shape[-1])
        return [dy @ p["weight"] if wanted.dx[0] else None], grads

    def c_forward(self, f):
        macs = self.macs(f.graph, f.node, Wanted((False,))).forward
        args = (Buf(f.y, "w"), Buf(f.x[0]), f.params["weight"], f.params.get("bias"))
        return [Call("mo_conv2d_forward", (*args, _as_conv(f.graph, f.node), *f.clamp), macs)]

    def c_dx(self, b, i):
        macs = self.macs(b.graph, b.node, Wanted((True,))).dx
        out = Buf(b.dx, "rw" if b.accumulate else "w")
        geo = _as_conv(b.graph, b.node)
        args = (out, Buf(b.dy), b.params["weight"], geo, int(b.accumulate))
        return Call("mo_conv2d_dx", args, macs)

    def c_grad(self, b, role, s, grad, acc):
        if role == "bias":
            return bias_grad(b, s, grad, acc)
        out, inp = b.graph.params[b.node.params["weight"]].shape
        n_out, n_inp = count(s.out, out), count(s.inp, inp)
        macs = self.macs(b.graph, b.node, Wanted((False,), {"weight": s})).dw
        geo = _as_conv(b.graph, b.node, n_out, n_inp)
        args = (grad, Buf(b.dy), Buf(b.kept[0]), geo, Expr("row"), Expr("row_end"), int(acc))
        return GradCall((Call("mo_conv2d_dw", args, macs),), n_out, n_inp)

    def c_gated(self, b, role, grad, acc):
        macs = self.macs(b.graph, b.node, b.wanted).dw
        return attention.c_gradient(b, role, grad, acc, _as_conv(b.graph, b.node), macs)


def _as_conv(graph, node, out=None, inp=None) -> Struct:
    """The 1x1 convolution of an image of 1 x rows pixels."""
    full_out, full_inp = graph.params[node.params["weight"]].shape
    rows, _ = channels_last(graph.shape(node.name))
    out, inp = out or full_out, inp or full_inp
    return Struct("mo_conv_t", (1, rows, inp, 1, rows, out, 1, 1, 1, 1, 0, 0, 1, 1, 1))
