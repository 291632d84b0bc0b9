"""Weights as arrays: derived constants, slices, and layouts there and back."""

from __future__ import annotations

import math

import numpy as np
import pytest
from graphs import small_cnn
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import InvalidInput
from modicum.lower import prepare
from modicum.selection import Selection, Slice, Update
from modicum.state import cut, from_c, image_to_c, materialise, to_c

GRAPH = small_cnn()
RNG = np.random.default_rng(0)


def state() -> dict[str, np.ndarray]:
    values = {
        p.name: RNG.standard_normal(p.shape).astype(np.float32) for p in GRAPH.params.values()
    }
    values["norm.var"] = 0.5 + np.abs(values["norm.var"])
    return values


def array(*shape: int) -> np.ndarray:
    return np.arange(math.prod(shape), dtype=np.float32).reshape(shape)


def test_a_folded_norm_scales_the_weight_and_shifts_the_bias():
    s = state()
    prepared = prepare(GRAPH, Selection(updates=(Update(param="head.weight"),)))
    values = materialise(prepared, s)
    scale = s["norm.weight"] / np.sqrt(s["norm.var"].astype(np.float64) + 1e-5)
    folded = next(v for n, v in values.items() if n.startswith("stem.weight*"))
    assert np.allclose(folded, s["stem.weight"] * scale[:, None, None, None], rtol=1e-6)
    shift = next(v for n, v in values.items() if n.startswith("stem.bias*"))
    assert np.allclose(shift, s["norm.bias"] - s["norm.mean"] * scale, rtol=1e-5, atol=1e-6)


def test_a_norm_that_stays_gets_its_reciprocal_deviation():
    s = state()
    values = materialise(prepare(GRAPH, Selection(updates=(Update(param="norm.bias"),))), s)
    assert np.allclose(values["norm.rstd"], 1 / np.sqrt(s["norm.var"] + 1e-5), rtol=1e-6)
    assert values["norm.weight"] is not None and values["norm.rstd"].dtype == np.float32


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["head.bias", "norm.mean", "stem.weight"])
def test_values_that_are_not_finite_are_refused_by_name(name, value):
    s = state()
    s[name].flat[-1] = value
    with pytest.raises(InvalidInput, match="not finite"):
        materialise(prepare(GRAPH, Selection(updates=(Update(param="head.weight"),))), s)


def test_a_negative_variance_is_refused():
    s = state()
    s["norm.var"][0] = -1.0
    with pytest.raises(InvalidInput, match="not finite"):
        materialise(prepare(GRAPH, Selection(updates=(Update(param="head.weight"),))), s)


@pytest.mark.parametrize("name", ["head.bias", "norm.var"])
def test_a_missing_entry_is_named(name):
    s = state()
    del s[name]
    with pytest.raises(InvalidInput, match=r"missing|has no") as caught:
        materialise(prepare(GRAPH, Selection(updates=(Update(param="head.weight"),))), s)
    assert name in str(caught.value)


def test_a_cut_takes_rows_columns_or_both():
    full = array(4, 3, 2, 2)
    assert np.array_equal(cut(full, Slice()), full)
    assert np.array_equal(cut(full, Slice(out=(0, 3))), full[[0, 3]])
    assert np.array_equal(cut(full, Slice(inp=(1,))), full[:, [1]])
    assert np.array_equal(cut(full, Slice(out=(2,), inp=(0, 2))), full[[2]][:, [0, 2]])


def test_layouts_put_channels_last():
    w = array(4, 3, 2, 5)
    assert np.array_equal(to_c(w, "ohwi")[1, 0, 4, 2], w[1, 2, 0, 4])
    depthwise = array(6, 1, 2, 3)
    assert np.array_equal(to_c(depthwise, "hwc")[1, 2, 5], depthwise[5, 0, 1, 2])
    assert np.array_equal(to_c(array(4), "plain"), array(4))
    images = array(2, 3, 4, 5)
    assert np.array_equal(image_to_c(images)[1, 3, 4, 2], images[1, 2, 3, 4])
    assert np.array_equal(image_to_c(array(2, 3)), array(2, 3))


@given(st.lists(st.integers(1, 5), min_size=4, max_size=4))
def test_layouts_come_back(shape):
    w = array(*shape)
    assert np.array_equal(from_c(to_c(w, "ohwi").ravel(), w.shape, "ohwi"), w)
    depthwise = array(shape[0], 1, *shape[2:])
    assert np.array_equal(from_c(to_c(depthwise, "hwc").ravel(), depthwise.shape, "hwc"), depthwise)
    assert to_c(w, "ohwi").flags.c_contiguous and from_c(w.ravel(), w.shape, "plain").base is None
