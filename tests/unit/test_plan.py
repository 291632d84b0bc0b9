"""Plans: made, printed, saved and read back; everything that is wrong with one is found."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import graphs
import pytest
from graphs import Builder, explicit, small_cnn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import modicum as mo
from modicum.board import boards, get
from modicum.errors import DoesNotFit, InvalidInput, UsageError
from modicum.methods import Bias, Explicit, Full, Last, Method
from modicum.optim import SGD, Adam
from modicum.plan import Plan, fits

GRAPH = small_cnn()
PLAN = mo.plan(GRAPH, "nano33ble", Bias(), Adam(lr=0.01), accumulate=2)
JSON = {**PLAN.model_dump(mode="json"), "hash": PLAN.hash}


def signed(data: dict) -> str:
    """The text of a plan whose hash is right, whatever else is wrong with it."""
    data = {k: v for k, v in data.items() if k != "hash"}
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return json.dumps({**data, "hash": hashlib.sha256(text.encode()).hexdigest()})


# ---- saving and reading ----------------------------------------------------------------------


@pytest.mark.parametrize("board", [None, "nano33ble", "pi4"])
@pytest.mark.parametrize("method", [Full(), Last(n=2), Bias(head=0)], ids=lambda m: m.kind)
def test_a_plan_comes_back_from_its_file_equal_and_with_the_same_hash(tmp_path, board, method):
    plan = mo.plan(GRAPH, board, method, SGD(lr=0.1, momentum=0.9))
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan and again.hash == plan.hash
    assert again.program == plan.program and str(again) == str(plan)
    assert os.listdir(tmp_path) == ["plan.json"]


@pytest.mark.slow
@settings(max_examples=25)
@given(graphs.jobs())
def test_a_generated_plan_comes_back_from_its_json(job):
    plan = made(job)
    again = Plan.from_json(json.dumps({**plan.model_dump(mode="json"), "hash": plan.hash}))
    assert again == plan and again.hash == plan.hash
    assert again.programs == plan.programs and again.looks == plan.looks


@pytest.mark.slow
def test_the_hash_is_the_same_in_another_process():
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "import modicum as mo\nfrom graphs import small_cnn\n"
        "from modicum.methods import Bias\nfrom modicum.optim import Adam\n"
        "p = mo.plan(small_cnn(), 'nano33ble', Bias(), Adam(lr=0.01), accumulate=2)\n"
        "print(p.graph.hash, p.hash)"
    )
    paths = [str(Path(mo.__file__).parents[1]), str(Path(__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-c", code, *paths],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "12345"},
    )
    assert done.stdout.split() == [PLAN.graph.hash, PLAN.hash]


def test_plans_that_decide_differently_have_different_hashes():
    others = [
        mo.plan(GRAPH, "nano33ble", Bias(), Adam(lr=0.01)),
        mo.plan(GRAPH, "nano33ble", Bias(), Adam(lr=0.02), accumulate=2),
        mo.plan(GRAPH, "stm32f746", Bias(), Adam(lr=0.01), accumulate=2),
        mo.plan(GRAPH, "nano33ble", Bias(), Adam(lr=0.01), accumulate=2, loss="mse"),
        mo.plan(small_cnn(5), "nano33ble", Bias(), Adam(lr=0.01), accumulate=2),
    ]
    assert len({PLAN.hash, *(p.hash for p in others)}) == 6


# ---- what is wrong with a plan ---------------------------------------------------------------


def leaves(data: object, path: tuple = ()) -> Iterator[tuple]:
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in items:
        if isinstance(value, dict | list) and value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key)


def changed(data: dict, path: tuple, value: object) -> dict:
    data = copy.deepcopy(data)
    at = data
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return data


def other(value: object) -> object:
    """Another value of the same type."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return value + 1
    return value + "x" if isinstance(value, str) else [1]


def at(data: object, path: tuple) -> object:
    for key in path:
        data = data[key]
    return data


@pytest.mark.slow
def test_every_single_change_of_a_field_is_noticed():
    paths = list(leaves(JSON))
    assert len(paths) > 300
    for path in paths:
        text = json.dumps(changed(JSON, path, other(at(JSON, path))))
        with pytest.raises(InvalidInput):
            Plan.from_json(text)


@pytest.mark.slow
def test_a_change_of_what_is_computed_from_the_rest_is_noticed_under_a_right_hash_too():
    for path in leaves(JSON):
        if path[0] in ("patterns", "cost", "steps") or "shape" in path or "param" in path:
            text = signed(changed(JSON, path, other(at(JSON, path))))
            with pytest.raises(InvalidInput):
                Plan.from_json(text)


