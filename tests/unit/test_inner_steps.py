"""Step sizes by inner step: patterns, their programs over one arena, and what the plan says."""

from __future__ import annotations

import copy
import hashlib
import json

import graphs
import pytest
from graphs import Builder, explicit, small_cnn
from hypothesis import given, settings
from hypothesis import strategies as st

import modicum as mo
from modicum.accounting import account
from modicum.backward_cost import backward_cost
from modicum.emit import Candidates
from modicum.errors import InvalidInput, UsageError
from modicum.lower import Program, lower, prepare
from modicum.memory import place, verify_together
from modicum.optim import SGD, Adam
from modicum.plan import Plan
from modicum.report import report
from modicum.selection import Selection, Slice, Update

GRAPH = small_cnn()
HEAD = {"head.*": None}
RATES = {
    **HEAD,
    "pointwise.*": {"rates": (1.0, 0.0, 0.5)},
    "stem.weight": {"rates": (0.0, 0.0, 2.0, 0.0)},
}


def planned(params: dict, optimizer=SGD(momentum=0.9), **more) -> Plan:  # noqa: B008
    return mo.plan(GRAPH, None, mo.Explicit(params=params), optimizer, **more)


PLAN = planned(RATES, accumulate=2)


def updated(program: Program) -> set[str]:
    return {t.param for t in program.updated}


# ---- patterns --------------------------------------------------------------------------------


def test_inner_steps_that_update_the_same_share_a_pattern_in_the_order_of_first_use():
    selection = Selection(
        updates=(
            Update(param="a", rates=(1.0, 0.0, 0.5, 0.0)),
            Update(param="b", rates=(0.0, 2.0)),
            Update(param="c", rates=(1.0, 0.0, 3.0, 0.0, 0.0, 1.0)),
        )
    )
    assert selection.inner_steps == 6
    # step 2 updates all, 3 and 4 what 1 does
    assert selection.patterns == ((0,), (1, 3, 4), (2,), (5,))
    assert selection.updated_in(5) == selection.updated_in(99) == {"b", "c"}
    assert [selection.updates[1].rate(k) for k in (0, 1, 2, 99)] == [0.0, 2.0, 2.0, 2.0]


def test_a_program_updates_what_its_step_says_and_stops_at_the_lowest_of_it():
    assert [updated(p) for p in PLAN.programs] == [
        {"pointwise.weight", "pointwise.bias", "head.weight", "head.bias"},
        {"head.weight", "head.bias"},
        {"stem.weight", "pointwise.weight", "pointwise.bias", "head.weight", "head.bias"},
    ]
    assert PLAN.inner_steps == 4
    assert [p.inner for p in PLAN.programs] == [(0, 3), (1,), (2,)]
    assert [PLAN.pattern_of(k) for k in (0, 1, 2, 3, 4, 1000)] == [0, 1, 2, 0, 0, 0]
    below = {"stem", "act", "depthwise", "act6"}  # the norm is joined with the stem
    for program in PLAN.programs[:2]:
        assert not any(program.wanted[name].any or program.kept[name] for name in below)
        assert not any(s.node in below for s in program.steps if s.phase in ("backward", "update"))
    assert PLAN.programs[2].wanted["stem"].any


def test_what_other_steps_train_is_read_from_ram_and_what_none_trains_from_flash():
    for program in PLAN.programs:
        stem = next(c for s in program.steps for c in s.calls if s.node == "stem")
        assert "w:stem.weight" in {getattr(a, "name", "") for a in stem.args}
        deep = next(c for s in program.steps for c in s.calls if s.node == "depthwise")
        assert not any("w:" in getattr(a, "name", "") for a in deep.args)


def test_a_step_computes_and_keeps_what_a_plan_for_it_alone_does():
    """But that a norm under a convolution that other steps train is not folded."""
    for pattern, params in (
        (0, {**HEAD, "pointwise.*": None}),
        (1, HEAD),
        (2, {**HEAD, "pointwise.*": None, "stem.weight": None}),
    ):
        alone = planned(params, accumulate=2)
        step = PLAN.steps[PLAN.patterns[pattern].steps[0]]
        assert step.saved == alone.cost.saved == PLAN.programs[pattern].saved_bytes
        assert step.macs_backward == alone.cost.macs_backward


def test_a_negative_inner_step_is_a_usage_error():
    with pytest.raises(UsageError, match="no inner step -1"):
        PLAN.pattern_of(-1)


