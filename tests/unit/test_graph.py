"""Graphs check themselves, print themselves, and know who reads what."""

from __future__ import annotations

import graphs
import pytest
from graphs import Builder, small_cnn
from hypothesis import given, settings
from pydantic import ValidationError

from modicum.errors import InvalidInput
from modicum.graph import Graph, Node, Param, Value
from modicum.ops import OPS, check_graph

GRAPH = small_cnn()


def changed(**fields: object) -> dict:
    return {**GRAPH.model_dump(), **fields}


def without(mapping: dict, key: str) -> dict:
    return {k: v for k, v in mapping.items() if k != key}


NODES = GRAPH.model_dump()["nodes"]
VALUES = GRAPH.model_dump()["values"]
PARAMS = GRAPH.model_dump()["params"]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"nodes": NODES[::-1]}, "before it is defined"),
        ({"nodes": [*NODES, NODES[0]]}, "defined twice"),
        ({"nodes": NODES[:-1]}, "not computed"),
        ({"output": "nothing"}, "not computed"),
        ({"values": without(VALUES, "act")}, "values and nodes differ"),
        ({"values": {**VALUES, "more": {"name": "more", "shape": (1,)}}}, "values and nodes"),
        ({"values": {**VALUES, "act": {"name": "other", "shape": (1, 8, 8, 8)}}}, "malformed"),
        ({"values": {**VALUES, "act": {"name": "act", "shape": (1, 0, 8, 8)}}}, "malformed"),
        ({"params": without(PARAMS, "head.bias")}, "unknown parameter 'head.bias'"),
        ({"params": {**PARAMS, "x": {"name": "y", "shape": (1,)}}}, "malformed"),
        ({"surprise": 1}, "Extra inputs"),
    ],
)
def test_a_graph_whose_names_do_not_resolve_cannot_be_made(fields, why):
    with pytest.raises(ValidationError, match=why):
        Graph.model_validate(changed(**fields))


def test_a_graph_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        GRAPH.output = "act"


@settings(max_examples=30)
@given(graphs.graphs())
def test_a_generated_graph_comes_back_from_its_json_with_the_same_hash(graph):
    again = Graph.model_validate_json(graph.model_dump_json())
    assert again == graph and again.hash == graph.hash
    check_graph(again)


def test_readers_users_and_layers_are_found():
    b = Builder(2, 4, 4)
    x = b.conv("input", 2, name="a")
    y = b.add("add", x, b.relu(x, name="r"), name="sum")
    graph = b.graph(b.linear(b.flatten(y, name="f"), 2, name="head"))
    assert [n.name for n in graph.consumers["a"]] == ["r", "sum"]
    assert graph.consumers["head"] == ()
    assert [(n.name, role) for n, role in graph.users_of("a.bias")] == [("a", "bias")]
    assert [n.name for n in graph.layers()] == ["a", "head"]
    assert graph.trainable() == ["a.weight", "a.bias", "head.weight", "head.bias"]


def test_sizes_are_in_bytes_of_float32():
    assert Value(name="x", shape=(1, 3, 4, 5)).bytes == 240
    assert Param(name="w", shape=(7,)).bytes == 28


def test_a_graph_prints_one_line_per_node_with_shapes_parameters_and_attributes():
    lines = str(GRAPH).splitlines()
    assert len(lines) == 1 + len(GRAPH.nodes)
    assert lines[0] == "input  1x3x8x8"
    assert lines[-1] == "head  1x4 = linear(flat) [head.weight, head.bias]"
    assert any("depthwise  1x8x8x8 = conv2d(act)" in line and "groups=8" in line for line in lines)


def test_the_state_dict_of_another_model_is_refused_with_what_differs():
    shapes = {p.name: p.shape for p in GRAPH.params.values()}
    GRAPH.check_params(shapes, "it")
    GRAPH.check_params({**shapes, "more": (1,)}, "it")
    with pytest.raises(InvalidInput, match="it does not belong to this graph") as caught:
        GRAPH.check_params({**without(shapes, "norm.mean"), "head.bias": (5,)}, "it")
    assert "norm.mean is missing; head.bias is (5,), the graph has (4,)" in str(caught.value)


