"""TinyTrain plans of published networks learn a task of real images, on host and emulated M7."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED
from emit.folders import Workshop

import modicum as mo
from modicum.fewshot import FineTune, fine_tune, observe_task
from modicum.heads import FewShot, few_shot
from modicum.models import MODELS, load_weights
from modicum.plan import Plan
from modicum.tasks import Preprocess, arrays, load, pseudo_query

NETS = ("mcunet-5fps", "mbv2-w0.35")
IMAGES = "data/traffic_signs.zip"
SIGNS = (1, 5, 9, 13, 20)
SIZE, SEED, WITHIN = 128, 3, 1e-4
TUNE = FineTune(iterations=2, prototypes="refreshed")
BOARD = "stm32n657"  # the smallest of the catalogue that holds both nets with these plans

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.slow,
    pytest.mark.needs_shared(IMAGES, *(f"weights/{net}.npz" for net in NETS)),
]


def backbone(name: str) -> FewShot:
    net = MODELS[name].make(MODELS[name].classes)
    load_weights(net, SHARED / "weights" / f"{name}.npz")
    return few_shot(net.eval(), len(SIGNS))


def support(name: str) -> tuple[np.ndarray, np.ndarray]:
    """One image of each sign."""
    images = load(SHARED / IMAGES)
    first = images.subset(np.array([np.flatnonzero(images.labels == k)[0] for k in SIGNS]))
    mean, std = MODELS[name].normalise
    x, _ = arrays(first, Preprocess(size=SIZE, mean=mean, std=std))
    return np.asarray(x), np.arange(len(SIGNS))


@pytest.mark.parametrize("name", NETS)
def test_a_published_net_learns_a_task_on_host_and_m7_as_in_pytorch(workshop: Workshop, name: str):
    """With SGD and with Adam: two plans of a candidate set, so that the weights compile once."""
    net, (x, y) = backbone(name), support(name)
    graph = mo.capture(net, torch.from_numpy(x[:1]))
    method = mo.TinyTrain()
    seen = observe_task(net, graph, method, (x, y), TUNE, seed=SEED)
    plans = [
        mo.plan(graph, BOARD, method, rule, samples=seen, accumulate=len(x))
        for rule in (mo.SGD(lr=0.01), mo.Adam(lr=0.002))
    ]
    folder = mo.emit(net, plans=plans, out=workshop.root / f"{name}-set", data=(x[:1], y[:1]))
    for member, plan in enumerate(plans):
        learns_as_pytorch(workshop, folder, member, net, plan, (x, y))


def learns_as_pytorch(
    workshop: Workshop,
    folder: Path,
    member: int,
    net: FewShot,
    plan: Plan,
    task: tuple[np.ndarray, np.ndarray],
) -> None:
    x, y = task
    tuned, learned = fine_tune(net, plan, task, TUNE, seed=SEED)
    asked = [pseudo_query(x, TUNE, seed=SEED, step=k) for k in range(TUNE.iterations)]
    train = np.concatenate(asked), np.tile(y, TUNE.iterations)
    job = {"train": train, "support": task, "test": (x[:1], y[:1]), "record": True}
    host, m7 = (workshop.run(folder, on=on, select=member, **job) for on in ("host", "m7"))

    assert mo.compare(host, m7).bitwise
    assert host.logits_after.tobytes() == m7.logits_after.tobytes()
    losses = np.reshape(host.losses, (TUNE.iterations, len(x))).mean(1)
    assert losses == pytest.approx(learned.losses, rel=WITHIN)
    for name, slot in tuned.trained.items():
        want, steps = slot.detach().numpy(), host.tensors[name]
        scale = np.abs(want).max()
        assert np.abs(steps[-1] - want).max() <= WITHIN * scale, name
        assert not np.array_equal(steps[-1], steps[0]), name
    with torch.no_grad():
        want = tuned.eval()(torch.from_numpy(x[:1])).numpy()
    assert np.abs(host.logits_after - want).max() <= WITHIN * np.abs(want).max()

    assert m7.figures["arena_high_water"] == plan.cost.arena
    assert m7.figures["ram"] <= plan.cost.ram
