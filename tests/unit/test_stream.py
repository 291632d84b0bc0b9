"""Frozen layers that take samples a few at a time: where these wait, and what that holds."""

from __future__ import annotations

from itertools import product

import pytest
from graphs import Builder, Graph
from hypothesis import given, settings
from hypothesis import strategies as st

from modicum.lower import Program, lower
from modicum.ops import OPS
from modicum.optim import SGD
from modicum.selection import Selection, Update
from modicum.stream import Pass, Streaming, dynamic_by_step, streaming


def blocks(*widths: int, side: int = 8, residual: bool = False) -> Graph:
    """Convolution, norm, ReLU and pooling, so many times, and a linear head."""
    b = Builder(2, side, side)
    x = "input"
    for i, width in enumerate(widths):
        y = b.norm(b.conv(x, width, name=f"conv{i}"), name=f"norm{i}")
        if residual:
            y = b.add("add", y, b.norm(b.conv(x, width, kernel=1), name=f"short{i}"))
        y = b.add("clamp", y, lo=0.0, hi=None)
        x = b.add("max_pool2d", y, kernel=(2, 2), stride=(2, 2), pad=(0, 0), dilation=(1, 1),
                  ceil=False)  # fmt: skip
    return b.graph(b.linear(b.flatten(x), 3, name="head"))


def trained(graph: Graph, *params: str, batch: bool = True) -> Program:
    norms = tuple(n.name for n in graph.nodes if n.op == "batch_norm") if batch else ()
    updates = tuple(Update(param=p) for p in params)
    return lower(graph, Selection(updates=updates, batch_norms=norms), SGD())


