"""The C interface of an emitted net, called as a firmware would call it."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_float, c_int, c_int32, c_size_t, c_uint8, c_void_p
from pathlib import Path

import numpy as np
import pytest
from cases import CASES, build
from emit.folders import Workshop

CASE = next(c for c in CASES if c.id == "groups-slices-Adam-x3")
REGRESSION = next(c for c in CASES if c.id == "regression-Full-Adam-x2")


class Net:
    """One state of a net in memory of its own, between two guards."""

    def __init__(self, library: ctypes.CDLL, name: str, init: bool = True) -> None:
        self.call = lambda function: getattr(library, f"{name}_{function}")
        for function, result in (("size", c_size_t), ("export_state", c_size_t),
                                 ("input", POINTER(c_float)), ("trained", POINTER(c_float)),
                                 ("error", ctypes.c_char_p)):  # fmt: skip
            self.call(function).restype = result
        self.bytes = self.call("size")()
        self.room = np.full(self.bytes + 128, 0xA5, np.uint8)
        start = self.room.ctypes.data
        self.at = start + 64 + (-start % 16)
        if init:
            assert self.call("init")(c_void_p(self.at)) == 0

    def train(self, x, label=0, target=None) -> tuple[int, float]:
        loss = c_float(-1.0)
        extra = c_int32(label) if target is None else pointer(target)
        status = self.call("train")(c_void_p(self.at), pointer(x), extra, byref(loss))
        return status, loss.value

    def predict(self, x, outputs: int) -> tuple[int, np.ndarray]:
        logits = np.full(outputs, -7.0, np.float32)
        return self.call("predict")(c_void_p(self.at), pointer(x), pointer(logits)), logits

    def export(self, room: int = 1 << 20) -> bytes:
        blob = (c_uint8 * room)()
        n = self.call("export_state")(c_void_p(self.at), blob, c_size_t(room))
        return bytes(blob[:n])

    def load(self, blob: bytes) -> int:
        return self.call("import_state")(c_void_p(self.at), blob, c_size_t(len(blob)))

    def guards_hold(self) -> bool:
        start = self.at - self.room.ctypes.data
        outside = np.concatenate([self.room[:start], self.room[start + self.bytes :]])
        return bool((outside == 0xA5).all())


def pointer(a):
    return None if a is None else a.ctypes.data_as(POINTER(c_float))


def library(workshop: Workshop, case, name: str) -> ctypes.CDLL:
    folder = workshop.emit(build(case), name)
    done = workshop.make(folder, "lib-parity", "lib", "PARITY=1", "OPT=-O0")
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "build" / "host-parity" / f"lib{name}.so"))


@pytest.fixture(scope="module")
def loaded(workshop):
    return library(workshop, CASE, "first")


@pytest.fixture
def net(loaded) -> Net:
    return Net(loaded, "first")


@pytest.fixture(scope="module")
def samples():
    x, y = build(CASE).samples(9)
    return np.ascontiguousarray(x.numpy().transpose(0, 2, 3, 1)), y.tolist()


OUTPUTS = 4


def test_nothing_but_init_works_before_init(loaded, samples):
    x, y = samples
    net = Net(loaded, "first", init=False)
    before = net.room.copy()
    status, logits = net.predict(x[0], OUTPUTS)
    assert status == -1 and (logits == -7.0).all()
    assert net.train(x[0], y[0]) == (-1, -1.0)
    assert net.export() == b"" and net.load(bytes(64)) == -1
    assert b"not initialised" in net.call("error")(-1)
    assert (net.room == before).all()


def test_a_null_state_is_refused(net, samples):
    x, _ = samples
    net.at = None
    assert net.predict(x[0], OUTPUTS)[0] == -1 and net.train(x[0])[0] == -1
    assert net.load(b"") == -1 and net.export() == b""


def test_a_null_input_is_refused(net):
    assert net.predict(None, OUTPUTS)[0] == -2
    assert net.train(None)[0] == -2


def test_a_label_out_of_range_is_refused_and_nothing_learned_changes(net, samples):
    x, y = samples
    assert net.train(x[0], y[0])[0] == 0
    before = net.export()
    for label in (-1, OUTPUTS, 2**31 - 1):
        assert net.train(x[1], label) == (-3, -1.0)
    assert net.export() == before


def test_export_without_the_room_for_it_writes_nothing(net):
    whole = net.export()
    assert net.export(len(whole)) == whole
    assert net.export(len(whole) - 1) == b"" and net.export(0) == b""


def test_two_states_of_one_net_learn_independently(loaded, samples):
    x, y = samples
    a, b, alone = (Net(loaded, "first") for _ in range(3))
    for i in range(6):
        assert a.train(x[i], y[i])[0] == 0
        assert b.train(x[8 - i], y[i])[0] == 0
        assert alone.train(x[i], y[i])[0] == 0
    assert a.export() == alone.export() != b.export()
    assert a.guards_hold() and b.guards_hold()


def test_predicting_changes_nothing_that_was_learned(net, samples):
    x, y = samples
    for i in range(4):  # in the middle of an accumulation
        net.train(x[i], y[i])
    before = net.export()
    first = [net.predict(v, OUTPUTS)[1] for v in x]
    again = [net.predict(v, OUTPUTS)[1] for v in x]
    assert net.export() == before
    assert np.array_equal(first, again)


def test_a_sample_may_be_written_straight_into_the_net(net, samples):
    x, _ = samples
    status, want = net.predict(x[2], OUTPUTS)
    place = net.call("input")(c_void_p(net.at))
    ctypes.memmove(place, x[2].ctypes.data, x[2].nbytes)
    logits = np.zeros(OUTPUTS, np.float32)
    assert net.call("predict")(c_void_p(net.at), place, pointer(logits)) == status == 0
    assert np.array_equal(logits, want)


def test_init_sets_everything_back(net, samples):
    x, y = samples
    fresh = net.export()
    for i in range(5):
        net.train(x[i], y[i])
    assert net.export() != fresh
    assert net.call("init")(c_void_p(net.at)) == 0
    assert net.export() == fresh


def test_an_update_follows_every_third_sample_only(net, samples):
    x, y = samples

    def weights() -> list[float]:
        count = c_int32()
        slices, i = [], 0
        while place := net.call("trained")(c_void_p(net.at), c_int32(i), byref(count)):
            slices += place[: count.value]
            i += 1
        assert count.value == 0
        return slices

    seen = [weights()]
    for i in range(6):
        net.train(x[i], y[i])
        seen.append(weights())
    changed = [seen[i] != seen[i + 1] for i in range(6)]
    assert changed == [False, False, True, False, False, True]
    assert len(seen[0]) == build(CASE).plan.cost.trained_params


def test_a_loss_that_is_not_finite_updates_nothing(workshop):
    lib = library(workshop, REGRESSION, "second")
    net = Net(lib, "second")
    x = np.zeros(5, np.float32)
    assert net.train(x, target=np.ones(3, np.float32))[0] == 0
    before = net.export()
    assert net.train(x, target=np.full(3, 1e30, np.float32))[0] == -4
    assert net.train(x, target=np.full(3, np.nan, np.float32))[0] == -2
    assert net.export() == before


def test_two_nets_live_in_one_process(workshop, loaded, samples):
    x, y = samples
    other = library(workshop, REGRESSION, "other")
    a, b = Net(loaded, "first"), Net(other, "other")
    alone = Net(loaded, "first")
    for i in range(3):
        assert a.train(x[i], y[i])[0] == 0
        assert b.train(np.ones(5, np.float32), target=np.ones(3, np.float32))[0] == 0
        alone.train(x[i], y[i])
    assert a.export() == alone.export()
    assert a.load(b.export()) == -5 and b.load(a.export()) == -5


def test_every_status_has_a_text_of_its_own(net):
    texts = [net.call("error")(c_int(-i)) for i in range(14)]
    assert len(set(texts)) == 14 and texts[-1] == b"unknown status"


def test_the_header_is_c_plus_plus_too(workshop, tmp_path: Path):
    import shutil
    import subprocess

    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    folder = workshop.emit(build(CASE))
    source = tmp_path / "firmware.cpp"
    source.write_text(
        '#include "model.h"\nstatic model_t net;\nint main() { return model_init(&net); }\n'
    )
    command = [
        "g++",
        "-Wall",
        "-Wextra",
        "-Wpedantic",
        "-Werror",
        f"-I{folder}",
        f"-I{folder}/kernels",
    ]
    subprocess.run([*command, "-c", str(source), "-o", str(tmp_path / "o")], check=True)
