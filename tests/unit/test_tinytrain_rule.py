"""TinyTrain's selection against a reading of the paper written for this test alone.

Nets are chains of layers with made-up scores.  Memory and MACs come from the layers' shapes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import graphs
import pytest
from graphs import Builder
from hypothesis import given, settings
from hypothesis import strategies as st

from modicum.errors import DoesNotFit, UsageError
from modicum.graph import Graph
from modicum.methods import Limits, Observed, TinyTrain
from modicum.methods.layers import head_of, last_layers, layers
from modicum.optim import SGD, Adam
from modicum.plan import Plan, plan
from modicum.selection import Selection

# ---- a chain and the paper's costs of it -----------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A layer of the chain as the table of a paper would have it."""

    out: int
    inp: int  # channels that it reads
    kernel: int  # 0: linear
    groups: int
    before: int  # pixels of its input
    after: int  # pixels of its output
    bias: bool
    norm: bool
    act: bool
    source: str  # the value that it reads
    name: str

    @property
    def depthwise(self) -> bool:
        return self.groups == self.out == self.inp > 1

    @property
    def taps(self) -> int:
        return max(self.kernel, 1) ** 2

    @property
    def weights(self) -> int:
        return self.out * self.inp // self.groups * self.taps

    @property
    def params(self) -> int:
        return self.weights + self.out * (self.bias + 2 * self.norm)

    @property
    def macs(self) -> int:
        return self.weights * self.after

    @property
    def value(self) -> str:
        return f"{self.name}.act" if self.act else f"{self.name}.norm" if self.norm else self.name

    def choices(self, axis: str) -> int:
        return self.out if axis == "out" or self.depthwise else self.inp // self.groups


@dataclass(frozen=True)
class Chain:
    graph: Graph
    pieces: tuple[Piece, ...]  # the classifier is the last one, where there is one
    head: str  # "linear" or "cosine"
    embedding: tuple[str, int]  # what the head reads, and its features
    views: dict[str, str]  # a flattened vector -> what it is the memory of

    @property
    def body(self) -> tuple[Piece, ...]:
        return self.pieces[:-1] if self.head == "linear" else self.pieces

    @property
    def ways(self) -> int:
        return self.graph.shape(self.graph.output)[1]


@st.composite
def chains(draw: st.DrawFn) -> Chain:
    small, flags = st.integers(1, 4), st.booleans()
    convs, dense = draw(st.integers(0, 4)), draw(st.integers(0, 2))
    if convs + dense == 0:
        dense = 1
    pieces: list[Piece] = []
    views: dict[str, str] = {}
    if convs:
        b = Builder(draw(small), draw(st.integers(3, 6)), draw(st.integers(3, 6)))
    else:
        b = Builder(draw(st.integers(2, 12)))
    x = "input"
    for i in range(convs):
        _, c, h, w = b.shape(x)
        kind = draw(st.sampled_from(["plain", "depthwise", "grouped"]))
        groups = {"plain": 1, "depthwise": c, "grouped": 2 if c % 2 == 0 else 1}[kind]
        out = c if kind == "depthwise" else groups * draw(small)
        kernel, stride = draw(st.sampled_from([2, 3])), draw(st.integers(1, 2))
        bias, norm, act = draw(flags), draw(flags), draw(flags)
        source, x = x, b.conv(x, out, kernel, groups, bias=bias, stride=(stride,) * 2, name=f"l{i}")
        after = math.prod(b.shape(x)[2:])
        pieces.append(Piece(out, c, kernel, groups, h * w, after, bias, norm, act, source, f"l{i}"))
        x = b.norm(x, name=f"l{i}.norm") if norm else x
        x = b.relu(x, name=f"l{i}.act") if act else x
    if convs:
        if draw(flags):
            x = b.add("adaptive_avg_pool2d", x, size=(1, 1), name="pool")
        _, c, h, w = b.shape(x)
        flat = b.flatten(x, name="flat")
        if c == 1 or h * w == 1:  # channels last and channels first are one order
            views[flat] = x
        x = flat
    head = draw(st.sampled_from(["linear", "cosine"]))
    for i in range(convs, convs + dense):
        features, out, bias, act = b.shape(x)[1], draw(small), draw(flags), draw(flags)
        source, x = x, b.linear(x, out, bias, name=f"l{i}")
        pieces.append(Piece(out, features, 0, 1, 1, 1, bias, False, act, source, f"l{i}"))
        x = b.relu(x, name=f"l{i}.act") if act else x
    embedding, ways = (x, b.shape(x)[1]), draw(st.integers(2, 4))
    if head == "linear":
        pieces.append(Piece(ways, embedding[1], 0, 1, 1, 1, True, False, False, x, "head"))
        out = b.linear(x, ways, name="head")
    else:
        roles = {"prototypes": (ways, embedding[1]), "scale": (1,), "bias": (1,)}
        out = b.add("cosine", x, params=roles, name="head")
    return Chain(b.graph(out), tuple(pieces), head, embedding, views)


