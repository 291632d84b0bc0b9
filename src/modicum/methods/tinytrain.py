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
from modicum.units import Size, count, kib, parse_size, percent

Criterion = Literal["full", "fisher", "fisher/memory", "fisher/compute", "l2", "random"]
Ranking = Literal["fisher", "l2", "random"]


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
    channels, scored by Delta of the layer's input: what is kept of it shrinks too; a layer that
    reads the model's own input is then left out.

    Where the paper is silent: biases of selected channels are not trained unless `bias`; norms are
    frozen; a linear layer that makes the output is always trained; K is a quarter of the channels,
    rounded, at least 1; a layer that does not fit is skipped, since on MCUNet stopping selects
    nothing under the paper's budgets, while skipping gives its number of parameters; a model
    without inverted residual blocks is inspected in its last 3 layers for each block asked for.
    """

    kind: Literal["tinytrain"] = "tinytrain"
    ram: Size = "1MiB"
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
        return parse_size(self.ram)

    def probes(self, graph: Graph) -> tuple[str, ...]:
        if self.criterion in ("l2", "random") and self.channels != "fisher":
            return ()
        return tuple(dict.fromkeys(self._probed(x) for x in self._window(graph)))

    @property
    def weighs(self) -> bool:
        return "l2" in (self.criterion, self.channels)

    def _window(self, graph: Graph) -> list[Layer]:
        """The layers to choose from."""
        found = last_layers(graph, self.inspect_blocks)
        able = [x for x in found if self.axis == "out" or x.node.inputs[0] != graph.input]
        if not able:
            raise UsageError(
                "every layer there is reads the model's own input, whose channels have no scores",
                where=", ".join(x.weight for x in found),
                hint="--set axis=out",
            )
        return able

    def _probed(self, layer: Layer) -> str:
        """The value whose channels are those that the layer is sliced by."""
        return layer.value if self.axis == "out" else layer.node.inputs[0]

    def select_for(self, graph: Graph, seen: Observed, limits: Limits) -> Selection:
        window = self._window(graph)
        self._check(graph, seen)
        everything = layers(graph)
        most = max(x.params for x in everything), max(x.macs for x in everything)
        ranked = sorted(window, key=lambda x: -self.score(x, seen, most))
        search = _Search(self, graph, seen, limits)
        search.check_inspection(ranked)
        chosen: dict[str, tuple[Layer, int]] = {}
        for layer in ranked:
            one = {layer.weight: (layer, self.first(layer))}
            if search.fits({**chosen, **one}):
                chosen |= one
            elif self.greedy == "stop":
                break
        if not chosen:
            raise search.nothing_fits(ranked)
        if self.fill:
            for name, (layer, k) in list(chosen.items()):
                chosen[name] = (layer, search.most(chosen, layer, k))
        return search.selection(chosen)

    def _check(self, graph: Graph, seen: Observed) -> None:
        """Raise UsageError unless the scores that are needed were observed, of this graph."""
        for value in self.probes(graph):
            shape = graph.shape(value)
            if len(seen.fisher.get(value, ())) != shape[1 if len(shape) == 4 else -1]:
                raise UsageError(
                    f"no Fisher scores of {value} were observed",
                    why="they belong to another model, or to a method with another window",
                    hint="observe(model, graph, method, support) with this method",
                )

    def first(self, layer: Layer) -> int:
        """The channels that a layer is selected with: K."""
        return max(1, round(self.channel_ratio * layer.channels(self.axis)))

    def score(self, layer: Layer, seen: Observed, most: tuple[int, int]) -> float:
        """s_i of eq. 3, or what the criterion puts in its place.

        `most` are the parameters and MACs of the largest layers of the model.
        """
        if self.criterion == "random":
            return random.Random(f"{self.seed} {layer.weight}").random()
        if self.criterion == "l2":
            return sum(n * n for n in layer.norms(seen, "out")) ** 0.5
        potential = sum(seen.fisher[self._probed(layer)])
        share_w, share_m = layer.params / most[0], layer.macs / most[1]
        by = {"full": share_w * share_m, "fisher/memory": share_w, "fisher/compute": share_m}
        return potential / by.get(self.criterion, 1.0)

    def best(self, layer: Layer, seen: Observed, k: int) -> tuple[int, ...]:
        """The k channels with the largest scores, ascending; of equal ones the first."""
        n = layer.channels(self.axis)
        if self.channels == "random":
            drawn = random.Random(f"{self.seed} {layer.weight} channels").sample(range(n), n)
            scores: Sequence[float] = [-float(drawn.index(i)) for i in range(n)]
        elif self.channels == "l2":
            scores = layer.norms(seen, self.axis)
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
        self.bests: dict[tuple[str, int], tuple[int, ...]] = {}
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
            for u in layer.update(self._best(layer, k), m.axis, m.bias)
        ]
        order = {name: i for i, name in enumerate(self.graph.trainable())}
        return Selection(
            updates=tuple(sorted([*updates, *self.head], key=lambda u: order[u.param]))
        )

    def _best(self, layer: Layer, k: int) -> tuple[int, ...]:
        if (layer.weight, k) not in self.bests:
            self.bests[layer.weight, k] = self.method.best(layer, self.seen, k)
        return self.bests[layer.weight, k]

    def cost(self, chosen: dict[str, tuple[Layer, int]]) -> BackwardCost:
        return backward_cost(self.graph, self.selection(chosen), self.limits.optimizer)

    def fits(self, chosen: dict[str, tuple[Layer, int]]) -> bool:
        selection = self.selection(chosen)
        cost = backward_cost(self.graph, selection, self.limits.optimizer)
        m = self.method
        within = cost.memory <= m.budget and cost.macs <= m.macs_fraction * self.full
        return within and self.limits.fits(selection)

    def most(self, chosen: dict[str, tuple[Layer, int]], layer: Layer, k: int) -> int:
        """As many channels of a layer as fit beside what else is chosen, k at least."""
        low, high = k, layer.channels(self.method.axis)
        if self.fits({**chosen, layer.weight: (layer, high)}):  # may take less than one fewer
            return high
        high = max(low, high - 1)
        while low < high:
            middle = (low + high + 1) // 2
            if self.fits({**chosen, layer.weight: (layer, middle)}):
                low = middle
            else:
                high = middle - 1
        return low

    def check_inspection(self, ranked: list[Layer]) -> None:
        """The pass that scores the channels has to keep the budget too."""
        need, budget = self._inspection(self.method), self.method.budget
        if need <= budget:
            return
        blocks = range(self.method.inspect_blocks - 1, 0, -1)
        narrower = (self.method.model_copy(update={"inspect_blocks": n}) for n in blocks)
        able = next((m for m in narrower if self._inspection(m) <= budget), None)
        hints = [f"--set inspect_blocks={able.inspect_blocks}"] if able else []
        raise DoesNotFit(
            f"tinytrain: inspecting {self.method.inspect_blocks} blocks needs {kib(need)} of "
            f"backward memory, the budget is {kib(budget)}.",
            why="the activations that are scored are kept until the backward pass",
            hint=[*self._affordable(ranked, need), *hints],
        )

    def _inspection(self, method: TinyTrain) -> int:
        if not (probes := method.probes(self.graph)):
            return 0
        return backward_cost(self.graph, Selection(updates=(), probes=probes), SGD()).memory

    def nothing_fits(self, ranked: list[Layer]) -> DoesNotFit:
        """The error, with the smallest budgets that one layer fits."""
        m = self.method
        hints = self._affordable(ranked)
        if m.greedy == "stop" and any(self.fits(self._alone(x)) for x in ranked):
            hints.append("--set greedy=skip, which goes on after a layer that does not fit")
        return DoesNotFit(
            f"tinytrain: no layer fits {kib(m.budget)} of backward memory and "
            f"{percent(m.macs_fraction)} of {count(self.full)} backward MACs.",
            floor=f"{kib(self.cost({}).io)} (the largest input and output of a layer)",
            why="every layer of the inspected blocks, alone, goes over a budget",
            hint=hints,
        )

    def _alone(self, layer: Layer) -> dict[str, tuple[Layer, int]]:
        return {layer.weight: (layer, self.method.first(layer))}

    def _affordable(self, ranked: list[Layer], least: int = 0) -> list[str]:
        """Budgets, as small as can be, in which a layer is selected; `least` bytes or more."""
        m = self.method
        tried = ranked if m.greedy == "skip" else ranked[:1]
        able = [x for x in tried if self.limits.fits(self.selection(self._alone(x)))]
        if not able:
            return ["a board with more RAM: the budgets would do, the whole plan does not fit"]
        needs = []
        for layer in able:
            cost = self.cost(self._alone(layer))
            needs.append((max(least, cost.memory), cost.macs, layer.weight))
        quick = [need for need in needs if need[1] <= m.macs_fraction * self.full]
        lean = [need for need in needs if need[0] <= m.budget]
        hints = []
        if quick:
            memory, _, weight = min(quick)
            hints.append(f"--set ram={memory}, which {weight} fits ({kib(memory)})")
        if lean:
            _, macs, weight = min(lean, key=lambda need: need[1])
            hints.append(f"--set macs_fraction={self._share(macs)}, which {weight} fits")
        if not hints:
            memory, macs, weight = min(needs)
            share = self._share(macs)
            hints.append(f"--set ram={memory} --set macs_fraction={share}, which {weight} fits")
        return hints

    def _share(self, macs: int) -> float:
        """The smallest `macs_fraction` of four digits that these MACs keep."""
        least = -(-macs * 10_000 // self.full)
        while least / 10_000 * self.full < macs:  # rounded down
            least += 1
        return least / 10_000


def _per_group(scores: Sequence[float], n: int) -> Sequence[float]:
    """Scores of the channels within a group, summed over the groups."""
    if len(scores) == n:
        return scores
    return [sum(scores[i::n]) for i in range(n)]