def held(program: Program, passes: tuple[Pass, ...], samples: int, chunk: int) -> int:
    """The most bytes at once when `samples` take the passes, by doing so with sizes alone.

    Fails where a node reads what is not there.  Without the last copy into one tensor.
    """
    graph = program.graph

    def size(values) -> int:
        homes = set()
        for value in values:
            while value in graph.by_name and OPS[graph.by_name[value].op].view(
                graph, graph.by_name[value]
            ):
                value = graph.by_name[value].inputs[0]
            homes.add(value)
        return sum(graph.values[v].bytes for v in homes - {graph.input})

    waiting = [set() for _ in range(samples // chunk)]
    most = 0
    for each in passes:
        for i in range(len(waiting)):
            live, mine = set(waiting[i]), set(waiting[i]) if not each.kept else set()
            waiting[i] = set()
            rest = chunk * sum(map(size, waiting))
            most = max(most, rest + chunk * size(live | mine))
            for k, node in enumerate(each.nodes):
                assert set(node.inputs) <= live | mine | {graph.input}, node.name
                later = {n.name for n in each.nodes[k + 1 :]}
                if each.norm is not None:
                    later.add(each.norm.name)
                over = set(node.inputs) if node.name in each.overwriting else set()
                assert not over & mine
                most = max(most, rest + chunk * size((live | mine | {node.name}) - over))
                live = {
                    v
                    for v in (live - over) | {node.name}
                    if any(n.name in later for n in graph.consumers[v]) or v in each.holds
                }
                if k + 1 == each.kept:
                    mine = {v for v in each.holds if v in live}
                    assert mine == set(each.holds)
            if each.norm is not None:
                assert each.norm.inputs[0] in live | mine | {graph.input}
            waiting[i] = mine
    return most


def always(program: Program, samples: int) -> int:
    """The samples themselves, and means and variances of frozen norms."""
    frozen = [n for n in program.graph.nodes if not program.wanted[n.name].any]
    norms = [n for n in frozen if n.op == "batch_stat_norm"]
    image = samples * program.graph.values["input"].bytes
    return image + sum(8 * program.graph.shape(n.name)[1] for n in norms)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.booleans(),
    st.booleans(),
    st.sampled_from([(4, 1), (4, 2), (6, 3), (1, 1)]),
    st.sampled_from([0.0, 0.1, 1.0, 100.0]),
)
@settings(deadline=None, max_examples=60)
def test_the_peak_is_what_the_samples_hold_on_their_way(widths, residual, batch, sizes, twice):
    graph = blocks(*widths, residual=residual)
    program = trained(graph, "head.weight", batch=batch)
    samples, chunk = sizes
    made = streaming(program, samples, chunk, twice=twice)
    way = held(program, made.passes, samples, chunk) + always(program, samples)
    moved = chunk * sum(program.graph.values[v].bytes for v in made.passes[-1].holds)
    assert way <= made.peak <= way + moved
    assert made.again <= twice * sum(m.forward for m in program.macs.values())


def test_without_statistics_of_the_batch_samples_pass_once():
    program = trained(blocks(4, 8, 8), "head.weight", batch=False)
    made = streaming(program, 6)
    assert len(made.passes) == 1 and made.passes[0].norm is None and made.again == 0
    image, conv, pooled = 2 * 64 * 4, 4 * 64 * 4, 4 * 16 * 4
    assert made.peak == 6 * image + conv + max(pooled, 0) + 6 * 8 * 4


def test_a_norm_of_the_batch_has_a_pass_of_its_own():
    program = trained(blocks(4, 8, 8), "head.weight")
    made = streaming(program, 6)
    assert [p.norm.name for p in made.passes if p.norm] == ["norm0", "norm1", "norm2"]
    assert made.passes[-1].norm is None
    running = streaming(program, 6, batch_norms=False)  # as in prediction
    assert len(running.passes) == 1


def test_no_cuts_hold_less_than_those_that_are_chosen():
    """Against all pairs of cuts before the two norms, sizes counted on the way."""
    program = trained(blocks(6, 3), "head.weight")
    graph = program.graph
    frozen = [n for n in graph.nodes if not program.wanted[n.name].any]
    norms = [i for i, n in enumerate(frozen) if n.op == "batch_stat_norm"]

    def peak(cuts: tuple[int, int]) -> int:
        passes, at = [], 0
        for to, stop in zip((*cuts, len(frozen)), (*norms, len(frozen)), strict=True):
            names = {n.name for n in frozen[to:]}
            holds = tuple(
                v
                for v in (n.name for n in frozen[:to])
                if any(n.name in names or program.wanted[n.name].any for n in graph.consumers[v])
            )
            over = frozenset(
                n.name for i, n in enumerate(frozen[at:stop], at)
                if n.op in ("clamp", "batch_stat_norm") and n.inputs[0] not in holds
                and (to != at or i > at)
            )  # fmt: skip
            norm = frozen[stop] if stop < len(frozen) else None
            passes.append(Pass(tuple(frozen[at:stop]), to - at, holds, norm, over))
            at = to
        return held(program, tuple(passes), 5, 1) + always(program, 5)

    first = range(norms[0] + 1)
    pairs = [(a, b) for a, b in product(first, range(norms[1] + 1)) if b >= a]
    able = [p for p in pairs if p[1] in (p[0], *range(norms[0] + 1, norms[1] + 1))]
    made = streaming(program, 5, twice=100.0)
    last = sum(graph.values[v].bytes for v in made.passes[-1].holds)
    assert made.peak <= min(map(peak, able)) + last


def test_fewer_macs_twice_hold_more():
    program = trained(blocks(16, 4, 4), "head.weight")
    peaks = [streaming(program, 8, twice=t) for t in (0.0, 0.7, 3.0)]
    assert peaks[0].again == 0
    assert peaks[0].peak > peaks[1].peak >= peaks[2].peak
    assert 0 < peaks[1].again <= peaks[2].again


def test_nothing_is_computed_twice_for_what_the_others_hold_anyway():
    program = trained(blocks(2, 64, 64), "conv1.weight", "conv2.weight", "head.weight")
    made = streaming(program, 8, twice=1.0)
    assert made.again == 0 and made.peak <= made.backward


def test_where_all_is_trained_only_the_samples_are_held():
    program = trained(blocks(4, 4), "conv0.weight", "head.weight")
    made = streaming(program, 3)
    assert made.passes == (Pass((), 0, (), None, frozenset()),)
    assert made.peak == 3 * 2 * 64 * 4
    assert made.forward == max(
        held
        for step, held in zip(program.steps, dynamic_by_step(program, 3), strict=True)
        if step.phase in ("forward", "save")
    )


@pytest.mark.parametrize("chunk", [5, 9])
def test_all_samples_at_once_are_one_chunk(chunk):
    program = trained(blocks(4, 4), "head.weight")
    made: Streaming = streaming(program, 5, chunk)
    assert made.chunk == 5
