"""The three use cases: networks that learn on a board as in PyTorch, and what their data is."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from emit.folders import Workshop
from PIL import Image

import modicum as mo
from modicum.errors import InvalidInput, UsageError
from modicum.federated.cases import CASES, characters, omniglot, rule_for
from modicum.federated.learner import NativeLearner
from modicum.federated.rules import FEDERATED, TinyReptile
from modicum.federated.torch_learner import TorchLearner


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """With the compiled kernels of the other tests of this run."""
    base = tmp_path_factory.getbasetemp()
    pool = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return Workshop(tmp_path_factory.mktemp("emitted"), pool / "compiled-kernels")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_client_learns_as_in_pytorch_within_the_ram_of_a_cortex_m4(name, workshop):
    case = CASES[name]
    torch.manual_seed(0)
    net = case.model()
    graph = mo.capture(net, torch.zeros(1, *case.input))
    method, optimizer = TinyReptile(rate=case.rate).training(graph)
    plan = mo.plan(graph, "nano33ble", method, optimizer, loss=case.loss)
    assert plan.cost.ram <= plan.board.ram == 256 * 1024
    assert sum(p.numel() for p in net.parameters()) < 25_000

    folder = mo.emit(net, plan, workshop.root / name)
    workshop.native(folder)
    native, there = NativeLearner(folder, parity=True), TorchLearner(net, plan)
    start = there.shared()
    rng = np.random.default_rng(0)
    native.begin(start)
    for k in range(8):
        x = rng.normal(size=case.input).astype(np.float32)
        target = np.sin(x) if case.loss == "mse" else k % 5
        assert native.learn(x, target) == pytest.approx(there.learn(x, target), rel=1e-4, abs=1e-5)
    np.testing.assert_allclose(native.shared(), there.shared(), atol=1e-5)
    assert np.abs(there.shared() - start).max() > 1e-3


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", FEDERATED)
def test_every_method_has_values_for_every_case(name, method):
    case = CASES[name]
    rule = FEDERATED[method](**rule_for(case, method))
    assert rule.rate == case.rate and bool(rule.local) == (method in ("fedrecon", "tinymetafed"))
    graph = mo.capture(case.model(), torch.zeros(1, *case.input))
    explicit, _ = rule.training(graph)
    assert len(explicit.params) == len(graph.trainable())


def test_values_that_are_given_go_before_those_of_the_case():
    fields = rule_for(CASES["words"], "tinymetafed", {"rate": 0.5, "local": ("head.*",)})
    assert fields["rate"] == 0.5 and fields["local"] == ("head.*",)
    assert fields["rate_local"] == CASES["words"].rate_local
    with pytest.raises(UsageError, match="no federated method"):
        rule_for(CASES["words"], "fed")


def test_characters_are_read_from_folders_and_each_once(tmp_path):
    rng = np.random.default_rng(0)
    for where, alphabets in (("one", ("Greek", "Latin")), ("two", ("Latin", "Korean"))):
        for alphabet in alphabets:
            for character in range(6):
                folder = tmp_path / where / alphabet / f"character{character:02}"
                folder.mkdir(parents=True)
                for drawer in range(1, 5):
                    page = (rng.random((20, 20)) < 0.9).astype(np.uint8) * 255
                    Image.fromarray(page).save(folder / f"0001_{drawer:02}.png")
    paths = (tmp_path / "one", tmp_path / "two")
    found = omniglot(paths)
    assert len(found.classes) == 18 and len(found) == 72 and len(set(found.group)) == 4
    assert found.image(0).shape == (28, 28, 1) and 0 < np.mean(found.image(0)) < 0.3

    population = characters(paths, newcomers=["Greek"])
    assert population.clients == 8 and population.alphabets == ("Korean", "Latin", "Greek")
    with pytest.raises(UsageError, match="0 clients"):  # the case keeps 3 back
        CASES["characters"].population(paths, 0)


def test_data_that_is_not_there_or_not_asked_for_is_an_error(tmp_path):
    with pytest.raises(UsageError, match="need no data"):
        CASES["sines"].population(["x"], 0)
    with pytest.raises(UsageError, match="need data"):
        CASES["characters"].population([], 0)
    with pytest.raises(UsageError, match=r"one \.npz"):
        CASES["words"].population([], 0)
    with pytest.raises(InvalidInput, match="not a file"):
        CASES["words"].population([tmp_path / "x.npz"], 0)


@pytest.mark.slow
@pytest.mark.needs_shared("data/omniglot_small1.zip", "data/omniglot_small2.zip")
def test_omniglot_makes_20_clients_and_3_newcomers(shared):
    paths = [shared(f"data/omniglot_small{k}.zip") for k in (1, 2)]
    population = CASES["characters"].population(paths, 0)
    assert (population.clients, population.newcomers) == (20, 3)
    support, query = population.streams(19, 40, 60, np.random.default_rng(0))
    assert len({x.tobytes() for x, _ in (*support, *query)}) == 100
    few, tests = population.newcomer(2, 5, 75, np.random.default_rng(0))
    assert len(few) == 25 and few[0][0].shape == (1, 28, 28) and len(tests) == 75


@pytest.mark.slow
@pytest.mark.needs_shared("data/spoken_digits.npz")
def test_spoken_digits_are_normalised_by_the_speakers_that_take_part(shared):
    population = CASES["words"].population([shared("data/spoken_digits.npz")], 0)
    assert (population.clients, population.newcomers) == (4, 2)
    draw = np.random.default_rng(0)
    x = np.stack([x for c in range(4) for x, _ in population.streams(c, 0, 500, draw)[1]])
    assert x.shape == (2000, 1, 32, 20)
    np.testing.assert_allclose(x.mean((0, 1, 2)), 0, atol=1e-3)
    np.testing.assert_allclose(x.std((0, 1, 2)), 1, atol=1e-3)
