"""The report of a plan and its runs: what it says, what it writes, and what it lets in."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from graphs import Builder, graphs, small_cnn
from hypothesis import given, settings
from hypothesis import strategies as st

from modicum import memory
from modicum.errors import InvalidInput, UsageError
from modicum.methods import Bias, Explicit, Full, Last
from modicum.optim import SGD, Adam
from modicum.plan import Plan
from modicum.plan import plan as make
from modicum.report import Report, report
from modicum.report.palette import PALETTE
from modicum.report.pictures.canvas import apart
from modicum.report.tables import memory_of, picture_layers
from modicum.trace import Trace

EVIL = "</svg><script>alert('x')</script> & $x^2_$ \x1b[31m\x00 漢字"
LOSSES = [3.0, 2.5, 2.0, 1.25, 1.5, 0.75, 0.5, 0.25]
BOARD_FIGURES = {
    "arena_planned": 9000.0,
    "arena_high_water": 8990.0,
    "stack_high_water": 700.0,
    "static": 96.0,
    "ram": 9786.0,
    "ram_planned": 10000.0,
    "instructions_train": 1_234_567.0,
    "instructions_predict": 456_789.0,
    "text": 20_480.0,
    "data": 0.0,
    "bss": 48.0,
    "weights": 4_096.0,
}


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make(small_cnn(), "nano33ble", Full(), SGD(lr=0.1, momentum=0.9))


@pytest.fixture(scope="module")
def traces(plan: Plan) -> tuple[Trace, ...]:
    """torch, the same bits on the host, and a board that differs a little."""
    scores = {"accuracy_before": 0.25, "accuracy_after": 0.875}
    near = [loss * (1 + 1e-6 * (i % 3)) for i, loss in enumerate(LOSSES)]
    host = {"microseconds_train": 55.0, "arena_high_water": 8990.0}
    return (
        Trace("torch", plan.hash, losses=LOSSES, figures={"seconds": 1.5}, **scores),
        Trace("host", plan.hash, losses=list(LOSSES), figures=host, **scores),
        Trace("m4f", plan.hash, losses=near, figures=BOARD_FIGURES, **scores),
    )


@pytest.fixture(scope="module")
def page(plan: Plan, traces: tuple[Trace, ...]) -> str:
    return report(plan, *traces).html()


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def row(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.strip().startswith(start))


# ---- text ------------------------------------------------------------------------------------


def test_the_text_has_the_plans_table_and_a_column_for_every_run(plan, traces):
    text = report(plan, *traces).text()
    assert text.startswith("full on nano33ble")
    assert row(text, "floor") and row(text, "lower bound")
    assert row(text, "how").split("  ")[-1].strip() == "C, emulated"
    assert (
        re.findall(r"[\d.]+ -> [\d.]+", row(text, "loss, first -> last sample"))
        == ["3.0000 -> 0.2500"] * 3
    )
    assert row(text, "accuracy").count("25.0 % -> 87.5 %") == 3
    assert row(text, "RAM, measured").split()[-5:][:2] == ["9.6", "KiB"]


def test_a_plan_alone_is_a_report_too(plan):
    made = report(plan)
    assert "training samples" not in made.text()
    assert made.as_dict()["runs"] == []
    assert "What happened" not in made.html()


def test_work_on_a_board_is_executed_instructions_and_never_time(plan, traces):
    text = report(plan, traces[2]).text()
    assert row(text, "executed instructions per training step").endswith("1,234,567")
    assert row(text, "executed instructions per inference").endswith("456,789")
    assert "time" not in text


def test_the_hosts_program_is_not_taken_for_the_nets_flash(plan, traces):
    traces[1].figures["text"] = 99_000.0
    assert "flash, code" not in report(plan, traces[1]).text()


def test_every_further_trace_is_compared_with_the_first(plan, traces):
    text = report(plan, *traces).text()
    assert "torch and host, 8 steps: bit-identical" in text
    assert "torch and m4f, 8 steps: agree within 0.0001" in text


def test_traces_that_cannot_be_compared_are_shown_and_say_why(plan, traces):
    short = Trace("short", plan.hash, losses=[1.0])
    made = report(plan, traces[0], short)
    assert "torch and short are not compared" in made.text()
    assert made.as_dict()["comparisons"] == [{"not_compared": made.comparisons[0]}]
    assert "not compared" in made.html()


def test_two_runs_in_one_place_are_told_apart(plan, traces):
    assert report(plan, traces[0], traces[0], traces[1]).names == ("torch", "torch (2)", "host")


# ---- JSON ------------------------------------------------------------------------------------


def test_the_json_is_plain_data_and_what_is_not_finite_is_null(plan):
    losses = [float("nan"), 1.0, float("inf")]
    trace = Trace("torch", plan.hash, losses=losses, figures={"odd": np.float64("nan")})
    data = json.loads(json.dumps(report(plan, trace).as_dict(), allow_nan=False))
    assert data["runs"][0]["losses"] == [None, 1.0, None]
    assert data["runs"][0]["figures"] == {"odd": None}
    assert data["plan"]["hash"] == plan.hash
    assert data["plan"]["cost"]["arena"] == plan.cost.arena


# ---- the page --------------------------------------------------------------------------------


def test_the_page_needs_nothing_beside_itself(page):
    parsed = Page(page)
    assert not {tag for tag, _ in parsed.tags} & {"script", "link", "img", "iframe", "object"}
    urls = {u for u in re.findall(r"https?://[^\s\"'<]+", page)}
    assert urls <= {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}
    assert not re.search(r"url\((?!#)|@import|\bsrc=", page)


def test_ids_are_unique_and_every_reference_is_to_one_of_them(page):
    ids = [attrs["id"] for _, attrs in Page(page).tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", page)) <= set(ids)


def test_the_page_shows_all_pictures_and_their_words(plan, traces, page):
    pictures = [a for tag, a in Page(page).tags if tag == "div" and a.get("role") == "img"]
    assert len(pictures) == 5 and all(a["aria-label"] for a in pictures)
    text = Page(page).text
    for words in (
        "Training on Arduino Nano 33 BLE (Sense)",
        "forward",
        "backward and update",
        "floor: inference alone",
        "executed instructions per training step",
        "They are not time",
        "tolerance",
        plan.hash,
    ):
        assert words in text


def test_pictures_take_their_colours_and_their_font_from_the_page(page):
    for svg in re.findall(r"<svg .*?</svg>", page, re.DOTALL):
        assert "var(--ink)" in svg
        assert "font-family" not in svg
        used = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", svg))
        assert not used & {light for light, _ in PALETTE.values()}, used


def test_one_report_has_one_page(plan, traces, page):
    assert report(plan, *traces).html() == page


def test_runs_of_the_same_bits_need_no_picture_of_their_difference(plan, traces):
    html = report(plan, *traces[:2]).html()
    assert "bit-identical" in html
    assert "relative difference of the loss" not in html


def test_names_from_outside_are_text_in_the_page(plan):
    b = Builder(4)
    graph = b.graph(b.linear("input", 3, name=EVIL))
    evil = make(graph, None, Full())
    trace = Trace(EVIL, evil.hash, losses=LOSSES, accuracy_before=0.1, accuracy_after=0.2)
    other = Trace(EVIL, evil.hash, losses=[x * 1.1 for x in LOSSES])
    made = report(evil, trace, other)
    parsed = Page(made.html())
    assert "script" not in {tag for tag, _ in parsed.tags}
    assert "$" in parsed.text
    assert not re.search(r"[\x00-\x08\x1b]", made.html() + made.text())


def test_odd_traces_make_a_page(plan):
    odd = [
        Trace("", plan.hash),
        Trace("one", plan.hash, losses=[1.0]),
        Trace("same", plan.hash, losses=[0.0, 0.0]),
        Trace("nan", plan.hash, losses=[float("nan"), float("inf")]),
        Trace("x" * 300, plan.hash, losses=[1e30, 1e-30], figures={"peak_rss": 1e7}),
        Trace("m4f", plan.hash, figures=dict.fromkeys([*BOARD_FIGURES, "seconds"], float("inf"))),
    ]
    assert "<svg" in report(plan, *odd).html()


def test_many_samples_do_not_make_a_large_page(plan):
    losses = np.exp(-np.linspace(0, 4, 30_000))
    noise = 1 + 1e-6 * np.random.default_rng(0).normal(size=losses.size)
    traces = [Trace(w, plan.hash, losses=list(y)) for w, y in
              (("torch", losses), ("host", losses * noise))]  # fmt: skip
    assert len(report(plan, *traces).html()) < 700_000


def test_the_style_is_ours_and_the_users_is_left_alone(plan, page, traces):
    import matplotlib

    with matplotlib.rc_context({"font.size": 30.0, "svg.fonttype": "path"}):
        assert report(plan, *traces).html() == page
        assert matplotlib.rcParams["font.size"] == 30.0


@pytest.mark.parametrize(
    "made",
    [
        lambda: make(small_cnn(), None, Bias(), Adam(), loss="mse"),
        lambda: make(small_cnn(), "stm32n657", Last(n=1), SGD(), accumulate=4),
        lambda: make(
            small_cnn(), "nano33ble", Explicit(params={"pointwise.weight": {"out": (1, 2)}}), Adam()
        ),
    ],
    ids=["bias without a board", "last, accumulated", "a slice"],
)
def test_every_kind_of_plan_has_a_page(made):
    assert report(made()).html().count("<svg ") == 3


@pytest.mark.slow
def test_of_very_many_layers_only_some_are_named():
    b, x = Builder(2, 4, 4), "input"
    for i in range(130):
        x = b.conv(x, 2, name=f"block.{i}.conv")
    graph = b.graph(b.linear(b.flatten(b.add("adaptive_avg_pool2d", x, size=(1, 1))), 3))
    html = report(make(graph, None, Last(n=3))).html()
    assert "One layer in" in html
    assert "The first 128 of 133 nodes are frozen" in html


# ---- the figures behind the pictures ---------------------------------------------------------


@settings(max_examples=15)
@given(graphs())
def test_live_bytes_by_kind_and_layers_add_up_to_the_plans_figures(graph):
    made = make(graph, None, Full(), SGD(momentum=0.5))
    m = memory_of(made)
    assert m.total.tolist() == memory.live_bytes(made.program)
    assert m.total.max() == made.cost.lower_bound
    assert m.persistent + m.dynamic == made.cost.arena
    layers = picture_layers(made)
    assert sum(row.kept for row in layers) == made.cost.saved
    assert sum(row.forward for row in layers) == made.cost.macs_forward
    assert sum(row.backward for row in layers) == made.cost.macs_backward
    assert sum(row.trained for row in layers) == made.cost.trained_params


def test_layers_are_trained_or_pass_the_gradient_or_are_frozen():
    made = make(small_cnn(), None, Explicit(params={"depthwise.weight": None}), SGD())
    status = {row.name: row.status for row in picture_layers(made)}
    assert status == {
        "stem": "frozen",
        "depthwise": "trained",
        "pointwise": "passes gradient",
        "head": "passes gradient",
    }


# ---- what is written -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "start"), [("r.html", "<!DOCTYPE html>"), ("r.JSON", "{"), ("r.txt", "full on")]
)
def test_the_suffix_chooses_the_format(plan, traces, tmp_path, name, start):
    made = report(plan, *traces, out=tmp_path / name)
    assert isinstance(made, Report)
    written = (tmp_path / name).read_text(encoding="utf-8")
    assert written.startswith(start) and written.endswith("\n")
    assert [f.name for f in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["r.pdf", "r", "r.html.gz"])
def test_another_suffix_is_a_usage_error_and_writes_nothing(plan, tmp_path, name):
    with pytest.raises(UsageError, match="report is not written as"):
        report(plan, out=tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_named_and_nothing_is_left(plan, tmp_path):
    target = tmp_path / "taken.txt"
    target.mkdir()
    with pytest.raises(InvalidInput, match=r"cannot write .*taken\.txt"):
        report(plan, out=target)
    with pytest.raises(InvalidInput, match="cannot write"):
        report(plan, out=tmp_path / "missing" / "r.txt")
    assert [f.name for f in tmp_path.iterdir()] == ["taken.txt"]


def test_an_old_report_is_replaced(plan, tmp_path):
    target = tmp_path / "r.txt"
    target.write_text("old")
    report(plan, out=str(target))
    assert target.read_text().startswith("full on")


def test_a_trace_of_another_plan_is_refused(plan):
    with pytest.raises(InvalidInput, match="of another plan"):
        report(plan, Trace("torch", "0" * 64))


def test_a_file_name_among_the_traces_is_a_usage_error_that_says_how(plan):
    with pytest.raises(UsageError) as caught:
        report(plan, "r.html")  # type: ignore[arg-type]
    assert caught.value.details["try"] == ["out='r.html'"]


def test_importing_the_report_loads_neither_torch_nor_what_draws():
    code = (
        "import sys, modicum.report\n"
        "print([m for m in ('torch', 'matplotlib', 'jinja2', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@given(st.lists(st.floats(0, 100), min_size=1, max_size=4))
def test_labels_beside_a_picture_stay_apart_and_in_order(values):
    places = apart(values, 10.0)
    assert all(place <= value for place, value in zip(places, values, strict=True))
    downwards = sorted(places, reverse=True)
    assert all(a - b >= 10 - 1e-9 for a, b in itertools.pairwise(downwards))
    for a, b in itertools.combinations(range(len(values)), 2):
        if values[a] != values[b]:
            assert (values[a] > values[b]) == (places[a] > places[b])
