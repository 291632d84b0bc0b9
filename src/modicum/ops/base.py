"""The vocabulary in which operators state what they keep, cost and call.

Torch-free: an operator's `forward` and `backward` import torch when they run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from modicum.graph import Graph, Node, Param, Shape
from modicum.selection import Slice

if TYPE_CHECKING:
    import torch

    Tensors = Sequence[torch.Tensor]

Layout = Literal["plain", "ohwi", "hwc"]

NO_LO, NO_HI = "MO_NO_LO", "MO_NO_HI"


@dataclass(frozen=True)
class Wanted:
    """Which gradients a node owes: one flag per input, a slice per trained parameter role.

    `looks`: the sides ("fw", "bw") whose magnitudes it adds up for its channel attention.
    """

    dx: tuple[bool, ...]
    params: Mapping[str, Slice] = field(default_factory=dict)
    looks: tuple[str, ...] = ()

    @property
    def any(self) -> bool:
        """Whether the gradient of its output is asked for."""
        return any(self.dx) or bool(self.params) or "bw" in self.looks


@dataclass(frozen=True)
class Kept:
    """Something kept from the forward pass until the node's backward pass.

    value: the tensor `value` itself; channels: only `channels` of it; gated: those that attention
    chooses, of which there are at most so many; mask: one bit per element
    of `value`, set where the node passes gradient; code: the winner of each max-pool window in
    `bits` bits; stats: means and 1 / standard deviations that a norm computed.  `bytes` is for
    one sample.
    """

    kind: Literal["value", "channels", "gated", "mask", "code", "stats"]
    value: str
    bytes: int
    channels: tuple[int, ...] | None = None
    bits: int = 0
    why: str = ""
    shared: bool = False  # the mask is read from a value that another node keeps anyway


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates for one sample, split by what they compute.

    `others` are the additions, multiplications, divisions, comparisons and exponentials of the
    (forward, backward) pass that are no part of one, such as those of norms and activations.
    """

    forward: int = 0
    dx: int = 0
    dw: int = 0
    others: tuple[int, int] = (0, 0)


# ---- arguments of a kernel call -------------------------------------------------------------


@dataclass(frozen=True)
class Buf:
    """A buffer in the arena, from element `offset`; `rows` adds the loop's row times that many.

    `training` marks an output that is NULL when the forward pass only predicts.
    """

    name: str
    mode: Literal["r", "w", "rw"] = "r"
    rows: int = 0
    offset: int = 0
    training: bool = False


@dataclass(frozen=True)
class Const:
    """A frozen parameter in flash, in the kernel's layout; `channels` keeps a part of it."""

    param: str
    layout: Layout = "plain"
    channels: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Struct:
    """A constant geometry argument, passed by address."""

    ctype: str
    fields: tuple[int, ...]


@dataclass(frozen=True)
class Indices:
    """A constant list of channel numbers; None is NULL."""

    channels: tuple[int, ...] | None


@dataclass(frozen=True)
class ByStep:
    """A constant for each inner step."""

    ctype: Literal["float", "uint32_t"]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Expr:
    """A C expression that the emitted schedule defines, such as ``lr`` or ``row_end``.

    It may read a `table`: ``{table}[inner]`` is then the entry of the inner step.
    """

    text: str
    table: ByStep | None = None


Arg = Buf | Const | Struct | Indices | Expr | int | float | None


@dataclass(frozen=True)
class Call:
    """One call of a hand-written C kernel."""

    fn: str
    args: tuple[Arg, ...]
    macs: int = 0


@dataclass(frozen=True)
class ForwardArgs:
    """What an operator needs to write its forward call."""

    node: Node
    graph: Graph
    x: tuple[str, ...]
    y: str
    params: Mapping[str, Arg]
    lo: float | None = None
    hi: float | None = None

    @property
    def clamp(self) -> tuple[Arg, Arg]:
        return clamp_args(self.lo, self.hi)

    def shape(self, i: int = 0) -> Shape:
        return self.graph.shape(self.node.inputs[i])

    @property
    def out_shape(self) -> Shape:
        return self.graph.shape(self.node.name)


