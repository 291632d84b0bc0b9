"""Task comparisons as data, text and a picture, made of rows without training."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest

import modicum as mo
from modicum.errors import UsageError
from modicum.report.comparison import interval
from modicum.report.pictures.pareto import Point, draw, picture
from modicum.report.tasks import TaskComparison, TaskRow
from modicum.tasks import FixedEpisodes, Preprocess, VariousEpisodes

TUNE = {"iterations": 40, "prototypes": "moving"}
DOMAINS = ("signs", "letters")


def row(label: str, mean: float, memory: int, model: str = "plain", **more) -> TaskRow:
    """Accuracies that go up and down alike for all methods: their differences vary less."""
    noise = np.random.default_rng(0).normal(0, 0.1, (2, 20))
    own = np.random.default_rng(hash_of(label + model)).normal(0, 0.01, (2, 20))
    given = {"trained": 100, "saved": 2048, "dynamic": 4096, "ram": 8192, "batch": 1,
             "macs": 1000, "seconds": 0.5, "selection": 0.01, "rate": 0.01, "tune": TUNE,
             "method": mo.Last() if memory else None, "memory": memory} | more  # fmt: skip
    accuracies = {d: tuple(mean + noise[k] + own[k]) for k, d in enumerate(DOMAINS)}
    return TaskRow(model=model, label=label, memory_one=memory, accuracies=accuracies, **given)


def hash_of(text: str) -> int:
    return sum(ord(c) * 31**i for i, c in enumerate(text)) % (1 << 32)


def none(model: str = "plain", mean: float = 0.4) -> TaskRow:
    return row("none", mean, 0, model, rate=None, tune=None)


def comparison(*rows: TaskRow, **more) -> TaskComparison:
    given = {"tasks": 20, "rule": FixedEpisodes(ways=(5, 10)), "optimizer": mo.Adam(), "seed": 0,
             "preprocess": Preprocess(size=64)}  # fmt: skip
    return TaskComparison(rows=rows, **{**given, **more})


LAST, FULL, LEAN = row("last", 0.5, 1 << 20), row("full", 0.6, 8 << 20), row("lean", 0.7, 1 << 18)
MADE = comparison(none(), LAST, FULL, LEAN)


def test_an_estimate_is_the_mean_of_all_tasks_with_its_interval():
    mine = MADE.accuracy(LAST, ["signs"])
    assert mine.mean == pytest.approx(np.mean(LAST.accuracies["signs"]))
    assert mine.half == pytest.approx(interval(LAST.accuracies["signs"]))
    every = [a for each in LAST.accuracies.values() for a in each]
    assert MADE.accuracy(LAST).half == pytest.approx(interval(every))
    assert str(MADE.accuracy(LAST)) == f"{100 * np.mean(every):.1f} ± {100 * interval(every):.1f}"


def test_differences_are_task_by_task_and_so_their_intervals_are_smaller():
    less = MADE.difference(LEAN, LAST)
    pairs = [a - b for d in DOMAINS for a, b in zip(LEAN.accuracies[d], LAST.accuracies[d],
                                                   strict=True)]  # fmt: skip
    assert less.mean == pytest.approx(np.mean(pairs)) and less.half == pytest.approx(
        interval(pairs)
    )
    assert less.half < 0.3 * MADE.accuracy(LEAN).half
    assert less.signed.startswith("+") and MADE.difference(LAST, LEAN).signed.startswith("-")


def test_one_task_has_no_interval():
    one = LAST.model_copy(update={"accuracies": {"signs": (0.5,)}})
    made = comparison(one, tasks=1)
    assert made.accuracy(one).half is None and str(made.accuracy(one)) == "50.0"
    assert "±" not in str(made)


def test_the_front_has_what_nothing_leaner_beats():
    assert MADE.front("plain") == ("none", "lean")
    assert comparison(LAST, FULL).front("plain") == ("last", "full")
    same = row("twin", 0.7, 1 << 18)
    assert len(comparison(LEAN, same, LAST).front("plain")) == 1


def test_the_text_says_what_was_done_and_what_it_cost():
    text = str(MADE)
    lines = text.splitlines()
    assert lines[0] == "20 tasks of each of 2 domains: 5 to 10 ways, 5 shots, 10 queries, seed 0"
    assert lines[1] == "40 iterations, Adam(lr=0.01), images 3x64x64"
    heads = lines[3].split("  ")
    assert [h.strip() for h in heads if h] == [
        "accuracy in %", "signs", "letters", "all", "less none", "lr"
    ]  # fmt: skip
    lean = next(line for line in lines if line.startswith("* lean"))
    assert str(MADE.accuracy(LEAN)) in lean and MADE.difference(LEAN, MADE.rows[0]).signed in lean
    assert "8,192.0 KiB" in text
    assert "2.0 KiB  4.0 KiB  8.0 KiB    256.0 KiB" in text
    assert next(line.split() for line in lines if line.startswith("  none")) == ["none"] + ["-"] * 9
    assert "lr: the best" not in text and "left out" not in text and "not learned" not in text


def test_a_batch_of_the_papers_is_told():
    wide = FULL.model_copy(update={"batch": 100, "memory": 64 << 20})
    assert "65,536.0 KiB x100" in str(comparison(wide))


def test_rates_that_were_chosen_are_told():
    one, other = row("last", 0.5, 1 << 20), row("full", 0.6, 1 << 21, rate=0.1)
    made = comparison(one, other, validation=("birds", "bees"), validation_tasks=12)
    assert "Adam(lr=best)" in str(made)
    assert "lr: the best on 12 tasks of birds, bees" in str(made)


def test_two_models_are_compared_method_by_method():
    gains = [none(), LAST, none("meta", 0.55), row("last", 0.6, 1 << 20, "meta")]
    made = comparison(*gains)
    text = str(made)
    heads = text.splitlines()[3].split()
    assert heads[-5:] == ["less", "none", "less", "plain", "lr"]
    line = next(x for x in text.splitlines() if "meta: last" in x)
    assert made.difference(gains[3], gains[2]).signed in line
    assert made.difference(gains[3], gains[1]).signed in line
    data = made.as_dict()["means"][3]
    assert data["differences"].keys() == {"none", "plain"} and data["front"] is True


def test_what_failed_and_what_was_left_out_is_listed():
    bad = row("bad", 0.2, 1 << 20, failed={"signs 3": "the loss is not finite in step 1"})
    made = comparison(none(), bad, left_out={"plain: mobiletl": "no blocks"})
    text = str(made)
    assert "not learned:\n  bad, signs 3  the loss is not finite in step 1" in text
    assert "left out:\n  plain: mobiletl  no blocks" in text


def test_names_from_outside_cannot_write_to_a_terminal():
    bad = row("a\x1b[2Jb", 0.2, 1 << 20)
    made = comparison(bad, none(), left_out={"c\x07": "d\x1b"})
    assert "\x1b" not in str(made) and "\x07" not in str(made) and "a?[2Jb" in str(made)


def test_various_shots_are_said_to_be_that():
    assert "5 to 50 ways, various shots" in str(comparison(LAST, rule=VariousEpisodes()))


def test_it_is_the_same_after_a_round_trip_and_pictures_are_the_same_bytes(tmp_path):
    MADE.save(tmp_path / "a")
    MADE.save(tmp_path / "b")
    names = {"tasks.json", "tasks.txt", "tasks.svg", "tasks.png"}
    assert {p.name for p in (tmp_path / "a").iterdir()} == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    data = json.loads((tmp_path / "a" / "tasks.json").read_text())
    assert len(data.pop("means")) == 4
    assert TaskComparison.model_validate(data) == MADE
    with pytest.raises(UsageError, match="not written as"):
        MADE.picture(tmp_path / "a.pdf")


# ---- the picture -----------------------------------------------------------------------------


def points(*rows: tuple[str, int, float, str]) -> list[Point]:
    return [Point(label, memory, accuracy, 0.02, 100, True, series)
            for label, memory, accuracy, series in rows]  # fmt: skip


def test_what_needs_no_memory_is_a_level_line_with_its_name():
    figure = draw(points(("none", 0, 0.40, ""), ("last", 4096, 0.5, "")), "title", "axis")
    ax = figure.axes[0]
    levels = [line for line in ax.lines if line.get_linestyle() == ":"]
    assert [float(line.get_ydata()[0]) for line in levels] == [40.0]
    low, high = ax.get_ylim()
    assert low < 40 < high and "none" in [t.get_text() for t in ax.texts]
    assert next(t for t in ax.texts if t.get_text() == "none").get_color() == "#0072b2"


def test_two_models_have_marks_of_their_own_and_a_key():
    drawn = points(("none", 0, 0.4, "plain"), ("last", 4096, 0.5, "plain"),
                   ("none", 0, 0.45, "meta"), ("last", 4096, 0.6, "meta"))  # fmt: skip
    words = "".join(ET.fromstring(picture(drawn, "title", "axis", ".svg")).itertext())
    assert "plain" in words and "meta" in words and words.count("last") == 2
    ax = draw(drawn, "title", "axis").axes[0]
    places = [tuple(c.get_offsets()[0]) for c in ax.collections if len(c.get_offsets()) == 1]
    places = sorted(set(places) - {(0.0, 0.0)})  # of the error bars
    assert len(places) == 2
    assert abs(places[0][0] / places[1][0] - 1) < 0.05  # apart enough to see both intervals


@pytest.mark.parametrize("levels", [[0.4, 0.4], [0.4, 0.41], [0.1, 0.9]])
def test_names_of_level_lines_do_not_lie_on_each_other(levels):
    drawn = points(*((f"none {i}", 0, a, str(i)) for i, a in enumerate(levels)),
                   ("last", 4096, 0.5, "0"))  # fmt: skip
    figure = draw(drawn, "title", "axis")
    figure.draw_without_rendering()
    boxes = [t.get_window_extent() for t in figure.axes[0].texts
             if t.get_text().startswith("none")]  # fmt: skip
    assert len(boxes) == 2 and not boxes[0].overlaps(boxes[1])


def test_only_level_lines_can_be_drawn():
    assert picture(points(("none", 0, 0.4, "")), "title", "axis", ".png").startswith(b"\x89PNG")
