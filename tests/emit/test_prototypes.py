"""Prototypes of a cosine head in C: cleared, summed from a support set, kept, and learned by."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import CASES, Built, build, captured
from emit.folders import Workshop
from torch import nn

import modicum as mo
from modicum.fewshot import FineTune, fine_tune
from modicum.heads import few_shot
from modicum.lower import fisher_of
from modicum.observe import inspection
from modicum.state import image_to_c
from modicum.tasks import pseudo_query

ROW = build(next(c for c in CASES if c.id == "few_shot-slices-Adam-x3"))
WAYS = 4


def support(built: Built = ROW, shots: int = 2) -> tuple[np.ndarray, np.ndarray]:
    x, _ = built.samples(WAYS * shots, seed=5)
    return x.numpy(), np.arange(WAYS * shots) % WAYS


@pytest.fixture(scope="module")
def folder(workshop: Workshop) -> Path:
    return workshop.emit(ROW)


@pytest.fixture
def net(workshop: Workshop, folder: Path) -> mo.Native:
    return workshop.native(folder)


def fill(net: mo.Native, x: np.ndarray, y: np.ndarray) -> None:
    net.clear_prototypes()
    for image, label in zip(image_to_c(x), y, strict=True):
        net.add_prototype(image, label)


# ---- what the calls do -----------------------------------------------------------------------


def test_refreshed_prototypes_predict_as_the_class_means_of_pytorch(net):
    x, y = support()
    fill(net, x, y)
    tuned = mo.apply(ROW.model, ROW.plan).eval()
    tuned.refresh(torch.from_numpy(x), torch.from_numpy(y))
    with torch.no_grad():
        want = tuned(torch.from_numpy(x)).numpy()
    got = np.stack([net.predict(image) for image in image_to_c(x)])
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    means, sums = tuned.head()[0].numpy(), net.trained()[-1].reshape(WAYS, -1)
    assert np.abs(sums - 2 * means).max() <= 1e-5 * np.abs(sums).max()


def test_cleared_prototypes_tell_no_class_from_another(net):
    net.clear_prototypes()
    logits = net.predict(image_to_c(support()[0])[0])
    assert len(set(logits.tolist())) == 1 and np.isfinite(logits).all()


def test_adding_goes_on_until_prototypes_are_cleared(net):
    x, y = support()
    fill(net, x, y)
    twice = net.trained()[-1]
    for image, label in zip(image_to_c(x), y, strict=True):
        net.add_prototype(image, label)
    assert not np.array_equal(net.trained()[-1], twice)
    fill(net, x, y)
    assert np.array_equal(net.trained()[-1], twice)


@pytest.mark.parametrize("label", [-1, WAYS, 2**31 - 1])
def test_a_label_out_of_range_changes_nothing(net, label):
    before = net.export_state()
    with pytest.raises(mo.InvalidInput, match="label is out of range"):
        net.add_prototype(np.zeros(net.inputs), label)
    assert net.export_state() == before


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_input_that_is_not_finite_changes_nothing(net, bad):
    before, x = net.export_state(), np.zeros(net.inputs)
    x[-1] = bad
    with pytest.raises(mo.InvalidInput, match="not finite"):
        net.add_prototype(x, 0)
    assert net.export_state() == before


def test_features_that_are_not_finite_change_nothing(workshop):
    model = few_shot(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7)), 2).eval()
    with torch.no_grad():
        model.backbone[0].weight.fill_(10.0)
    plan = mo.plan(mo.capture(model, torch.zeros(1, 3)), optimizer=mo.SGD(lr=0.1))
    net = workshop.native(mo.emit(model, plan, workshop.root / "overflowing"))
    net.add_prototype(np.ones(3), 1)
    before = net.export_state()
    with pytest.raises(mo.InvalidInput, match="features are not finite"):
        net.add_prototype(np.full(3, 3e38), 1)
    assert net.export_state() == before


def test_nothing_but_init_works_before_init(workshop, folder):
    net = workshop.native(folder)
    net._memory.raw = bytes(len(net._memory))
    with pytest.raises(mo.ModicumError, match="not initialised"):
        net.clear_prototypes()
    with pytest.raises(mo.ModicumError, match="not initialised"):
        net.add_prototype(np.zeros(net.inputs), 0)
    assert net._memory.raw == bytes(len(net._memory))


def test_a_state_blob_carries_the_prototypes(workshop, folder, net):
    x, y = support()
    fill(net, x, y)
    other = workshop.native(folder)
    other.import_state(net.export_state())
    for image in image_to_c(x):
        assert np.array_equal(net.predict(image), other.predict(image))
    assert other.export_state() == net.export_state()


def test_a_refresh_in_the_middle_of_an_accumulation_does_not_disturb_it(workshop, folder, net):
    x, y = support()
    images, other = image_to_c(x), workshop.native(folder)
    fill(net, x, y)
    fill(other, x, y)
    for i in range(3):
        assert net.train(images[i], y[i]) == other.train(images[i], y[i])
        fill(net, x, y)
    fill(other, x, y)
    assert net.export_state() == other.export_state()


def test_a_net_without_a_cosine_head_has_no_prototypes(workshop):
    row = build(next(c for c in CASES if c.id == "mlp-Full-SGD"))
    made = workshop.emit(row)
    net = workshop.native(made)
    for call in (net.clear_prototypes, lambda: net.add_prototype(np.zeros(net.inputs), 0)):
        with pytest.raises(mo.ModicumError, match="the net has no prototypes"):
            call()
    assert "prototypes" not in (made / "model.h").read_text()
    x, y = row.samples(4)
    with pytest.raises(mo.ModicumError, match="no prototypes to refresh"):
        workshop.run(made, support=(x.numpy(), y.numpy()))


# ---- a few-shot task, in C as in PyTorch -----------------------------------------------------

K = 4


@pytest.mark.parametrize("optimizer", [mo.SGD(lr=0.02, momentum=0.5), mo.Adam(lr=0.003)], ids=str)
@pytest.mark.parametrize("prototypes", ["refreshed", "fixed"])
def test_a_task_is_learned_from_refreshed_prototypes_as_fine_tune_does(
    workshop, optimizer, prototypes
):
    model, graph = copy.deepcopy(captured("few shot"))
    with torch.no_grad():
        model.head.scale.fill_(3.0)
    x, y = support()
    config = FineTune(iterations=K, prototypes=prototypes)
    plan = mo.plan(graph, None, mo.Full(), optimizer, accumulate=len(x))
    tuned, learned = fine_tune(model, plan, (x, y), config, seed=7)
    asked = [pseudo_query(x, config, seed=7, step=k) for k in range(K)]
    folder = mo.emit(model, plan, workshop.root / f"task {prototypes} {optimizer}")
    trace = workshop.run(
        folder,
        train=(np.concatenate(asked), np.tile(y, K)),
        support=(x, y),
        refresh=0 if prototypes == "fixed" else None,
        test=(x, y),
        record=True,
    )
    losses = np.reshape(trace.losses, (K, len(x))).mean(1)
    assert losses == pytest.approx(learned.losses, rel=1e-4)
    for name, slot in tuned.trained.items():
        want, start = slot.detach().numpy(), trace.tensors[name][0]
        scale = np.abs(want).max()
        assert np.abs(trace.tensors[name][-1] - want).max() <= 1e-4 * scale, name
        assert np.abs(trace.tensors[name][-1] - start).max() > 1e-3 * scale, name
    with torch.no_grad():
        logits = tuned.eval()(torch.from_numpy(x)).numpy()
    assert np.abs(trace.logits_after - logits).max() <= 1e-4 * np.abs(logits).max()
    assert trace.figures["microseconds_prototype"] >= 0


def test_prototypes_are_refreshed_before_every_so_many_samples(workshop, folder, net):
    x, y = support()
    images = image_to_c(x)
    given = {"train": (x, y), "support": (x, y), "record": True}
    trace = workshop.run(folder, refresh=2, **given)
    want = []
    for i in range(len(x)):
        if i % 2 == 0:
            fill(net, x, y)
        want.append(net.train(images[i], y[i]))
    assert trace.losses == want
    assert workshop.run(folder, refresh=None, **given).losses != want  # every 3: the plan's


@pytest.mark.parametrize("refresh", [0, None])
def test_the_last_predictions_follow_what_was_learned_unless_told_otherwise(
    workshop, folder, net, refresh
):
    x, y = support()
    given = {"train": (x[:3], y[:3]), "support": (x, y), "test": (x, y)}
    trace = workshop.run(folder, refresh=refresh, **given)
    fill(net, x, y)
    for i in range(3):
        net.train(image_to_c(x)[i], y[i])
    if refresh is None:
        fill(net, x, y)
    want = np.stack([net.predict(image) for image in image_to_c(x)])
    assert np.array_equal(trace.logits_after, want)


def test_what_run_refuses(workshop, folder):
    x, y = support()
    with pytest.raises(mo.ModicumError, match="refreshed from what"):
        workshop.run(folder, refresh=3)
    with pytest.raises(mo.ModicumError, match="every -1 samples"):
        workshop.run(folder, support=(x, y), refresh=-1)
    with pytest.raises(mo.InvalidInput, match="labels must be whole numbers from 0 to 3"):
        workshop.run(folder, support=(x, y + 1))
    with pytest.raises(mo.InvalidInput, match="the inputs have shape"):
        workshop.run(folder, support=(x[:, :2], y))


def test_a_support_sample_that_the_net_refuses_is_named(workshop):
    model = few_shot(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7)), 2).eval()
    with torch.no_grad():
        model.backbone[0].weight.fill_(10.0)
    plan = mo.plan(mo.capture(model, torch.zeros(1, 3)))
    folder = mo.emit(model, plan, workshop.root / "refusing")
    x, y = np.ones((3, 3), np.float32), np.array([0, 1, 0])
    x[1] = 3e38
    with pytest.raises(mo.InvalidInput, match="refused support sample 1") as caught:
        workshop.run(folder, support=(x, y), train=(x[:1], y[:1]))
    assert "status -10" in str(caught.value)


# ---- scores of channels ----------------------------------------------------------------------


@pytest.mark.parametrize("axis", ["out", "in"])
def test_the_inspection_of_tinytrain_scores_channels_in_c_as_in_pytorch(workshop, axis):
    method = mo.TinyTrain(axis=axis, inspect_blocks=1)
    x, y = support()
    seen = mo.observe(ROW.model, ROW.graph, method, (x, y))
    plan = inspection(ROW.graph, method.probes(ROW.graph))
    folder = mo.emit(ROW.model, plan, workshop.root / f"inspection {axis}")
    done = workshop.make(folder, "host-fast", "check")
    assert done.returncode == 0, done.stderr
    trace = workshop.run(folder, train=(x, y), support=(x, y), refresh=0, record=True)
    assert len(seen.fisher) >= 2
    for value, want in seen.fisher.items():
        got = -trace.tensors[fisher_of(value)][-1] / len(x)
        assert np.abs(got - want).max() <= 1e-4 * max(want), value
