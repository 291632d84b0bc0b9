"""Placement and its verifier, which share no code: good placements pass, broken ones do not."""

from __future__ import annotations

import graphs
import pytest
from graphs import small_cnn
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from modicum.errors import Bug, InvalidInput
from modicum.lower import Buffer, Program, Step, lower, lower_inference
from modicum.memory import ALIGN, live_bytes, lower_bound, place, verify
from modicum.ops.base import Buf, Call
from modicum.optim import SGD, Adam
from modicum.selection import Selection, Update

orders = st.sampled_from(["dx-first", "dw-first"])


def program(optimizer=SGD(momentum=0.9), accumulate=1, order="dx-first") -> Program:  # noqa: B008
    graph = small_cnn()
    selection = Selection(updates=tuple(Update(param=p) for p in graph.trainable()))
    return lower(graph, selection, optimizer, accumulate=accumulate, order=order)


# ---- placement -------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=150)
@given(graphs.jobs(12), orders)
def test_every_placement_is_valid_and_between_the_bound_and_the_sum_of_all_buffers(job, order):
    made = lower(**job, order=order)
    placement = place(made)
    verify(made, placement.offsets, placement.arena)
    total = sum(b.bytes + ALIGN for b in made.buffers.values())
    assert lower_bound(made) == placement.lower_bound <= placement.arena <= total
    for name, offset in placement.offsets.items():
        assert offset % ALIGN == 0
        assert 0 <= offset <= placement.arena - made.buffers[name].bytes


@pytest.mark.slow
@settings(max_examples=100)
@given(graphs.jobs(12), orders)
def test_buffers_that_live_at_the_same_time_do_not_overlap(job, order):
    made = lower(**job, order=order)
    at = place(made).offsets
    spans = made.lifetimes
    names = list(at)
    for i, a in enumerate(names):
        for b in names[:i]:
            together = spans[a][0] <= spans[b][1] and spans[b][0] <= spans[a][1]
            apart = at[a] + made.buffers[a].bytes <= at[b] or at[b] + made.buffers[b].bytes <= at[a]
            assert apart or not together, (a, b)


@pytest.mark.slow
@settings(max_examples=100)
@given(graphs.jobs(12))
def test_the_lower_bound_is_the_most_bytes_live_at_one_step(job):
    made = lower(**job)
    spans = made.lifetimes.items()
    live = [
        sum(made.buffers[n].bytes for n, (first, last) in spans if first <= i <= last)
        for i in range(len(made.steps))
    ]
    assert live_bytes(made) == live and lower_bound(made) == max(live)


def test_what_lives_on_from_step_to_step_lies_at_the_start_in_one_piece():
    made = program(Adam(), accumulate=2)
    placement = place(made)
    kept = [b for b in made.buffers.values() if b.persistent]
    assert {b.kind for b in kept} == {"weight", "optimizer", "accumulator"}
    end = max(placement.offsets[b.name] + b.bytes for b in kept)
    assert end <= placement.persistent
    assert all(
        placement.offsets[b.name] >= placement.persistent
        for b in made.buffers.values()
        if not b.persistent and b.name in placement.offsets
    )


def test_placing_is_deterministic():
    assert place(program()) == place(program())


def test_inference_alone_is_placed_too_and_needs_the_floor():
    made = lower_inference(small_cnn())
    placement = place(made)
    verify(made, placement.offsets, placement.arena)
    assert {s.phase for s in made.steps} == {"forward"}
    image = 4 * 8 * 8 * 8
    assert placement.arena == 3 * image  # what the skip needs, and the two ends of a convolution


# ---- the verifier ----------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=150)
@given(graphs.jobs(12), st.data())
def test_a_buffer_moved_onto_another_that_lives_with_it_is_found(job, data):
    made = lower(**job)
    placement = place(made)
    spans = made.lifetimes
    pairs = [
        (a, b)
        for a in spans
        for b in spans
        if a != b and spans[a][0] <= spans[b][1] and spans[b][0] <= spans[a][1]
    ]
    assume(pairs)
    a, b = data.draw(st.sampled_from(pairs))
    offsets = {**placement.offsets, a: placement.offsets[b]}
    arena = max(offsets[n] + made.buffers[n].bytes for n in offsets)
    with pytest.raises(InvalidInput):
        verify(made, offsets, arena)


@pytest.mark.slow
@settings(max_examples=100)
@given(graphs.jobs(12), st.data())
def test_any_other_placement_that_passes_has_no_overlap_of_lives(job, data):
    """Whatever offsets are tried: what the verifier lets pass is right by the lifetimes as well."""
    made = lower(**job)
    room = place(made).arena // 4
    offsets = {n: 4 * data.draw(st.integers(0, room)) for n in made.lifetimes}
    arena = max(offsets[n] + made.buffers[n].bytes for n in offsets)
    spans = made.lifetimes
    clash = any(
        spans[a][0] <= spans[b][1]
        and spans[b][0] <= spans[a][1]
        and offsets[a] < offsets[b] + made.buffers[b].bytes
        and offsets[b] < offsets[a] + made.buffers[a].bytes
        for a in spans
        for b in spans
        if a < b
    )
    most = sum(buffer.bytes + ALIGN for buffer in made.buffers.values())
    if clash or arena > most:  # no placement needs so large an arena
        with pytest.raises(InvalidInput):
            verify(made, offsets, arena)
    else:
        verify(made, offsets, arena)


@pytest.mark.parametrize("shift", [-4, 4, 16, -16, 2, 1 << 40])
def test_one_shifted_buffer_is_found(shift):
    made = program()
    placement = place(made)
    top = max(placement.offsets, key=lambda n: placement.offsets[n] + made.buffers[n].bytes)
    offsets = {**placement.offsets, top: placement.offsets[top] + shift}
    with pytest.raises(InvalidInput):
        verify(made, offsets, placement.arena)


def test_an_arena_one_word_too_small_is_found():
    made = program()
    placement = place(made)
    with pytest.raises(InvalidInput, match="outside the arena"):
        verify(made, placement.offsets, placement.arena - 4)


@pytest.mark.parametrize("arena", [-1, 1 << 40, 1 << 80])
def test_an_arena_that_no_placement_needs_is_refused_without_making_one(arena):
    made = program()
    with pytest.raises(InvalidInput, match="arena"):
        verify(made, place(made).offsets, arena)


def test_a_buffer_too_few_or_too_many_is_found():
    made = program()
    placement = place(made)
    fewer = dict(placement.offsets)
    del fewer["input"]
    for offsets in (fewer, {**placement.offsets, "more": 0}):
        with pytest.raises(InvalidInput, match="different buffers"):
            verify(made, offsets, placement.arena)


def test_overlapping_persistent_buffers_are_found():
    made = program()
    placement = place(made)
    offsets = {**placement.offsets, "v:head.weight": placement.offsets["w:head.weight"]}
    with pytest.raises(InvalidInput, match="persistent"):
        verify(made, offsets, placement.arena)


def test_a_program_that_reads_what_nothing_wrote_is_our_own_mistake():
    made = program()
    call = Call("mo_add", (Buf("ghost", "r"), 1))
    broken = Program(
        **{
            **{f: getattr(made, f) for f in made.__dataclass_fields__},
            "buffers": {**made.buffers, "ghost": Buffer("ghost", 16, "workspace")},
            "steps": (*made.steps, Step("backward", "head", (call,))),
        }
    )
    placement = place(broken)
    with pytest.raises(Bug, match="'ghost', which nothing wrote") as caught:
        verify(broken, placement.offsets, placement.arena)
    assert caught.value.exit_code == 70
