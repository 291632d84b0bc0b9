"""TinyTrain (Kwon et al., ICML 2024): for each task, the layers and channels that matter most."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from modicum.backward_cost import BackwardCost, backward_cost
from modicum.errors import DoesNotFit, UsageError
from modicum.graph import Graph
from modicum.methods.base import Limits, Method, Observed, ObservingMethod
from modicum.methods.last import Last
from modicum.methods.layers import Layer, head_of, last_layers, layers
from modicum.methods.mobiletl import exact
from modicum.optim import SGD
from modicum.selection import Selection, Update
from modicum.units import count, kib, parse_size, percent

Criterion = Literal["full", "fisher", "fisher/memory", "fisher/compute", "l2", "random"]
Ranking = Literal["fisher", "l2", "random"]
RATIOS = (1.0, 0.5, 0.25, 0.125)


class TinyTrain(ObservingMethod):
    """Under a memory and a compute budget, train the channels with the most Fisher information.

    Of the layers of the last `inspect_blocks` blocks, with the activation a of output channel o
    (after norm and non-linearity), its gradient g, N samples and pixels d:

    - Delta_o = sum_n (sum_d a_nd g_nd)^2 / 2N  (eq. 2), P_i = sum_o Delta_o
    - s_i = P_i / ((W_i / max W) (M_i / max M)), `criterion` "full"  (eq. 3); W_i parameters and
      M_i MACs of layer i, the maxima over all layers.  "fisher" is P_i alone, "fisher/memory" and
      "fisher/compute" leave out M and W, "l2" is the norm of the weights, "random" a draw.
    - Layers are taken in the order of s_i, each with the `channel_ratio` of its channels that have
      the largest Delta (`channels`: "fisher", or "l2", "random" to compare with), as long as the
      backward pass needs at most `ram` bytes and `macs_fraction` of the MACs of a full backward
      pass, both in the papers' convention (`backward_cost`), and the whole plan fits its board.
      `greedy`: "skip" leaves out a layer that does not fit and goes on, "stop" ends there.
    - `fill` then gives the selected layers, in the same order, as many more channels as fit.

    `axis` "out" slices output channels: gradients and optimiser state shrink.  "in" slices input
    channels, scored by Delta of the layer's input: what is kept of it shrinks too.

    Where the paper is silent: biases of selected channels are not trained unless `bias`; norms are
    frozen; a linear layer that makes the output is always trained; K is a quarter of the channels,
    rounded, at least 1; a layer that does not fit is skipped, since on MCUNet stopping selects
    nothing under the paper's budgets, while skipping gives its number of parameters; a model
    without inverted residual blocks is inspected in its last 3 layers for each block asked for.
    """

    kind: Literal["tinytrain"] = "tinytrain"
    ram: int | str = "1MiB"
    macs_fraction: Annotated[float, Field(gt=0, le=1)] = 0.15
    inspect_blocks: Annotated[int, Field(ge=1)] = 6
    channel_ratio: Annotated[float, Field(gt=0, le=1)] = 0.25
    fill: bool = False
    axis: Literal["out", "in"] = "out"
    criterion: Criterion = "full"
    channels: Ranking = "fisher"
    greedy: Literal["skip", "stop"] = "skip"
    bias: bool = False
    seed: int = 0

    @property
    def budget(self) -> int:
        """The backward memory in bytes."""
        return parse_size(self.ram) if isinstance(self.ram, str) else self.ram

    def probes(self, graph: Graph) -> tuple[str, ...]:
        if self.criterion in ("l2", "random") and self.channels != "fisher":
            return ()
        return tuple(
            dict.fromkeys(self._probed(x) for x in last_layers(graph, self.inspect_blocks))
        )

    def _probed(self, layer: Layer) -> str:
        """The value whose channels are those that the layer is sliced by."""
        return layer.value if self.axis == "out" else layer.node.inputs[0]

    def select_for(self, graph: Graph, seen: Observed, limits: Limits) -> Selection:
        window = last_layers(graph, self.inspect_blocks)
        missing = [v for v in self.probes(graph) if v not in seen.fisher]
        if missing:
            raise UsageError(
                f"no Fisher scores of {missing[0]} were observed",
                why="they belong to another model, or to a method with another window",
                hint="observe(model, graph, method, support) with this method",
            )
        search = _Search(self, graph, seen, limits)
        search.check_inspection()
        ranked = sorted(window, key=lambda x: -self.score(graph, x, seen))
        chosen: dict[str, tuple[Layer, int]] = {}
        for layer in ranked:
            k = max(1, round(self.channel_ratio * layer.channels(self.axis)))
            if search.fits({**chosen, layer.weight: (layer, k)}):
                chosen[layer.weight] = (layer, k)
            elif self.greedy == "stop":
                break
        if not chosen:
            raise search.nothing_fits(ranked)
        if self.fill:
            for name, (layer, k) in list(chosen.items()):
                chosen[name] = (layer, search.most(chosen, layer, k))
        return search.selection(chosen)

    def score(self, graph: Graph, layer: Layer, seen: Observed) -> float:
        """s_i of eq. 3, or what the criterion puts in its place."""
        if self.criterion == "random":
            return random.Random(f"{self.seed} {layer.weight}").random()
        if self.criterion == "l2":
            return sum(n * n for n in seen.norms[layer.weight][0]) ** 0.5
        potential = sum(seen.fisher[self._probed(layer)])
        everything = layers(graph)
        share_w = layer.params / max(x.params for x in everything)
        share_m = layer.macs / max(x.macs for x in everything)
        by = {"full": share_w * share_m, "fisher/memory": share_w, "fisher/compute": share_m}
        return potential / by.get(self.criterion, 1.0)

    def best(self, layer: Layer, seen: Observed, k: int) -> tuple[int, ...]:
        """The k channels with the largest scores, ascending; of equal ones the first."""
        n = layer.channels(self.axis)
        if self.channels == "random":
            drawn = random.Random(f"{self.seed} {layer.weight} channels").sample(range(n), n)
            scores: Sequence[float] = [-float(drawn.index(i)) for i in range(n)]
        elif self.channels == "l2":
            scores = seen.norms[layer.weight][0 if self.axis == "out" or layer.depthwise else 1]
        else:
            scores = _per_group(seen.fisher[self._probed(layer)], n)
        order = sorted(range(n), key=lambda i: (-scores[i], i))
        return tuple(sorted(order[:k]))

    def smaller(self) -> Method | None:
        return Last()


class _Search:
    """Budgets, and selections of layers with numbers of channels."""

    def __init__(self, method: TinyTrain, graph: Graph, seen: Observed, limits: Limits) -> None:
        self.method, self.graph, self.seen, self.limits = method, graph, seen, limits
        head = head_of(graph)
        names = [] if head is None else [head.weight, *head.biases]
        self.head = [Update(param=n) for n in names]
        full = exact(graph, graph.nodes, "affine")
        self.full = backward_cost(graph, full, limits.optimizer).macs

    def selection(self, chosen: dict[str, tuple[Layer, int]]) -> Selection:
        m = self.method
        updates = [
            u
            for layer, k in chosen.values()
            for u in layer.update(m.best(layer, self.seen, k), m.axis, m.bias)
        ]
        order = {name: i for i, name in enumerate(self.graph.trainable())}
        return Selection(
            updates=tuple(sorted([*updates, *self.head], key=lambda u: order[u.param]))
        )

    def cost(self, chosen: dict[str, tuple[Layer, int]]) -> BackwardCost:
        return backward_cost(self.graph, self.selection(chosen), self.limits.optimizer)

    def fits(self, chosen: dict[str, tuple[Layer, int]]) -> bool:
        cost = self.cost(chosen)
        within = (
            cost.memory <= self.method.budget and cost.macs <= self.method.macs_fraction * self.full
        )
        return within and self.limits.fits(self.selection(chosen))

    def most(self, chosen: dict[str, tuple[Layer, int]], layer: Layer, k: int) -> int:
        """As many channels of a layer as fit beside what else is chosen, k at least."""
        low, high = k, layer.channels(self.method.axis)
        while low < high:
            middle = (low + high + 1) // 2
            if self.fits({**chosen, layer.weight: (layer, middle)}):
                low = middle
            else:
                high = middle - 1
        return low

    def check_inspection(self) -> None:
        """The pass that scores the channels has to keep the budget too."""
        probes, budget = self.method.probes(self.graph), self.method.budget
        if not probes:
            return
        need = backward_cost(self.graph, Selection(updates=(), probes=probes), SGD()).memory
        if need > budget:
            raise DoesNotFit(
                f"tinytrain: inspecting {self.method.inspect_blocks} blocks needs {kib(need)} of "
                f"backward memory, the budget is {kib(budget)}.",
                why="the activations that are scored are kept until the backward pass",
                hint=[f"--set ram={need}", "--set inspect_blocks=n with a smaller n"],
            )

    def nothing_fits(self, ranked: list[Layer]) -> DoesNotFit:
        """The error, with the smallest budgets that one layer fits."""
        m = self.method
        alone = []
        for layer in ranked if m.greedy == "skip" else ranked[:1]:
            k = max(1, round(m.channel_ratio * layer.channels(m.axis)))
            alone.append((self.cost({layer.weight: (layer, k)}), layer))
        quick = [c for c in alone if c[0].macs <= m.macs_fraction * self.full]
        lean = [c for c in alone if c[0].memory <= m.budget]
        hints = []
        if quick:
            cost, layer = min(quick, key=lambda c: c[0].memory)
            if cost.memory > m.budget:
                text = f"--set ram={cost.memory}, which {layer.weight} fits ({kib(cost.memory)})"
                hints.append(text)
        if lean:
            cost, layer = min(lean, key=lambda c: c[0].macs)
            share = cost.macs / self.full
            if share > m.macs_fraction:
                least = -(-cost.macs * 10_000 // self.full) / 10_000
                hints.append(f"--set macs_fraction={least}, which {layer.weight} fits")
        if not hints and not (quick and lean):
            cost = min((c[0] for c in alone), key=lambda c: (c.memory, c.macs))
            least = -(-cost.macs * 10_000 // self.full) / 10_000
            hints.append(f"--set ram={cost.memory} --set macs_fraction={least}")
        if not hints:
            hints.append("a board with more RAM: the budgets would do, the whole plan does not fit")
        if m.greedy == "stop":
            hints.append("--set greedy=skip, which goes on after a layer that does not fit")
        return DoesNotFit(
            f"tinytrain: no layer fits {kib(m.budget)} of backward memory and "
            f"{percent(m.macs_fraction)} of {count(self.full)} backward MACs.",
            floor=f"{kib(alone[0][0].io)} (the largest input and output of a layer)",
            why="every layer of the inspected blocks, alone, needs more than one of the budgets",
            hint=hints,
        )


def _per_group(scores: Sequence[float], n: int) -> Sequence[float]:
    """Scores of the channels within a group, summed over the groups."""
    if len(scores) == n:
        return scores
    return [sum(scores[i::n]) for i in range(n)]
