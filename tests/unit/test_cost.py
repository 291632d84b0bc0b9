"""Costs: every part of the RAM, flash and the rows of the table."""

from __future__ import annotations

import graphs
import pytest
from graphs import explicit, small_cnn
from hypothesis import given, settings

import modicum as mo
from modicum.cost import KERNEL_CODE, cost, layer_costs
from modicum.lower import lower
from modicum.memory import place
from modicum.optim import SGD, Adam

GRAPH = small_cnn()


@pytest.mark.slow
@settings(max_examples=80)
@given(graphs.jobs(10))
def test_the_parts_add_up(job):
    program = lower(**job)
    c = cost(program, place(program), None)
    assert c.floor <= c.lower_bound <= c.arena
    assert c.ram == c.arena + c.static + c.stack
    assert c.flash == c.flash_weights + c.flash_code
    assert c.saved == program.saved_bytes
    assert c.saved == sum(n for row in layer_costs(program) for _, n, _ in row.kept)
    statistics = sum(t.size for t in program.statistics)
    trained = 4 * c.trained_params
    assert c.upload == c.trained_bytes == trained + 4 * statistics
    assert c.optimizer_bytes == len(job["optimizer"].states) * trained
    assert c.accumulator_bytes == (trained if job["accumulate"] > 1 else 0)
    assert c.trained_bytes + c.optimizer_bytes + c.accumulator_bytes <= c.arena
    assert c.floor_at in {n.name for n in program.graph.nodes}


@pytest.mark.slow
@settings(max_examples=80)
@given(graphs.jobs(10))
def test_every_kernel_that_is_called_has_a_measured_size(job):
    calls = {call.fn for step in lower(**job).steps for call in step.calls}
    assert calls <= set(KERNEL_CODE)


def test_the_floor_is_the_same_for_every_update():
    plans = [mo.plan(GRAPH, method=m) for m in (mo.Full(), mo.Last(n=1), mo.Bias(head=0))]
    assert len({p.cost.floor for p in plans}) == 1


def test_frozen_weights_and_initial_values_lie_in_flash():
    params = sum(p.size for p in GRAPH.params.values() if p.trainable)
    frozen = mo.plan(GRAPH, method=mo.Last(n=1)).cost
    geometry = 4 * 15 * 4  # of four layers
    # the norm is folded: its scale is gone and its shift is the stem's bias
    assert frozen.flash_weights == 4 * (params - 8) + geometry


def test_slices_cost_what_they_hold():
    half = mo.Explicit(params={"pointwise.weight": {"out": (0, 1, 2, 3)}})
    whole = mo.Explicit(params={"pointwise.weight": None})
    a, b = (mo.plan(GRAPH, method=m, optimizer=Adam()).cost for m in (half, whole))
    assert 2 * a.trained_params == b.trained_params
    assert 2 * a.optimizer_bytes == b.optimizer_bytes
    inputs = mo.Explicit(params={"pointwise.weight": {"inp": (0, 1)}})
    assert mo.plan(GRAPH, method=inputs).cost.saved * 4 == b.saved


def test_the_table_lists_trained_slices_and_counts_shared_values_once():
    method = mo.Explicit(params={"pointwise.weight": {"out": (1,), "inp": (0, 2)}, "head.*": None})
    rows = {row.name: row for row in mo.plan(GRAPH, method=method).layers}
    assert rows["pointwise"].trained == ("weight[1/8 out, 2/8 in]",)
    assert rows["head"].trained == ("weight", "bias")
    assert [kind for kind, _, _ in rows["pointwise"].kept] == ["channels"]


def test_a_linux_board_has_another_stack_than_a_microcontroller():
    mcu, linux = (mo.plan(GRAPH, name).cost for name in ("nano33ble", "pi4"))
    assert linux.stack > mcu.stack and linux.arena == mcu.arena


def test_more_state_needs_more_ram():
    method = explicit(mo.Full().select(GRAPH))
    need = [
        mo.plan(GRAPH, method=method, optimizer=o, accumulate=n).cost.ram
        for o, n in ((SGD(), 1), (SGD(momentum=0.9), 1), (Adam(), 1), (Adam(), 2))
    ]
    assert need == sorted(set(need))
