"""Inverted residual blocks are found by their structure, and only they."""

from __future__ import annotations

import pytest
from graphs import Builder, inverted_residual
from graphs import blocks_net as net

from modicum.blocks import describe, find_blocks
from modicum.errors import UsageError
from modicum.methods import Blocks, MobileTL

KINDS: list[dict[str, object]] = [
    {},
    {"residual": True},
    {"gate": True, "residual": True},
    {"stride": 2, "gate": True},
    {"norms": False, "residual": True},
    {"acts": False},
]


def test_every_kind_of_block_is_found_with_its_parts():
    found = find_blocks(net(*KINDS))
    assert len(found) == len(KINDS)
    for i, (b, kind) in enumerate(zip(found, KINDS, strict=True)):
        assert (b.expand, b.depthwise, b.project) == (f"b{i}.expand", f"b{i}.dw", f"b{i}.project")
        norms = kind.get("norms", True)
        assert b.internal_norms == ((f"b{i}.n1", f"b{i}.n2") if norms else ())
        assert b.last_norm == (f"b{i}.n3" if norms else None)
        assert b.activations == ((f"b{i}.a1", f"b{i}.a2") if kind.get("acts", True) else ())
        assert bool(b.gate) == bool(kind.get("gate")) and b.residual == bool(kind.get("residual"))
        assert b.nodes[0] == b.expand and set(b.gate) <= set(b.nodes)


def test_the_name_is_the_module_that_holds_the_block():
    (b,) = find_blocks(net({}))
    assert b.name == "b0"


@pytest.mark.parametrize("what", ["separable", "bottleneck", "second reader", "pool inside"])
def test_what_only_looks_like_a_block_is_none(what):
    b = Builder(4, 8, 8)
    y = b.relu(b.conv("input", 8, 1)) if what != "separable" else "input"
    groups = 1 if what == "bottleneck" else b.shape(y)[1]
    inside = y
    y = b.relu(b.conv(y, b.shape(y)[1], 3, groups))
    if what == "pool inside":
        y = b.add("avg_pool2d", y, kernel=(2, 2), stride=(2, 2), pad=(0, 0), ceil=False,
                  include_pad=True, divisor=0)  # fmt: skip
    y = b.conv(y, 4, 1)
    if what == "second reader":
        y = b.add("concat", y, inside, dim=1)
    assert find_blocks(b.graph(b.linear(b.flatten(y), 2))) == ()
    assert describe(()).startswith("none")


@pytest.mark.parametrize("gate_first", [True, False])
def test_the_gate_of_one_pixel_is_found_whichever_factor_of_the_product_it_is(gate_first):
    b = Builder(4, 1, 1)
    y = b.relu(b.conv("input", 12, 1, name="expand"), name="a1")
    y = b.relu(b.conv(y, 12, 3, 12, name="dw"), name="a2")
    squeezed = b.add("adaptive_avg_pool2d", y, name="pool", size=(1, 1))
    squeezed = b.relu(b.conv(squeezed, 2, 1, name="reduce"), name="relu")
    gate = b.add("hardsigmoid", b.conv(squeezed, 12, 1, name="grow"), name="gate")
    factors = (gate, y) if gate_first else (y, gate)
    y = b.conv(b.add("mul", *factors, name="scaled"), 4, 1, name="project")
    graph = b.graph(b.linear(b.flatten(b.add("add", "input", y, name="sum")), 2))
    (found,) = find_blocks(graph)
    assert found.gate == ("pool", "reduce", "relu", "grow", "gate")
    assert (found.expand, found.depthwise, found.project) == ("expand", "dw", "project")
    assert found.residual and "scaled" in found.nodes


# ---- what MobileTL makes of them -------------------------------------------------------------


def test_mobiletl_trains_shifts_inside_and_whole_norms_after_the_projection():
    graph = net({}, {"gate": True, "residual": True})
    chosen = MobileTL(blocks=1).select(graph)
    names = {u.param for u in chosen.updates}
    inside = {f"b1.{n}.bias" for n in ("n1", "n2", "n3")} | {"b1.n3.weight"}
    convs = {f"b1.{n}.weight" for n in ("expand", "dw", "project", "reduce", "grow")}
    gate = {"b1.reduce.bias", "b1.grow.bias"}
    after = {"mix.weight", "mix.bias", "mix.norm.bias", "head.weight", "head.bias"}
    assert names == inside | convs | gate | after
    assert chosen.sign == ("b1.a1", "b1.a2", "mix.act")  # not the gate's relu
    assert chosen.batch_norms == ()
    batch = MobileTL(blocks=2, last_norm="batch").select(graph)
    assert batch.batch_norms == ("b0.n3", "b1.n3")


def test_each_part_of_mobiletl_can_be_left_out():
    graph = net({})
    exact = MobileTL(blocks=1, shift_only=False, sign_backward=False).select(graph)
    assert exact == Blocks(blocks=1, norms="affine").select(graph)
    assert MobileTL(blocks=1, shift_only=False).select(graph).updates == exact.updates
    assert MobileTL(blocks=1, sign_backward=False).select(graph).sign == ()


def test_exact_blocks_follow_the_batch_in_all_their_norms():
    chosen = Blocks(blocks=1).select(net({}, {}))
    assert chosen.batch_norms == ("b1.n1", "b1.n2", "b1.n3", "mix.norm")
    assert chosen.sign == ()


def test_a_folded_norm_has_only_its_shift_and_that_is_the_bias():
    graph = net({"norms": False})
    names = {u.param for u in MobileTL(blocks=1).select(graph).updates}
    assert {"b0.expand.bias", "b0.dw.bias", "b0.project.bias"} <= names


def test_more_blocks_than_there_are_is_an_error_that_names_those_there_are():
    with pytest.raises(UsageError, match="has 2 inverted residual blocks, not 3") as caught:
        MobileTL(blocks=3).select(net({}, {}))
    assert "found 2: b0, b1" in str(caught.value)
    b = Builder(4)
    with pytest.raises(UsageError, match="has 0") as caught:
        Blocks(blocks=1).select(b.graph(b.linear("input", 2)))
    assert "none: no expand 1x1" in str(caught.value)


def test_batch_statistics_that_are_asked_for_need_a_norm():
    b = Builder(3, 8, 8)
    x = inverted_residual(
        b, inverted_residual(b, "input", "b0", 4, norms=False), "b1", 4, norms=False
    )
    graph = b.graph(b.linear(b.flatten(x), 3, name="head"))
    with pytest.raises(UsageError, match="no batch norms"):
        MobileTL(blocks=1, last_norm="batch").select(graph)
    assert Blocks(blocks=1).select(graph).batch_norms == ()  # as PyTorch trains it: exactly


def test_smaller_variants_have_fewer_blocks_and_end_with_the_last_layer():
    method, seen = MobileTL(blocks=3, last_norm="batch"), []
    while method is not None:
        seen.append((method.kind, getattr(method, "blocks", None)))
        method = method.smaller()
    assert seen[:4] == [("mobiletl", 3), ("mobiletl", 2), ("mobiletl", 1), ("last", None)]