def test_one_step_size_for_all_steps_is_one_pattern_as_ever():
    plan = planned({**HEAD, "stem.weight": {"rates": (0.5,)}})
    assert plan.inner_steps == len(plan.patterns) == len(plan.steps) == 1
    assert plan.programs == (plan.program,)
    assert "inner steps" not in str(plan)
    (step,) = plan.steps
    assert (step.saved, step.macs_backward) == (plan.cost.saved, plan.cost.macs_backward)


def test_step_sizes_that_differ_but_are_never_zero_are_one_pattern_too():
    plan = planned({**HEAD, "stem.weight": {"rates": (1.0, 0.5)}})
    assert (plan.inner_steps, len(plan.patterns)) == (2, 1)
    texts = [
        a.text
        for s in plan.program.steps
        for call in s.calls
        if call.fn == "mo_momentum"
        for a in call.args
        if hasattr(a, "text") and "lr" in a.text
    ]
    assert texts == ["lr", "lr", "{table}[inner] * lr"]


# ---- the norm after a convolution ------------------------------------------------------------


def normed() -> graphs.Graph:
    b = Builder(3, 6, 6)
    x = b.relu(b.norm(b.conv("input", 4, bias=False, name="conv"), name="norm"))
    return b.graph(b.linear(b.flatten(x), 2, name="head"))


@pytest.mark.parametrize(
    ("weight", "scale", "ops"),
    [
        ((1.0, 0.0), None, {"norm_conv2d"}),
        ((1.0, 0.0), (1.0, 0.0), {"norm_conv2d"}),
        ((1.0, 1.0), (0.0, 1.0), {"norm_conv2d"}),
        ((1.0, 0.0), (0.0, 1.0), {"conv2d", "batch_norm"}),
        ((0.5, 0.0), (0.5,), {"conv2d", "batch_norm"}),
    ],
)
def test_a_norm_joins_its_convolution_where_no_step_trains_its_scale_alone(weight, scale, ops):
    updates = [Update(param="conv.weight", rates=weight), Update(param="head.bias")]
    updates += [Update(param="norm.weight", rates=scale)] if scale else []
    prepared = prepare(normed(), Selection(updates=tuple(updates)))
    assert {n.op for n in prepared.nodes} - {"clamp", "reshape", "linear"} == ops


def test_a_shift_whose_convolution_rests_in_a_step_keeps_nothing_and_computes_no_product():
    updates = (Update(param="conv.weight", rates=(1.0, 0.0)), Update(param="norm.bias"))
    program = lower(normed(), Selection(updates=updates), SGD(), step=1)
    assert program.graph.nodes[0].op == "norm_conv2d"
    assert program.kept["conv"] == () and program.macs["conv"].dw == 0
    calls = [c.fn for s in program.steps if s.phase in ("backward", "update") for c in s.calls]
    assert "mo_affine_dx" not in calls and "mo_conv2d_dw" not in calls
    assert program.macs["conv"].others == (2 * 4 * 36, 4 * 36)  # an affine map; a sum


# ---- one arena -------------------------------------------------------------------------------


def test_what_persists_lies_at_one_place_and_the_arena_is_the_worst_patterns():
    homes = [
        {n: at for n, at in pattern.offsets.items() if program.buffers[n].persistent}
        for pattern, program in zip(PLAN.patterns, PLAN.programs, strict=True)
    ]
    assert homes[0] == homes[1] == homes[2]
    assert {n.partition(":")[0] for n in homes[0]} == {"w", "v", "g"}
    arenas = [place(p).arena for p in PLAN.programs]
    assert PLAN.cost.arena == max(arenas) and min(arenas) < max(arenas)
    assert PLAN.worst == arenas.index(max(arenas)) == 2
    assert PLAN.program is PLAN.programs[2]
    assert PLAN.cost.saved == max(p.saved_bytes for p in PLAN.programs)
    assert PLAN.cost.macs_backward == max(s.macs_backward for s in PLAN.steps)


@settings(max_examples=40)
@given(st.data())
def test_every_generated_plan_holds_together(data):
    job = data.draw(graphs.jobs())
    job["selection"] = data.draw(graphs.by_step(job["selection"]))
    plan = mo.plan(
        job["graph"],
        method=explicit(job["selection"]),
        **{key: job[key] for key in ("optimizer", "loss", "accumulate")},
    )
    selection, cost = plan.selection, plan.cost
    assert selection == job["selection"] and selection.inner_steps == plan.inner_steps
    assert sorted(k for p in plan.patterns for k in p.steps) == list(range(plan.inner_steps))
    for step in plan.steps:
        program = plan.programs[step.pattern]
        assert updated(program) == selection.updated_in(step.step)
        assert step.saved == program.saved_bytes <= cost.saved
        assert step.dynamic <= cost.arena and step.macs_backward <= cost.macs_backward
        kept = plan.patterns[step.pattern].layers
        assert step.saved == sum(n for row in kept for _, n, _ in row.kept)
        assert step.trains == tuple(row.name for row in kept if row.trained)
        mine = account(plan, step=step.step).total
        assert (mine.saved, mine.macs_backward) == (step.saved, step.macs_backward)
    assert all(p.trained == plan.program.trained for p in plan.programs)
    assert cost.trained_params == sum(t.size for t in plan.program.trained)
    again = Plan.from_json(json.dumps({**plan.model_dump(mode="json"), "hash": plan.hash}))
    assert again == plan and str(again) == str(plan)
    assert report(plan).text()


