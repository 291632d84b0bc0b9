"""TinyTL (Cai et al., NeurIPS 2020): biases, lite residual modules, or both.

And AdapterDrop (Rückle et al., EMNLP 2021) of it: none of them in the first blocks.
"""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal
from typing import Annotated, Literal

from pydantic import Field

from modicum.blocks import describe, find_blocks
from modicum.errors import UsageError
from modicum.graph import Graph
from modicum.methods.base import Method
from modicum.methods.last import Last
from modicum.selection import Selection, Update

LITE = "lite"


class TinyTL(Method):
    """Train biases, or small residual branches beside frozen blocks, and the last layers whole.

    Of y = W x + b the gradient db = sum dy needs nothing but dy, while dW needs x: so weights
    stay frozen and no activation of theirs is kept.  What biases cannot express is left to a lite
    residual module beside every inverted residual block,

        y = F_W(x) + b + up(L(pool(x))),

    on a map of half the size, whose parameters are all trained (`modicum.lite` says what L is).

    - mode "bias" (TinyTL-B): all biases and norm shifts of the backbone.
    - mode "lite" (TinyTL-L): all parameters of the lite modules.
    - mode "lite+bias" (TinyTL-L+B): both, but for the shift of each lite module's last norm,
      which moves the same sum as the shift of the block's last norm.

    The last `head` convolutions and linear layers are trained whole in every mode (0: none).
    A parameter belongs to a lite module when one part of its dotted name is ``lite``.

    `drop` is AdapterDrop (Rückle et al., EMNLP 2021, arXiv 2010.11918) on top of TinyTL, as
    TinyTrain (Kwon et al., ICML 2024) compares with it; AdapterDrop-25, -50 and -75 are 0.25, 0.5
    and 0.75.  Of n inverted residual blocks the first drop * n, rounded half up, are dropped (of
    few blocks that may be all): they get no lite module, and no bias in them or before them is
    trained, so that back-propagation stops behind them.

    `kernel`, `groups`, `norm_channels`, `standardise`, `backbone_norm` and `seed` are those of
    `modicum.add_lite_residuals`.  `modicum.prepare_model` puts the modules into a model before
    it is captured, as the command line does by itself; a selection of "lite" on a graph without
    them raises UsageError.

    Not the paper's: weights of the frozen backbone are kept in float32 (8 bits there), and the
    lite modules start at random with no effect (there they are pre-trained with the backbone).
    """

    kind: Literal["tinytl"] = "tinytl"
    mode: Literal["bias", "lite", "lite+bias"] = "lite+bias"
    head: Annotated[int, Field(ge=0)] = 1
    drop: Annotated[float, Field(ge=0, lt=1)] = 0.0
    kernel: Annotated[int, Field(ge=1)] = 5
    groups: Annotated[int, Field(ge=1)] = 2
    norm_channels: Annotated[int, Field(ge=1)] = 8
    standardise: bool = True
    backbone_norm: Literal["keep", "group"] = "keep"
    seed: int = 0

    def select(self, graph: Graph) -> Selection:
        lite = {name for name in graph.trainable() if in_lite(name)}
        left, early = self._left(graph)
        chosen = {u.param for u in Last(n=self.head).select(graph).updates} if self.head else set()
        if "lite" in self.mode:
            if left and not lite:
                raise UsageError(
                    "the model has no lite residual modules to train",
                    why=f"no parameter has {LITE!r} as a part of its name",
                    hint="capture what modicum.prepare_model(model, example, method) returns "
                    '(the command line does so by itself), or mode="bias"',
                )
            chosen |= lite - early if left else set()
        if "bias" in self.mode:
            biases = {p for n in graph.nodes for r, p in n.params.items() if r == "bias"}
            chosen |= biases - lite - early
            chosen -= last_shifts(graph)
        names = [name for name in graph.trainable() if name in chosen]
        return Selection(updates=tuple(Update(param=name) for name in names))

    def _left(self, graph: Graph) -> tuple[bool, set[str]]:
        """Whether blocks are left, and the parameters before them if others are dropped."""
        blocks = find_blocks(graph) if self.drop else ()
        if self.drop and not blocks:
            raise UsageError(
                "the model has no inverted residual blocks, of which drop leaves out the first",
                where=f"found {describe(blocks)}",
                hint="drop=0",
            )
        n = dropped(self.drop, len(blocks))
        if n == 0:
            return True, set()
        left = blocks[n:]
        names = [node.name for node in graph.nodes]
        end = names.index(left[0].nodes[0]) if left else names.index(blocks[-1].nodes[-1]) + 1
        return bool(left), {p for node in graph.nodes[:end] for p in node.params.values()}

    def smaller(self) -> Method | None:
        if self.mode != "bias":
            return self.model_copy(update={"mode": "bias"})
        return Last(n=self.head) if self.head else None


def dropped(drop: float, blocks: int) -> int:
    """drop * blocks, rounded half up.

    >>> [dropped(drop, 10) for drop in (0.0, 0.25, 0.5, 0.75, 0.04)], dropped(0.29, 50)
    ([0, 3, 5, 8, 0], 15)
    """
    return int((Decimal(str(drop)) * blocks).quantize(Decimal(1), ROUND_HALF_UP))


def in_lite(name: str) -> bool:
    """Whether a parameter or module belongs to a lite module, by its dotted name."""
    return LITE in name.split(".")


def last_shifts(graph: Graph) -> set[str]:
    """The shift of the last norm in each lite module."""
    shifts = {}
    for node in graph.nodes:
        bias = node.params.get("bias", "")
        if node.op == "group_norm" and in_lite(bias):
            parts = bias.split(".")
            shifts[tuple(parts[: parts.index(LITE)])] = bias
    return set(shifts.values())
