"""Concatenation along one dimension; each input's gradient is its part of dy."""

from __future__ import annotations

from modicum.ops.attributes import whole
from modicum.ops.base import Buf, Call, Op


class Concat(Op):
    name = "concat"
    arity = 0
    plain_autograd = True

    def shape(self, node, inputs, params):
        dim = whole(node, "dim", least=0)
        first = inputs[0]
        for other in inputs[1:]:
            rest = [(a, b) for d, (a, b) in enumerate(zip(first, other, strict=False)) if d != dim]
            if len(other) != len(first) or any(a != b for a, b in rest):
                raise ValueError(f"{first} and {other} differ outside dimension {dim}")
        if not 1 <= dim < len(first):
            raise ValueError("concatenates along any dimension but the batch")
        return (*first[:dim], sum(s[dim] for s in inputs), *first[dim + 1 :])

    def forward(self, node, x, p):
        import torch

        return torch.cat(list(x), node.attrs["dim"])

    def backward(self, node, dy, kept, p, wanted, x_shapes):
        dim = node.attrs["dim"]
        parts = dy.split([s[dim] for s in x_shapes], dim)
        return [part if w else None for part, w in zip(parts, wanted.dx, strict=True)], {}

    def c_forward(self, f):
        calls = []
        for i, x in enumerate(f.x):
            blocks, run, offset, stride = self._part(f, i)
            args = (Buf(f.y, "w", offset=offset), stride, Buf(x), run, blocks, run, 0)
            calls.append(Call("mo_copy_blocks", args))
        return calls

    def c_dx(self, b, i):
        blocks, run, offset, stride = self._part(b, i)
        args = (Buf(b.dx, "w"), run, Buf(b.dy, offset=offset), stride, blocks, run, 0)
        return Call("mo_copy_blocks", args)

    def _part(self, f, i):
        """(blocks, floats per block, offset, floats between blocks) of input i, channels last."""
        dim = f.node.attrs["dim"]
        order = [2, 3, 1] if len(f.out_shape) == 4 else list(range(1, len(f.out_shape)))
        axis = order.index(dim)
        blocks = _product(f.out_shape[d] for d in order[:axis])
        inner = _product(f.out_shape[d] for d in order[axis + 1 :])
        before = sum(f.shape(j)[dim] for j in range(i))
        return blocks, f.shape(i)[dim] * inner, before * inner, f.out_shape[dim] * inner


def _product(ns):
    total = 1
    for n in ns:
        total *= n
    return total
