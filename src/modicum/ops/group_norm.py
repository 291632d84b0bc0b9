"""Group normalisation: mean and variance over the pixels and channels of each group of a sample.

y = (x - mean) * rstd * weight + bias; with xhat = (x - mean) * rstd and g = dy * weight,
dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), the means over the group; dweight = sum dy xhat.
Unlike a batch norm's, its statistics depend on the input, so dx always needs the input.
"""

from __future__ import annotations

from modicum.ops.attributes import SMALLEST, number, whole
from modicum.ops.base import Buf, Call, Kept, Op, bias_grad, channels_last
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


class GroupNorm(Op):
    name = "group_norm"
    roles = ("weight", "bias")
    clamps = True

    def shape(self, node, inputs, params):
        channels, groups = inputs[0][1], whole(node, "groups")
        number(node, "eps", SMALLEST)
        if len(inputs[0]) not in (2, 4) or channels % groups:
            raise ValueError(f"{groups} groups do not divide the channels of {inputs[0]}")
        check_entries(node, params, channels)
        return inputs[0]

    def saved(self, graph, node, wanted):
        x, s = graph.values[node.inputs[0]], wanted.params.get("weight")
        stats = Kept("stats", node.name, 8 * node.attrs["groups"], why="statistics of each group")
        if wanted.dx[0]:
            why = "input, for the gradients through the statistics"
            return (Kept("value", x.name, x.bytes, why=why), stats)
        return () if s is None else (scale_input(graph, node, s), stats)

    def elementwise(self, graph, node, wanted):
        any_ = wanted.dx[0] or "weight" in wanted.params
        return (1 + 3 + 4, (1 + 4) * bool(any_) + 5 * wanted.dx[0])

    def forward(self, node, x, p):
        import torch.nn.functional as F

        groups, eps = node.attrs["groups"], node.attrs["eps"]
        return F.group_norm(x[0], groups, p.get("weight"), p.get("bias"), eps)

    def forward_saving(self, node, x, p):
        import torch

        n, c = x[0].shape[:2]
        groups, eps = node.attrs["groups"], node.attrs["eps"]
        args = (n, c, x[0][0, 0].numel(), groups, eps)
        y, mean, rstd = torch.ops.aten.native_group_norm(
            x[0].contiguous(), p.get("weight"), p.get("bias"), *args
        )
        return y, torch.stack([mean, rstd])

    def backward(self, node, dy, kept, p, wanted, x_shapes):
        import torch

        groups = node.attrs["groups"]
        if not wanted.dx[0]:
            grads = {r: total(pick(dy, s)) for r, s in wanted.params.items() if r == "bias"}
            if "weight" in wanted.params:
                s = wanted.params["weight"]
                each = (v.repeat_interleave(dy.shape[1] // groups, 1) for v in kept[1])
                mean, rstd = (spread(pick(v, s), dy) for v in each)
                grads["weight"] = total(pick(dy, s) * ((kept[0] - mean) * rstd))
            return [None], grads
        x, (mean, rstd) = kept
        n, c = x.shape[:2]
        args = (n, c, x[0, 0].numel(), groups)
        mask = (True, "weight" in wanted.params, "bias" in wanted.params)
        dx, dw, db = torch.ops.aten.native_group_norm_backward(
            dy.contiguous(), x.contiguous(), mean, rstd, p.get("weight"), *args, mask
        )
        found = {"weight": dw, "bias": db}
        return [dx], {r: entries(found[r], s) for r, s in wanted.params.items()}

    def inplace(self, graph, node):
        return (0,)

    def dx_inplace(self, graph, node, i):
        return True

    def c_forward(self, f):
        return self.c_forward_saving(f, None)

    def c_forward_saving(self, f, aux):
        p = f.params
        args = (Buf(f.y, "w"), Buf(f.x[0]), p.get("weight"), p.get("bias"), aux)
        shape = (*channels_last(f.out_shape), f.node.attrs["groups"], float(f.node.attrs["eps"]))
        return [Call("mo_group_norm_forward", (*args, *shape, *f.clamp))]

    def c_dx(self, b, i):
        args = (Buf(b.dx, "w"), Buf(b.dy), Buf(b.kept[0]), b.params.get("weight"), Buf(b.kept[1]))
        shape = (*channels_last(b.out_shape), b.node.attrs["groups"])
        return Call("mo_group_norm_dx", (*args, *shape))

    def c_grad(self, b, role, s, grad, acc):
        if role == "bias":
            return bias_grad(b, s, grad, acc)
        pixels, c = channels_last(b.out_shape)
        (x, stats), groups = b.kept, b.node.attrs["groups"]

        def every(out: Buf, acc: bool) -> Call:
            args = (out, Buf(b.dy), Buf(x), Buf(stats), pixels, c, groups, int(acc))
            return Call("mo_group_norm_dgamma", args)

        return scale_grad(b, s, grad, acc, (x, stats, groups), every)

    def slices_rows(self, graph, node, wanted):
        return wanted.dx[0]

    def workspace(self, graph, node, wanted):
        return scale_space(wanted.params["weight"], graph.shape(node.name)[1], wanted)