@dataclass(frozen=True)
class BackwardArgs(ForwardArgs):
    """What an operator needs to write its backward calls.

    `dy` is the gradient buffer of the output, `kept` maps what `saved` listed to buffers, `dx`
    is the buffer of the input gradient being written, `accumulate` adds to it.  `wanted` is what
    `saved` was asked with, `space` a buffer of as many floats as `workspace` says.  `gates` are
    those of the input and the output channels, where attention chooses them.
    """

    dy: str = ""
    dx: str = ""
    accumulate: bool = False
    kept: tuple[str, ...] = ()
    wanted: Wanted = field(default_factory=lambda: Wanted(()))
    space: str = ""
    gates: tuple[Buf | None, Buf | None] = (None, None)


@dataclass(frozen=True)
class GradCall:
    """The calls that compute the gradient of one parameter slice.

    `rows` is the number of independent rows it can be split into, of `row_elems` elements each;
    when that is more than 1 the calls read the C variables `row` and `row_end`.
    """

    calls: tuple[Call, ...]
    rows: int
    row_elems: int


class Op:
    """An operator: stateless, one instance per kind.

    The default methods describe an operator without parameters that keeps nothing.
    """

    name: ClassVar[str]
    arity: ClassVar[int] = 1  # inputs; 0: any number
    roles: ClassVar[tuple[str, ...]] = ()
    states: ClassVar[tuple[str, ...]] = ()  # parameters that the forward pass itself moves
    refreshed: ClassVar[tuple[str, ...]] = ()  # those that a pass over the support set renews
    clamps: ClassVar[bool] = False  # its C kernel can clamp the output while storing it
    accumulates: ClassVar[bool] = False  # its dx kernel can add to an existing gradient
    plain_autograd: ClassVar[bool] = False  # PyTorch's own backward keeps nothing for it

    def shape(self, node: Node, inputs: Sequence[Shape], params: Mapping[str, Param]) -> Shape:
        """The output's shape; raise ValueError with a reason if the node is malformed."""
        raise NotImplementedError

    def saved(self, graph: Graph, node: Node, wanted: Wanted) -> tuple[Kept, ...]:
        """The smallest set of things to keep for the wanted gradients."""
        return ()

    def macs(self, graph: Graph, node: Node, wanted: Wanted) -> Macs:
        return Macs()

    def elementwise(self, graph: Graph, node: Node, wanted: Wanted) -> tuple[float, float]:
        """Operations of the (forward, backward) pass beside MACs, per element of the output."""
        return (0, 0)

    def layout(self, graph: Graph, node: Node, role: str) -> Layout:
        """The layout of a parameter in C."""
        return "plain"

    # ---- torch ----

    def forward(self, node: Node, x: Tensors, p: Mapping[str, torch.Tensor]) -> torch.Tensor:
        raise NotImplementedError

    def forward_saving(
        self, node: Node, x: Tensors, p: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output, and the codes or statistics that `saved` lists."""
        return self.forward(node, x, p), None

    def takes_sign(self, node: Node) -> bool:
        """True for an activation whose derivative 1[a >= 0] of its input a may stand for."""
        return False

    def mask(self, node: Node, source: torch.Tensor) -> torch.Tensor:
        """Where gradient passes, from the value that a kept mask is of."""
        raise NotImplementedError

    def backward(
        self,
        node: Node,
        dy: torch.Tensor,
        kept: Tensors,
        p: Mapping[str, torch.Tensor],
        wanted: Wanted,
        x_shapes: Sequence[Any],
    ) -> tuple[list[torch.Tensor | None], dict[str, torch.Tensor]]:
        """Gradients of the inputs and of the wanted parameter slices."""
        raise NotImplementedError

    # ---- C ----

    def inplace(self, graph: Graph, node: Node) -> tuple[int, ...]:
        """Inputs whose buffer the forward call may overwrite with the output."""
        return ()

    def view(self, graph: Graph, node: Node) -> bool:
        """True when the output is the input's memory under another shape."""
        return False

    def passes_gradient(self, graph: Graph, node: Node) -> bool:
        """True when the gradient of every input is the gradient of the output."""
        return self.view(graph, node)

    def dx_inplace(self, graph: Graph, node: Node, i: int) -> bool:
        """True when the gradient of input `i` may overwrite the output gradient."""
        return False

    def c_mask(self, graph: Graph, node: Node, mask: Buf, source: Buf) -> Call:
        """The call that packs a kept mask."""
        raise NotImplementedError

    def c_forward(self, f: ForwardArgs) -> list[Call]:
        raise NotImplementedError

    def c_forward_saving(self, f: ForwardArgs, aux: Buf) -> list[Call]:
        """The forward calls of a training step, which also write the codes or statistics."""
        raise NotImplementedError

    def c_dx(self, b: BackwardArgs, i: int) -> Call:
        """The call that writes the gradient of input `i` into ``b.dx``."""
        raise NotImplementedError

    def c_grad(self, b: BackwardArgs, role: str, s: Slice, grad: Buf, acc: bool) -> GradCall:
        """The call that writes the gradient of a parameter slice.

        ``b.dy`` is already gathered to ``s.out`` where that is a list (unless `slices_rows`),
        ``b.kept`` to the channels that `saved` names.
        """
        raise NotImplementedError

    def c_gated(self, b: BackwardArgs, role: str, grad: Buf, acc: bool) -> Call:
        """The call that writes the gradient of the channels that ``b.gates`` let through.

        Those of ``b.kept`` are gathered, and of ``b.dy`` for a weight where `gathers_gated`.
        """
        raise NotImplementedError

    def gathers_gated(self, node: Node) -> bool:
        """Whether `c_gated` takes the chosen channels of dy one after the other."""
        return True

    def c_follow(self, b: BackwardArgs) -> Call:
        """The call that moves what `states` lists, once the sample's loss is known to be finite."""
        raise NotImplementedError

    def c_refresh(self, f: ForwardArgs) -> Call:
        """The call that adds a sample to what `refreshed` lists, after a forward pass."""
        raise NotImplementedError

    def slices_rows(self, graph: Graph, node: Node, wanted: Wanted) -> bool:
        """True when `c_grad` picks a weight's output channels itself, from the whole dy."""
        return False

    def workspace(self, graph: Graph, node: Node, wanted: Wanted) -> int:
        """Floats that the `c_grad` of a sliced weight needs beside the gradient."""
        return 0


def clamp_args(lo: float | None, hi: float | None) -> tuple[Arg, Arg]:
    return (Expr(NO_LO) if lo is None else lo, Expr(NO_HI) if hi is None else hi)


def bias_grad(b: BackwardArgs, s: Slice, grad: Buf, acc: bool) -> GradCall:
    """The gradient of what is added to each channel: the sum of dy over rows or pixels."""
    rows, columns = channels_last(b.out_shape)
    n = count(s.out, columns)
    return GradCall((Call("mo_bias_grad", (grad, Buf(b.dy), rows, n, int(acc))),), 1, n)


def mask_bytes(elements: int, bits: int = 1) -> int:
    return (elements * bits + 7) // 8


def channels_last(shape: Shape) -> tuple[int, int]:
    """(rows, columns) of a value in C memory: pixels x channels, or rows x features."""
    if len(shape) == 4:
        return shape[2] * shape[3], shape[1]
    rows = 1
    for n in shape[1:-1]:
        rows *= n
    return rows, shape[-1]


def count(channels: tuple[int, ...] | None, full: int) -> int:
    return full if channels is None else len(channels)