ODD = [None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1.5, -0.0, 1e308, float("nan"), float("inf"),
       "", "x", "input", [], [0], [[]], {}, {"a": 1}]  # fmt: skip


@pytest.mark.slow
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_whatever_stands_in_a_field_the_answer_is_a_plan_or_invalid_input(data):
    path = data.draw(st.sampled_from(list(leaves(JSON))))
    path = path[: data.draw(st.integers(1, len(path)))]
    text = signed(changed(JSON, path, data.draw(st.sampled_from(ODD))))
    reads_or_refuses(text)


def many_operators() -> graphs.Graph:
    """A net with every kind of attribute."""
    b = Builder(4, 9, 9)
    x = b.norm(b.conv("input", 6, groups=2, standardise=0.1))
    window = {"kernel": (2, 2), "stride": (2, 2), "pad": (1, 0), "ceil": False}
    x = b.relu(b.add("max_pool2d", x, **window, dilation=(1, 2)), -1.0, 6.0)
    x = b.add("resize", x, size=(6, 7), mode="bilinear", align=False, scales=(1.3, 0.0))
    x = b.add("avg_pool2d", x, **window, include_pad=True, divisor=3)
    x = b.add("group_norm", x, params={"weight": (6,), "bias": (6,)}, groups=3, eps=1e-5)
    x = b.add("adaptive_avg_pool2d", b.add("concat", x, x, dim=1), size=(2, 1))
    return b.graph(b.linear(b.flatten(x), 3, name="head"))


@pytest.mark.slow
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_whatever_an_attribute_is_the_answer_is_a_plan_that_prints_or_invalid_input(data):
    plan = mo.plan(many_operators())
    tree = {**plan.model_dump(mode="json"), "hash": plan.hash}
    paths = [p for p in leaves(tree["graph"]["nodes"]) if p[1] == "attrs"]
    path = ("graph", "nodes", *data.draw(st.sampled_from(paths)))
    path = path[: data.draw(st.integers(4, len(path)))]
    text = signed(changed(tree, path, data.draw(st.sampled_from(ODD))))
    with contextlib.suppress(InvalidInput):
        again = Plan.from_json(text)
        assert str(again) and again.program.steps


@pytest.mark.parametrize(
    ("attr", "value"),
    [("eps", float("nan")), ("eps", -1.0), ("momentum", 2), ("groups", 4), ("lo", float("nan")),
     ("lo", 7), ("size", [0, 3]), ("scales", [-1.0, 0.0]), ("stride", [1.5, 1.0]), ("align", 1)],
)  # fmt: skip
def test_a_plan_with_a_malformed_attribute_is_refused_with_the_name_of_its_node(attr, value):
    plan = mo.plan(many_operators())
    tree = {**plan.model_dump(mode="json"), "hash": plan.hash}
    node = next(i for i, n in enumerate(tree["graph"]["nodes"]) if attr in n["attrs"])
    with pytest.raises(InvalidInput, match="malformed") as caught:
        Plan.from_json(signed(changed(tree, ("graph", "nodes", node, "attrs", attr), value)))
    assert repr(plan.graph.nodes[node].name) in str(caught.value)


@pytest.mark.slow
@settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_field_that_is_missing_double_or_elsewhere_is_refused_or_does_not_matter(data):
    tree = copy.deepcopy(JSON)
    for _ in range(data.draw(st.integers(1, 3))):
        paths = list(leaves(tree))
        path = data.draw(st.sampled_from(paths))
        path = path[: data.draw(st.integers(1, len(path)))]
        parent, key = at(tree, path[:-1]), path[-1]
        match data.draw(st.sampled_from(["drop", "copy", "swap"])):
            case "drop":
                del parent[key]
            case "copy":
                source = at(tree, data.draw(st.sampled_from(paths)))
                parent[key] = copy.deepcopy(source)
            case "swap":
                keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
                with_ = data.draw(st.sampled_from(keys))
                parent[key], parent[with_] = parent[with_], parent[key]
        if not tree:
            return
    reads_or_refuses(signed(tree))


TEXT = json.dumps(JSON)


@pytest.mark.slow
@settings(max_examples=150)
@given(
    st.lists(st.tuples(st.integers(0, len(TEXT) - 1), st.integers(0, 255)), min_size=1, max_size=3),
    st.integers(0, len(TEXT)) | st.just(len(TEXT)),
)
def test_a_file_with_damaged_bytes_or_cut_short_is_refused(changes, length):
    raw = bytearray(TEXT.encode())
    for i, byte in changes:
        raw[i] = byte
    raw = raw[:length]
    text = raw.decode("latin-1")
    try:
        same = json.loads(text) == JSON
    except ValueError:
        same = False
    if not same:
        with pytest.raises(InvalidInput):
            Plan.from_json(text)


