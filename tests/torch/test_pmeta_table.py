"""The table of rules is put together over machines: rows without a training here stay."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def pmeta(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import pmeta

    yield pmeta
    for name in ("pmeta", "backbones"):
        sys.modules.pop(name, None)


def training(folder: Path, rule: str, accuracy: float, epochs: int = 3) -> None:
    """The record of one, in the setting of 5 ways and 1 shot."""
    test = {"mean": accuracy, "interval": 0.01, "tasks": 600}
    result = {
        "setting": "omniglot-5w1s", "rule": rule, "seed": 0,
        "config": {"epochs": epochs, "episodes": 400, "tasks": 4},
        "trace": {"test": test, "seconds": 7.0},
    }  # fmt: skip
    path = folder / "omniglot-5w1s" / f"{rule}-0"
    path.mkdir(parents=True)
    (path / "result.json").write_text(json.dumps(result))


def tabled(pmeta, monkeypatch, out: Path, file: Path, kib: float) -> dict:
    costs = {"peak_kb": kib, "measured_peak_kb": kib, "gmacs": 1.0,
             "measured_gmacs": 1.0, "steps": "3"}  # fmt: skip
    monkeypatch.setattr(pmeta, "costs", lambda setting, folder: costs)
    pmeta.table(SimpleNamespace(out=out, json=file, verb="table"))
    return json.loads(file.read_text())


def test_rows_of_another_machine_stay_and_own_ones_are_renewed(pmeta, monkeypatch, tmp_path):
    file = tmp_path / "pmeta.json"
    for rule in ("MAML", "ANIL", "BOIL"):
        training(tmp_path / "there", rule, 0.9)
    training(tmp_path / "there", "p-Meta", 0.5)
    first = tabled(pmeta, monkeypatch, tmp_path / "there", file, 8.0)
    assert {r["rule"] for r in first["rows"]} == {"MAML", "ANIL", "BOIL", "p-Meta"}
    assert first["ratios"] == []

    training(tmp_path / "here", "MAML++", 0.7)
    training(tmp_path / "here", "p-Meta", 0.6)
    made = tabled(pmeta, monkeypatch, tmp_path / "here", file, 2.0)
    rows = {r["rule"]: r for r in made["rows"]}
    assert rows["MAML"] == next(r for r in first["rows"] if r["rule"] == "MAML")
    assert rows["p-Meta"]["accuracy"] == 0.6 and rows["p-Meta"]["updates"] == 300
    mean = rows["mean of four"]
    assert mean["accuracy"] == pytest.approx((3 * 0.9 + 0.7) / 4)
    assert mean["peak_kb"] == pytest.approx((3 * 8.0 + 2.0) / 4)
    (ratio,) = made["ratios"]
    assert ratio["peak_kb"] == pytest.approx(6.5 / 2)
    assert ratio["below_best"] == pytest.approx(0.9 - 0.6)

    again = tabled(pmeta, monkeypatch, tmp_path / "nowhere", file, 0.0)
    assert again["rows"] == made["rows"]


def test_what_a_row_lacks_is_counted_where_it_depends_on_no_weights(pmeta, monkeypatch):
    monkeypatch.setattr(pmeta, "counted", lambda setting, net, learner: {"measured_gmacs": 2.0})
    for rule, gains in (("MAML", True), ("Reptile", True), ("p-Meta", False), ("ProtoNet", False)):
        row = {"setting": "omniglot-5w1s", "rule": rule, "seed": 0, "gmacs": 1.0}
        known = row | {"measured_gmacs": 1.0}
        assert pmeta.recounted(known) == known
        assert pmeta.recounted(row) == (row | {"measured_gmacs": 2.0} if gains else row)


def test_ablations_have_a_table_of_their_own(pmeta, monkeypatch, tmp_path):
    file = tmp_path / "pmeta.json"
    training(tmp_path / "there", "layers only", 0.8, epochs=1)
    made = tabled(pmeta, monkeypatch, tmp_path / "there", file, 1.0)
    assert made["rows"] == [] and made["ablation"][0]["updates"] == 100
    again = tabled(pmeta, monkeypatch, tmp_path / "nowhere", file, 1.0)
    assert again["ablation"] == made["ablation"]


def test_only_as_many_updates_are_compared(pmeta, monkeypatch, tmp_path):
    for rule in ("MAML", "ANIL", "BOIL", "MAML++"):
        training(tmp_path / "out", rule, 0.9, epochs=3)
    training(tmp_path / "out", "p-Meta", 0.5, epochs=1)
    made = tabled(pmeta, monkeypatch, tmp_path / "out", tmp_path / "pmeta.json", 1.0)
    assert made["ratios"] == []


def test_a_table_of_nothing_is_empty(pmeta, monkeypatch, tmp_path):
    made = tabled(pmeta, monkeypatch, tmp_path, tmp_path / "new.json", 1.0)
    assert made["rows"] == [] and made["ratios"] == []
