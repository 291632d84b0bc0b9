"""Max, average and adaptive average pooling."""

from __future__ import annotations

from modicum.graph import Graph, Node
from modicum.ops.attributes import flag, whole, wholes
from modicum.ops.base import Buf, Call, Kept, Op, Struct, mask_bytes


class MaxPool2d(Op):
    """y = max over the window; dx routes dy to the winner.

    Kept: the winner's position in its window, in 2, 4 or 8 bits.
    """

    name = "max_pool2d"

    def shape(self, node, inputs, params):
        kh, kw = wholes(node, "kernel")
        if kh * kw > 256:
            raise ValueError(f"windows of up to 256 elements, not {kh} x {kw}")
        shape = _pooled(node, inputs[0])
        for axis in (0, 1):
            if not _all_see_input(node, axis, inputs[0][2 + axis], shape[2 + axis]):
                raise ValueError("a dilated window lies between the elements: it has no maximum")
        return shape

    def saved(self, graph, node, wanted):
        if not wanted.dx[0]:
            return ()
        y, bits = graph.values[node.name], code_bits(node)
        why = f"winner of each window, {bits} bits"
        return (Kept("code", y.name, mask_bytes(y.size, bits), bits=bits, why=why),)

    def elementwise(self, graph, node, wanted):
        kh, kw = node.attrs["kernel"]
        return (kh * kw, int(wanted.dx[0]))

    def forward(self, node, x, p):
        import torch.nn.functional as F

        return F.max_pool2d(x[0], *_max_args(node))

    def forward_saving(self, node, x, p):
        """The output, and for each element the winner's position kh * k_w + kw."""
        import torch.nn.functional as F

        y, index = F.max_pool2d(x[0], *_max_args(node), return_indices=True)
        origin_h, origin_w = _origins(node, y)
        dilation_h, dilation_w = node.attrs["dilation"]
        w = x[0].shape[-1]
        kw = index % w  # and on in place: these whole numbers are twice as large as y
        kw.sub_(origin_w).floor_divide_(dilation_w)
        kh = index.floor_divide_(w).sub_(origin_h).floor_divide_(dilation_h)
        return y, kh.mul_(node.attrs["kernel"][1]).add_(kw)

    def backward(self, node, dy, kept, p, wanted, x_shapes):
        import torch

        a = node.attrs
        n, c, h, w = x_shapes[0]
        origin_h, origin_w = _origins(node, dy)
        row = origin_h + kept[0] // a["kernel"][1] * a["dilation"][0]
        col = origin_w + kept[0] % a["kernel"][1] * a["dilation"][1]
        dx = torch.zeros(n, c, h * w, dtype=dy.dtype, device=dy.device)
        dx.scatter_add_(2, (row * w + col).flatten(2), dy.flatten(2))
        return [dx.reshape(n, c, h, w)], {}

    def c_forward(self, f):
        return self.c_forward_saving(f, None)

    def c_forward_saving(self, f, aux):
        args = (Buf(f.y, "w"), aux, Buf(f.x[0]), window(f.graph, f.node), code_bits(f.node))
        return [Call("mo_maxpool_forward", args)]

    def c_dx(self, b, i):
        args = (Buf(b.dx, "w"), Buf(b.dy), Buf(b.kept[0]), window(b.graph, b.node))
        return Call("mo_maxpool_backward", (*args, code_bits(b.node)))


class AvgPool2d(Op):
    """y = sum over the window / divisor; dx spreads dy / divisor over the window."""

    name = "avg_pool2d"

    def shape(self, node, inputs, params):
        flag(node, "include_pad")
        whole(node, "divisor", least=0)
        return _pooled(node, inputs[0])

    def elementwise(self, graph, node, wanted):
        kh, kw = node.attrs["kernel"]
        return (kh * kw + 1, (kh * kw + 1) * wanted.dx[0])

    def forward(self, node, x, p):
        import torch.nn.functional as F

        return F.avg_pool2d(x[0], *_avg_args(node))

    def backward(self, node, dy, kept, p, wanted, x_shapes):
        import torch

        like = dy.new_empty(1).expand(x_shapes[0])
        return [torch.ops.aten.avg_pool2d_backward(dy, like, *_avg_args(node))], {}

    def c_forward(self, f):
        return [Call("mo_avgpool_forward", (Buf(f.y, "w"), Buf(f.x[0]), *_avg_c(f)))]

    def c_dx(self, b, i):
        return Call("mo_avgpool_backward", (Buf(b.dx, "w"), Buf(b.dy), *_avg_c(b)))


