"""Standardised weights: what is prepared, what runs in C and in which order, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import Builder, Graph

from modicum.errors import InvalidInput, UsageError
from modicum.graph import Derived
from modicum.lower import Program, lower, prepare
from modicum.ops import check_graph
from modicum.optim import SGD
from modicum.selection import Selection, Slice, Update
from modicum.state import materialise


def net(groups: int = 1, eps: float = 1e-5) -> Graph:
    b = Builder(6, 5, 5)
    y = b.norm(b.conv("input", 6, groups=groups, name="conv", standardise=eps), name="norm")
    return b.graph(b.linear(b.flatten(y), 3, name="head"))


def train(graph: Graph, *updates: Update, **more: object) -> Program:
    return lower(graph, Selection(updates=updates), SGD(), **more)


def calls(program: Program, node: str = "conv") -> list[tuple[str, str]]:
    return [(s.phase, c.fn) for s in program.steps if s.node == node for c in s.calls]


WEIGHT = Update(param="conv.weight")
HEAD = Update(param="head.weight")


def test_a_frozen_weight_is_a_constant_and_its_norm_stays_apart():
    graph = prepare(net(), Selection(updates=(HEAD,)))
    node = graph.by_name["conv"]
    constant = graph.params[node.params["weight"]]
    assert "standardise" not in node.attrs
    sources = {"weight": "conv.weight"}
    assert constant.derived == Derived(kind="standardise", sources=sources, eps=1e-5)
    assert graph.by_name["norm"].op == "batch_norm"
    assert ("forward", "mo_standardise") not in calls(train(net(), HEAD))


def test_the_constant_has_mean_0_and_variance_1_in_each_output_channel():
    graph = prepare(net(groups=2), Selection(updates=(HEAD,)))
    rng = np.random.default_rng(0)
    state = {
        name: np.abs(rng.normal(2.0, 3.0, param.shape)).astype(np.float32)
        for name, param in net(groups=2).params.items()
    }
    w = materialise(graph, state)["conv.weight*standardised"].reshape(6, -1)
    assert w.mean(1) == pytest.approx(np.zeros(6), abs=1e-6)
    assert w.var(1) == pytest.approx(np.ones(6), rel=1e-4)


def test_a_trained_weight_is_standardised_forward_and_for_dx_and_its_gradient_before_the_update():
    below = Builder(2, 5, 5)
    y = below.conv(below.conv("input", 6, name="below"), 6, name="conv", standardise=0.1)
    graph = below.graph(below.linear(below.flatten(y), 3, name="head"))
    program = train(graph, WEIGHT, Update(param="below.weight"))
    assert calls(program) == [
        ("forward", "mo_standardise"), ("forward", "mo_conv2d_forward"),
        ("backward", "mo_standardise"), ("backward", "mo_conv2d_dx"),
        ("update", "mo_conv2d_dw"), ("update", "mo_standardise_dw"), ("update", "mo_sgd"),
    ]  # fmt: skip


def test_with_accumulation_the_sum_of_the_gradients_is_passed_through_once():
    found = calls(train(net(), WEIGHT, accumulate=3))
    assert found[-4:] == [
        ("backward", "mo_conv2d_dw"),
        ("update", "mo_standardise_dw"), ("update", "mo_sgd"), ("update", "memset"),
    ]  # fmt: skip


def test_a_depthwise_weight_is_turned_so_that_a_channel_is_a_row():
    found = [fn for _, fn in calls(train(net(groups=6), WEIGHT))]
    turn, back = "mo_transpose", "mo_transpose"
    assert found == [
        turn, "mo_standardise", back, "mo_depthwise_forward",
        "mo_depthwise_dw", turn, turn, "mo_standardise_dw", back, "mo_sgd",
    ]  # fmt: skip


@pytest.mark.parametrize("part", [Slice(out=(0, 2)), Slice(inp=(1,))])
def test_a_slice_of_a_standardised_weight_is_refused(part):
    with pytest.raises(UsageError, match="can only be trained whole"):
        train(net(), Update(param="conv.weight", slice=part))


@pytest.mark.parametrize("eps", [0.0, -1.0, float("nan")])
def test_an_eps_that_is_not_positive_is_malformed(eps):
    graph = net()
    conv = graph.by_name["conv"]
    nodes = (conv.model_copy(update={"attrs": {**conv.attrs, "standardise": eps}}),)
    with pytest.raises(InvalidInput, match="malformed"):
        check_graph(graph.model_copy(update={"nodes": (*nodes, *graph.nodes[1:])}))
