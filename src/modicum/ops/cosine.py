"""Cosine similarity to prototypes, the output layer of a few-shot classifier.

y_k = s (cos(x, c_k) + b), cos(x, c) = x . c / (n(x) n(c)), n(v) = max(|v|, 1e-8)
dx = (u - x^ (x^ . u)) / n(x), u = s sum_k dy_k c_k / n(c_k), x^ = x / n(x)

The prototypes c_k are sums of the embeddings of a class, or their means: a cosine does not see
the length.  They are no trained parameter: a pass over the support set refreshes them.
s and b as in P>M>F (Hu et al., CVPR 2022).
"""

from __future__ import annotations

from typing import ClassVar

from modicum.ops.base import Buf, Call, Expr, Kept, Macs, Op

EPS = 1e-8


class Cosine(Op):
    name = "cosine"
    roles: ClassVar[tuple[str, ...]] = ()
    refreshed: ClassVar[tuple[str, ...]] = ("prototypes",)
    accumulates = True

    def shape(self, node, inputs, params):
        (n, features) = inputs[0]
        ways, width = params[node.params["prototypes"]].shape
        if features != width:
            raise ValueError(f"{features} features do not fit prototypes of {width}")
        for role in ("scale", "bias"):
            if params[node.params[role]].shape != (1,):
                raise ValueError(f"the {role} is not one number")
        return (n, ways)

    def saved(self, graph, node, wanted):
        if not wanted.dx[0]:
            return ()
        x = graph.values[node.inputs[0]]
        return (Kept("value", x.name, x.bytes, why="embedding, for its gradient"),)

    def macs(self, graph, node, wanted):
        ways, features = graph.params[node.params["prototypes"]].shape
        forward = (2 * ways + 1) * features  # products, and the lengths of both factors
        return Macs(forward=forward, dx=(2 * ways + 3) * features if wanted.dx[0] else 0)

    def forward(self, node, x, p):
        unit = _unit(p["prototypes"])
        return p["scale"] * (_unit(x[0]) @ unit.T + p["bias"])

    def backward(self, node, dy, kept, p, wanted, x_shapes):
        x = kept[0]
        length = x.norm(dim=-1, keepdim=True)
        n = length.clamp_min(EPS)
        along = x / n
        u = p["scale"] * dy @ _unit(p["prototypes"])
        inner = (along * u).sum(-1, keepdim=True) * (length > EPS)
        return [(u - along * inner) / n], {}

    def c_forward(self, f):
        ways, features = f.graph.params[f.node.params["prototypes"]].shape
        p = f.params
        args = (Buf(f.y, "w"), Buf(f.x[0]), p["prototypes"], p["scale"], p["bias"])
        macs = (2 * ways + 1) * features
        return [Call("mo_cosine_forward", (*args, features, ways), macs)]

    def c_dx(self, b, i):
        ways, features = b.graph.params[b.node.params["prototypes"]].shape
        out = Buf(b.dx, "rw" if b.accumulate else "w")
        args = (out, Buf(b.dy), Buf(b.kept[0]), b.params["prototypes"], b.params["scale"])
        macs = (2 * ways + 3) * features
        return Call("mo_cosine_dx", (*args, features, ways, int(b.accumulate)), macs)

    def c_refresh(self, f):
        """Adds the embedding to the prototype of `label`."""
        features = f.graph.params[f.node.params["prototypes"]].shape[1]
        target = f.params["prototypes"]
        return Call("mo_prototype_add", (target, Buf(f.x[0]), Expr("label"), features))


def _unit(v):
    return v / v.norm(dim=-1, keepdim=True).clamp_min(EPS)
