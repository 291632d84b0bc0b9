"""SparseUpdate's offline search (Lin et al., NeurIPS 2022): what biases and weight slices to train.

First what each choice alone adds to the accuracy on validation tasks, then, by evolution, the
choices with the largest sum that a limit of backward memory allows::

    k, i, r = argmax dacc_b[k] + sum_i dacc_W[i, r_i]    subject to memory <= limit

Both go on where they were interrupted.  That gains add up is the paper's assumption: what a scheme
really gains is for `compare_on_tasks` to say.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from modicum import __version__
from modicum.adapt import progress_bar
from modicum.backward_cost import BackwardCost, backward_cost
from modicum.capture import capture
from modicum.errors import DoesNotFit, InvalidInput, ToolMissing, UsageError
from modicum.fewshot import FineTune
from modicum.graph import Frozen, Graph
from modicum.heads import FewShot, few_shot
from modicum.methods import Limits, Observed, SparseUpdate
from modicum.methods.layers import Layer, head_of, last_layers, layers
from modicum.observe import observe
from modicum.optim import SGD, Adam
from modicum.report.comparison import write
from modicum.report.search import Contributions, Scheme, biases_text, share_text
from modicum.report.tasks import Estimate, estimate
from modicum.selection import Selection, Update
from modicum.task_comparison import Contender, Domain, runs_on_tasks
from modicum.tasks import EpisodeRule, FixedEpisodes, Preprocess
from modicum.units import kib, parse_size

SHARES = (1.0, 0.5, 0.25, 0.125)
EVERY = 3
GENERATIONS = 40
POPULATION = 50

RULE = FixedEpisodes(ways=(5, 10), shots=5, queries=10)


def find_scheme(
    model: nn.Module,
    domains: Mapping[str, Domain],
    preprocess: Preprocess,
    limit: int | str,
    *,
    out: str | Path,
    tasks: int = 12,
    rule: EpisodeRule = RULE,
    tune: FineTune | None = None,
    optimizer: SGD | Adam | None = None,
    blocks: int | None = None,
    every: int = EVERY,
    shares: Sequence[float] = SHARES,
    generations: int = GENERATIONS,
    seed: int = 0,
    progress: bool = False,
) -> Scheme:
    """`contribution`, then `search`; `out` gets the scheme, all figures and a picture.

    Says before the hours that it takes what would fail after them: raises DoesNotFit where no
    scheme keeps the limit, ToolMissing without optuna.
    """
    _optuna()
    optimizer = optimizer or Adam()
    net, graph = _captured(model, preprocess, rule)
    _check_limit(graph, _grid(graph, blocks, every), _bytes(limit), optimizer)
    gains = contribution(
        net,
        domains,
        preprocess,
        out=out,
        tasks=tasks,
        rule=rule,
        tune=tune,
        optimizer=optimizer,
        blocks=blocks,
        every=every,
        shares=shares,
        seed=seed,
        progress=progress,
    )
    found = search(
        gains,
        graph,
        limit,
        optimizer,
        samples=observe(net, graph, SparseUpdate(biases=1)),
        generations=generations,
        seed=seed,
        out=out,
        progress=progress,
    )
    found.save(Path(out))
    return found


# ---- what each choice adds ---------------------------------------------------------------------


def contribution(
    model: nn.Module,
    domains: Mapping[str, Domain],
    preprocess: Preprocess,
    *,
    out: str | Path,
    tasks: int = 12,
    rule: EpisodeRule = RULE,
    tune: FineTune | None = None,
    optimizer: SGD | Adam | None = None,
    blocks: int | None = None,
    every: int = EVERY,
    shares: Sequence[float] = SHARES,
    seed: int = 0,
    progress: bool = False,
) -> Contributions:
    """Learn validation tasks with one choice at a time, and see what it adds.

    `model` is a few-shot model, or a classifier, which `few_shot` makes one of.  `domains` have
    classes that nothing else is tested on; `tasks` of each are drawn by `rule` with `seed`.  With
    acc the mean accuracy over these tasks, b(k) the biases of the last k layers and W(i, r) a
    share r of the input channels of layer i, those with the largest norm::

        dacc_b[k]    = acc(b(k)) - acc(prototypes alone)        k = every, 2 every, ..., all
        dacc_W[i, r] = acc(b(k_i) + W(i, r)) - acc(b(k_i))      k_i: the smallest k that reaches i

    A bias is also the shift of a norm.  `blocks` limits k and i to the layers of the last inverted
    residual blocks, and what follows them.  Of a small layer, shares that round to no channel, or
    to as many as a larger share, are left out.

    `out` gets a file for each task and choice, and contributions.json.  Raises InvalidInput for
    data that does not fit, UsageError for a model that has no layers or no cosine head.
    """
    if not domains or tasks < 1 or not all(0 < r <= 1 for r in shares):
        raise UsageError("nothing to learn", hint="a domain, a task, shares above 0 and up to 1")
    tune, optimizer = tune or FineTune(), optimizer or Adam()
    net, graph = _captured(model, preprocess, rule)
    found, grid = _layers(graph), _grid(graph, blocks, every)
    methods: dict[str, SparseUpdate | None] = {"none": None}
    methods |= {
        f"biases {k}": SparseUpdate(biases=k) for k in grid if any(x.biases for x in found[-k:])
    }
    reached = {i: next(k for k in grid if len(found) - k <= i)
               for i in range(len(found) - grid[-1], len(found))}  # fmt: skip
    slices = {i: _distinct(found[i], shares) for i in reached}
    methods |= {
        _slice_name(i, r): SparseUpdate(biases=reached[i], weights={str(i): r})
        for i, rs in slices.items()
        for r in rs
    }
    with progress_bar(progress, len(methods) * len(domains) * tasks, "contribution") as advance:
        runs = runs_on_tasks(
            net,
            {n: Contender(method=m, tune=tune, rates=(optimizer.lr,)) for n, m in methods.items()},
            domains,
            preprocess,
            out=out,
            tasks=tasks,
            rule=rule,
            optimizer=optimizer,
            seed=seed,
            on_run=advance,
        )

    def gain(name: str, over: str) -> Estimate:
        pairs = zip(runs[name], runs.get(over, runs["none"]), strict=True)
        return estimate([one.accuracy - other.accuracy for one, other in pairs])

    made = Contributions(
        layers={x.weight: x.shape for x in found},
        domains=tuple(domains),
        tasks=tasks,
        rule=rule,
        tune=tune.model_dump(mode="json"),
        optimizer=optimizer,
        preprocess=preprocess,
        seed=seed,
        base=estimate([run.accuracy for run in runs["none"]]),
        biases={k: gain(f"biases {k}" if f"biases {k}" in runs else "none", "none") for k in grid},
        weights={
            i: {r: gain(_slice_name(i, r), f"biases {reached[i]}") for r in rs}
            for i, rs in slices.items()
        },
        failed=sum(run.failed is not None for each in runs.values() for run in each),
    )
    made.save(Path(out))
    return made


def _captured(model: nn.Module, preprocess: Preprocess, rule: EpisodeRule) -> tuple[FewShot, Graph]:
    ways = rule.range[1]
    net = (model.of_ways(ways) if isinstance(model, FewShot) else few_shot(model, ways)).eval()
    device = next(net.buffers()).device  # the head has some
    return net, capture(net, torch.zeros(1, *preprocess.shape, device=device))


def _layers(graph: Graph) -> list[Layer]:
    """The layers that SparseUpdate counts: all but a linear one that makes the output."""
    head = head_of(graph)
    return [x for x in layers(graph) if head is None or x.node.name != head.node.name]


def _grid(graph: Graph, blocks: int | None, every: int) -> list[int]:
    """The numbers of last layers whose biases are trained."""
    if every < 1 or (blocks is not None and blocks < 1):
        raise UsageError("steps and blocks are counted from 1 on")
    last = len(last_layers(graph, blocks or 1))  # says now that there are no layers
    last = len(_layers(graph)) if blocks is None else last
    return sorted({*range(every, last, every), last})


def _distinct(layer: Layer, shares: Sequence[float]) -> list[float]:
    """Shares that are not the same channels, of equal ones the largest."""
    by_channels: dict[int, float] = {}
    for r in sorted(shares, reverse=True):
        by_channels.setdefault(round(r * layer.channels("in")), r)
    return [r for n, r in by_channels.items() if n]


def _slice_name(layer: int, share: float) -> str:
    return f"weight {layer}, {share_text(share)}"


# ---- the best sum under a limit ----------------------------------------------------------------


def search(
    contributions: Contributions,
    graph: Graph,
    limit: int | str,
    optimizer: SGD | Adam | None = None,
    *,
    samples: Observed,
    generations: int = GENERATIONS,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = False,
) -> Scheme:
    """The scheme with the largest sum of contributions that evolution finds within a limit.

    `limit`, in bytes or as "1MiB", is for the memory of `backward_cost`, the papers' convention:
    activations of one sample, trained weights, their gradients and the states of `optimizer`
    (without: that of the contributions).  `graph` is of the network that the contributions are of,
    and `samples` what ``observe(model, graph, SparseUpdate(biases=1))`` saw of its weights.

    A scheme trains the biases of the last k layers, for a k that was measured, and of these layers
    weights that gain something.  `generations` of 50 schemes descend from each other by uniform
    crossover and mutation (optuna's NSGA-II); one that is over the limit loses the weights with the
    least gain per byte until it is not.

    `out` gets a file of the schemes that were looked at; a rerun, also one with another seed or
    more generations, looks at the others only.  Raises DoesNotFit where the limit is below the
    cheapest scheme, InvalidInput for another network, ToolMissing without optuna.
    """
    _optuna()
    if generations < 1:
        raise UsageError("a search takes a generation")
    optimizer = optimizer or contributions.optimizer
    schemes = _Schemes(contributions, graph, _bytes(limit), optimizer, samples)
    study = _Study(schemes, seed, None if out is None else Path(out))
    (biases, shares), looked = study.best(generations, progress)
    return Scheme(
        method=_method(biases, shares),
        limit=schemes.limit,
        optimizer=optimizer,
        gain=contributions.gain(biases, shares),
        cost=schemes.cost(biases, shares),
        looked=looked,
        seed=seed,
        contributions=contributions,
    )


class _Schemes:
    """Genes as schemes that keep the limit, with what they gain and cost."""

    def __init__(
        self,
        contributions: Contributions,
        graph: Graph,
        limit: int,
        optimizer: SGD | Adam,
        samples: Observed,
    ) -> None:
        self.gains, self.graph, self.limit = contributions, graph, limit
        self.optimizer, self.samples = optimizer, samples
        self._order = {name: i for i, name in enumerate(graph.trainable())}
        self._updates: dict[Any, tuple[Update, ...]] = {}
        self._costs: dict[Any, BackwardCost] = {}
        c = contributions
        if [x.shape for x in _layers(graph)] != list(c.layers.values()):
            raise InvalidInput(
                "the contributions are of another network",
                why="its layers have other shapes than the graph's",
            )
        _check_limit(graph, c.biases, limit, optimizer)
        self.biases = [k for k in sorted(c.biases) if self.fits(k, {})]
        self.shares: dict[int, list[float]] = {}
        self._per_byte: dict[tuple[int, float], float] = {}
        for i, by_share in sorted(c.weights.items()):
            k = c.covering(i)
            able = [r for r, e in by_share.items() if e.mean > 0 and self.fits(k, {i: r})]
            if able:
                self.shares[i] = [0.0, *sorted(able)]
            for r in able:
                more = _summed(self.cost(k, {i: r})) - _summed(self.cost(k, {}))
                self._per_byte[i, r] = by_share[r].mean / max(more, 1)

    @property
    def genes(self) -> dict[str, int]:
        """The largest value of each gene; the smallest is 0."""
        return {"biases": len(self.biases) - 1} | {
            str(i): len(shares) - 1 for i, shares in self.shares.items()
        }

    def of(self, genes: Mapping[str, int]) -> tuple[int, dict[int, float]]:
        """(k, shares): without weights before the last k, and without what is over the limit."""
        k = self.biases[genes["biases"]]
        first = len(self.gains.layers) - k
        wanted = {i: rs[genes[str(i)]] for i, rs in self.shares.items() if i >= first}
        best = sorted((i for i, r in wanted.items() if r),
                      key=lambda i: -self._per_byte[i, wanted[i]])  # fmt: skip

        def scheme(n: int) -> dict[int, float]:
            return {i: wanted[i] for i in sorted(best[:n])}

        numbers = range(1, len(best) + 1)
        n = bisect_right(numbers, self.limit, key=lambda n: self.cost(k, scheme(n)).memory)
        while not self.fits(k, scheme(n)):
            n -= 1
        return k, scheme(n)

    def gain(self, genes: Mapping[str, int]) -> float:
        return self.gains.gain(*self.of(genes))

    def fits(self, biases: int, shares: Mapping[int, float]) -> bool:
        return self.cost(biases, shares).memory <= self.limit

    def cost(self, biases: int, shares: Mapping[int, float]) -> BackwardCost:
        key = biases, *sorted(shares.items())
        if key not in self._costs:
            updates = [*self._selected(biases, {})]
            for i, r in shares.items():
                updates += self._selected(0, {i: r})
            unique = {u.param: u for u in updates}  # a head is in each
            ordered = sorted(unique.values(), key=lambda u: self._order[u.param])
            selection = Selection(updates=tuple(ordered))
            self._costs[key] = backward_cost(self.graph, selection, self.optimizer)
        return self._costs[key]

    def _selected(self, biases: int, shares: Mapping[int, float]) -> tuple[Update, ...]:
        """What SparseUpdate selects, once for each part of a scheme: that takes longer than all
        the rest.
        """
        key = biases, *shares.items()
        if key not in self._updates:
            limits = Limits(self.optimizer)
            selection = _method(biases, shares).select_for(self.graph, self.samples, limits)
            self._updates[key] = selection.updates
        return self._updates[key]


def _method(biases: int, shares: Mapping[int, float]) -> SparseUpdate:
    return SparseUpdate(biases=biases, weights={str(i): r for i, r in sorted(shares.items())})


def _summed(cost: BackwardCost) -> int:
    """Bytes without the room of inputs and outputs, in which a small choice would cost nothing."""
    return cost.saved + cost.weights + cost.optimizer


def _check_limit(
    graph: Graph, grid: Sequence[int] | Mapping[int, Any], limit: int, optimizer: SGD | Adam
) -> None:
    fewest = min(grid)
    selection = SparseUpdate(biases=fewest).select_for(graph, Observed(), Limits(optimizer))
    cheapest = backward_cost(graph, selection, optimizer)
    if cheapest.memory > limit:
        raise DoesNotFit(
            f"search: no scheme fits {kib(limit)} of backward memory.",
            floor=f"{kib(cheapest.io)} (the largest input and output of a layer)",
            why=f"the cheapest, {biases_text(fewest)}, needs {kib(cheapest.memory)}",
            hint=f"--limit {cheapest.memory}",
        )


def _bytes(limit: int | str) -> int:
    return parse_size(limit) if isinstance(limit, str) else limit


# ---- evolution ---------------------------------------------------------------------------------


class _Looked(Frozen):
    """The study file: the gains of the schemes that were looked at, by their genes."""

    inputs: dict[str, Any]
    gains: dict[str, float]


class _Study:
    """Evolves schemes from a seed.

    A rerun does so from the first generation on, but looks at no scheme a second time: that is
    where the time goes, and what it finds is by construction what an unbroken run finds.
    """

    def __init__(self, schemes: _Schemes, seed: int, out: Path | None) -> None:
        self.schemes, self.seed, self.optuna = schemes, seed, _optuna()
        self.inputs = self._all_inputs()
        name = hashlib.sha256(json.dumps(self.inputs, sort_keys=True).encode()).hexdigest()
        self.path = None if out is None else out / "studies" / f"{name[:16]}.json"

    def best(self, generations: int, progress: bool) -> tuple[tuple[int, dict[int, float]], int]:
        """The best scheme, and how many were looked at."""
        kind = self.optuna.distributions.IntDistribution
        space = {gene: kind(0, most) for gene, most in self.schemes.genes.items()}
        gains = self._read()
        with (
            _quiet(self.optuna),
            progress_bar(progress, generations * POPULATION, "search") as advance,
        ):
            sampler = self.optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=self.seed)
            study = self.optuna.create_study(direction="maximize", sampler=sampler)
            looked = set()
            for _ in range(generations):
                before = len(gains)
                for _ in range(POPULATION):
                    trial = study.ask(space)
                    key = ",".join(str(trial.params[gene]) for gene in space)
                    if key not in gains:
                        gains[key] = self.schemes.gain(trial.params)
                    study.tell(trial, gains[key])
                    looked.add(key)
                    advance()
                if len(gains) > before:
                    self._write(gains)
            return self.schemes.of(study.best_params), len(looked)

    def _all_inputs(self) -> dict[str, Any]:
        s = self.schemes
        digest = hashlib.sha256(s.gains.model_dump_json().encode())
        norms = [s.samples.norms.get(x.weight) for x in _layers(s.graph)]
        digest.update(json.dumps(norms).encode())
        return {
            "modicum": __version__,
            "graph": s.graph.hash,
            "gains": digest.hexdigest(),
            "limit": s.limit,
            "optimizer": s.optimizer.model_dump(mode="json"),
        }

    def _read(self) -> dict[str, float]:
        """Gains from the study file, if it is whole and of the same inputs."""
        try:
            looked = _Looked.model_validate_json(self.path.read_text() if self.path else "")
        except (OSError, ValidationError, UnicodeDecodeError):
            return {}
        return dict(looked.gains) if looked.inputs == self.inputs else {}

    def _write(self, gains: dict[str, float]) -> None:
        if self.path is not None:
            text = _Looked(inputs=self.inputs, gains=gains).model_dump_json()
            write(self.path, (text + "\n").encode())


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise ToolMissing(
            "optuna, which does the search, is not installed",
            hint='pip install "modicum[search]"',
        ) from None
    return optuna


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