# ---- what each operator checks ---------------------------------------------------------------


def shape(op: str, *inputs: tuple[int, ...], params: dict | None = None, **attrs: object):
    roles = {role: f"p.{role}" for role in params or {}}
    made = {f"p.{role}": Param(name=f"p.{role}", shape=s) for role, s in (params or {}).items()}
    names = tuple(f"x{i}" for i in range(len(inputs)))
    return OPS[op].shape(Node(name="n", op=op, inputs=names, params=roles, attrs=attrs),
                         list(inputs), made)  # fmt: skip


CONV = {"stride": (1, 1), "padding": (0, 0, 0, 0), "dilation": (1, 1), "groups": 1}
POOL = {"kernel": (2, 2), "stride": (2, 2), "pad": (0, 0), "dilation": (1, 1), "ceil": False}
X = (1, 4, 6, 6)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda: shape("conv2d", X, params={"weight": (8, 3, 1, 1)}, **CONV), "do not fit"),
        (lambda: shape("conv2d", X, params={"weight": (3, 2, 1, 1)}, **{**CONV, "groups": 2}),
         "do not fit"),
        (lambda: shape("conv2d", X, params={"weight": (8, 4, 1, 1), "bias": (7,)}, **CONV), "bias"),
        (lambda: shape("conv2d", X, params={"weight": (8, 4, 1, 1)}, **{**CONV, "stride": (0, 1)}),
         "at least 1"),
        (lambda: shape("conv2d", X, params={"weight": (8, 4, 1, 1)},
                       **{**CONV, "padding": (0, 0, -1, 0)}), "paddings at least 0"),
        (lambda: shape("linear", (1, 5), params={"weight": (2, 4)}), "do not fit"),
        (lambda: shape("linear", X, params={"weight": (2, 6)}), "rank 2 or 3"),
        (lambda: shape("linear", (1, 4), params={"weight": (2, 4), "bias": (3,)}), "bias"),
        (lambda: shape("batch_norm", X, params={"mean": (4,), "var": (5,)}, eps=1e-5), "channels"),
        (lambda: shape("clamp", X, lo=1.0, hi=1.0), "lo < hi"),
        (lambda: shape("max_pool2d", X, **{**POOL, "kernel": (17, 16)}), "256"),
        (lambda: shape("max_pool2d", X, **{**POOL, "stride": (0, 2)}), "at least 1"),
        (lambda: shape("add", X, (1, 4, 6, 5)), "one shape"),
        (lambda: shape("concat", X, (1, 4, 5, 6), dim=1), "differ outside"),
        (lambda: shape("concat", X, X, dim=0), "any dimension but the batch"),
        (lambda: shape("concat", X, X, dim=4), "any dimension but the batch"),
        (lambda: shape("reshape", X, shape=(1, 100)), "does not reshape"),
        (lambda: shape("reshape", X, shape=(2, 72)), "batch kept"),
        (lambda: shape("reshape", X, shape=(1, 2, 6, 12)), "image to another image"),
    ],
)  # fmt: skip
def test_a_malformed_node_says_what_is_wrong(call, why):
    with pytest.raises(ValueError, match=why):
        call()


def test_a_graph_with_an_unknown_operator_or_a_wrong_shape_is_refused():
    nodes = [{**n, "op": "fft"} if n["name"] == "act" else n for n in NODES]
    with pytest.raises(InvalidInput, match="unknown operator 'fft'"):
        check_graph(Graph.model_validate(changed(nodes=nodes)))
    values = {**VALUES, "head": {"name": "head", "shape": (1, 5)}}
    with pytest.raises(InvalidInput, match="'head' has the wrong shape") as caught:
        check_graph(Graph.model_validate(changed(values=values)))
    assert "(1, 5), the operator computes (1, 4)" in str(caught.value)
    nodes = [{**n, "attrs": {}} if n["name"] == "depthwise" else n for n in NODES]
    with pytest.raises(InvalidInput, match=r"'depthwise' .* is malformed"):
        check_graph(Graph.model_validate(changed(nodes=nodes)))
