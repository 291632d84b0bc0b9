"""Batch normalisation with frozen statistics: an affine map per channel.

y = (x - mean) * rstd * weight + bias; dx = dy * weight * rstd;
dweight = sum dy * (x - mean) * rstd (needs x); dbias = sum dy (needs nothing).
"""

from __future__ import annotations

from dataclasses import replace

from modicum.errors import InvalidInput, UsageError
from modicum.ops.base import Buf, Call, Const, GradCall, Kept, Op, channels_last, count


class BatchNorm(Op):
    name = "batch_norm"
    roles = ("weight", "bias")
    clamps = True

    def shape(self, node, inputs, params):
        return _same_shape(node, inputs, params)

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

    def elementwise(self, graph, node, wanted):
        params = wanted.params
        return (2, wanted.dx[0] + 4 * ("weight" in params) + ("bias" in params))

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

    def dx_inplace(self, graph, node, i):
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


def _same_shape(node, inputs, params):
    channels = inputs[0][1]
    for role, name in node.params.items():
        if params[name].shape != (channels,):
            raise ValueError(f"{role} is {params[name].shape}, the input has {channels} channels")
    return inputs[0]


def _rows(grad, s):
    return grad if s.out is None else grad[list(s.out)]


def _spread(v, like):
    return v.reshape(1, -1, *[1] * (like.dim() - 2))


def _pick(dy, s):
    return dy if s.out is None else dy[:, list(s.out)]


def _sum(t):
    return t.sum([d for d in range(t.dim()) if d != 1])


class BatchStatNorm(Op):
    """Batch normalisation with the statistics of the batch, which the running ones follow.

    mean and variance over samples and pixels; xhat = (x - mean) * rstd; y = xhat weight + bias;
    running += momentum (batch's - running), the variance unbiased; dx = weight * rstd *
    (dy - mean(dy) - xhat mean(dy xhat)).  On a board a batch is one sample.  Prediction uses the
    running statistics.
    """

    name = "batch_stat_norm"
    roles = ("weight", "bias")
    states = ("mean", "var")
    clamps = True

    def shape(self, node, inputs, params):
        return _same_shape(node, inputs, params)

    def saved(self, graph, node, wanted):
        x = graph.values[node.inputs[0]]
        stats = Kept("stats", node.name, 8 * x.shape[1], why="statistics of the batch")
        if not wanted.dx[0] and "weight" not in wanted.params:
            return (stats,)
        why = "input, for the gradients through the statistics"
        return (stats, Kept("value", x.name, x.bytes, why=why))

    def elementwise(self, graph, node, wanted):
        """Mean, variance and xhat; the two sums, which are the parameters' gradients, and dx."""
        any_ = wanted.dx[0] or wanted.params
        return (1 + 3 + 4, (1 + 4) * bool(any_) + 4 * wanted.dx[0])

    def forward(self, node, x, p):
        """With the running statistics, as in prediction."""
        import torch.nn.functional as F

        norm = (p["mean"], p["var"], p["weight"], p["bias"])
        return F.batch_norm(x[0], *norm, training=False, eps=node.attrs["eps"])

    def forward_saving(self, node, x, p):
        import torch

        if x[0].numel() // x[0].shape[1] < 2:
            raise InvalidInput(
                "batch statistics of a single value", where=node.name, hint="a larger batch"
            )
        norm = (p["weight"], p["bias"], p["mean"], p["var"], True)
        y, mean, rstd = torch.ops.aten.native_batch_norm(
            x[0], *norm, node.attrs["momentum"], node.attrs["eps"]
        )
        return y, torch.stack([mean, rstd])

    def backward(self, node, dy, kept, p, wanted, x_shapes):
        import torch

        if len(kept) == 1:
            return [None], {"bias": _sum(_pick(dy, wanted.params["bias"]))}
        (mean, rstd), x = kept
        mask = (wanted.dx[0], "weight" in wanted.params, "bias" in wanted.params)
        norm = (p["weight"], p["mean"], p["var"], mean, rstd, True, node.attrs["eps"])
        dx, *grads = torch.ops.aten.native_batch_norm_backward(dy, x, *norm, mask)
        found = dict(zip(("weight", "bias"), grads, strict=True))
        picked = {r: _rows(found[r], s) for r, s in wanted.params.items()}
        return [dx if wanted.dx[0] else None], picked

    def dx_inplace(self, graph, node, i):
        return True

    def c_forward(self, f):
        return self.c_forward_saving(f, None)

    def c_forward_saving(self, f, aux):
        if f.out_shape[2:] in ((), (1, 1)):
            raise UsageError(
                "batch statistics of a single pixel, where a batch is one sample",
                where=f.node.name,
                hint="affine norms, or a larger input",
            )
        p = f.params
        norm = (p["weight"], p["bias"], p["mean"], p["var"], aux)
        shape = (*channels_last(f.out_shape), float(f.node.attrs["eps"]))
        args = (Buf(f.y, "w"), Buf(f.x[0]), *norm, *shape, *f.clamp)
        return [Call("mo_batch_norm_forward", args)]

    def c_follow(self, b):
        """Moves the running statistics; only after the loss turned out finite."""
        running = [replace(b.params[r], mode="rw") for r in self.states]
        rates = (float(b.node.attrs["eps"]), float(b.node.attrs["momentum"]))
        args = (*running, Buf(b.kept[0]), *channels_last(b.out_shape), *rates)
        return Call("mo_batch_norm_follow", args)

    def c_dx(self, b, i):
        args = (Buf(b.dx, "w"), Buf(b.dy), Buf(b.kept[1]), b.params["weight"], Buf(b.kept[0]))
        return Call("mo_batch_norm_dx", (*args, *channels_last(b.out_shape)))

    def c_grad(self, b, role, s, grad, acc):
        pixels, c = channels_last(b.out_shape)
        if role == "bias":
            n = count(s.out, c)
            return GradCall((Call("mo_bias_grad", (grad, Buf(b.dy), pixels, n, int(acc))),), 1, n)
        mean, rstd = Buf(b.kept[0]), Buf(b.kept[0], offset=c)
        args = (grad, Buf(b.dy), Buf(b.kept[1]), mean, rstd, pixels, c, int(acc))
        return GradCall((Call("mo_affine_dgamma", args),), 1, c)
