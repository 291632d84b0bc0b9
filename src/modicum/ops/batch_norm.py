"""Batch normalisation with frozen statistics: an affine map per channel.

y = (x - mean) * rstd * weight + bias; dx = dy * weight * rstd;
dweight = sum dy * (x - mean) * rstd (needs x); dbias = sum dy (needs nothing).
"""

from __future__ import annotations

from dataclasses import replace

from modicum.errors import InvalidInput, UsageError
from modicum.ops.attributes import number
from modicum.ops.base import Buf, Call, Const, GradCall, Kept, Op, bias_grad, channels_last, count
from modicum.ops.channels import (
    check_entries,
    entries,
    pick,
    scale_grad,
    scale_input,
    scale_space,
    spread,
    total,
)


class BatchNorm(Op):
    name = "batch_norm"
    roles = ("weight", "bias")
    clamps = True

    def shape(self, node, inputs, params):
        return _same_shape(node, inputs, params)

    def saved(self, graph, node, wanted):
        s = wanted.params.get("weight")
        return () if s is None else (scale_input(graph, node, s),)

    def elementwise(self, graph, node, wanted):
        params = wanted.params
        return (2, wanted.dx[0] + 4 * ("weight" in params) + ("bias" in params))

    def forward(self, node, x, p):
        scale = p["weight"] * p["rstd"]
        shift = p["bias"] - p["mean"] * scale
        return x[0] * spread(scale, x[0]) + spread(shift, x[0])

    def backward(self, node, dy, kept, p, wanted, x_shapes):
        grads = {}
        if "bias" in wanted.params:
            grads["bias"] = total(pick(dy, wanted.params["bias"]))
        if "weight" in wanted.params:
            s = wanted.params["weight"]
            mean, rstd = (spread(entries(p[r], s), dy) for r in ("mean", "rstd"))
            grads["weight"] = total(pick(dy, s) * ((kept[0] - mean) * rstd))
        dx = dy * spread(p["weight"] * p["rstd"], dy) if wanted.dx[0] else None
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
        if role == "bias":
            return bias_grad(b, s, grad, acc)
        pixels, c = channels_last(b.out_shape)
        n = count(s.out, c)
        mean, rstd = (Const(b.node.params[r], channels=s.out) for r in ("mean", "rstd"))
        args = (grad, Buf(b.dy), Buf(b.kept[0]), mean, rstd, pixels, n, int(acc))
        return GradCall((Call("mo_affine_dgamma", args),), 1, n)


def _same_shape(node, inputs, params):
    check_entries(node, params, inputs[0][1])
    number(node, "eps", 0.0)
    if node.attrs.get("momentum") is not None:
        number(node, "momentum", 0.0, 1.0)
    return inputs[0]


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
        if wanted.dx[0]:
            why = "input, for the gradients through the statistics"
            return (stats, Kept("value", x.name, x.bytes, why=why))
        s = wanted.params.get("weight")
        return (stats,) if s is None else (stats, scale_input(graph, node, s))

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

        mean, rstd = kept[0]
        if not wanted.dx[0]:
            grads = {r: total(pick(dy, s)) for r, s in wanted.params.items() if r == "bias"}
            if "weight" in wanted.params:
                s = wanted.params["weight"]
                shift, scale = (spread(entries(v, s), dy) for v in (mean, rstd))
                grads["weight"] = total(pick(dy, s) * ((kept[1] - shift) * scale))
            return [None], grads
        mask = (True, "weight" in wanted.params, "bias" in wanted.params)
        norm = (p["weight"], p["mean"], p["var"], mean, rstd, True, node.attrs["eps"])
        dx, dw, db = torch.ops.aten.native_batch_norm_backward(dy, kept[1], *norm, mask)
        found = {"weight": dw, "bias": db}
        return [dx], {r: entries(found[r], s) for r, s in wanted.params.items()}

    def inplace(self, graph, node):
        return (0,)  # where its input is not kept

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
        if role == "bias":
            return bias_grad(b, s, grad, acc)
        pixels, c = channels_last(b.out_shape)
        stats, x = b.kept
        mean, rstd = Buf(stats), Buf(stats, offset=c)

        def every(out: Buf, acc: bool) -> Call:
            args = (out, Buf(b.dy), Buf(x), mean, rstd, pixels, c, int(acc))
            return Call("mo_affine_dgamma", args)

        return scale_grad(b, s, grad, acc, (x, stats, c), every)

    def slices_rows(self, graph, node, wanted):
        return wanted.dx[0]

    def workspace(self, graph, node, wanted):
        return scale_space(wanted.params["weight"], graph.shape(node.name)[1], wanted)
