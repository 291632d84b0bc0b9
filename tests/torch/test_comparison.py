"""compare_methods: alike for every method, resumed where it was interrupted, told in one table."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import modicum as mo
from modicum import comparison
from modicum.comparison import Comparison, Row, compare_methods
from modicum.errors import UsageError
from modicum.report.comparison import interval, t_quantile
from modicum.report.pictures.pareto import Point, draw, picture
from modicum.tasks import Augment, Preprocess, load

SHOWN = Preprocess(size=6, mean=(0.5,), std=(0.5,))
METHODS = {"full": mo.Full(), "last": mo.Last()}


def images(per_class: int, classes: int = 3, seed: int = 0):
    """Each class is brighter in rows of its own."""
    rng = np.random.default_rng(seed)
    y = np.arange(per_class * classes) % classes
    x = rng.integers(0, 150, (len(y), 6, 6, 1))
    for i, label in enumerate(y):
        x[i, 2 * label : 2 * label + 2] += 100
    return load((x.astype(np.uint8), y))


def net(outputs: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(144, outputs)
    )


TRAIN, TEST = images(8), images(6, seed=1)


def compared(out: Path, **more) -> Comparison:
    given = {"epochs": 2, "seeds": (0, 1), "optimizer": mo.SGD(lr=0.05), **more}
    model, methods = given.pop("model", net), given.pop("methods", METHODS)
    train, test = given.pop("train", TRAIN), given.pop("test", TEST)
    return compare_methods(model, methods, train, test, SHOWN, out=out, **given)


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """The methods of the trainings that really happen."""
    kinds: list[str] = []
    train = comparison.train_passes

    def spy(tuned, *args, **kwargs):
        kinds.append(tuned.plan.method.kind)
        return train(tuned, *args, **kwargs)

    monkeypatch.setattr(comparison, "train_passes", spy)
    return kinds


def runs(out: Path, folder: str = "") -> list[dict]:
    files = sorted((out / folder).glob("*-seed*.json"))
    return [json.loads(path.read_text()) for path in files]


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("compared")
    return SimpleNamespace(out=out, result=compared(out, board="nano33ble"))


def test_a_row_says_how_accurate_a_method_is_and_what_it_costs(done):
    full, last = done.result.rows
    assert (full.label, last.label) == ("full", "last")
    graph = mo.capture(net(), torch.zeros(1, 1, 6, 6))
    plan = mo.plan(graph, "nano33ble", mo.Full(), mo.SGD(lr=0.05), accumulate=8)
    cost = plan.cost
    assert (full.saved, full.ram, full.flash) == (cost.saved, cost.ram, cost.flash)
    assert (full.macs_forward, full.macs_backward) == (cost.macs_forward, cost.macs_backward)
    assert full.saved_batch == mo.account(plan, 8).total.saved
    assert full.memory == full.saved_batch + 4 * cost.trained_params + cost.optimizer_bytes
    persistent = cost.trained_bytes + cost.optimizer_bytes + cost.accumulator_bytes
    assert cost.arena - full.dynamic == pytest.approx(persistent, abs=64)
    assert full.memory > last.memory and full.macs_backward > last.macs_backward
    assert full.fits is True
    by_file = [run["accuracy"] for run in runs(done.out) if run["inputs"]["method"] == dict(
        kind="full", norms="affine")]  # fmt: skip
    assert sorted(by_file) == sorted(full.accuracies)
    assert full.accuracy == pytest.approx(np.mean(full.accuracies))
    assert full.accuracy > 0.6
    assert 0 < full.seconds_per_step < full.seconds


def test_what_does_not_fit_a_board_is_trained_all_the_same(tmp_path):
    board = mo.boards()["nano33ble"]
    small = board.model_copy(update={"name": "tiny", "reserve": board.ram - 1000})
    result = compared(tmp_path, board=small, seeds=(0,), epochs=1)
    assert [row.fits for row in result.rows] == [False, False]
    assert "! does not fit tiny" in str(result)


def test_all_methods_start_from_the_same_weights_and_other_seeds_from_others(done):
    weights: dict[int, set[str]] = {}
    for run in runs(done.out):
        weights.setdefault(run["inputs"]["seed"], set()).add(run["inputs"]["model"]["weights"])
    assert [len(w) for w in weights.values()] == [1, 1]
    assert weights[0] != weights[1]


def test_a_network_of_other_outputs_gets_a_head_that_only_the_seed_decides(tmp_path):
    torch.manual_seed(3)
    base = net(outputs=7)
    before = {k: v.clone() for k, v in base.state_dict().items()}
    state = torch.get_rng_state()
    compared(tmp_path, model=base, epochs=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
    start = comparison._start(base, SHOWN, 3, seed=0)
    a, again, b = (start.network(seed).state_dict() for seed in (0, 0, 1))
    assert a["3.weight"].shape == (3, 144)
    assert torch.equal(a["3.weight"], again["3.weight"])
    assert not torch.equal(a["3.weight"], b["3.weight"])
    assert torch.equal(a["0.weight"], before["0.weight"])


def test_the_same_call_gives_the_same_accuracies(done, tmp_path):
    again = compared(tmp_path)
    assert [r.accuracies for r in again.rows] == [r.accuracies for r in done.result.rows]
    assert [r["losses"] for r in runs(tmp_path)] == [r["losses"] for r in runs(done.out)]


# ---- going on ----------------------------------------------------------------------------------


def test_a_rerun_trains_nothing_and_finds_the_same(done, trained):
    assert compared(done.out, board="nano33ble") == done.result
    assert trained == []


def test_after_an_interruption_only_the_rest_is_trained(tmp_path, trained, monkeypatch):
    spied = comparison.train_passes

    def interrupted(*args, **kwargs):
        if len(trained) == 3:
            raise KeyboardInterrupt
        return spied(*args, **kwargs)

    monkeypatch.setattr(comparison, "train_passes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compared(tmp_path)
    assert trained == ["full", "full", "last"]
    assert not (tmp_path / "comparison.json").exists()
    monkeypatch.setattr(comparison, "train_passes", spied)
    trained.clear()
    assert len(compared(tmp_path).rows) == 2
    assert trained == ["last"]


CHANGES = {
    "learning rate": {"optimizer": mo.SGD(lr=0.01)},
    "epochs": {"epochs": 1},
    "batch": {"batch": 5},
    "schedule": {"schedule": "constant"},
    "augmentation": {"augment": Augment(crop="pad", pad=1, flip=False)},
    "training data": {"train": images(8, seed=4)},
    "test data": {"test": images(6, seed=5)},
    "method": {"methods": {"last": mo.Last(n=2)}},
    "weights": {"model": lambda: net().apply(lambda m: m.bias.data.zero_() if hasattr(
        m, "bias") else None)},
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_depends_on_a_changed_input_is_trained_again(done, tmp_path, trained, change):
    shutil.copytree(done.out, tmp_path, dirs_exist_ok=True)
    last = {"last": mo.Last()}
    compared(tmp_path, seeds=(0,), methods=last)
    assert trained == []
    compared(tmp_path, **{"seeds": (0,), "methods": last, **change})
    assert trained == ["last"]


@pytest.mark.parametrize("text", ["", "{", '{"version": 1}', "changed"])
def test_a_file_that_is_not_whole_is_made_again(tmp_path, trained, text):
    last = {"last": mo.Last()}
    compared(tmp_path, seeds=(0,), methods=last)
    path = next(tmp_path.glob("last-*.json"))
    whole = path.read_text()
    path.write_text(whole.replace('"epochs": 2', '"epochs": 3') if text == "changed" else text)
    trained.clear()
    compared(tmp_path, seeds=(0,), methods=last)
    assert trained == ["last"]
    assert json.loads(path.read_text())["accuracy"] == json.loads(whole)["accuracy"]
    assert not list(tmp_path.glob(".*"))


# ---- learning rates ----------------------------------------------------------------------------


def test_learning_rates_are_chosen_on_a_part_of_the_training_set(tmp_path):
    result = compared(tmp_path, rates=(1e-6, 0.05))
    tried, final = runs(tmp_path, "validation"), runs(tmp_path)
    assert (len(tried), len(final)) == (4, 4)
    for run in tried:
        assert run["inputs"]["seed"] not in result.seeds
        assert run["inputs"]["data"]["train"]["images"] < len(TRAIN)
        assert run["inputs"]["data"]["test"] != final[0]["inputs"]["data"]["test"]
        sizes = [run["inputs"]["data"][part]["images"] for part in ("train", "test")]
        assert sum(sizes) == len(TRAIN)
    for row in result.rows:
        assert row.rate == 0.05
        assert row.validation["0.05"] >= row.validation["1e-06"]
    assert {run["inputs"]["optimizer"]["lr"] for run in final} == {0.05}
    assert "the best of 1e-06, 0.05" in str(result)


# ---- what cannot be compared -------------------------------------------------------------------


def test_methods_that_do_not_apply_or_diverge_are_listed_and_the_rest_goes_on(tmp_path):
    methods = {"blocks": mo.Blocks(), "full": mo.Full(), "last": mo.Last()}
    huge = mo.SGD(lr=3e38)
    with pytest.raises(UsageError, match="none of the methods") as caught:
        compared(tmp_path, methods=methods, optimizer=huge, seeds=(0,))
    assert any("not finite" in line for line in caught.value.details["why"])
    result = compared(tmp_path, methods=methods, seeds=(0,), epochs=1)
    assert [row.label for row in result.rows] == ["full", "last"]
    assert "0 inverted residual blocks" in result.left_out["blocks"]
    assert "left out:\n  blocks" in str(result)


BAD = {
    "other classes": ({"test": images(4, classes=2)}, mo.InvalidInput),
    "a model without a linear end": (
        {"model": nn.Sequential(nn.Conv2d(1, 5, 6), nn.Flatten())}, UsageError),
    "an input that the model does not take": ({"model": nn.Linear(7, 3)}, UsageError),
    "no methods": ({"methods": {}}, UsageError),
    "no seeds": ({"seeds": ()}, UsageError),
    "a seed twice": ({"seeds": (1, 1)}, UsageError),
    "no epochs": ({"epochs": 0}, UsageError),
    "a rate of zero": ({"rates": (0.0, 0.1)}, UsageError),
    "an unknown board": ({"board": "nope"}, UsageError),
}  # fmt: skip


@pytest.mark.parametrize(("change", "error"), BAD.values(), ids=BAD)
def test_what_makes_no_comparison_is_refused_before_anything_is_trained(
    tmp_path, trained, change, error
):
    with pytest.raises(error):
        compared(tmp_path, **change)
    assert trained == []


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_trained(tmp_path, trained):
    (tmp_path / "file").write_text("")
    with pytest.raises(mo.InvalidInput, match="cannot write"):
        compared(tmp_path / "file" / "out")
    assert trained == []


# ---- the table, the data and the picture --------------------------------------------------------


def test_the_folder_has_the_comparison_as_text_data_and_pictures(done):
    names = {path.name for path in done.out.iterdir() if path.name.startswith("comparison")}
    assert names == {f"comparison.{suffix}" for suffix in ("json", "txt", "svg", "png")}
    data = json.loads((done.out / "comparison.json").read_text())
    front = data.pop("front")
    assert Comparison.model_validate_json(json.dumps(data)) == done.result
    assert front == list(done.result.front)
    text = (done.out / "comparison.txt").read_text()
    assert text == f"{done.result}\n"
    full = done.result.rows[0]
    assert f"{100 * full.accuracy:.1f} ± {100 * full.interval:.1f} %" in text
    assert "3 classes, 24 training and 18 test images, 1x6x6" in text
    assert (done.out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    svg = ET.fromstring((done.out / "comparison.svg").read_text())
    words = "".join(svg.itertext())
    assert all(word in words for word in ("full", "last", "Pareto front", "memory", "accuracy"))


def row(label: str, memory: int, accuracy: float) -> Row:
    numbers = dict.fromkeys(
        ("trained_params", "saved", "saved_batch", "dynamic", "ram", "flash", "macs_forward",
         "macs_backward", "seconds", "seconds_per_step"), 1)  # fmt: skip
    return Row(label=label, method=mo.Full(), rate=0.1, accuracies=(accuracy,), accuracy=accuracy,
               interval=None, memory=memory, fits=None, **numbers)  # fmt: skip


def test_the_front_has_what_is_more_accurate_than_all_that_needs_no_more(done):
    rows = (row("d", 40, 0.9), row("a", 10, 0.5), row("b", 20, 0.4), row("c", 20, 0.8),
            row("e", 50, 0.9))  # fmt: skip
    assert done.result.model_copy(update={"rows": rows}).front == ("a", "c", "d")


def test_labels_lie_neither_on_each_other_nor_on_a_point():
    rng = np.random.default_rng(0)
    points = [
        Point(f"method:blocks={i}", int(1000 * 2 ** rng.uniform(0, 4)), rng.uniform(0.8, 0.9),
              0.01, int(rng.integers(1, 1e6)), i % 2 == 0)
        for i in range(10)
    ]  # fmt: skip
    figure = draw(points, "accuracy in %", "memory")
    ax = figure.axes[0]
    figure.draw_without_rendering()
    texts = [t for t in ax.texts if t.get_text().startswith("method")]
    assert len(texts) == 10
    boxes = [t.get_window_extent() for t in texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    centres = [ax.transData.transform((p.memory / 1024, 100 * p.accuracy)) for p in points]
    assert not any(box.contains(*centre) for box in boxes for centre in centres)
    frame = ax.get_window_extent()
    assert all(frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1) for box in boxes)


@pytest.mark.parametrize("points", [
    [Point("one", 1024, 0.5, None, 0, True)],
    [Point("a", 1, 0.0, 0.5, 0, True), Point("b", 1 << 40, 1.0, 0.5, 1 << 40, True)],
    [Point("same", 4096, 0.9, 0.0, 5, True), Point("same", 4096, 0.9, 0.0, 5, False)],
    [Point("$x^2_$ <&>", 4096, 0.9, 0.01, 5, True)],
], ids=["one", "far apart", "on each other", "odd names"])  # fmt: skip
def test_odd_points_can_be_drawn(points):
    for suffix in (".svg", ".png"):
        assert picture(points, "accuracy in %", "memory", suffix)
    words = "".join(ET.fromstring(picture(points, "accuracy in %", "memory", ".svg")).itertext())
    assert points[0].label in words


def test_the_same_points_are_the_same_bytes_and_other_formats_are_refused(done, tmp_path):
    points = [Point("one", 1024, 0.5, None, 7, True)]
    assert picture(points, "accuracy in %", "memory", ".svg") == picture(
        points, "accuracy in %", "memory", ".svg"
    )
    with pytest.raises(UsageError, match="not written as"):
        done.result.picture(tmp_path / "a.pdf")


@pytest.mark.parametrize(("freedom", "t"), [
    (1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (9, 2.2622), (10, 2.2281),
    (29, 2.0452), (30, 2.0423), (100, 1.9840), (1000, 1.9623),
])  # fmt: skip
def test_quantiles_are_those_of_the_tables(freedom, t):
    assert t_quantile(freedom) == pytest.approx(t, abs=5e-5)


def test_an_interval_needs_two_values():
    assert interval((0.5,)) is None
    assert interval((0.5, 0.5)) == 0
    assert interval((0.8, 0.9, 1.0)) == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
