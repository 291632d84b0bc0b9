"""Update exactly what is named, down to channels."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import Field

from modicum.errors import UsageError
from modicum.graph import Frozen, Graph
from modicum.methods.base import Method
from modicum.ops import OPS
from modicum.ops.attention import sides
from modicum.selection import Rates, Selection, Slice, Update


class Channels(Frozen):
    """Output and input channels of the parameters that a pattern matches; None is all.

    `rates` are their step sizes relative to the optimiser's, by inner step, the last one repeated;
    0 is "not in this step".
    """

    out: tuple[int, ...] | None = None
    inp: tuple[int, ...] | None = None
    rates: Rates = (1.0,)


class Explicit(Method):
    """Train the parameters whose names match a pattern, whole or as channel slices.

    >>> method = Explicit(params={"classifier.*": None, "blocks.5.*.weight": {"out": (0, 3)}})
    >>> twice = Explicit(params={"classifier.*": None, "blocks.5.*": {"rates": (1.0, 0.5, 0.0)}})

    The second trains `blocks.5` in the first two updates of a task, the classifier in all.  A
    channel list applies where the axis exists: `inp` is ignored on biases.  The first pattern
    that matches a parameter decides.  `batch_norms` and `sign` are patterns of nodes: norms that
    use and follow batch statistics, activations with a sign mask for their derivative.  A pattern
    without a match is an error.  `attended` are weights whose channels are chosen by the attention
    that their layers have to have (p-Meta).
    """

    kind: Literal["explicit"] = "explicit"
    params: Annotated[dict[str, Channels | None], Field(min_length=1)]
    batch_norms: tuple[str, ...] = ()
    sign: tuple[str, ...] = ()
    attended: tuple[str, ...] = ()

    def select(self, graph: Graph) -> Selection:
        names = graph.trainable()
        for name in self.attended:
            if not any(sides(node) for node, _ in graph.users_of(name)):
                raise UsageError(
                    f"the model has no channel attention at {name!r}, by which the method chooses",
                    hint="the weights that p-Meta's training wrote, weights.pt, which carry it",
                )
        for pattern in self.params:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UsageError(
                    f"no trainable parameter matches {pattern!r}",
                    hint="names look like " + ", ".join(names[:6]),
                )
        updates = []
        for name in names:
            match = next((p for p in self.params if fnmatchcase(name, p)), None)
            if match is not None:
                c = self.params[match] or Channels()
                has_inputs = len(graph.params[name].shape) > 1
                part = Slice(out=c.out, inp=c.inp if has_inputs else None)
                updates.append(Update(param=name, slice=part, rates=c.rates))
        norms = [n.name for n in graph.nodes if n.op == "batch_norm"]
        activations = [n.name for n in graph.nodes if OPS[n.op].takes_sign(n)]
        return Selection(
            updates=tuple(updates),
            batch_norms=_matching(self.batch_norms, norms, "batch norm"),
            sign=_matching(self.sign, activations, "activation with a sign mask"),
            attended=self.attended,
        )


def _matching(patterns: tuple[str, ...], names: list[str], what: str) -> tuple[str, ...]:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(
                f"no {what} matches {pattern!r}",
                hint="their names are " + (", ".join(names[:6]) or "none: the model has none"),
            )
    return tuple(n for n in names if any(fnmatchcase(n, p) for p in patterns))
