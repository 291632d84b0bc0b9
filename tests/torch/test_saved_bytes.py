"""What autograd really holds between the two passes is what the plan lists."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Case, build
from hypothesis import given
from hypothesis import strategies as st
from oracle import held_bytes

import modicum as mo
from modicum.apply import Tuned, pack_bits, unpack_bits


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_autograd_holds_the_bytes_that_the_plan_saves(case: Case):
    built = build(case)
    tuned = Tuned(built.model, built.plan)
    x, _ = built.samples(1)
    assert held_bytes(tuned, x) == built.plan.cost.saved
    listed = sum(n for row in built.plan.layers for _, n, _ in row.kept)
    assert listed == built.plan.cost.saved


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.net in ("mobile", "max pools")], ids=lambda case: case.id
)
def test_a_batch_holds_as_many_times_the_bytes_but_for_the_rounding_of_bits(case: Case):
    built = build(case)
    held = held_bytes(Tuned(built.model, built.plan), built.samples(8)[0])
    # 8 samples fill every byte of a mask
    layers = built.plan.layers
    statistics = sum(n for row in layers for kind, n, _ in row.kept if kind == "stats")
    most = 8 * (built.plan.cost.saved - statistics) + statistics
    rounded = sum(8 for row in layers for kind, _, _ in row.kept if kind in ("mask", "code"))
    assert most - rounded <= held <= most


def test_prediction_without_gradients_holds_nothing():
    built = build(CASES[0])
    kept = []
    with (
        torch.no_grad(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        Tuned(built.model, built.plan)(built.samples(2)[0])
    assert kept == []


def test_bias_only_training_keeps_no_activation_of_a_convolution():
    built = build(next(c for c in CASES if c.id == "mobile-Bias0-SGD"))
    kinds = {kind for row in built.plan.layers for kind, _, _ in row.kept}
    assert kinds == {"mask"}


def test_frozen_layers_below_the_first_trained_one_keep_nothing():
    built = build(next(c for c in CASES if c.id == "conv-Last1-SGD"))
    assert [row.op for row in built.plan.layers if row.kept] == ["linear"]
    assert built.plan.cost.saved == 4 * 36


@given(st.sampled_from([1, 2, 4, 8]), st.data())
def test_packed_bits_come_back(bits, data):
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=40))
    packed = pack_bits(torch.tensor(values, dtype=torch.uint8), bits)
    assert packed.numel() == -(-len(values) * bits // 8)
    assert unpack_bits(packed, bits, len(values)).tolist() == values


def test_two_layers_that_keep_one_value_hold_it_once():
    built = build(next(c for c in CASES if c.id == "one_input-Full-SGD"))
    by_name = {row.name: row for row in built.plan.layers}
    assert [n for _, n, _ in by_name["a"].kept] == [4 * 6 * 4 * 5]
    assert [(n, "counted above" in why) for _, n, why in by_name["b"].kept] == [(0, True)]
    assert (
        mo.plan(built.graph, method=mo.Explicit(params={"b.weight": None})).cost.saved == 480 + 13
    )
