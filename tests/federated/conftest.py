"""Learners of a small net, built once."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from emit.folders import Workshop
from federated.lines import make_net

import modicum as mo
from modicum.federated.learner import NativeLearner
from modicum.federated.torch_learner import TorchLearner

if importlib.util.find_spec("flwr") is None:  # it needs Python 3.11
    collect_ignore = [
        "test_command.py", "test_deployment.py", "test_engines.py", "test_federation.py",
    ]  # fmt: skip


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def learners(tmp_path_factory):
    """(kind, rule, shots or None) -> a learner; emitted folders are built once."""
    base = tmp_path_factory.getbasetemp()
    pool = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    place = tmp_path_factory.mktemp("emitted")
    workshop = Workshop(place, Path(pool) / "compiled-kernels")
    made: dict[str, NativeLearner] = {}

    def learner(kind, rule, shots=None):
        net = make_net()
        graph = mo.capture(net, torch.zeros(1, 2))
        method, optimizer = rule.training(graph) if shots is None else rule.deployment(graph, shots)
        plan = mo.plan(graph, "nano33ble", method, optimizer, loss="mse", accumulate=rule.batch)
        if kind == "torch":
            return TorchLearner(net, plan, rule.local)
        key = plan.hash + repr(rule.local)
        if key not in made:
            folder = mo.emit(net, plan, place / f"{len(made)}")
            with workshop.kernels(folder, "lib-parity"), pytest.MonkeyPatch.context() as patch:
                patch.setenv("OPT", "-O0")  # its bits do not depend on it
                made[key] = NativeLearner(folder, rule.local, parity=True)
        return made[key]

    return learner
