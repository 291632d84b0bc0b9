"""What norms share: one parameter entry per channel, their gradients and slices."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from modicum.graph import Graph, Node, Param
from modicum.ops.base import (
    BackwardArgs,
    Buf,
    Call,
    GradCall,
    Indices,
    Kept,
    Wanted,
    channels_last,
)
from modicum.selection import Slice


def check_entries(node: Node, params: Mapping[str, Param], channels: int) -> None:
    """Raise ValueError unless each parameter has one entry per channel."""
    for role, name in node.params.items():
        if params[name].shape != (channels,):
            raise ValueError(f"{role} is {params[name].shape}, the input has {channels} channels")


def scale_input(graph: Graph, node: Node, s: Slice) -> Kept:
    """What of its input a norm keeps where nothing but its scale needs it."""
    x = graph.values[node.inputs[0]]
    if s.out is None:
        return Kept("value", x.name, x.bytes, why="input, for the scale's gradient")
    part = x.bytes // x.shape[1] * len(s.out)
    why = f"{len(s.out)} of {x.shape[1]} channels, for the scale's gradient"
    return Kept("channels", x.name, part, channels=s.out, why=why)


# ---- torch: channels are dimension 1 ----


def spread(v, like):
    """One entry per channel, or per sample and channel, to broadcast over `like`."""
    v = v if v.dim() == 2 else v[None]
    return v.reshape(*v.shape, *[1] * (like.dim() - 2))


def pick(t, s: Slice):
    return t if s.out is None else t[:, list(s.out)]


def entries(grad, s: Slice):
    return grad if s.out is None else grad[list(s.out)]


def total(t):
    """The sum per channel."""
    return t.sum([d for d in range(t.dim()) if d != 1])


# ---- C: the scale's gradient where the statistics are those of the input ----


def scale_space(s: Slice, channels: int, wanted: Wanted) -> int:
    """Floats of ``b.space`` that `scale_grad` needs."""
    if s.out is None:
        return 0
    return channels + len(s.out) if wanted.dx[0] else 2 * len(s.out)


def scale_grad(
    b: BackwardArgs,
    s: Slice,
    grad: Buf,
    acc: bool,
    kept: tuple[str, str, int],
    every: Callable[[Buf, bool], Call],
) -> GradCall:
    """The gradient of a scale, whole or sliced; `every` makes the call for all channels.

    `kept` are the buffers of the input and of the statistics, so many means and then as many
    1 / standard deviations, and how many that is.  Where x is kept whole for dx, a slice is
    gathered from the gradient of all channels, which takes less room than its part of x and dy.
    """
    pixels, c = channels_last(b.out_shape)
    if s.out is None:
        return GradCall((every(grad, acc),), 1, c)
    x, stats, groups = kept
    n, space = len(s.out), Buf(b.space)
    if b.wanted.dx[0]:
        part = Buf(b.space, "w", offset=c) if acc else grad
        calls = [
            every(Buf(b.space, "w"), False),
            Call("mo_gather", (part, space, Indices(s.out), 1, c, n)),
        ]
        if acc:
            add = (grad, n, Buf(b.space, offset=c), n, 1, n, 1)
            calls.append(Call("mo_copy_blocks", add))
        return GradCall(tuple(calls), 1, n)
    of = Indices(tuple(o // (c // groups) for o in s.out))
    gather = Call("mo_gather", (Buf(b.space, "w"), Buf(stats), of, 2, groups, n))
    args = (grad, Buf(b.dy), Buf(x), space, Buf(b.space, offset=n), pixels, n, int(acc))
    return GradCall((gather, Call("mo_affine_dgamma", args)), 1, n)
