"""TinyTL (Cai et al., NeurIPS 2020): biases, lite residual modules, or both."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

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
    kernel: Annotated[int, Field(ge=1)] = 5
    groups: Annotated[int, Field(ge=1)] = 2
    norm_channels: Annotated[int, Field(ge=1)] = 8
    standardise: bool = True
    backbone_norm: Literal["keep", "group"] = "keep"
    seed: int = 0

    def select(self, graph: Graph) -> Selection:
        lite = {name for name in graph.trainable() if in_lite(name)}
        chosen = {u.param for u in Last(n=self.head).select(graph).updates} if self.head else set()
        if "lite" in self.mode:
            if not lite:
                raise UsageError(
                    "the model has no lite residual modules to train",
                    why=f"no parameter has {LITE!r} as a part of its name",
                    hint="capture what modicum.prepare_model(model, example, method) returns "
                    '(the command line does so by itself), or mode="bias"',
                )
            chosen |= lite
        if "bias" in self.mode:
            chosen |= {p for n in graph.nodes for r, p in n.params.items() if r == "bias"} - lite
            chosen -= last_shifts(graph)
        names = [name for name in graph.trainable() if name in chosen]
        return Selection(updates=tuple(Update(param=name) for name in names))

    def smaller(self) -> Method | None:
        if self.mode != "bias":
            return self.model_copy(update={"mode": "bias"})
        return Last(n=self.head) if self.head else None


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