def test_persistent_buffers_at_different_places_are_refused():
    placed = [(program, dict(place(program).offsets)) for program in PLAN.programs]
    verify_together(placed, PLAN.cost.arena)
    swapped = placed[1][1]
    a, b = "w:pointwise.bias", "v:pointwise.bias"
    swapped[a], swapped[b] = swapped[b], swapped[a]
    with pytest.raises(InvalidInput, match=r"'v:pointwise\.bias' is not at the same place"):
        verify_together(placed, PLAN.cost.arena)


def test_the_limit_of_ram_holds_for_the_worst_step():
    need = PLAN.cost.ram
    assert planned(RATES, accumulate=2, ram=need).cost.ram == need
    with pytest.raises(mo.DoesNotFit):
        planned(RATES, accumulate=2, ram=need - 1)


# ---- what is refused -------------------------------------------------------------------------


def test_an_inner_step_that_updates_nothing_is_named():
    with pytest.raises(UsageError, match="inner step 1 updates nothing"):
        planned({"head.*": {"rates": (1.0, 0.0, 1.0)}, "stem.weight": {"rates": (0.0, 0.0, 1.0)}})


def test_updates_that_never_move_are_dropped():
    plan = planned({**HEAD, "stem.weight": {"rates": (0.0, 0.0, 0.0)}})
    assert plan == planned({**HEAD, "stem.weight": {"rates": (0.0, 0.0, 0.0)}})
    assert [u.param for u in plan.selection.updates] == ["head.weight", "head.bias"]
    assert plan.inner_steps == 1
    assert plan.cost == planned(HEAD).cost
    with pytest.raises(UsageError, match="selects nothing to update"):
        planned({"head.*": {"rates": (0.0,)}})


@pytest.mark.parametrize("rates", [(), (float("nan"),), (-1e39,), (1e39,), (1.0,) * 257])
def test_step_sizes_that_make_no_sense_cannot_be_written_down(rates):
    with pytest.raises(ValueError, match="rates"):
        mo.Explicit(params={"head.*": {"rates": rates}})


def test_a_candidate_set_refuses_step_sizes_that_differ():
    with pytest.raises(UsageError, match=r"plan 1 \(explicit\) has step sizes that differ"):
        Candidates((planned(HEAD), PLAN))


JSON = PLAN.model_dump(mode="json")


