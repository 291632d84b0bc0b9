"""What emit and run refuse, and that nothing changes when they do."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import CASES, build
from emit.folders import Workshop
from torch import nn

import modicum as mo
from modicum.errors import ModicumError, ToolMissing, UsageError

ROW = build(next(c for c in CASES if c.id == "mlp-Full-SGD"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- emit ------------------------------------------------------------------------------------


def test_a_folder_that_is_not_empty_is_left_as_it_is(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not an empty folder") as caught:
        mo.emit(ROW.model, ROW.plan, tmp_path)
    assert caught.value.exit_code == 2
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_a_file_in_the_place_of_the_folder_is_left_as_it_is(tmp_path):
    target = tmp_path / "out"
    target.write_text("mine")
    with pytest.raises(UsageError, match="not an empty folder"):
        mo.emit(ROW.model, ROW.plan, target)
    assert contents(tmp_path) == {"out": b"mine"}


def test_an_empty_folder_and_one_that_does_not_exist_are_both_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "new" / "deep"):
        assert mo.emit(ROW.model, ROW.plan, target) == target
        assert {"plan.json", "Makefile", "model.c", "model.h", "net.mk"} <= set(os.listdir(target))
    assert sorted(os.listdir(tmp_path)) == ["empty", "new"]  # no scratch folder is left


@pytest.mark.parametrize("name", ["", "Model", "7up", "a-b", "a b", "net", "main", "x" * 40, "é"])
def test_a_name_that_cannot_prefix_c_symbols_is_refused(tmp_path, name):
    with pytest.raises(UsageError, match="cannot prefix C symbols"):
        mo.emit(ROW.model, ROW.plan, tmp_path / "out", name=name)
    assert contents(tmp_path) == {}


def test_the_plan_of_another_model_is_refused_and_nothing_is_written(tmp_path):
    other = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)).eval()
    with pytest.raises(mo.InvalidInput, match="does not belong to this graph"):
        mo.emit(other, ROW.plan, tmp_path / "out")
    assert contents(tmp_path) == {} and list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_refused_and_nothing_is_written(tmp_path):
    model = nn.Linear(6, 3)
    plan = mo.plan(mo.capture(model, torch.zeros(1, 6)))
    with torch.no_grad():
        model.weight[1, 2] = torch.nan
    with pytest.raises(mo.InvalidInput, match="'weight' has values that are not finite"):
        mo.emit(model, plan, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "data",
    [
        (np.full((3, 6), np.nan, np.float32), np.zeros(3, int)),
        (np.zeros((3, 5), np.float32), np.zeros(3, int)),
        (np.zeros((3, 6), np.float32), np.array([0, 1, 4])),
    ],
    ids=["not finite", "wrong shape", "label out of range"],
)
def test_check_samples_that_do_not_fit_are_refused_and_nothing_is_written(tmp_path, data):
    with pytest.raises(mo.InvalidInput):
        mo.emit(ROW.model, ROW.plan, tmp_path / "out", data=data)
    assert list(tmp_path.iterdir()) == []


def test_the_given_samples_become_the_check_vectors(tmp_path):
    x, y = ROW.samples(5, seed=9)
    out = mo.emit(ROW.model, ROW.plan, tmp_path / "out", data=(x, y))
    with np.load(out / "vectors.npz") as file:
        vectors = dict(file)
    assert np.array_equal(vectors["x"], x[: len(vectors["x"])].numpy())
    assert np.array_equal(vectors["y"], y[: len(vectors["x"])].numpy())


# ---- run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(workshop: Workshop) -> Path:
    made = workshop.emit(ROW)
    workshop.run(made)  # so that what comes next finds it built
    return made


def data(n: int = 4) -> tuple[np.ndarray, np.ndarray]:
    x, y = ROW.samples(n)
    return x.numpy(), y.numpy()


def test_a_folder_that_was_not_emitted_is_refused(tmp_path):
    with pytest.raises(mo.InvalidInput, match="not an emitted folder"):
        mo.run(tmp_path)


def test_a_folder_with_a_damaged_plan_is_refused(workshop, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    plan = json.loads((copy / "plan.json").read_text())
    plan["accumulate"] = 2
    (copy / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(mo.InvalidInput, match="changed after it was made"):
        workshop.run(copy)


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 and no more", b"x" * 100])
def test_check_samples_that_are_missing_or_damaged_are_named(workshop, folder, tmp_path, content):
    copy = shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("build"))
    (copy / "vectors.npz").unlink()
    if content is not None:
        (copy / "vectors.npz").write_bytes(content)
    with pytest.raises(mo.InvalidInput, match=r"vectors\.npz has no check samples"):
        workshop.run(copy)


@pytest.mark.parametrize("on", ["", "stm32", "M4F", "Host"])
def test_an_unknown_machine_is_refused_with_the_names_there_are(folder, on):
    with pytest.raises(UsageError, match="cannot run on") as caught:
        mo.run(folder, on=on)
    assert "m55" in str(caught.value)


def test_qemu_needs_a_plan_for_a_board_with_an_emulated_core(folder):
    with pytest.raises(UsageError, match="no emulated machine has the core"):
        mo.run(folder, on="qemu")


def test_a_sample_of_the_wrong_size_is_refused(workshop, folder):
    x, y = data()
    with pytest.raises(mo.InvalidInput, match=r"the inputs have shape \(4, 5\)"):
        workshop.run(folder, train=(x[:, :5], y))


def test_a_label_out_of_range_is_refused(workshop, folder):
    x, y = data()
    y[2] = 4
    with pytest.raises(mo.InvalidInput, match="labels must be whole numbers from 0 to 3"):
        workshop.run(folder, train=(x, y))


def test_an_order_beyond_the_samples_is_refused(workshop, folder):
    for order in ([0, 4], [-1]):
        with pytest.raises(mo.InvalidInput, match="order names samples beyond the 4"):
            workshop.run(folder, train=data(), order=order)


def test_inputs_that_are_not_finite_are_refused_with_the_sample(workshop, folder):
    x, y = data()
    x[1, 3] = np.inf
    with pytest.raises(mo.InvalidInput, match="input 1 has values that are not finite"):
        workshop.run(folder, train=(x, y))
    with pytest.raises(mo.InvalidInput, match="input 1 has values that are not finite"):
        workshop.run(folder, test=(x, y))


def test_training_that_diverges_is_an_error_and_not_a_trace(workshop):
    row = build(next(c for c in CASES if c.id == "linear-Full-SGD"))
    plan = mo.plan(row.graph, optimizer=mo.SGD(lr=3e38))
    x, y = (t.numpy() for t in row.samples(6))
    made = mo.emit(row.model, plan, workshop.root / "diverging", data=(x[:1], y[:1]))
    with pytest.raises(mo.InvalidInput, match="refused sample") as caught:
        workshop.run(made, train=(x, y))
    assert "status -4" in str(caught.value)


def test_a_run_that_takes_too_long_is_ended(workshop, folder, monkeypatch):
    with pytest.raises(ModicumError, match="did not end within"):
        workshop.run(folder, timeout=1e-6)


# ---- tools -----------------------------------------------------------------------------------


def path_with(folder: Path, *tools: str) -> str:
    """A PATH on which there is nothing but these."""
    folder.mkdir()
    for tool in tools:
        (folder / tool).symlink_to(shutil.which(tool))
    return str(folder)


def test_without_make_the_error_says_what_to_install(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", path_with(tmp_path / "bin"))
    with pytest.raises(ToolMissing, match="make is not installed") as caught:
        mo.run(folder)
    assert "apt install" in str(caught.value)


@pytest.mark.parametrize(("on", "tool"), [("host", "cc"), ("m4f", "arm-none-eabi-gcc")])
def test_without_a_compiler_the_error_names_it(folder, tmp_path, monkeypatch, on, tool):
    bin_ = path_with(tmp_path / "bin", "make", "mkdir", "cmp", "find", "rm", "sh")
    monkeypatch.setenv("PATH", bin_)
    copy = shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("build"))
    with pytest.raises(ToolMissing) as caught:
        mo.run(copy, on=on)
    assert f"{tool} is not on" in str(caught.value)


def test_a_compiler_error_is_shown(workshop, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("build"))
    (copy / "model.c").write_text("int nonsense = ;\n")
    with pytest.raises(ModicumError, match="host does not build") as caught:
        workshop.run(copy)
    assert "model.c:1" in str(caught.value)
