"""The backward pass in the papers' convention: its parts, and that they are the program's."""

from __future__ import annotations

import graphs
from graphs import Builder, small_cnn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modicum.backward_cost import backward_cost
from modicum.lower import fisher_of, lower
from modicum.methods import Inspect
from modicum.optim import SGD, Adam
from modicum.plan import plan
from modicum.selection import Selection, Slice, Update


@settings(suppress_health_check=[HealthCheck.large_base_example])
@given(graphs.jobs())
def test_what_is_kept_and_trained_and_the_macs_are_those_of_the_program(job):
    cost = backward_cost(job["graph"], job["selection"], job["optimizer"])
    program = lower(**job)
    assert cost.saved == program.saved_bytes
    assert cost.updated == sum(t.size for t in program.trained)
    assert cost.copies == 2 + len(job["optimizer"].states)
    assert cost.macs == sum(m.dx + m.dw for m in program.macs.values())


@settings(max_examples=25, suppress_health_check=[HealthCheck.large_base_example])
@given(graphs.sliced())
def test_so_they_are_of_slices(job):
    cost = backward_cost(job["graph"], job["selection"], job["optimizer"])
    program = lower(**job)
    assert (cost.saved, cost.updated) == (
        program.saved_bytes,
        sum(t.size for t in program.trained),
    )


@settings(max_examples=25, suppress_health_check=[HealthCheck.large_base_example])
@given(graphs.graphs(6), st.data())
def test_so_they_are_of_a_pass_that_only_scores(graph, data):
    names = [n.name for n in graph.nodes if n.name != graph.output]
    if not names:
        return
    probed = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    made = plan(graph, method=Inspect(values=tuple(probed)))
    cost = backward_cost(graph, made.selection, SGD())
    assert cost.saved == made.program.saved_bytes == made.cost.saved
    assert [t.param for t in made.program.trained] == [
        fisher_of(n.name) for n in graph.nodes if n.name in probed
    ]
    assert cost.macs == made.cost.macs_backward


@settings(max_examples=25, suppress_health_check=[HealthCheck.large_base_example])
@given(graphs.jobs(), st.integers(1, 100))
def test_memory_is_the_larger_of_io_and_what_is_kept_and_four_bytes_for_each_copy(job, batch):
    cost = backward_cost(job["graph"], job["selection"], job["optimizer"])
    states = {SGD: 1 if getattr(job["optimizer"], "momentum", 0) else 0, Adam: 2}
    floats = 2 + states[type(job["optimizer"])]
    assert cost.memory == max(cost.io, cost.saved) + 4 * floats * cost.updated
    assert cost.memory == cost.activation + cost.weights + cost.optimizer
    assert cost.batch_memory(1) == cost.memory
    assert cost.batch_memory(batch) == max(cost.io, batch * cost.saved) + 4 * floats * cost.updated


def test_input_and_output_of_a_layer_are_counted_by_hand():
    graph = small_cnn()  # 3x8x8 - stem 8x8x8 - depthwise - pointwise - pool - linear
    whole = Selection(updates=(Update(param="head.weight"),))
    assert backward_cost(graph, whole, SGD()).io == 4 * (8 * 64 + 8 * 64)  # the pointwise one
    b = Builder(3, 8, 8)
    x = b.conv("input", 8, name="stem")
    x = b.conv(x, 8, groups=8, name="depthwise")
    graph = b.graph(b.linear(b.flatten(b.add("adaptive_avg_pool2d", x, size=(1, 1))), 4))
    # of the depthwise one a channel of its output at a time: less than the stem's 3 + 8
    last = Selection(updates=(Update(param=graph.nodes[-1].params["weight"]),))
    assert backward_cost(graph, last, SGD()).io == 4 * (3 * 64 + 8 * 64)


def test_a_slice_of_a_layer_costs_its_share_and_the_way_to_it():
    graph = small_cnn()
    part = Selection(updates=(Update(param="pointwise.weight", slice=Slice(out=(1, 5))),))
    cost = backward_cost(graph, part, Adam())
    assert cost.updated == 2 * 8 and cost.copies == 4
    # 2 of 8 channels of a 1x1 convolution of 8 on 64 pixels, and the head's input gradient
    assert cost.macs == 2 * 8 * 64 + 4 * 8
    assert cost.saved == 4 * 8 * 64  # its input
    within = Selection(updates=(Update(param="pointwise.weight", slice=Slice(inp=(1, 5))),))
    assert backward_cost(graph, within, Adam()).saved == 4 * 2 * 64


def test_nothing_selected_costs_the_input_and_output_alone():
    cost = backward_cost(small_cnn(), Selection(updates=()), Adam())
    assert (cost.saved, cost.updated, cost.macs) == (0, 0, 0)
    assert cost.memory == cost.io
