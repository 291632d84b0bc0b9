"""Batch normalisation with frozen statistics: an affine map per channel.

y = (x - mean) * rstd * weight + bias; dx = dy * weight * rstd;
dweight = sum dy * (x - mean) * rstd (needs x); dbias = sum dy (needs nothing).
"""

from __future__ import annotations

from modicum.ops.base import Buf, Call, Const, GradCall, Kept, Op, channels_last, count


class BatchNorm(Op):
    name = "batch_norm"
    roles = ("weight", "bias")

    def shape(self, node, inputs, params):
        channels = inputs[0][1]
        for role, name in node.params.items():
            if params[name].shape != (channels,):
                raise ValueError(
                    f"{role} is {params[name].shape}, the input has {channels} channels"
                )
        return inputs[0]

    def saved(self, graph, node, wanted):
        s = wanted.params.get("weight")
        if s is None:
            return ()
        x = graph.values[node.inputs[0]]
        if s.out is None:
            return (Kept("value", x.name, x.bytes, why="input, for the scale's gradient"),)
        part = x.bytes // x.shape[1] * len(s.out)
        why = f"{len(s.out)} of {x.shape[1]} channels, for the scale's gradient"
        return (Kept("channels", x.name, part, channels=s.out, why=why),)

    def forward(self, node, x, p):
        scale = p["weight"] * p["rstd"]
        shift = p["bias"] - p["mean"] * scale
        return x[0] * _spread(scale, x[0]) + _spread(shift, x[0])

    def backward(self, node, dy, kept, p, wanted, x_shapes):
        grads = {}
        if "bias" in wanted.params:
            grads["bias"] = _sum(_pick(dy, wanted.params["bias"]))
        if "weight" in wanted.params:
            s = wanted.params["weight"]
            pick = slice(None) if s.out is None else list(s.out)
            x_hat = (kept[0] - _spread(p["mean"][pick], dy)) * _spread(p["rstd"][pick], dy)
            grads["weight"] = _sum(_pick(dy, s) * x_hat)
        dx = dy * _spread(p["weight"] * p["rstd"], dy) if wanted.dx[0] else None
        return [dx], grads

    def inplace(self, graph, node):
        return (0,)

    def dx_inplace(self, graph, node):
        return True

    def c_forward(self, f):
        p = f.params
        args = (Buf(f.y, "w"), Buf(f.x[0]), p["weight"], p["bias"], p["mean"], p["rstd"])
        return [Call("mo_affine_forward", (*args, *channels_last(f.out_shape), *f.clamp))]

    def c_dx(self, b, i):
        args = (Buf(b.dx, "w"), Buf(b.dy), b.params["weight"], b.params["rstd"])
        return Call("mo_affine_dx", (*args, *channels_last(b.out_shape)))

    def c_grad(self, b, role, s, grad, acc):
        pixels, c = channels_last(b.out_shape)
        n = count(s.out, c)
        if role == "bias":
            call = Call("mo_bias_grad", (grad, Buf(b.dy), pixels, n, int(acc)))
            return GradCall((call,), 1, n)
        mean, rstd = (Const(b.node.params[r], channels=s.out) for r in ("mean", "rstd"))
        args = (grad, Buf(b.dy), Buf(b.kept[0]), mean, rstd, pixels, n, int(acc))
        return GradCall((Call("mo_affine_dgamma", args),), 1, n)


def _spread(v, like):
    return v.reshape(1, -1, *[1] * (like.dim() - 2))


def _pick(dy, s):
    return dy if s.out is None else dy[:, list(s.out)]


def _sum(t):
    return t.sum([d for d in range(t.dim()) if d != 1])
