"""SparseUpdate (Lin et al., NeurIPS 2022): a fixed scheme of biases and weight slices."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import Field, model_validator

from modicum.errors import UsageError
from modicum.graph import Graph
from modicum.methods.base import Limits, Method, Observed, ObservingMethod
from modicum.methods.last import Last
from modicum.methods.layers import Layer, head_of, inner_layers
from modicum.selection import Selection, Slice, Update

Share = Annotated[float, Field(ge=0, le=1)]

# (convolutions, last k that train their bias, {convolution: share of its input channels}), as
# published for 128x128 (MCUNetV3, github.com/mit-han-lab/tiny-training, schemes by extra memory)
# without and with the last 1x1 convolution that some versions of the nets have
_NETS = {"mcunet": (42, 43), "mbv2": (51, 52), "proxyless": (60, 61)}
_SCHEMES: dict[str, tuple[int, tuple[int, ...], tuple[float, ...]]] = {
    "mcunet-49kb": (20, (23, 24, 27, 30, 33, 39), (0, 0.25, 0.5, 0.5, 0, 0)),
    "mcunet-74kb": (21, (21, 23, 24, 26, 27, 30), (1, 0, 1, 0, 0.5, 1)),
    "mcunet-99kb": (22, (21, 24, 27, 30, 36, 39), (1, 1, 1, 1, 0.125, 0.25)),
    "mcunet-124kb": (24, (21, 24, 27, 30, 33, 39), (0.25, 1, 1, 1, 0.5, 0.5)),
    "mcunet-148kb": (23, (21, 24, 27, 30, 36, 39), (1, 1, 1, 1, 1, 0.5)),
    "mbv2-49kb": (
        16,
        (36, 39, 40, 41, 42, 45, 48, 49),
        (1, 1, 0, 0.25, 0.125, 0.125, 0.125, 0.125),
    ),
    "mbv2-73kb": (
        20,
        (32, 33, 36, 39, 41, 42, 45, 48),
        (0.125, 0.5, 0.5, 1, 0.25, 0.125, 0.125, 1),
    ),
    "mbv2-99kb": (25, tuple(range(27, 49, 3)), (1, 1, 1, 1, 1, 0.125, 0.5, 1)),
    "mbv2-123kb": (31, tuple(range(27, 49, 3)), (1, 1, 1, 1, 1, 0.5, 1, 1)),
    "mbv2-138kb": (34, tuple(range(27, 49, 3)), (1,) * 8),
    "proxyless-49kb": (
        21,
        (39, 42, 44, 45, 50, 51, 54, 57),
        (0.25, 1, 0, 1, 0, 0.125, 0.25, 0.25),
    ),
    "proxyless-74kb": (28, (33, 36, 39, 42, 45, 51, 54, 57), (0.5, 0.25, 1, 1, 1, 0.5, 0.25, 0.5)),
    "proxyless-98kb": (25, tuple(range(36, 58, 3)), (1, 0.5, 1, 1, 0.25, 0.5, 1, 1)),
    "proxyless-120kb": (32, tuple(range(36, 58, 3)), (1, 1, 1, 1, 0.5, 1, 1, 1)),
    "proxyless-148kb": (45, tuple(range(36, 58, 3)), (1,) * 8),
}

SCHEMES = tuple(_SCHEMES)


class SparseUpdate(ObservingMethod):
    """Train the biases of the last `biases` layers, and a share of the channels of some weights.

    `weights` maps layers to shares of their channels: a layer's number, counted from 0 through
    the convolutions and linear layers, or a pattern of weight names.  `axis`: "in" slices input
    channels, so that less is kept of the input; of a depthwise layer both are one.  `channels`:
    "l2" takes those with the largest L2 norm of the weight, "leading" the first.  A linear layer
    that makes the output is always trained.  `scheme` is a published one by name and stands for
    `biases` and `weights`: see `SCHEMES`.  A share of 0 trains no weight of a layer.

    Lin et al., "On-Device Training Under 256KB Memory", NeurIPS 2022 (arXiv 2206.15472).
    """

    kind: Literal["sparse_update"] = "sparse_update"
    scheme: str = ""
    biases: Annotated[int, Field(ge=0)] = 0
    weights: dict[str, Share] = {}
    axis: Literal["in", "out"] = "in"
    channels: Literal["l2", "leading"] = "l2"

    @model_validator(mode="after")
    def _one_of_both(self) -> SparseUpdate:
        if self.scheme and self.scheme not in _SCHEMES:
            raise ValueError(f"no scheme is called {self.scheme!r}: {', '.join(_SCHEMES)}")
        if bool(self.scheme) == bool(self.biases or self.weights):
            raise ValueError("either a scheme, or biases and weights")
        return self

    def select_for(self, graph: Graph, seen: Observed, limits: Limits) -> Selection:
        head, found = head_of(graph), inner_layers(graph)
        biases, shares = self._resolved(found)
        updates: dict[str, Update] = {}
        for layer in found[len(found) - biases :] if biases else []:
            updates |= {b: Update(param=b) for b in layer.biases}
        for i, share in shares.items():
            layer = found[i]
            n = layer.channels(self.axis)
            if k := round(share * n):
                best = tuple(range(k)) if self.channels == "leading" else self._best(layer, seen, k)
                updates |= {u.param: u for u in layer.update(best, self.axis)}
        if head is not None:
            updates |= {p: Update(param=p, slice=Slice()) for p in (head.weight, *head.biases)}
        chosen = [updates[p] for p in graph.trainable() if p in updates]
        return Selection(updates=tuple(chosen))

    def _resolved(self, found: list[Layer]) -> tuple[int, dict[int, float]]:
        """Layers with biases, and the share of each layer that trains weights."""
        if self.scheme:
            biases, numbers, parts = _SCHEMES[self.scheme]
            net = self.scheme.partition("-")[0]
            if len(found) not in _NETS[net]:
                raise UsageError(
                    f"the scheme {self.scheme} is for {_NETS[net][0]} convolutions",
                    why=f"the model has {len(found)}",
                    hint="biases and weights of your own, or `modicum search`",
                )
            return biases, dict(zip(numbers, parts, strict=True))
        if self.biases > len(found):
            raise UsageError(f"the model has {len(found)} layers, not {self.biases}")
        shares: dict[int, float] = {}
        for key, share in self.weights.items():
            at = [i for i, x in enumerate(found) if str(i) == key or fnmatchcase(x.weight, key)]
            if not at:
                raise UsageError(
                    f"no layer is {key!r}",
                    hint=f"a number from 0 to {len(found) - 1}, or a name like {found[0].weight}",
                )
            shares |= {i: share for i in at}
        return self.biases, shares

    def _best(self, layer: Layer, seen: Observed, k: int) -> tuple[int, ...]:
        scores = layer.norms(seen, self.axis)
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        return tuple(sorted(order[:k]))

    def smaller(self) -> Method | None:
        return Last()
