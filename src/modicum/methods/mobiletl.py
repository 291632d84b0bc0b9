"""MobileTL (Chiang et al., AAAI 2023), and the exact fine-tuning of blocks it is compared with."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from modicum.blocks import Block, describe, find_blocks
from modicum.errors import UsageError
from modicum.graph import Graph, Node
from modicum.methods.base import Method
from modicum.methods.last import Last
from modicum.ops import OPS
from modicum.selection import Selection, Update

Norms = Literal["affine", "batch"]


class MobileTL(Method):
    """Train the last blocks of inverted residuals, norms by their shifts, activations by signs.

    f'(x) = h'(g(x)): everything before the last `blocks` inverted residual blocks is frozen (g),
    the blocks and all that follows them are trained (h'); back-propagation stops there.

    - Norms after expansion and depthwise convolution, `shift_only`: of y = gamma (x - mu) / sigma
      + beta only beta is trained, dL/dbeta = sum dL/dy, and x is not kept.
    - Activations, `sign_backward`: relu6 and hardswish pass dL/dy * 1[a >= 0] on to their input
      a; at most one bit per element is kept, and none where the output is kept anyway, since its
      sign bit is that of a.  The forward pass stays exact.
    - The norm after the projection, `last_norm`: "affine" trains scale and shift with frozen
      statistics, "batch" also uses and follows the statistics of the batch (of one sample, on a
      board).  With "affine" the scale's gradient comes from the convolution's weight gradient,
      so that the norm's input is not kept.
    - Convolution weights and squeeze-and-excite gates are trained as usual.

    Where the paper is silent: blocks are counted from the output; what follows the last block
    (feature mix, classifier) is always trained, its norm and activation as inside a block; a
    norm that was folded into its convolution has no scale left, its shift is the convolution's
    bias, and `last_norm` says nothing about it; momentum of the running statistics is the
    model's; `prefix` is "float" (the paper quantises g).  Chiang et al., "MobileTL: On-Device
    Transfer Learning with Inverted Residual Blocks".
    """

    kind: Literal["mobiletl"] = "mobiletl"
    blocks: Annotated[int, Field(ge=1)] = 3
    shift_only: bool = True
    sign_backward: bool = True
    last_norm: Norms = "affine"
    prefix: Literal["float"] = "float"

    def select(self, graph: Graph) -> Selection:
        blocks = last_blocks(graph, self.blocks)
        nodes = _from(graph, blocks[0])
        last_norms = {b.last_norm for b in blocks if b.last_norm is not None}
        gates = {name for b in blocks for name in b.gate}
        updates, sign = [], []
        for node in nodes:
            internal = node.op == "batch_norm" and node.name not in last_norms
            for role, name in node.params.items():
                if graph.params[name].trainable and not (
                    self.shift_only and internal and role == "weight"
                ):
                    updates.append(Update(param=name))
            if self.sign_backward and node.name not in gates and OPS[node.op].takes_sign(node):
                sign.append(node.name)
        batch: tuple[str, ...] = ()
        if self.last_norm == "batch":
            batch = _batch_norms(graph, [n for n in nodes if n.name in last_norms])
        return Selection(updates=_once(updates), batch_norms=batch, sign=tuple(sign))

    def smaller(self) -> Method | None:
        if self.blocks == 1:
            return Last()
        return self.model_copy(update={"blocks": self.blocks - 1})


class Blocks(Method):
    """Fine-tune the last blocks of inverted residuals exactly, and all that follows them.

    `norms`: "batch" uses and follows batch statistics in all trained norms, as PyTorch does in
    training mode and as the papers' baselines do; "affine" keeps the statistics frozen.
    """

    kind: Literal["blocks"] = "blocks"
    blocks: Annotated[int, Field(ge=1)] = 3
    norms: Norms = "batch"

    def select(self, graph: Graph) -> Selection:
        nodes = _from(graph, last_blocks(graph, self.blocks)[0])
        return exact(graph, nodes, self.norms)

    def smaller(self) -> Method | None:
        if self.blocks == 1:
            return Last()
        return self.model_copy(update={"blocks": self.blocks - 1})


def last_blocks(graph: Graph, n: int) -> tuple[Block, ...]:
    """The last n inverted residual blocks; raises UsageError, naming what there is."""
    found = find_blocks(graph)
    if len(found) < n:
        raise UsageError(
            f"the model has {len(found)} inverted residual blocks, not {n}",
            where=f"found {describe(found)}",
            hint="fewer blocks, or a method that does not need any, such as last or bias",
        )
    return found[len(found) - n :]


def exact(graph: Graph, nodes: tuple[Node, ...], norms: Norms) -> Selection:
    """Everything in these nodes, with exact gradients."""
    names = [p for node in nodes for p in node.params.values() if graph.params[p].trainable]
    batch: tuple[str, ...] = ()
    if norms == "batch" and any(n.op == "batch_norm" for n in nodes):
        batch = _batch_norms(graph, [n for n in nodes if n.op == "batch_norm"])
    return Selection(updates=_once([Update(param=p) for p in names]), batch_norms=batch)


def _batch_norms(graph: Graph, nodes: list[Node]) -> tuple[str, ...]:
    names = tuple(n.name for n in nodes if n.op == "batch_norm")
    if not names:
        raise UsageError(
            "the blocks have no batch norms to give batch statistics to",
            why="they were folded into the convolutions, or are of another kind",
            hint='norms that are "affine"',
        )
    return names


def _from(graph: Graph, block: Block) -> tuple[Node, ...]:
    start = next(i for i, n in enumerate(graph.nodes) if n.name == block.nodes[0])
    return graph.nodes[start:]


def _once(updates: list[Update]) -> tuple[Update, ...]:
    return tuple({u.param: u for u in updates}.values())