Chosen = dict[str, tuple[int, ...]]  # layer -> channels


def saved(chain: Chain, first: int, whole: set[str], parts: int, inclusive: bool) -> int:
    """Bytes kept: these values, parts of others, and a bit for each element of each ReLU passed.

    Gradient flows from the piece `first` on, through its own ReLU too if `inclusive`.  Of a value
    that is kept whole the ReLU's bits are known.
    """
    if chain.head == "cosine":
        whole = whole | {chain.embedding[0]}
    masks = 0
    for i, p in enumerate(chain.pieces):
        if p.act and p.value not in whole and (i > first or (inclusive and i == first)):
            masks += -(-p.out * p.after // 8)
    stored = {chain.views.get(v, v) for v in whole}
    return masks + parts + sum(4 * chain.graph.values[v].size for v in stored)


def io(chain: Chain) -> int:
    def both(p: Piece) -> int:
        return p.inp * p.before + p.out * p.after // (p.groups if p.depthwise else 1)

    return 4 * max(map(both, chain.pieces))


def costs(chain: Chain, chosen: Chosen, method: TinyTrain, states: int) -> tuple[int, int]:
    """(memory in bytes, MACs) of the backward pass: appendix A.4 of the paper, for one sample."""
    updated = macs = parts = 0
    whole: set[str] = set()
    names = [p.name for p in chain.pieces]
    first = min(names.index(n) for n in chosen)
    for i, p in enumerate(chain.pieces):
        if i > first:
            macs += p.macs  # the gradient goes on to its input
        if p.name == "head":
            updated += p.params
            macs += p.macs
            whole.add(p.source)
            continue
        if p.name not in chosen:
            continue
        k, out_axis = len(chosen[p.name]), method.axis == "out" or p.depthwise
        size = p.weights * k // p.choices(method.axis)
        updated += size
        macs += size * p.after
        if method.bias:
            updated += (k if out_axis else p.out) * (p.bias + p.norm)
        if out_axis:  # a group of which nothing is chosen is not needed
            touched = {o // (p.out // p.groups) for o in chosen[p.name]}
            kept = len(touched) * p.inp // p.groups
        else:
            kept = k * p.groups
        if kept == p.inp:
            whole.add(p.source)
        else:
            parts += 4 * kept * p.before
    if chain.head == "cosine":
        macs += (2 * chain.ways + 3) * chain.embedding[1]
    memory = max(io(chain), saved(chain, first, whole, parts, inclusive=True))
    return memory + (2 + states) * 4 * updated, macs


def full_macs(chain: Chain) -> int:
    both = 2 * sum(p.macs for p in chain.pieces) - chain.pieces[0].macs
    return both + (chain.head == "cosine") * (2 * chain.ways + 3) * chain.embedding[1]


# ---- the rule --------------------------------------------------------------------------------


def window(chain: Chain, method: TinyTrain) -> list[Piece]:
    last = chain.body[-3 * method.inspect_blocks :]
    return [p for p in last if method.axis == "out" or p.source != "input"]


def inspection(chain: Chain, method: TinyTrain) -> int:
    """Bytes of the pass that scores the channels: each score and its place."""
    if method.criterion == "l2" and method.channels == "l2":
        return 0
    inside = window(chain, method)
    probed = {p.value if method.axis == "out" else p.source for p in inside}
    scores = {v: chain.graph.shape(v)[1] for v in probed}
    first = min(chain.pieces.index(p) for p in inside) - (method.axis == "in")
    kept = saved(chain, first, probed, 0, inclusive=False)
    return max(io(chain), kept) + 8 * sum(scores.values())


def ranked(chain: Chain, method: TinyTrain, seen: Observed) -> list[Piece]:
    most_w, most_m = (max(f(p) for p in chain.pieces) for f in (_params, _macs))

    def score(p: Piece) -> float:
        if method.criterion == "l2":
            return math.sqrt(sum(n**2 for n in seen.norms[f"{p.name}.weight"][0]))
        total = sum(seen.fisher[p.value if method.axis == "out" else p.source])
        if method.criterion == "fisher":
            return total
        w, m = p.params / most_w, p.macs / most_m
        shares = {"full": w * m, "fisher/memory": w, "fisher/compute": m}
        return total / shares[method.criterion]

    inside = window(chain, method)
    return sorted(inside, key=lambda p: (-score(p), inside.index(p)))


def _params(p: Piece) -> int:
    return p.params


def _macs(p: Piece) -> int:
    return p.macs


def best(p: Piece, method: TinyTrain, seen: Observed, k: int) -> tuple[int, ...]:
    n = p.choices(method.axis)
    if method.channels == "l2":
        out_axis = method.axis == "out" or p.depthwise
        scores = list(seen.norms[f"{p.name}.weight"][0 if out_axis else 1])
    else:
        each = seen.fisher[p.value if method.axis == "out" else p.source]
        scores = [0.0] * n
        for channel, value in enumerate(each):  # of groups, the same place in each
            scores[channel % n] += value
    order = sorted(range(n), key=lambda i: (-scores[i], i))
    return tuple(sorted(order[:k]))


def select(chain: Chain, method: TinyTrain, seen: Observed, states: int) -> Chosen | None:
    """What the paper's greedy rule chooses; None where nothing fits."""
    limit = method.macs_fraction * full_macs(chain)

    def fits(chosen: Chosen) -> bool:
        memory, macs = costs(chain, chosen, method, states)
        return memory <= method.budget and macs <= limit

    if inspection(chain, method) > method.budget:
        return None
    chosen: Chosen = {}
    order = ranked(chain, method, seen)
    for p in order:
        k = max(1, round(method.channel_ratio * p.choices(method.axis)))
        more = {**chosen, p.name: best(p, method, seen, k)}
        if fits(more):
            chosen = more
        elif method.greedy == "stop":
            break
    if method.fill:
        for p in order:
            if p.name in chosen:
                sizes = range(p.choices(method.axis), len(chosen[p.name]) - 1, -1)
                tried = ({**chosen, p.name: best(p, method, seen, k)} for k in sizes)
                chosen = next(filter(fits, tried))
    return chosen or None


# ---- drawn methods ---------------------------------------------------------------------------


@st.composite
def methods(draw: st.DrawFn) -> TinyTrain:
    return TinyTrain(
        macs_fraction=draw(st.sampled_from([0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0])),
        inspect_blocks=draw(st.integers(1, 3)),
        channel_ratio=draw(st.sampled_from([0.125, 0.25, 0.5, 1.0])),
        fill=draw(st.booleans()),
        axis=draw(st.sampled_from(["out", "in"])),
        criterion=draw(
            st.sampled_from(["full", "fisher", "fisher/memory", "fisher/compute", "l2"])
        ),
        channels=draw(st.sampled_from(["fisher", "l2"])),
        greedy=draw(st.sampled_from(["skip", "stop"])),
        bias=draw(st.booleans()),
    )


optimizers = st.sampled_from([SGD(), SGD(momentum=0.9), Adam()])


@st.composite
def scores(draw: st.DrawFn, chain: Chain) -> Observed:
    """Of every value and weight; small numbers, so that there are ties."""
    number = st.one_of(st.integers(0, 3).map(float), st.floats(0, 100))

    def some(n: int) -> tuple[float, ...]:
        return tuple(draw(st.lists(number, min_size=n, max_size=n)))

    values = {p.value for p in chain.body} | {p.source for p in chain.body if p.source != "input"}
    shapes = {f"{p.name}.weight": (p.out, p.inp // p.groups) for p in chain.pieces}
    return Observed(
        fisher={v: some(chain.graph.shape(v)[1]) for v in sorted(values)},
        norms={w: (some(out), some(inp)) for w, (out, inp) in shapes.items()},
        samples=5,
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[Chain, TinyTrain, SGD | Adam, Observed]:
    chain = draw(chains())
    method = draw(methods())
    if not window(chain, method):
        method = method.model_copy(update={"axis": "out"})
    least = max(io(chain), inspection(chain, method))
    more = draw(st.sampled_from([-1, 0, 100, 300, 600, 1000, 2000, 4000, 10**6]))
    method = method.model_copy(update={"ram": least + more + draw(st.integers(0, 99))})
    return chain, method, draw(optimizers), draw(scores(chain))


def planned(
    chain: Chain, method: TinyTrain, optimizer: SGD | Adam, seen: Observed, ram: int | None = None
) -> Plan:
    return plan(chain.graph, None, method, optimizer, samples=seen, ram=ram)


def chosen_of(p: Plan, method: TinyTrain, chain: Chain) -> Chosen:
    """Layer -> channels, after a look at everything else that was selected."""
    chosen: Chosen = {}
    pieces = {piece.name: piece for piece in chain.pieces}
    extra: dict[str, tuple[int, ...] | None] = {}
    for u in p.selection.updates:
        name = u.param.removesuffix(".weight")
        if name in pieces and u.param.endswith(".weight") and name != "head":
            out_axis = method.axis == "out" or pieces[name].depthwise
            assert (u.slice.inp if out_axis else u.slice.out) is None
            channels = u.slice.out if out_axis else u.slice.inp
            assert channels is not None
            chosen[name] = channels
        else:
            assert u.slice.inp is None
            extra[u.param] = u.slice.out
    expected: dict[str, tuple[int, ...] | None] = {}
    if chain.head == "linear":
        expected |= {"head.weight": None, "head.bias": None}
    for name, channels in chosen.items() if method.bias else ():
        rows = channels if method.axis == "out" or pieces[name].depthwise else None
        expected |= {f"{name}.bias": rows} if pieces[name].bias else {}
        expected |= {f"{name}.norm.bias": rows} if pieces[name].norm else {}
    assert extra == expected
    return chosen


# ---- the tests -------------------------------------------------------------------------------


@settings(max_examples=100)
@given(cases())
def test_the_selection_is_that_of_the_rule_read_word_by_word(case):
    chain, method, optimizer, seen = case
    want = select(chain, method, seen, len(optimizer.states))
    if want is None:
        with pytest.raises(DoesNotFit):
            planned(chain, method, optimizer, seen)
        return
    p = planned(chain, method, optimizer, seen)
    assert chosen_of(p, method, chain) == want


@settings(max_examples=40)
@given(cases(), st.data())
def test_no_budget_is_exceeded_nor_the_ram_of_the_whole_plan(case, data):
    chain, method, optimizer, seen = case
    ram = data.draw(st.one_of(st.none(), st.integers(1500, 9000)))
    try:
        p = planned(chain, method, optimizer, seen, ram)
    except DoesNotFit:
        return
    chosen = chosen_of(p, method, chain)
    memory, macs = costs(chain, chosen, method, len(optimizer.states))
    assert memory <= method.budget and macs <= method.macs_fraction * full_macs(chain)
    assert inspection(chain, method) <= method.budget
    assert ram is None or p.cost.ram <= ram
    assert p.cost.trained_params == sum(t.size for t in p.program.trained)


def hints(error: DoesNotFit) -> Iterator[dict[str, object]]:
    """The settings that each line of the error proposes."""
    for line in error.details["try"]:
        found = re.findall(r"--set (\w+)=(\S+?)(?=,|\s|$)", line)
        if found:
            kinds = {"ram": int, "macs_fraction": float, "inspect_blocks": int, "greedy": str}
            yield {key: kinds[key](value) for key, value in found}


@settings(max_examples=40)
@given(cases(), st.data())
def test_the_budgets_that_a_refusal_names_are_the_smallest_that_do(case, data):
    chain, method, optimizer, seen = case
    least = inspection(chain, method)
    ram = data.draw(st.sampled_from([1, least - 1, least, least + 40, 10**6]))
    share = data.draw(st.sampled_from([0.001, 0.1, 0.3, 1.0]))
    method = method.model_copy(update={"ram": max(1, ram), "macs_fraction": share})
    try:
        planned(chain, method, optimizer, seen)
        return
    except DoesNotFit as error:
        proposed = list(hints(error))
    budgets = [h for h in proposed if h.keys() & {"ram", "macs_fraction"}]
    assert budgets
    for settings_ in budgets:
        better = method.model_copy(update=settings_)
        planned(chain, better, optimizer, seen)
        less = {"ram": -1, "macs_fraction": -1e-4}
        for key in settings_.keys() & less.keys():
            worse = better.model_copy(update={key: settings_[key] + less[key]})
            if worse.budget < 1 or worse.macs_fraction <= 0:
                continue
            with pytest.raises(DoesNotFit):
                planned(chain, worse, optimizer, seen)
    for settings_ in proposed:
        if "greedy" in settings_:
            planned(chain, method.model_copy(update=settings_), optimizer, seen)
        if "inspect_blocks" in settings_:
            assert inspection(chain, method.model_copy(update=settings_)) <= method.budget


# ---- cases by hand ---------------------------------------------------------------------------


def three() -> Chain:
    """Three layers of 8 channels each: 1x1 images, so that every figure is easy."""
    b = Builder(8)
    x, pieces = "input", []
    for i in range(3):
        pieces.append(Piece(8, 8, 0, 1, 1, 1, True, False, False, x, f"l{i}"))
        x = b.linear(x, 8, name=f"l{i}")
    pieces.append(Piece(2, 8, 0, 1, 1, 1, True, False, False, x, "head"))
    return Chain(b.graph(b.linear(x, 2, name="head")), tuple(pieces), "linear", (x, 8), {})


def seen_of(chain: Chain, *potentials: float) -> Observed:
    body = {p.value: s for p, s in zip(chain.body, potentials, strict=True)}
    fisher = {v: tuple(s * (c + 1) / 36 for c in range(8)) for v, s in body.items()}
    return Observed(fisher=fisher, samples=1)


def test_skipping_goes_on_after_a_layer_that_does_not_fit_and_stopping_does_not():
    chain = three()
    seen = seen_of(chain, 3.0, 2.0, 1.0)
    by = {"ram": 10**6, "macs_fraction": 0.45}  # 158 of 352: the first layer alone takes 176
    skip = chosen_of(planned(chain, TinyTrain(**by), SGD(), seen), TinyTrain(), chain)
    assert skip == {"l1": (6, 7), "l2": (6, 7)}
    with pytest.raises(DoesNotFit) as error:
        planned(chain, TinyTrain(**by, greedy="stop"), SGD(), seen)
    assert {"greedy": "skip"} in list(hints(error.value))
    swapped = seen_of(chain, 2.0, 1.0, 3.0)
    p = planned(chain, TinyTrain(**by, greedy="stop"), SGD(), swapped)
    assert chosen_of(p, TinyTrain(), chain) == {"l2": (6, 7)}


def test_of_equal_scores_the_first_layer_and_channel_are_taken():
    chain = three()
    fisher = {p.value: (1.0,) * 8 for p in chain.body}
    cost = costs(chain, {"l1": (0, 1)}, TinyTrain(), 0)[0]
    method = TinyTrain(ram=cost, macs_fraction=0.45)
    p = planned(chain, method, SGD(), Observed(fisher=fisher))
    assert chosen_of(p, method, chain) == {"l1": (0, 1)}  # the first does not keep the MACs


def test_random_criteria_are_draws_of_the_seed():
    chain = three()
    method = TinyTrain(ram=10**6, macs_fraction=1.0, criterion="random", channels="random")
    drawn = {
        seed: chosen_of(
            planned(chain, method.model_copy(update={"seed": seed}), SGD(), Observed()),
            method,
            chain,
        )
        for seed in (0, 0, 1, 2, 3)
    }
    assert drawn[0] == chosen_of(planned(chain, method, SGD(), Observed()), method, chain)
    assert len({str(c) for c in drawn.values()}) == 4
    assert all(len(c) == 2 for each in drawn.values() for c in each.values())


def test_filling_gives_the_best_layer_its_channels_first():
    chain = three()
    seen = seen_of(chain, 1.0, 2.0, 3.0)
    room = {"l1": (6, 7), "l2": tuple(range(8))}
    memory, macs = costs(chain, room, TinyTrain(), 2)
    method = TinyTrain(
        ram=memory + 16 * 8 - 1, macs_fraction=(macs + 8) / full_macs(chain), fill=True
    )
    p = planned(chain, method, Adam(), seen)
    assert chosen_of(p, method, chain) == room


def test_a_layer_that_fits_whole_is_filled_though_one_channel_fewer_would_not_fit():
    """So it is on a board: a slice is put together in a buffer of the whole weight's size."""
    chain = three()
    method = TinyTrain(ram=10**6, macs_fraction=1.0, fill=True)

    def fits(selection: Selection) -> bool:
        return all(u.slice.out is None or len(u.slice.out) in (2, 8) for u in selection.updates)

    limits = Limits(optimizer=SGD(), fits=fits)
    selection = method.select_for(chain.graph, seen_of(chain, 1, 1, 1), limits)
    assert [len(u.slice.out) for u in selection.updates if u.slice.out] == [8, 8, 8]


def test_a_refusal_names_what_the_inspection_takes_where_that_is_more_than_training():
    chain = three()
    method = TinyTrain(ram=1, macs_fraction=1.0, channel_ratio=0.125)
    with pytest.raises(DoesNotFit, match="inspecting 6 blocks needs") as error:
        planned(chain, method, SGD(), seen_of(chain, 1, 1, 1))
    # three activations of 8 floats, and 24 scores with their gradients; training takes 272
    assert list(hints(error.value)) == [{"ram": 3 * 32 + 8 * 24}]
    assert costs(chain, {"l2": (7,)}, method, 0)[0] == 272


def test_input_channels_of_a_grouped_convolution_add_up_the_scores_of_their_place_in_each_group():
    b = Builder(2, 3, 3)
    x = b.conv(b.conv("input", 6, 1, name="below"), 4, 3, groups=2, name="grouped")
    graph = b.graph(b.linear(b.flatten(x), 2, name="head"))
    fisher = {"below": (1.0, 5.0, 0.0, 4.0, 1.0, 6.0)}  # in each place 5, 6 and 6
    method = TinyTrain(ram=10**6, macs_fraction=1.0, axis="in", channel_ratio=0.34)
    (update, *_) = plan(graph, method=method, samples=Observed(fisher=fisher)).selection.updates
    assert (update.param, update.slice.inp) == ("grouped.weight", (1,))


def test_a_share_of_macs_that_floats_round_down_is_named_one_step_larger():
    p, q, s = 3, 10, 3  # 63 of 90, and 0.7 * 90 is 62.999...
    b = Builder(p)
    graph = b.graph(b.linear(b.linear("input", q, name="l0"), s, name="head"))
    full, least = p * q + 2 * q * s, p + 2 * q * s
    exact = least * 10_000 // full / 10_000
    assert least * 10_000 % full == 0 and exact * full < least
    method = TinyTrain(ram=10**6, macs_fraction=0.01, channel_ratio=0.01)
    seen = Observed(fisher={"l0": (1.0,) * q})
    with pytest.raises(DoesNotFit) as error:
        plan(graph, method=method, samples=seen)
    (named,) = hints(error.value)
    assert named == {"macs_fraction": pytest.approx(exact + 1e-4)}
    plan(graph, method=method.model_copy(update=named), samples=seen)


def test_a_layers_value_is_after_its_norms_and_its_activation_and_no_further():
    b = Builder(3, 5, 5)
    x = b.relu(b.norm(b.conv("input", 4, name="a"), name="a.norm"), name="a.act")
    x = b.conv(b.relu(b.norm(x, name="other"), name="again"), 4, name="b")
    x = b.add("add", x, b.relu(x, name="branch"), name="sum")
    graph = b.graph(b.linear(b.flatten(x), 2, name="head"))
    found = {x.node.name: x for x in layers(graph)}
    assert {n: x.value for n, x in found.items()} == {"a": "a.act", "b": "b", "head": "head"}
    assert found["a"].biases == ("a.bias", "a.norm.bias") and found["a"].others == (
        "a.norm.weight",
    )
    assert found["a"].params == 4 * 3 * 9 + 3 * 4 and found["b"].params == 4 * 4 * 9 + 4


def test_the_window_is_the_last_blocks_and_what_follows_them():
    graph = graphs.blocks_net({"residual": True}, {"gate": True}, {"residual": True})
    names = [x.node.name for x in last_layers(graph, 1)]
    assert names == ["b2.expand", "b2.dw", "b2.project", "mix"]
    gated = [x.node.name for x in last_layers(graph, 2)]
    assert gated[:5] == ["b1.expand", "b1.dw", "b1.reduce", "b1.grow", "b1.project"]
    assert last_layers(graph, 9)[0].node.name == "b0.expand"
    assert head_of(graph).node.name == "head" and "head" not in gated
    values = {x.node.name: x.value for x in layers(graph)}
    assert values["b1.expand"] == "b1.a1" and values["b1.reduce"] == "b1.relu"
    assert values["b1.grow"] == "b1.gate" and values["b2.project"] == "b2.n3"


def test_a_budget_is_a_size_or_a_number_of_bytes():
    assert TinyTrain(ram="0.5MiB").budget == 2**19 and TinyTrain(ram=7).budget == 7
    with pytest.raises(UsageError, match="is not a size"):
        planned(three(), TinyTrain(ram="plenty"), SGD(), seen_of(three(), 1, 1, 1))


def test_a_board_without_room_for_any_layer_says_so():
    chain = three()
    method = TinyTrain(ram=10**6, macs_fraction=1.0)
    seen = seen_of(chain, 1, 1, 1)
    enough = planned(chain, method, SGD(), seen).cost.ram
    assert planned(chain, method, SGD(), seen, ram=enough).cost.ram <= enough
    with pytest.raises(DoesNotFit, match="no layer fits") as error:
        planned(chain, method, SGD(), seen, ram=600)
    assert "a board with more RAM" in str(error.value)


def test_limits_default_to_no_board():
    chain = three()
    limits = Limits(optimizer=SGD())
    selection = TinyTrain(ram=10**6, macs_fraction=1.0).select_for(
        chain.graph, seen_of(chain, 1, 1, 1), limits
    )
    assert {u.param for u in selection.updates} > {"l0.weight", "l1.weight", "l2.weight"}


@pytest.mark.parametrize(("ram", "says"), [("much", "not a size"), (0, "no memory at all")])
def test_a_budget_that_is_no_size_is_refused_when_it_is_given(ram, says):
    with pytest.raises(UsageError, match=says):
        TinyTrain(ram=ram)
