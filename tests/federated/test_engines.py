"""The app on Flower's engines, and under its wrappers, does what it does in one process."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from modicum.federated.app.client_app import app
from modicum.federated.app.task import Settings, strategy_of
from modicum.federated.grid import LocalGrid
from modicum.federated.simulate import simulate
from modicum.federated.strategy import Federate, run_rounds


def settings(**more: object) -> Settings:
    small = {"rounds": 3, "clients": 8, "newcomers": 2, "judge_every": 3, "tests": 10}
    rule = '{"kind": "tinymetafed", "clients": 3}'
    return Settings.model_validate({**small, "rule": rule, **more})


def in_one_process(chosen: Settings) -> Federate:
    strategy = strategy_of(chosen)
    grid = LocalGrid(app, chosen.clients + chosen.newcomers, chosen.config())
    run_rounds(strategy, grid)
    return strategy


@pytest.mark.slow
def test_the_simulation_engine_agrees_with_one_process_and_leaves_nothing_running() -> None:
    chosen = settings()
    expected = in_one_process(chosen)
    before = descendants()
    found = simulate(chosen, cpus=2)
    assert [r.used for r in found.rounds] == [r.used for r in expected.rounds]
    assert [len(r.used) for r in found.rounds] == [3, 3, 3]
    assert [r.bytes_up for r in found.rounds] == [r.bytes_up for r in expected.rounds]
    np.testing.assert_allclose(found.server.theta, expected.server.theta, atol=1e-6)
    assert found.judgements[-1].after == pytest.approx(expected.judgements[-1].after, abs=1e-6)
    until = time.monotonic() + 20
    while descendants() - before and time.monotonic() < until:
        time.sleep(0.2)
    assert not descendants() - before


def descendants(of: int | None = None) -> set[int]:
    """Processes that this one has started, and those that they have."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:  # it has ended
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found, new = set(), {of or os.getpid()}
    while new:
        new = {pid for pid, parent in parents.items() if parent in new} - found
        found |= new
    return found
