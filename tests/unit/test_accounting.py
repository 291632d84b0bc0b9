"""Layers add up to the whole, and a batch multiplies what grows with it."""

from __future__ import annotations

import pytest
from graphs import blocks_net as net
from graphs import small_cnn

import modicum as mo
from modicum.accounting import account
from modicum.errors import UsageError


@pytest.mark.parametrize("method", [mo.Full(), mo.Full(norms="batch"), mo.Bias(), mo.Last(n=1)])
@pytest.mark.parametrize("batch", [1, 8])
def test_layers_add_up_to_the_plans_figures(method, batch):
    plan = mo.plan(small_cnn(), method=method)
    a, c = account(plan, batch), plan.cost
    statistics = sum(n for row in plan.layers for kind, n, _ in row.kept if kind == "stats")
    assert sum(r.saved for r in a.layers) == a.total.saved
    assert a.total.saved == batch * (c.saved - statistics) + statistics
    assert a.total.macs_forward == sum(r.macs_forward for r in a.layers) == batch * c.macs_forward
    assert a.total.macs_backward == batch * c.macs_backward
    assert a.total.flops_forward == batch * c.flops_forward > 2 * a.total.macs_forward
    assert a.total.flops_backward == batch * c.flops_backward


def test_a_frozen_convolution_costs_two_flops_a_mac_and_its_norm_nothing():
    plan = mo.plan(small_cnn(), method=mo.Last(n=1))
    stem = next(r for r in account(plan).layers if r.name == "stem")
    assert stem.flops_forward == 2 * stem.macs_forward and stem.flops_backward == 0


def test_a_sign_mask_is_cheaper_than_the_exact_derivative():
    exact, sign = (
        account(mo.plan(net({}), method=mo.MobileTL(blocks=1, sign_backward=s))).total
        for s in (False, True)
    )
    assert sign.flops_backward < exact.flops_backward and sign.saved < exact.saved
    assert sign.macs_backward == exact.macs_backward


def test_blocks_are_the_sums_of_their_nodes():
    a = account(mo.plan(net({}, {"gate": True}), method=mo.MobileTL(blocks=1)), batch=4)
    first, last = a.blocks
    assert (first.name, last.name) == ("b0", "b1")
    assert first.saved == first.macs_backward == 0 < first.macs_forward
    inside = [r for r in a.layers if r.name.startswith("b1.")]
    assert last.saved == sum(r.saved for r in inside)
    assert last.flops_backward == sum(r.flops_backward for r in inside)
    text = str(a)
    assert "inverted residual blocks" in text and text.splitlines()[-1].startswith("total")


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(UsageError, match="a batch of 0"):
        account(mo.plan(small_cnn(), method=mo.Full()), 0)
