"""Lowering: what is kept, what runs and in which order, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import graphs
import pytest
from graphs import Builder, Graph, small_cnn
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from modicum.errors import UsageError
from modicum.lower import Program, choose_saved, lower, lower_inference, prepare, wanted_gradients
from modicum.memory import place
from modicum.ops.base import Buf
from modicum.optim import SGD, Adam
from modicum.selection import Selection, Slice, Update


def train(graph: Graph, *params: str | Update, **more: object) -> Program:
    """The program that trains these parameters, given by name or as slices."""
    updates = tuple(p if isinstance(p, Update) else Update(param=p) for p in params)
    selection = Selection(updates=updates)
    return lower(graph, selection, more.pop("optimizer", SGD()), **more)


def part(param: str, out=None, inp=None) -> Update:
    return Update(param=param, slice=Slice(out=out, inp=inp))


def kept(program: Program) -> dict[str, list[tuple[str, str, int]]]:
    return {
        node: [(k.kind, k.value, k.bytes) for k in ks] for node, ks in program.kept.items() if ks
    }


def layer(grow) -> Graph:
    """below - the operator - head, over a 6 x 4 x 4 image."""
    b = Builder(2, 4, 4)
    y = grow(b, b.conv("input", 6, kernel=1, name="below"))
    return b.graph(b.linear(b.flatten(y, name="flat"), 3, name="head"))


# ---- what is kept ----------------------------------------------------------------------------

IMAGE = 4 * 6 * 4 * 4
CONV = layer(lambda b, x: b.conv(x, 5, name="op"))
GROUPED = layer(lambda b, x: b.conv(x, 4, groups=2, name="op"))
DEPTHWISE = layer(lambda b, x: b.conv(x, 6, groups=6, name="op"))
NORM = layer(lambda b, x: b.norm(x, name="op"))
GROUP_NORM = layer(
    lambda b, x: b.add(
        "group_norm", x, params={"weight": (6,), "bias": (6,)}, name="op", groups=2, eps=1e-5
    )
)


@pytest.mark.parametrize(
    ("graph", "update", "keeps"),
    [
        (CONV, part("op.weight"), [("value", "below", IMAGE)]),
        (CONV, part("op.bias"), []),
        (CONV, part("op.weight", out=(1, 2)), [("value", "below", IMAGE)]),
        (CONV, part("op.weight", inp=(0, 5)), [("channels", "below", IMAGE // 3)]),
        (CONV, part("op.weight", (0,), (3,)), [("channels", "below", IMAGE // 6)]),
        (CONV, part("op.weight", inp=tuple(range(6))), [("value", "below", IMAGE)]),
        (GROUPED, part("op.weight"), [("value", "below", IMAGE)]),
        (GROUPED, part("op.weight", out=(0, 3)), [("value", "below", IMAGE)]),
        (GROUPED, part("op.weight", out=(2, 3)), [("channels", "below", IMAGE // 2)]),
        (GROUPED, part("op.weight", inp=(1,)), [("channels", "below", IMAGE // 3)]),
        (GROUPED, part("op.weight", (0,), (0, 2)), [("channels", "below", IMAGE // 3)]),
        (GROUPED, part("op.weight", inp=(0, 1, 2)), [("value", "below", IMAGE)]),
        (DEPTHWISE, part("op.weight"), [("value", "below", IMAGE)]),
        (DEPTHWISE, part("op.weight", out=(2, 4)), [("channels", "below", IMAGE // 3)]),
        (NORM, part("op.weight"), [("value", "below", IMAGE)]),
        (NORM, part("op.weight", out=(0, 1, 2)), [("channels", "below", IMAGE // 2)]),
        (NORM, part("op.bias"), []),
        (GROUP_NORM, part("op.weight"), [("value", "below", IMAGE), ("stats", "op", 16)]),
        (GROUP_NORM, part("op.weight", out=(1, 5)),
         [("channels", "below", IMAGE // 3), ("stats", "op", 16)]),
        (GROUP_NORM, part("op.bias", out=(1, 5)), []),
        (CONV, part("head.weight"), None),
        (CONV, part("head.bias"), []),
    ],
)  # fmt: skip
def test_a_layer_keeps_the_smallest_thing_its_own_gradient_needs(graph, update, keeps):
    found = kept(train(graph, update))
    if keeps is None:
        assert found == {"head": [("value", "flat", 4 * 5 * 4 * 4)]}
    else:
        assert found == ({"op": keeps} if keeps else {})


def test_a_norm_keeps_the_channels_of_its_sliced_scale_until_a_layer_below_is_trained():
    scale = part("op.weight", out=(0, 4))
    for graph, norms, stats in ((NORM, ("op",), 48), (GROUP_NORM, (), 16)):
        alone = Selection(updates=(scale,), batch_norms=norms)
        assert lower(graph, alone, SGD()).saved_bytes == IMAGE // 3 + stats
        above = Selection(updates=(part("below.bias"), scale), batch_norms=norms)
        assert lower(graph, above, SGD()).saved_bytes == IMAGE + stats


def test_a_grouped_weight_counts_its_slices_once_however_its_groups_share_them():
    one = 3 * 9 * 16  # a channel of GROUPED's output
    for s, want in {
        part("op.weight"): 4 * one,
        part("op.weight", out=(1,)): one,
        part("op.weight", out=(0, 2)): 2 * one,
        part("op.weight", out=(0, 2, 3)): 3 * one,  # two of one group, one of the other
        part("op.weight", out=(0, 2, 3), inp=(1,)): one,
        part("op.weight", inp=(0, 2)): 4 * one * 2 // 3,
    }.items():
        program = train(GROUPED, s)
        calls = [c for step in program.steps for c in step.calls if c.fn == "mo_conv2d_dw"]
        of_op = sum(c.macs for c in calls)
        assert program.macs["op"].dw == of_op == want
        assert len(calls) == (2 if s.slice.out == (0, 2, 3) else 1)


@pytest.mark.parametrize(
    ("grow", "keeps"),
    [
        (lambda b, x: b.relu(x, name="op"), [("mask", "op", 12)]),
        (lambda b, x: b.relu(x, -1.0, 1.0, name="op"), [("mask", "op", 12)]),
        (lambda b, x: b.conv(x, 5, name="op"), []),
        (lambda b, x: b.norm(x, name="op"), []),
        (lambda b, x: b.add("add", x, x, name="op"), []),
        (lambda b, x: b.add("concat", x, x, name="op", dim=1), []),
        (lambda b, x: b.add("adaptive_avg_pool2d", x, name="op", size=(3, 1)), []),
        (lambda b, x: b.add("avg_pool2d", x, name="op", **window(2), include_pad=True, divisor=0),
         []),
        (lambda b, x: b.add("max_pool2d", x, name="op", **window(2), dilation=(1, 1)),
         [("code", "op", 6 * 4 * 2 // 8)]),
        (lambda b, x: b.add("max_pool2d", x, name="op", **window(3), dilation=(1, 1)),
         [("code", "op", 6 * 1 * 4 // 8)]),
        (lambda b, x: b.add("max_pool2d", x, name="op", **window(5, pad=2), dilation=(1, 1)),
         [("code", "op", 6 * 1 * 8 // 8)]),
    ],
)  # fmt: skip
def test_passing_a_gradient_through_keeps_at_most_bits(grow, keeps):
    found = kept(train(layer(grow), "below.bias"))
    assert found == ({"op": keeps} if keeps else {})


def window(kernel: int, pad: int = 0) -> dict[str, object]:
    return {
        "kernel": (kernel, kernel),
        "stride": (kernel, kernel),
        "pad": (pad, pad),
        "ceil": False,
    }


def test_a_clamp_whose_output_the_next_layer_keeps_has_no_mask_of_its_own():
    graph = layer(lambda b, x: b.conv(b.relu(x, name="act"), 5, name="op"))
    both = train(graph, "below.bias", "op.weight")
    assert kept(both) == {"op": [("value", "act", IMAGE)], "act": [("value", "act", IMAGE)]}
    assert both.saved_bytes == IMAGE
    only_channels = train(graph, "below.bias", part("op.weight", inp=(1,)))
    assert only_channels.saved_bytes == IMAGE // 6 + 12


def test_two_layers_that_keep_the_same_channels_keep_them_twice_and_one_value_once():
    b = Builder(6, 4, 4)
    y = b.add("add", b.conv("input", 2, name="a"), b.conv("input", 2, name="b"))
    graph = b.graph(b.linear(b.flatten(y), 3, name="head"))
    channels = train(graph, part("a.weight", inp=(0, 1)), part("b.weight", inp=(0, 1)))
    assert channels.saved_bytes == 2 * IMAGE // 3
    assert train(graph, "a.weight", "b.weight").saved_bytes == IMAGE


def test_a_value_kept_under_two_shapes_that_share_memory_counts_once():
    b = Builder(3, 4)
    rows = b.linear("input", 6, name="stem")
    flat = b.flatten(rows)
    y = b.add("add", b.flatten(b.linear(rows, 2, name="a")), b.linear(flat, 6, name="b"))
    graph = b.graph(y)
    assert train(graph, "a.weight", "b.weight").saved_bytes == 4 * 18


@pytest.mark.slow
@settings(max_examples=100)
@given(st.data())
def test_training_less_never_keeps_more(data):
    graph = data.draw(graphs.graphs(10))
    more = data.draw(graphs.selections(graph, slices=False))
    scales = {n.params.get("weight") for n in graph.nodes if n.op == "batch_norm"}
    # a norm's scale alone keeps the norm's input, with the convolution's weight it keeps nothing
    droppable = [u for u in more.updates if u.param not in scales]
    gone = data.draw(st.lists(st.sampled_from(droppable), max_size=4)) if droppable else []
    kept = tuple(u for u in more.updates if u not in gone and u.param not in scales)
    assume(kept)
    less = more.model_copy(update={"updates": kept})
    assert lower(graph, less, SGD()).saved_bytes <= lower(graph, more, SGD()).saved_bytes


# ---- what runs -------------------------------------------------------------------------------


def backward_nodes(program: Program) -> list[str]:
    steps = [s.node for s in program.steps if s.phase in ("backward", "update")]
    return list(dict.fromkeys(steps))


def test_the_backward_pass_stops_at_the_deepest_trained_layer():
    graph = small_cnn()
    assert backward_nodes(train(graph, "head.weight", "head.bias")) == ["head"]
    nodes = backward_nodes(train(graph, "pointwise.bias"))
    assert nodes[0] == "head" and nodes[-1] == "pointwise" and "act6" not in nodes


def test_a_branch_without_trained_layers_gets_no_gradient():
    b = Builder(4, 3, 3)
    left, right = b.conv("input", 5, name="left"), b.conv("input", 5, name="right")
    y = b.add("add", b.relu(left, name="act"), b.relu(right, name="frozen"))
    graph = b.graph(b.linear(b.flatten(y), 2, name="head"))
    program = train(graph, "left.weight")
    assert "frozen" not in backward_nodes(program) and "right" not in backward_nodes(program)
    assert kept(program).keys() == {"left", "act"}


@pytest.mark.slow
@settings(max_examples=150)
@given(graphs.jobs(10), st.sampled_from(["dx-first", "dw-first"]))
def test_every_buffer_is_used_and_everything_written_is_read(job, order):
    program = lower(**job, order=order)
    written = set().union(*(s.writes for s in program.steps))
    read = {a.name for s in program.steps for c in s.calls for a in c.args
            if isinstance(a, Buf) and a.mode != "w"}  # fmt: skip
    assert written | read <= set(program.buffers)
    for name, buffer in program.buffers.items():
        assert name in written | read, f"{name} is not used"
        assert name in read or buffer.name == program.output_buffer, f"{name} is never read"


@settings(max_examples=150)
@given(graphs.jobs(10))
def test_a_program_says_whether_the_other_order_makes_another(job):
    one, other = (lower(**job, order=order) for order in ("dx-first", "dw-first"))
    assert one.either == other.either == (one != replace(other, order=one.order))


@pytest.mark.slow
@settings(max_examples=150)
@given(graphs.jobs(10), st.sampled_from(["dx-first", "dw-first"]))
def test_a_weight_changes_after_everything_that_reads_it(job, order):
    program = lower(**job, order=order)
    for t in program.trained:
        using = [i for i, s in enumerate(program.steps) if t.buffer in s.reads]
        changing = [i for i, s in enumerate(program.steps) if t.buffer in s.writes]
        assert len(changing) == 1 and using[-1] == changing[0]
        assert program.steps[changing[0]].phase == "update"


@pytest.mark.slow
@settings(max_examples=100)
@given(graphs.jobs(10))
def test_state_is_kept_for_the_trained_elements_only(job):
    program = lower(**job)
    sizes = {t.param: 4 * t.size for t in program.trained}
    assert sizes == {
        u.param: 4 * elements(u.slice.shape(job["graph"].params[u.param].shape))
        for u in job["selection"].updates
    }
    moved = {t.param: [4 * t.size] for t in program.statistics}
    found: dict[str, list[int]] = {}
    for buffer in program.buffers.values():
        if buffer.persistent:
            found.setdefault(buffer.value, []).append(buffer.bytes)
    copies = 1 + len(job["optimizer"].states) + (job["accumulate"] > 1)
    assert found == {name: [size] * copies for name, size in sizes.items()} | moved


def elements(shape: tuple[int, ...]) -> int:
    n = 1
    for d in shape:
        n *= d
    return n


@pytest.mark.parametrize(
    ("optimizer", "states"),
    [(SGD(), 0), (SGD(weight_decay=0.1), 0), (SGD(momentum=0.9), 1), (Adam(), 2)],
    ids=["SGD", "decay", "momentum", "Adam"],
)
def test_optimisers_keep_as_many_values_per_element_as_they_need(optimizer, states):
    program = train(small_cnn(), part("head.weight", out=(0, 2)), optimizer=optimizer)
    state = [b for b in program.buffers.values() if b.kind == "optimizer"]
    assert [b.bytes for b in state] == [4 * 2 * 8] * states


def test_a_large_weight_is_updated_in_blocks_of_rows_without_room_for_its_gradient():
    b = Builder(4000)
    graph = b.graph(b.linear("input", 300, name="head"))
    program = train(graph, "head.weight")
    (gradient,) = [x for x in program.buffers.values() if x.value == "head.weight"
                   and x.kind == "gradient"]  # fmt: skip
    assert gradient.bytes < 4 * 4000 * 300 / 50
    (update,) = [s for s in program.steps if s.phase == "update"]
    assert update.rows == 300 and 0 < update.block < 300


def test_with_accumulation_the_whole_gradient_lives_on():
    program = train(small_cnn(), "head.weight", accumulate=4)
    (gradient,) = [x for x in program.buffers.values() if x.kind == "accumulator"]
    assert gradient.persistent and gradient.bytes == 4 * 4 * 8


# ---- norms -----------------------------------------------------------------------------------


def ops(graph: Graph, *params: str) -> list[str]:
    prepared = prepare(graph, Selection(updates=tuple(Update(param=p) for p in params)))
    return [n.op for n in prepared.nodes][:3]


def test_a_norm_is_folded_where_neither_it_nor_its_layer_is_trained():
    graph = small_cnn()
    folded, whole = ["conv2d", "clamp", "conv2d"], ["conv2d", "batch_norm", "clamp"]
    assert ops(graph, "head.weight") == folded
    for param in ("norm.weight", "norm.bias"):
        assert ops(graph, param) == whole


def test_a_norm_joins_its_convolution_where_the_weight_is_trained_whole():
    graph = small_cnn()
    one = ["norm_conv2d", "clamp", "conv2d"]
    for params in (["stem.weight"], ["stem.weight", "norm.bias"], graph.trainable()):
        assert ops(graph, *params) == one
    sliced = Update(param="stem.weight", slice=Slice(out=(0, 1)))
    batch = Selection(updates=(Update(param="stem.weight"),), batch_norms=("norm",))
    for selection in (Selection(updates=(sliced,)), batch):
        assert next(n.op for n in prepare(graph, selection).nodes) == "conv2d"


def test_the_scale_of_a_norm_needs_nothing_beside_what_the_weight_needs():
    graph = small_cnn()
    weight = train(graph, "stem.weight", "norm.bias").saved_bytes
    assert train(graph, "stem.weight", "norm.weight", "norm.bias").saved_bytes == weight
    assert train(graph, "norm.weight").saved_bytes > train(graph, "norm.bias").saved_bytes


def test_a_norm_after_something_else_than_a_layer_stays():
    b = Builder(3, 4, 4)
    x = b.norm(b.relu(b.norm("input", name="first")), affine=False, name="second")
    graph = b.graph(b.linear(b.flatten(x), 2, name="head"))
    prepared = prepare(graph, Selection(updates=(Update(param="head.weight"),)))
    assert [n.op for n in prepared.nodes].count("batch_norm") == 2
    roles = prepared.by_name["second"].params
    assert set(roles) == {"weight", "bias", "mean", "var", "rstd"}


def test_a_layer_with_another_reader_than_its_norm_is_not_folded():
    b = Builder(3, 4, 4)
    y = b.conv("input", 3, name="conv")
    y = b.add("add", y, b.norm(y, name="norm"))
    graph = b.graph(b.linear(b.flatten(y), 2, name="head"))
    assert "batch_norm" in ops(graph, "head.weight")


# ---- costs of a node -------------------------------------------------------------------------


def test_macs_count_what_the_slices_leave():
    full = 5 * 6 * 9 * 16
    cases = {
        part("op.weight"): (full, full, full),
        part("op.weight", out=(0, 1)): (full, full, full * 2 // 5),
        part("op.weight", (0,), (1, 2, 3)): (full, full, full // 10),
        part("op.bias"): (full, full, 0),
    }
    for update, want in cases.items():
        macs = train(CONV, "below.bias", update).macs["op"]
        assert (macs.forward, macs.dx, macs.dw) == want
    assert train(CONV, "op.weight").macs["op"].dx == 0
    macs = train(CONV, "head.weight").macs["head"]
    assert (macs.forward, macs.dx, macs.dw) == (240, 0, 240)


# ---- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("graph", "selection", "why"),
    [
        (CONV, [], "selects nothing"),
        (CONV, [part("conv.weight")], "no trainable parameter is called 'conv.weight'"),
        (NORM, [part("op.mean")], "no trainable parameter is called 'op.mean'"),
        (CONV, [part("op.bias"), part("op.bias")], "selected twice"),
        (CONV, [part("op.weight", out=(5,))], "has no output channel 5"),
        (CONV, [part("op.weight", inp=(0, 6))], "has no input channel 6"),
        (CONV, [part("op.bias", inp=(0,))], "has no input channels to slice"),
        (CONV, [Update(param="op.bias", rates=(0.0, 0.0))], "step size is 0 in every step"),
        (CONV, [Update(param="op.bias", rates=(1.0, 0.0))], "inner step 1 updates nothing"),
    ],
)
def test_a_selection_that_does_not_fit_the_graph_is_a_usage_error(graph, selection, why):
    with pytest.raises(UsageError, match=why):
        lower(graph, Selection(updates=tuple(selection)), SGD())


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_a_loss_of_an_image_is_refused_with_what_to_do(loss):
    b = Builder(3, 4, 4)
    graph = b.graph(b.conv("input", 2, name="conv"))
    with pytest.raises(UsageError, match=f"{loss} cannot be taken of an output of shape") as caught:
        train(graph, "conv.weight", loss=loss)
    assert "flatten" in str(caught.value)


def test_a_loss_of_rows_is_the_mean_square_only():
    b = Builder(5, 4)
    graph = b.graph(b.linear("input", 2, name="head"))
    assert place(train(graph, "head.weight", loss="mse")).arena > 0
    with pytest.raises(UsageError, match="cross_entropy cannot be taken"):
        train(graph, "head.weight")


def test_all_listed_channels_are_the_whole_parameter():
    listed = part("op.weight", tuple(range(5)), tuple(range(6)))
    a, b = train(CONV, listed), train(CONV, "op.weight")
    assert a.kept == b.kept and a.steps == b.steps


def test_inference_trains_and_keeps_nothing():
    program = lower_inference(small_cnn())
    assert program.saved_bytes == 0 and program.trained == ()
    assert not any(b.persistent for b in program.buffers.values())


def test_what_is_wanted_and_kept_can_be_asked_without_a_program():
    graph = prepare(CONV, Selection(updates=(part("op.bias"),)))
    wanted = wanted_gradients(graph, {"op.bias": part("op.bias")})
    assert wanted["head"].dx == (True,) and wanted["op"].dx == (False,)
    assert list(wanted["op"].params) == ["bias"] and not wanted["below"].any
    assert not any(choose_saved(graph, wanted).values())


def test_a_frozen_norm_of_the_batch_writes_over_its_input():
    """Nothing needs it any more; one that passes gradient on keeps it."""
    b = Builder(2, 4, 4)
    x = b.norm(b.conv(b.norm(b.conv("input", 6, name="below"), name="still"), 6, name="conv"))
    graph = b.graph(b.linear(b.flatten(x), 3, name="head"))
    norms = tuple(n.name for n in graph.nodes if n.op == "batch_norm")
    selection = Selection(updates=(Update(param="conv.weight"),), batch_norms=norms)
    program = lower(graph, selection, SGD())
    written = {s.node: s.writes for s in program.steps if s.phase == "forward"}
    assert "below" in written["still"] and "conv" not in written[norms[1]]