def reads_or_refuses(text: str) -> None:
    """Any other exception fails the test."""
    with contextlib.suppress(InvalidInput):
        Plan.from_json(text).check()


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "1", '"plan"', "{}", "{", "[" * 100_000, '{"version": 1}', "\x00", "NaN"],
    ids=lambda t: repr(t[:8]),
)
def test_what_is_not_a_plan_at_all_is_refused(text):
    with pytest.raises(InvalidInput, match="not a"):
        Plan.from_json(text)


@pytest.mark.parametrize("version", [0, 3, "4", None, 1.5])
def test_another_version_is_refused_with_its_number(version):
    with pytest.raises(InvalidInput, match="not a plan of version 4") as caught:
        Plan.from_json(signed({**JSON, "version": version}))
    assert repr(version) in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InvalidInput, match=re.escape(str(tmp_path / "none.json"))):
        Plan.load(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidInput, match="cannot read"):
        Plan.load(tmp_path / "binary.json")
    with pytest.raises(InvalidInput, match="cannot read"):
        Plan.load(tmp_path)


def test_the_error_says_which_field_is_wrong():
    wrong = changed(JSON, ("optimizer", "lr"), "fast")
    with pytest.raises(InvalidInput, match="not a valid plan") as caught:
        Plan.from_json(signed(wrong), where="my/plan.json")
    assert "my/plan.json: optimizer.adam.lr" in str(caught.value)


def test_a_plan_with_another_graph_is_refused():
    wrong = {**JSON, "graph": small_cnn(9).model_dump(mode="json")}
    with pytest.raises(InvalidInput, match=r"hash|changed"):
        Plan.from_json(json.dumps(wrong))
    with pytest.raises(InvalidInput):
        Plan.from_json(signed(wrong))


def test_a_copy_with_another_decision_has_its_own_programs():
    more = PLAN.model_copy(update={"accumulate": 1})
    assert PLAN.programs[0].accumulate == 2 and more.programs[0].accumulate == 1
    with pytest.raises(InvalidInput):
        more.check()


def test_samples_that_were_not_looked_at_are_refused_with_what_looks_at_them():
    with pytest.raises(UsageError, match="samples of type tuple") as error:
        mo.plan(GRAPH, None, mo.TinyTrain(), samples=([1.0], [0]))
    assert "observe(model, graph, method, samples)" in str(error.value)


def test_offsets_that_overlap_are_refused_with_the_step():
    wrong = copy.deepcopy(JSON)
    offsets = wrong["patterns"][0]["offsets"]
    first, second = sorted(offsets, key=offsets.get)[:2]
    offsets[second] = offsets[first]
    with pytest.raises(InvalidInput, match=r"overlaps another|overwrite"):
        Plan.from_json(signed(wrong))


def test_an_offset_beyond_the_arena_is_refused():
    for offset in (-16, 2, JSON["cost"]["arena"], 2**40):
        wrong = copy.deepcopy(JSON)
        wrong["patterns"][0]["offsets"]["input"] = offset
        with pytest.raises(InvalidInput, match="outside the arena or unaligned"):
            Plan.from_json(signed(wrong))


# ---- limits ----------------------------------------------------------------------------------


def test_a_plan_within_its_limits_fits_and_one_byte_less_does_not():
    need = mo.plan(GRAPH, method=Full()).cost
    assert fits(mo.plan(GRAPH, method=Full(), ram=need.ram, flash=need.flash))
    for less in ({"ram": need.ram - 1}, {"flash": need.flash - 1}):
        with pytest.raises(DoesNotFit) as caught:
            mo.plan(GRAPH, method=Full(), **less)
        assert caught.value.exit_code == 3


def test_the_error_has_the_table_the_floor_and_the_shortage():
    with pytest.raises(DoesNotFit) as caught:
        mo.plan(GRAPH, "nano33ble", Full(), ram=10_000)
    text = caught.value.render()
    assert text.startswith("DoesNotFit: full needs ")
    assert re.search(r"nano33ble has 9\.8 KiB for it", text)
    assert "inference alone" in text and "input 1x3x8x8" in text
    for row in ("lower bound", "arena", "trained", "optimiser", "saved", "stack", "RAM", "flash"):
        assert row in caught.value.details["table"].__str__(), row


def test_below_the_inference_peak_the_error_says_that_no_choice_helps():
    floor = mo.plan(GRAPH, method=Bias(head=0)).cost.floor
    with pytest.raises(DoesNotFit) as caught:
        mo.plan(GRAPH, method=Last(n=1), ram=floor)
    assert "no choice of updated layers" in str(caught.value)