def signed(data: dict) -> str:
    """The text of a plan whose hash is right, whatever else is wrong with it."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return json.dumps({**data, "hash": hashlib.sha256(text.encode()).hexdigest()})


def rate(data: dict, step: int, value: float, of: int = 1) -> None:
    data["selection"]["updates"][of]["rates"][step] = value


ALTERED = {
    "a rate that is no longer 0": (lambda d: rate(d, 1, 1.0), "have different buffers"),
    "a rate that is 0 now": (lambda d: rate(d, 0, 0.0), "patterns are not those"),
    "a step alike another": (
        lambda d: [rate(d, 1, 1.0, of) for of in range(3)], "patterns are not those"
    ),
    "a placement": (lambda d: d["patterns"][1]["offsets"].update(input=4), "overwrite|overlaps"),
    "a home": (
        lambda d: d["patterns"][1]["offsets"].update(
            {"w:head.bias": d["patterns"][1]["offsets"]["v:head.bias"],
             "v:head.bias": d["patterns"][1]["offsets"]["w:head.bias"]}
        ),
        "same place",
    ),
    "a step of a pattern": (lambda d: d["patterns"][1].update(steps=[2]), "patterns are not"),
    "no pattern": (lambda d: d.update(patterns=[]), "not a valid plan"),
    "a pattern too few": (lambda d: d["patterns"].pop(), "patterns are not those"),
    "the order of patterns": (lambda d: d["patterns"].reverse(), "patterns are not those"),
    "an order of steps": (lambda d: d["patterns"][0].update(order="x"), "not a valid plan"),
    "saved bytes of a step": (lambda d: d["steps"][1].update(saved=1), "costs are not those"),
    "a step's pattern": (lambda d: d["steps"][1].update(pattern=0), "costs are not those"),
    "a step too few": (lambda d: d["steps"].pop(), "costs are not those"),
    "kept bytes of a layer": (
        lambda d: d["patterns"][1]["layers"][0].update(macs_forward=1), "costs are not those"
    ),
    "the arena": (lambda d: d["cost"].update(arena=d["cost"]["arena"] + 4), "costs are not"),
}  # fmt: skip


@pytest.mark.parametrize("what", ALTERED)
def test_an_altered_plan_is_refused_under_the_old_hash_and_under_a_right_one(what):
    alter, why = ALTERED[what]
    data = copy.deepcopy(JSON)
    alter(data)
    with pytest.raises(InvalidInput, match=r"changed after it was made|not a valid plan"):
        Plan.from_json(json.dumps({**data, "hash": PLAN.hash}))
    with pytest.raises(InvalidInput, match=why):
        Plan.from_json(signed(data))
    assert Plan.from_json(signed(JSON)) == PLAN


# ---- what is told ----------------------------------------------------------------------------


def test_the_plan_prints_a_row_for_every_inner_step():
    lines = str(PLAN).splitlines()
    start = next(i for i, line in enumerate(lines) if "inner steps differ" in line)
    head, *rows = (line.split() for line in lines[start + 1 : start + 6])
    assert head[:4] == ["step", "pattern", "trains", "saved"]
    assert [row[:2] for row in rows[:3]] == [["0", "0"], ["1", "1"], ["2", "2"]]
    assert rows[3][:3] == ["3", "on", "0"]
    assert "head" in rows[1] and not any("stem" in cell for cell in rows[1])
    assert "stem," in rows[2]
    assert any("pattern 2, which needs most memory" in line for line in lines)


def test_a_report_shows_the_inner_steps_and_the_worst_pattern():
    made = report(PLAN)
    html, data = made.html(), made.as_dict()["plan"]
    assert "<h3>Inner steps</h3>" in html and "those of pattern 2" in html
    assert "4 inner steps that differ" in html
    assert [s["pattern"] for s in data["steps"]] == [0, 1, 2, 0]
    assert sum(n for row in data["layers"] for _, n, _ in row["kept"]) == PLAN.steps[2].saved
    assert "Inner steps" not in report(planned(HEAD)).html()


def test_an_account_is_of_one_inner_step_by_default_of_those_that_keep_most():
    assert account(PLAN).steps == (2,) == account(PLAN, step=2).steps
    assert str(account(PLAN)).startswith("For a batch of 1, inner steps 2:")
    first = account(PLAN, 8, step=3)
    assert first.steps == (0, 3)
    assert first.total.macs_backward == 8 * PLAN.steps[0].macs_backward
    assert str(account(planned(HEAD))).startswith("For a batch of 1:")


def test_backward_cost_is_that_of_the_worst_step_and_of_all_that_is_updated():
    every = backward_cost(GRAPH, PLAN.selection, SGD())
    steps = [
        backward_cost(
            GRAPH,
            Selection(updates=tuple(Update(param=n) for n in PLAN.selection.updated_in(k))),
            SGD(),
        )
        for k in range(4)
    ]
    assert every.saved == max(s.saved for s in steps) == PLAN.cost.saved
    assert every.macs == max(s.macs for s in steps)
    assert every.updated == PLAN.cost.trained_params
    idle = Update(param="depthwise.weight", rates=(0.0,), slice=Slice())
    more = PLAN.selection.model_copy(update={"updates": (*PLAN.selection.updates, idle)})
    assert backward_cost(GRAPH, more, SGD()) == every


def test_constants_by_step_and_all_schedules_are_in_flash():
    one, several = (
        planned({**HEAD, "stem.weight": {"rates": rates}}, SGD()).cost
        for rates in ((1.0,), (1.0, 0.5))
    )
    assert several.flash_weights == one.flash_weights + 2 * 4
    other = planned({**HEAD, "stem.weight": {"rates": (1.0, 0.0)}}, SGD()).cost
    assert other.flash_weights == one.flash_weights
    assert other.flash_code > one.flash_code  # two schedules
    adam = planned({**HEAD, "stem.weight": {"rates": (1.0, 0.0)}}, Adam())
    assert {c.fn for p in adam.programs for s in p.steps for c in s.calls} >= {"mo_adam_counted"}
