"""The same training on the emulated boards as on the host, bit by bit, in the planned RAM."""

from __future__ import annotations

import numpy as np
import pytest
from cases import CASES, Case, build
from emit.folders import Workshop

import modicum as mo

IDS = (
    *("mobile-Full-SGD-nano33ble", "conv-Bias1-Adam-stm32f746", "groups-slices-Adam-x3"),
    *("gated-MobileTL_batch-Momentum", "gated-shift_only-Adam-x3", "curves-Full-SGD"),
    "few_shot-slices-Adam-x3",
)
ROWS = [next(c for c in CASES if c.id == id_) for id_ in IDS]

pytestmark = pytest.mark.qemu


@pytest.mark.parametrize("board", ["m4f", "m7", "m55"])
@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.id)
def test_a_board_trains_bit_by_bit_as_the_host_in_the_ram_that_the_plan_promised(
    workshop: Workshop, case: Case, board: str
):
    built = build(case)
    folder = workshop.emit(built)
    x, y = built.samples(7)
    data = (x.numpy(), y.numpy())
    job = {"train": data, "order": [3, 0, 6, 1, 5, 2, 4, 0], "test": data, "record": True}
    host, there = (workshop.run(folder, on=on, **job) for on in ("host", board))

    assert there.where == board and len(there.losses) == 8
    assert there.losses == host.losses
    moved = {t.param for t in built.plan.program.learned}
    assert there.tensors.keys() == host.tensors.keys() == moved
    for name, tensor in host.tensors.items():
        assert there.tensors[name].tobytes() == tensor.tobytes(), name
    assert there.logits_before.tobytes() == host.logits_before.tobytes()
    assert there.logits_after.tobytes() == host.logits_after.tobytes()
    assert not np.array_equal(host.logits_before, host.logits_after)
    assert mo.compare(host, there).bitwise

    figures, cost = there.figures, built.plan.cost
    assert figures["arena_high_water"] == cost.arena
    assert figures["ram"] == cost.arena + figures["static"] + figures["stack_high_water"]
    assert figures["ram"] <= cost.ram
    assert 0 < figures["instructions_predict"] < figures["instructions_train"]
    assert figures["text"] > 0 and figures["weights"] > 0
    assert "microseconds_train" in host.figures and "microseconds_train" not in figures


def test_a_run_on_a_board_is_the_same_every_time(workshop: Workshop):
    folder = workshop.emit(build(ROWS[0]))
    a, b = (workshop.run(folder, on="m4f") for _ in range(2))
    assert (a.losses, a.figures) == (b.losses, b.figures)


def test_qemu_means_the_machine_with_the_core_of_the_plans_board(workshop: Workshop):
    folder = workshop.emit(build(ROWS[1]))
    with workshop.kernels(folder, "m7-parity"):
        assert mo.run(folder, on="qemu").where == "m7"
