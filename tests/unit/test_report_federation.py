"""Curves of federations, and the energy model behind one of their axes."""

from __future__ import annotations

import pytest

from modicum.board import get
from modicum.errors import UsageError
from modicum.federated.energy import Energy
from modicum.report.federation import curve, save_curves

RUNS = [
    [(0, 0.0, 0.0, 4.0), (10, 1e6, 0.5, 2.0), (20, 2e6, 1.0, 1.0)],
    [(0, 0.0, 0.0, 4.0), (10, 3e6, 1.5, 1.0), (20, 4e6, 2.0, 1.0)],
]


def test_a_curve_is_the_mean_over_seeds_with_its_interval():
    made = curve("x", RUNS)
    assert (made.rounds, made.bytes, made.joules) == ([0, 10, 20], [0, 2e6, 3e6], [0, 1.0, 1.5])
    assert made.quality == [4.0, 1.5, 1.0]
    half = 12.706 * (0.5**0.5) / 2**0.5  # Student's t with one degree of freedom
    assert made.high[1] - made.quality[1] == pytest.approx(half, rel=1e-3)
    assert made.low[0] == made.high[0] == 4.0


def test_one_run_and_no_energy_are_drawn_too(tmp_path):
    plain = [[(r, b, 0.0, q) for r, b, _, q in RUNS[0]]]
    assert curve("x", plain).joules == []
    save_curves(tmp_path / "a.svg", {"one": plain}, "error", "a title")
    save_curves(tmp_path / "b.svg", {"one": RUNS, "two & more": RUNS}, "error", "a title")
    first, second = ((tmp_path / n).read_text() for n in ("a.svg", "b.svg"))
    assert "J, modelled" not in first and "J, modelled" in second
    for text in ("a title", "two &amp; more", "MB sent and received (codec)"):
        assert text in second
    with pytest.raises(UsageError):
        save_curves(tmp_path / "b.gif", {"one": RUNS}, "error", "a title")


def test_energy_is_the_boards_figures_and_nothing_else():
    model = Energy.of(get("nano33ble"))
    assert model.compute(64e6) == pytest.approx(0.0099)  # a second of 9.9 mW
    assert model.radio(1000) == pytest.approx(1000 * 115.2e-9)
    assert model.joules(64e6, 1000) == pytest.approx(0.0099 + 115.2e-6)
    assert Energy.of(get("nano33ble"), ipc=0.5).compute(64e6) == pytest.approx(0.0198)
    with pytest.raises(UsageError, match="no active power"):
        Energy.of(get("stm32f746"))
