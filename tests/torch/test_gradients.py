"""Every gradient of `apply` against PyTorch's autograd on the original model."""

from __future__ import annotations

import graphs
import pytest
import torch
from cases import CASES, Case, build
from graphs import Builder, explicit, renamed, selections
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import (
    GraphModel,
    autograd_gradients,
    difference,
    held_bytes,
    in_double,
    kept_bytes,
    samples,
    tuned_gradients,
)

import modicum as mo
from modicum.apply import Tuned
from modicum.graph import Graph
from modicum.selection import Selection

rows = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


@rows
def test_gradients_are_those_of_autograd_in_double_precision(case: Case):
    built = build(case)
    x, y = built.samples(3)
    tuned = in_double(Tuned(built.model, built.plan), built.model)
    got = tuned_gradients(tuned, x.double(), y)
    largest, where = difference(got, autograd_gradients(built.model, built.plan, x, y))
    # PyTorch divides by a float 6 in hardsigmoid's double backward pass, too
    rounded = any(node.op == "hardsigmoid" for node in built.graph.nodes)
    assert largest < (1e-6 if rounded else 1e-9), where


@rows
def test_gradients_are_those_of_autograd_in_single_precision(case: Case):
    built = build(case)
    x, y = built.samples(1)
    got = tuned_gradients(Tuned(built.model, built.plan), x, y)
    # a shift that a later norm with batch statistics takes out again has no gradient
    floor = 1e-3 if built.plan.selection.batch_norms else 1e-6
    largest, where = difference(got, autograd_gradients(built.model, built.plan, x, y), floor)
    assert largest < 1e-4, where


@rows
def test_a_batch_has_the_sum_of_its_samples_gradients(case: Case):
    built = build(case)
    if built.plan.selection.batch_norms:
        pytest.skip("batch statistics make samples depend on each other")
    x, y = built.samples(4)
    tuned = in_double(Tuned(built.model, built.plan), built.model)
    together = tuned_gradients(tuned, x.double(), y)
    alone = [tuned_gradients(tuned, x[i : i + 1].double(), y[i : i + 1]) for i in range(4)]
    summed = {name: sum(part[name] for part in alone) for name in together}
    largest, where = difference(together, summed)
    assert largest < 1e-9, where


# ---- one operator at a time, with generated shapes -------------------------------------------


def around(draw: st.DrawFn, grow: graphs.Grow) -> Graph:
    """A trained layer, the operator, a head: both gradients of the operator are wanted."""
    sizes = st.integers(1, 7)
    while True:
        if grow in graphs.IMAGE and (grow not in graphs.FLAT or draw(st.booleans())):
            b = Builder(draw(st.integers(1, 3)), draw(sizes), draw(sizes))
            x = b.conv("input", draw(st.integers(1, 6)), kernel=1, name="below")
        else:
            shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=2))
            b = Builder(*shape)
            x = b.linear("input", draw(sizes), name="below")
        try:
            y = grow(draw, b, x)
        except ValueError:  # a window larger than the image, and the like
            continue
        y = b.flatten(y) if len(b.shape(y)) != 2 else y
        return b.graph(b.linear(y, 3, name="head"))


OPERATORS = {f.__name__.strip("_"): f for f in [*graphs.IMAGE, *graphs.FLAT]}


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_has_autograds_gradients_and_kept_bytes_on_generated_shapes(name):
    @settings(max_examples=8, suppress_health_check=[HealthCheck.large_base_example])
    @given(st.data())
    def check(data: st.DataObject):
        graph = data.draw(st.composite(around)(OPERATORS[name]))
        agrees(graph, data.draw(selections(graph)))

    check()


@settings(max_examples=25)
@given(graphs.jobs())
def test_a_generated_net_has_autograds_gradients_and_kept_bytes(job):
    agrees(job["graph"], job["selection"], job["loss"])


@settings(max_examples=60)
@given(graphs.sliced())
def test_slices_on_both_axes_have_autograds_gradients_and_kept_bytes(job):
    agrees(job["graph"], job["selection"], job["loss"])


def agrees(graph: Graph, selection: Selection, loss: str = "cross_entropy") -> None:
    model = GraphModel(graph)
    x, y = samples(graph, loss, 2)
    captured = mo.capture(model, x)
    method = explicit(renamed(selection, graph, captured))
    plan = mo.plan(captured, method=method, loss=loss)
    tuned = Tuned(model, plan)
    got = tuned_gradients(in_double(tuned, model), x.double(), y)
    # what a later norm takes out again has no gradient but rounding
    largest, where = difference(got, autograd_gradients(model, plan, x, y), floor=1e-3)
    assert largest < 1e-9, where
    assert held_bytes(tuned, x[:1].clone()) == kept_bytes(plan)


# ---- derivatives by differences --------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.note in ("grouped", "slices") or c.id == "max_pools-Full-SGD"],
    ids=lambda case: case.id,
)
def test_gradcheck_finds_the_same_gradients_by_differences(case: Case):
    built = build(case)
    tuned = in_double(Tuned(built.model, built.plan), built.model)
    x = built.samples(1)[0].double()
    names = dict(tuned.named_parameters())

    def outputs(*values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(tuned, dict(zip(names, values, strict=True)), (x,))

    values = [p.detach().clone().requires_grad_() for p in names.values()]
    assert torch.autograd.gradcheck(outputs, values, eps=1e-6, atol=1e-6, fast_mode=True)