def wide(channels: int = 64, size: int = 24) -> graphs.Graph:
    b = Builder(3, size, size)
    x = b.relu(b.conv("input", channels))
    for _ in range(3):
        x = b.relu(b.conv(x, channels, groups=channels, bias=False))
        x = b.relu(b.conv(x, channels, kernel=1))
    x = b.flatten(b.add("adaptive_avg_pool2d", x, size=(1, 1)))
    return b.graph(b.linear(x, 10))


@pytest.mark.parametrize("method", [Full(), Last(n=7), Last(n=3), Bias(), Bias(head=2)], ids=str)
@pytest.mark.parametrize("board", ["nano33ble", "stm32f746"])
def test_every_hint_of_a_plan_that_does_not_fit_really_fits(method: Method, board: str):
    graph = wide()
    with pytest.raises(DoesNotFit) as caught:
        mo.plan(graph, board, method)
    hints = caught.value.details["try"]
    assert hints
    for hint in hints:
        if hint.startswith("--board"):
            name = hint.split()[1].rstrip(",")
            assert fits(mo.plan(graph, name, method))
        elif hint.startswith("--method"):
            smaller = parsed(hint)
            assert fits(mo.plan(graph, board, smaller))
        else:
            assert hint == "a smaller input or a narrower model"


def test_a_hint_of_a_smaller_method_names_what_it_needs_and_fits():
    limits = {"ram": mo.plan(GRAPH, method=Last(n=2)).cost.ram}
    with pytest.raises(DoesNotFit) as caught:
        mo.plan(GRAPH, method=Full(), **limits)
    hint = next(h for h in caught.value.details["try"] if h.startswith("--method"))
    assert fits(mo.plan(GRAPH, method=parsed(hint), **limits))


def parsed(hint: str) -> Method:
    """The method that the hint's flags stand for."""
    words = hint.split(",")[0].split()
    assert words[0] == "--method"
    flags = dict(zip(words[2::2], words[3::2], strict=True))
    pairs = [v.split("=") if k == "--set" else (k.lstrip("-"), v) for k, v in flags.items()]
    return {"last": Last, "bias": Bias, "full": Full}[words[1]](**{k: int(v) for k, v in pairs})


def test_limits_of_a_board_are_replaced_by_limits_of_the_call():
    plan = mo.plan(GRAPH, "nano33ble", ram=50_000, flash=60_000)
    assert (plan.ram, plan.flash) == (50_000, 60_000)
    board = get("nano33ble")
    plan = mo.plan(GRAPH, board)
    assert (plan.ram, plan.flash) == (board.available, board.flash)
    assert mo.plan(GRAPH).ram is None


# ---- calls -----------------------------------------------------------------------------------


def test_an_unknown_board_is_a_usage_error():
    with pytest.raises(UsageError, match="no board is called 'nano'"):
        mo.plan(GRAPH, "nano")


@pytest.mark.parametrize("accumulate", [0, -1, 70_000])
def test_a_number_of_samples_that_cannot_be_accumulated_is_refused(accumulate):
    with pytest.raises(UsageError, match=f"{accumulate} samples"):
        mo.plan(GRAPH, accumulate=accumulate)


def test_the_default_is_to_train_everything_with_plain_sgd():
    plan = mo.plan(GRAPH)
    assert plan.method == Full() and plan.optimizer == SGD()
    assert [u.param for u in plan.selection.updates] == GRAPH.trainable()


@pytest.mark.parametrize("name", boards())
def test_a_plan_prints_for_every_board(name):
    plan = mo.plan(GRAPH, name, Explicit(params={"*.weight": {"out": (0, 1)}}), SGD(momentum=0.5))
    text = str(plan)
    assert name in text.splitlines()[0]
    assert "2/8 out" in text and "SGD" in text


def test_the_printed_plan_says_what_each_layer_keeps_and_why():
    lines = str(mo.plan(GRAPH, method=Bias())).splitlines()
    (frozen,) = [line for line in lines if "frozen and keep nothing" in line]
    assert frozen.strip().startswith("1 of 10 nodes")
    (act,) = [line for line in lines if line.startswith("  act6")]
    assert "mask 64 B: 1 bit per element" in act
    (head,) = [line for line in lines if line.startswith("  head")]
    assert "weight, bias" in head and "input, for the weight gradient" in head


def made(job) -> Plan:
    return mo.plan(
        job["graph"],
        method=explicit(job["selection"]),
        optimizer=job["optimizer"],
        loss=job["loss"],
        accumulate=job["accumulate"],
    )
