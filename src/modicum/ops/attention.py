"""Channel attention of a convolution or linear layer: which channels a step of its weight updates.

v = mean |x| of each channel over the samples of a step and their pixels, or of |dL/dy|;
s = softmax(W2 relu(W1 v / (mean v + 1e-12) + b1) + b2); the largest s are kept until their sum
exceeds rho, and scaled to a mean of 1 over what is kept: the gates.

dw[o, i] = gate_bw[o] gate_fw[i] sum dy[o] x[i], db[o] = gate_bw[o] sum dy[o]; dx is the plain one.
p-Meta (Qu et al., KDD 2022); where it says no more, the choices are ours, see modicum.meta.pmeta.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from modicum.graph import Graph, Node, Param
from modicum.ops.attributes import number
from modicum.ops.base import BackwardArgs, Buf, Call, Kept, Struct, Wanted, channels_last
from modicum.selection import Slice

if TYPE_CHECKING:
    from torch import Tensor

EPS = 1e-12
SIDES = ("fw", "bw")
BRANCH = ("down", "down_bias", "up", "up_bias")


def most_kept(channels: int, rho: float) -> int:
    """The most channels that `clip` can leave: where all scores are equal."""
    return min(channels, int(rho * channels) + 1)


def roles_of(side: str) -> tuple[str, ...]:
    """The roles of a branch's parameters, W1, b1, W2, b2, in the layer's node."""
    return tuple(f"{side}_{part}" for part in BRANCH)


def sides(node: Node) -> tuple[str, ...]:
    """Those of "fw", the input channels, and "bw", the output channels, that have a branch."""
    if len(node.params) < len(BRANCH):  # searches ask often
        return ()
    return tuple(side for side in SIDES if f"{side}_down" in node.params)


def gated(node: Node, wanted: Wanted) -> bool:
    """Whether attention chooses what is computed of the weight's gradient."""
    return "weight" in wanted.params and bool(sides(node))


def channels(graph: Graph, node: Node, side: str) -> int:
    """Of the weight's input or output; of a grouped convolution's input those of a group."""
    out, inp = graph.params[node.params["weight"]].shape[:2]
    return inp if side == "fw" else out


def most(graph: Graph, node: Node, side: str) -> int:
    """The most channels of a side that a step updates: all without a branch."""
    n = channels(graph, node, side)
    return most_kept(n, node.attrs["rho"]) if side in sides(node) else n


def worst(graph: Graph, node: Node) -> Slice:
    """A slice of the weight that is as large as attention lets it become."""
    return Slice(
        out=tuple(range(most(graph, node, "bw"))), inp=tuple(range(most(graph, node, "fw")))
    )


def kept(graph: Graph, node: Node) -> Kept:
    """The input channels that the forward branch lets through."""
    x, n = graph.values[node.inputs[0]], most(graph, node, "fw")
    why = f"at most {n} of {x.shape[1]} input channels, as attention chooses"
    return Kept("gated", x.name, x.bytes // x.shape[1] * n, why=why)


def plain(node: Node) -> Node:
    """The node without attention."""
    roles = {role for side in SIDES for role in roles_of(side)}
    params = {role: name for role, name in node.params.items() if role not in roles}
    attrs = {key: v for key, v in node.attrs.items() if key != "rho"}
    return node.model_copy(update={"params": params, "attrs": attrs})


def check(node: Node, params: Mapping[str, Param], inputs: int, outputs: int, groups: int) -> None:
    """Raise ValueError for branches that do not fit the layer."""
    if not sides(node):
        return
    if not 0 < number(node, "rho") <= 1:
        raise ValueError(f"rho is {node.attrs['rho']}, not above 0 and at most 1")
    if "fw" in sides(node) and groups > 1:
        raise ValueError("attention to the input channels of a grouped convolution")
    for side in sides(node):
        n = inputs if side == "fw" else outputs
        shapes = [params[node.params[role]].shape for role in roles_of(side)]
        hidden = shapes[0][0]
        if shapes != [(hidden, n), (hidden,), (n, hidden), (n,)]:
            raise ValueError(f"branches of {shapes} do not fit {n} channels")


def c_gradient(
    b: BackwardArgs, role: str, grad: Buf, acc: bool, geometry: Struct, macs: int
) -> Call:
    """The call that computes the gradient of a weight or bias for the chosen channels alone."""
    fw, bw = b.gates
    limits = most(b.graph, b.node, "fw"), most(b.graph, b.node, "bw")
    if role == "weight":
        args = (grad, Buf(b.dy), Buf(b.kept[0]), fw, bw, geometry, *limits, int(acc))
        return Call("mo_gated_dw", args, macs)
    shape = channels_last(b.out_shape)
    if bw is None:
        return Call("mo_bias_grad", (grad, Buf(b.dy), *shape, int(acc)))
    return Call("mo_gated_bias_grad", (grad, Buf(b.dy), bw, *shape, limits[1], int(acc)))


# ---- torch -----------------------------------------------------------------------------------


def magnitudes(x: Tensor) -> Tensor:
    """Mean |x| of each channel over samples and pixels: (n, C, ...) -> (C,)."""
    return x.abs().mean([d for d in range(x.dim()) if d != 1])


def scores(v: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor) -> Tensor:
    """Of C channels, from their mean magnitudes v (C,); see above."""
    import torch.nn.functional as F

    return F.linear(F.linear(v / (v.mean() + EPS), down, down_bias).relu(), up, up_bias).softmax(0)


def clip(s: Tensor, rho: float) -> Tensor:
    """Gates of channels with scores s (C,): the largest until their sum exceeds rho, else 0.

    Those that stay are scaled to a mean of 1, so that equal scores gate nothing but what they
    leave out.  Of equal scores the first stay.
    """
    import torch

    order = s.detach().argsort(descending=True, stable=True)
    before = s.detach()[order].cumsum(0) - s.detach()[order]
    first = torch.arange(len(s), device=s.device) < most_kept(len(s), rho)  # rounding adds none
    left = first if rho >= 1 else (before <= rho) & first  # a sum may round to more than 1
    keep = torch.zeros_like(s).scatter(0, order, left.to(s.dtype))
    kept = s * keep
    return kept * (keep.sum() / kept.sum())


def gates(node: Node, p: Mapping[str, Tensor], side: str, v: Tensor) -> Tensor | None:
    """The gates of a side, from its mean magnitudes; None without a branch."""
    if side not in sides(node):
        return None
    return clip(scores(v, *(p[role] for role in roles_of(side))), node.attrs["rho"])


def chosen(gate: Tensor | None) -> tuple[int, ...] | None:
    """The channels that a gate lets through; None for all of them."""
    if gate is None:
        return None
    found = tuple(gate.nonzero().flatten().tolist())
    return None if len(found) == len(gate) else found


def spread(compact: Tensor, like: Tensor, s: Slice, fw: Tensor | None, bw: Tensor | None) -> Tensor:
    """The gradient of a slice of a parameter, times its gates, in zeros of the whole shape."""
    import torch

    out, inp = (slice(None) if c is None else torch.tensor(c) for c in (s.out, s.inp))
    if bw is not None:
        compact = compact * bw[out].reshape(-1, *[1] * (like.dim() - 1))
    full = torch.zeros_like(like)
    if like.dim() == 1:
        full[out] = compact
        return full
    if fw is not None:
        compact = compact * fw[inp].reshape(1, -1, *[1] * (like.dim() - 2))
    rows = full[out]
    rows[:, inp] = compact
    full[out] = rows
    return full
