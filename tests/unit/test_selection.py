"""Slices and updates: shapes, checks, and what the methods select."""

from __future__ import annotations

import math

import graphs
import pytest
from graphs import Builder, explicit, small_cnn
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from modicum.errors import UsageError
from modicum.methods import METHODS, Bias, Explicit, Full, Last, Method
from modicum.selection import Slice, Update, check_selection

GRAPH = small_cnn()
ALL = GRAPH.trainable()


def names(method: Method, graph=GRAPH) -> list[str]:
    return [u.param for u in method.select(graph).updates]


# ---- slices ----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [(), (1, 0), (0, 0), (-1, 2), (1, 1, 2)])
def test_channels_are_ascending_distinct_and_not_negative(channels):
    for axis in ("out", "inp"):
        with pytest.raises(ValidationError, match="ascending, distinct, non-negative"):
            Slice(**{axis: channels})


def test_a_slice_has_the_shape_of_its_channels():
    assert Slice().whole and not Slice(out=(0,)).whole
    assert Slice(out=(0, 2)).shape((5, 4, 3, 3)) == (2, 4, 3, 3)
    assert Slice(inp=(1,)).shape((5, 4, 3, 3)) == (5, 1, 3, 3)
    assert Slice(out=(1,), inp=(0, 2, 3)).shape((5, 4)) == (1, 3)
    assert Slice(out=(1, 2, 3)).shape((5,)) == (3,)


@pytest.mark.parametrize("rates", [(), (math.nan,), (math.inf,), (-math.inf,), (1.0, 1e39)])
def test_step_sizes_are_floats_of_the_c_side(rates):
    with pytest.raises(ValidationError):
        Update(param="w", rates=rates)


@settings(max_examples=50)
@given(st.data())
def test_every_generated_selection_is_accepted_and_explicit_selects_it_again(data):
    graph = data.draw(graphs.graphs())
    selection = data.draw(graphs.selections(graph))
    check_selection(graph, selection)
    assert explicit(selection).select(graph) == selection


# ---- methods ---------------------------------------------------------------------------------


def test_full_selects_every_parameter_and_no_statistics():
    assert names(Full()) == ALL
    assert not any(name.endswith(("mean", "var")) for name in ALL)


def test_last_selects_whole_layers_with_the_norms_that_follow_them():
    head = ["head.weight", "head.bias"]
    assert names(Last(n=1)) == head
    assert names(Last(n=2)) == ["pointwise.weight", "pointwise.bias", *head]
    assert names(Last(n=4)) == names(Last(n=99)) == ALL
    b = Builder(3, 4, 4)
    x = b.norm(b.conv(b.norm("input", name="first"), 4, name="conv"), name="after")
    graph = b.graph(b.flatten(x))
    assert names(Last(n=1), graph) == ["conv.weight", "conv.bias", "after.weight", "after.bias"]


def test_bias_selects_shifts_and_the_last_layers_whole():
    shifts = ["norm.bias", "depthwise.bias", "pointwise.bias"]
    assert names(Bias(head=0)) == [*shifts, "head.bias"]
    assert names(Bias()) == [*shifts, "head.weight", "head.bias"]
    assert names(Bias(head=2))[-4:] == names(Last(n=2))


def test_explicit_selects_by_pattern_and_the_first_that_matches_decides():
    method = Explicit(params={"head.weight": {"out": (1,)}, "*.weight": None})
    chosen = {u.param: u.slice for u in method.select(GRAPH).updates}
    assert chosen["head.weight"] == Slice(out=(1,)) and chosen["stem.weight"] == Slice()
    assert list(chosen) == [n for n in ALL if n.endswith("weight")]


def test_input_channels_of_an_explicit_pattern_apply_where_there_are_any():
    chosen = Explicit(params={"head.*": {"out": (0,), "inp": (3,)}}).select(GRAPH).updates
    assert [u.slice for u in chosen] == [Slice(out=(0,), inp=(3,)), Slice(out=(0,))]


def test_a_pattern_without_a_match_is_an_error_with_the_names_there_are():
    with pytest.raises(UsageError, match=r"no trainable parameter matches 'heads\.\*'") as caught:
        Explicit(params={"head.*": None, "heads.*": None}).select(GRAPH)
    assert "stem.weight" in str(caught.value)


def test_methods_that_have_nothing_to_select_are_usage_errors():
    b = Builder(3, 4, 4)
    graph = b.graph(b.flatten(b.norm("input")))
    with pytest.raises(UsageError, match="no convolution or linear layer"):
        Last(n=1).select(graph)
    b = Builder(4)
    graph = b.graph(b.linear("input", 2, bias=False))
    with pytest.raises(UsageError, match="selects nothing to update"):
        check_selection(graph, Bias(head=0).select(graph))


@pytest.mark.parametrize(
    "make", [lambda: Last(n=0), lambda: Bias(head=-1), lambda: Explicit(params={}),
             lambda: Last(m=1), lambda: Explicit(params={"*": {"channels": (1,)}})]
)  # fmt: skip
def test_a_method_that_makes_no_sense_cannot_be_made(make):
    with pytest.raises(ValidationError):
        make()


@pytest.mark.parametrize("method", [Full(), Last(n=7), Bias(), Bias(head=3)], ids=str)
def test_the_smaller_variants_of_a_method_end_and_select_less_and_less(method):
    chosen, seen = set(names(method)), 0
    while (method := method.smaller()) is not None:
        assert set(names(method)) <= chosen
        chosen, seen = set(names(method)), seen + 1
        assert seen < 20
    assert chosen == {"head.weight", "head.bias"} or seen > 0


@pytest.mark.parametrize(
    "method", [Full(), Last(n=3), Bias(head=2), Explicit(params={"*.bias": {"out": (0,)}})], ids=str
)
def test_methods_are_told_apart_by_kind_when_they_are_read_back(method):
    from modicum.methods import AnyMethod

    again = TypeAdapter(AnyMethod).validate_json(method.model_dump_json())
    assert again == method and type(again) is METHODS[method.kind]
