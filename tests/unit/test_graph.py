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


def test_a_copy_with_changes_does_not_take_along_what_was_derived():
    assert GRAPH.hash and GRAPH.by_name and GRAPH.consumers
    nodes = tuple(n.model_copy(update={"module": "elsewhere"}) for n in GRAPH.nodes)
    changed = GRAPH.model_copy(update={"nodes": nodes})
    assert changed.hash != GRAPH.hash and changed.by_name[GRAPH.output].module == "elsewhere"
    assert GRAPH.model_copy().hash == GRAPH.hash


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
         "stride is 0, not a whole number from 1"),
        (lambda: shape("conv2d", X, params={"weight": (8, 4, 1, 1)},
                       **{**CONV, "padding": (0, 0, -1, 0)}), "padding is -1"),
        (lambda: shape("linear", (1, 5), params={"weight": (2, 4)}), "do not fit"),
        (lambda: shape("linear", X, params={"weight": (2, 6)}), "rank 2 or 3"),
        (lambda: shape("linear", (1, 4), params={"weight": (2, 4), "bias": (3,)}), "bias"),
        (lambda: shape("batch_norm", X, params={"mean": (4,), "var": (5,)}, eps=1e-5), "channels"),
        (lambda: shape("clamp", X, lo=1.0, hi=1.0), "lo < hi"),
        (lambda: shape("max_pool2d", X, **{**POOL, "kernel": (17, 16)}), "256"),
        (lambda: shape("max_pool2d", X, **{**POOL, "stride": (0, 2)}), "stride is 0"),
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


NAN, INF = float("nan"), float("inf")
NOT_TWO = [(1,), (1, 2, 3), 1, None, "11", (1.0, 1.0), (1, 0), (1, True), (1, 65536), (1, 10**400)]
NOT_A_NUMBER = [NAN, INF, -INF, None, "1", True, (1.0,), 1e39, -1e39, 10**400]
NOT_WHOLE = [0, -1, 1.0, NAN, None, "1", True, (1,), 10**400]
NOT_A_FLAG = [0, 1, None, "", "yes", (True,)]
WEIGHT, NORM = {"weight": (8, 4, 1, 1)}, {"mean": (4,), "var": (4,)}
WRONG = [
    ("conv2d", WEIGHT, CONV, {"stride": NOT_TWO, "dilation": NOT_TWO, "groups": [*NOT_WHOLE, 3],
                              "padding": [(0, 0), (0, 0, 0, -1), (0.0,) * 4, None, 0],
                              "standardise": [*NOT_A_NUMBER, 0.0, -1.0, 1e-300]}),
    ("batch_norm", NORM, {"eps": 1e-5, "momentum": 0.1},
     {"eps": [*NOT_A_NUMBER, -1e-5], "momentum": [*filter(None, NOT_A_NUMBER), -0.1, 1.1]}),
    ("group_norm", {}, {"groups": 2, "eps": 1e-5},
     {"groups": [*NOT_WHOLE, 3, 8], "eps": [*NOT_A_NUMBER, 0.0, -1.0, 1e-300]}),
    ("clamp", {}, {"lo": 0.0, "hi": 6.0},
     {"lo": [*filter(None, NOT_A_NUMBER), 6.0, 7], "hi": [*filter(None, NOT_A_NUMBER), 0.0, -1]}),
    ("clamp", {}, {"lo": None, "hi": 6.0}, {"hi": [*NOT_A_NUMBER]}),
    ("clamp", {}, {"lo": -1.0, "hi": None}, {"lo": [*NOT_A_NUMBER], "sign": [True]}),
    ("max_pool2d", {}, POOL, {"kernel": NOT_TWO, "stride": NOT_TWO, "dilation": NOT_TWO,
                              "pad": [(0, -1), (0, 2), (0,), (0.0, 0.0)], "ceil": NOT_A_FLAG}),
    ("max_pool2d", {}, {**POOL, "dilation": (6, 1), "pad": (1, 1)}, {"dilation": [(7, 1)]}),
    ("avg_pool2d", {}, {**POOL, "dilation": (1, 1), "include_pad": True, "divisor": 0},
     {"pad": [(2, 0)], "include_pad": NOT_A_FLAG, "divisor": [-1, 1.5, NAN, True, None, 10**400]}),
    ("adaptive_avg_pool2d", {}, {"size": (1, 1)}, {"size": NOT_TWO}),
    ("resize", {}, {"size": (3, 3), "scales": (0.5, 0.5), "mode": "nearest", "align": False},
     {"size": [*NOT_TWO, (4, 3)], "mode": ["cubic", None, 0], "align": NOT_A_FLAG,
      "scales": [(NAN, 0.5), (0.5, INF), (-0.5, 0.5), (0.5,), (0.5, 1.5), (1e-300, 0.5),
                 (10**400, 0.5), None, "xx"]}),
    ("concat", {}, {"dim": 1}, {"dim": [*NOT_WHOLE, 4]}),
    ("reshape", {}, {"shape": (1, 144)}, {"shape": [(1, 144.0), (1, -12, -12), (144,), None, 144]}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("op", "params", "good", "wrong"), WRONG, ids=[f"{row[0]}{i}" for i, row in enumerate(WRONG)]
)
def test_an_attribute_of_a_wrong_type_or_out_of_range_is_malformed(op, params, good, wrong):
    shape(op, X, params=params, **good)
    for key, values in wrong.items():
        for value in values:
            with pytest.raises((ValueError, TypeError)):
                print(key, value, shape(op, X, params=params, **{**good, key: value}))


@pytest.mark.parametrize(
    ("op", "attrs"),
    [
        ("batch_norm", {"eps": 0.0, "momentum": None}),
        ("batch_norm", {"eps": 0, "momentum": 1}),
        ("clamp", {"lo": -0.0, "hi": None}),
        ("clamp", {"lo": None, "hi": -3}),
        ("clamp", {"lo": 0.0, "hi": 1.0, "sign": True}),
        ("max_pool2d", {**POOL, "dilation": (6, 1), "stride": (6, 1), "pad": (3, 1)}),
        ("resize", {"size": (13, 6), "scales": (2.3, 0.0), "mode": "bilinear", "align": True}),
        ("adaptive_avg_pool2d", {"size": (65535, 1)}),
    ],
)
def test_attributes_at_their_bounds_are_taken(op, attrs):
    assert min(shape(op, X, params=NORM if op == "batch_norm" else {}, **attrs)) > 0


@pytest.mark.parametrize("inputs", [(), ("below", "below"), ("below", "below", "below")])
@pytest.mark.parametrize("op", ["clamp", "add"])
def test_a_node_with_another_number_of_inputs_is_malformed(op, inputs):
    b = Builder(3)
    y = b.linear("input", 3, name="below")
    y = b.add("add", y, y, name="op") if op == "add" else b.relu(y, name="op")
    graph = b.graph(y)
    check_graph(graph)
    if len(inputs) != len(graph.by_name["op"].inputs):
        node = graph.by_name["op"].model_copy(update={"inputs": inputs})
        with pytest.raises(InvalidInput, match="malformed"):
            check_graph(graph.model_copy(update={"nodes": (*graph.nodes[:-1], node)}))


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