class AdaptiveAvgPool2d(Op):
    """Average over windows floor(i H / out) .. ceil((i + 1) H / out); 1 x 1 is the mean."""

    name = "adaptive_avg_pool2d"

    def shape(self, node, inputs, params):
        n, c, _, _ = inputs[0]
        return (n, c, *wholes(node, "size"))

    def elementwise(self, graph, node, wanted):
        """Each input is added once, or nearly."""
        ratio = graph.values[node.inputs[0]].size / graph.values[node.name].size
        return (ratio + 1, (ratio + 1) * wanted.dx[0])

    def forward(self, node, x, p):
        import torch.nn.functional as F

        return F.adaptive_avg_pool2d(x[0], node.attrs["size"])

    def backward(self, node, dy, kept, p, wanted, x_shapes):
        import torch

        h, w = x_shapes[0][-2:]
        if node.attrs["size"] == (1, 1):
            return [(dy / (h * w)).expand(x_shapes[0])], {}
        like = dy.new_empty(1).expand(x_shapes[0])
        return [torch.ops.aten._adaptive_avg_pool2d_backward(dy, like)], {}

    def c_forward(self, f):
        args = (Buf(f.y, "w"), Buf(f.x[0]), *self._sizes(f))
        return [Call("mo_adaptive_avgpool_forward", args)]

    def c_dx(self, b, i):
        args = (Buf(b.dx, "w"), Buf(b.dy), *self._sizes(b))
        return Call("mo_adaptive_avgpool_backward", args)

    def _sizes(self, f):
        _, c, h, w = f.shape()
        return (h, w, *f.out_shape[2:], c)


def code_bits(node: Node) -> int:
    kh, kw = node.attrs["kernel"]
    return 2 if kh * kw <= 4 else 4 if kh * kw <= 16 else 8


def window(graph: Graph, node: Node) -> Struct:
    """mo_pool_t of a max or average pool."""
    _, c, h, w = graph.shape(node.inputs[0])
    _, _, out_h, out_w = graph.shape(node.name)
    ph, pw = node.attrs["pad"]
    fields = (h, w, c, out_h, out_w, *node.attrs["kernel"], *node.attrs["stride"])
    return Struct("mo_pool_t", (*fields, ph, pw, ph, pw, *node.attrs.get("dilation", (1, 1))))


def _pooled(node, x):
    n, c, h, w = x
    (kh, kw), (sh, sw), (ph, pw) = (
        wholes(node, key, least=least) for key, least in (("kernel", 1), ("stride", 1), ("pad", 0))
    )
    dh, dw = wholes(node, "dilation") if "dilation" in node.attrs else (1, 1)
    reach, ceil = (dh * (kh - 1) + 1, dw * (kw - 1) + 1), flag(node, "ceil")
    if 2 * ph > reach[0] or 2 * pw > reach[1]:
        raise ValueError("the padding is at most half of the window")
    return (
        n,
        c,
        _pooled_size(h, reach[0], sh, ph, ceil),
        _pooled_size(w, reach[1], sw, pw, ceil),
    )


def _pooled_size(n, extent, stride, pad, ceil):
    size = (n + 2 * pad - extent + (stride - 1 if ceil else 0)) // stride + 1
    # a window must start inside the input or its left padding
    return size - 1 if ceil and (size - 1) * stride >= n + pad else size


def _all_see_input(node, axis, n, windows):
    """Whether a tap of each window along an axis of n elements lies on one of them."""
    kernel, stride, pad, dilation = (
        node.attrs[key][axis] for key in ("kernel", "stride", "pad", "dilation")
    )
    starts = range(-pad, windows * stride - pad, stride) if dilation > n else ()
    return all(any(0 <= s + tap * dilation < n for tap in range(kernel)) for s in starts)


def _origins(node, y):
    """Row and column of each window's first element, shaped to broadcast over y."""
    import torch

    (sh, sw), (ph, pw) = node.attrs["stride"], node.attrs["pad"]
    rows = torch.arange(y.shape[2], device=y.device) * sh - ph
    cols = torch.arange(y.shape[3], device=y.device) * sw - pw
    return rows[:, None], cols[None, :]


def _max_args(node):
    a = node.attrs
    return (a["kernel"], a["stride"], a["pad"], a["dilation"], a["ceil"])


def _avg_args(node):
    a = node.attrs
    return (a["kernel"], a["stride"], a["pad"], a["ceil"], a["include_pad"], a["divisor"] or None)


def _avg_c(f):
    a = f.node.attrs
    return (window(f.graph, f.node), int(a["include_pad"]), a["divisor"])
