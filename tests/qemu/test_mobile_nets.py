"""MobileTL plans of published networks, on the host and on the emulated Cortex-M7."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emit.folders import Workshop

import modicum as mo
from modicum.models import MODELS

pytestmark = [pytest.mark.qemu, pytest.mark.slow]

# the emulated machine has 4 MB of RAM; the head of MobileNetV3-Small alone takes 2.3 MB of them
ROWS = {
    "mobilenet_v3_small": (96, mo.MobileTL(blocks=1, last_norm="batch")),
    "mbv2-w0.35": (96, mo.MobileTL(blocks=3)),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_published_net_trains_on_host_and_m7_as_in_pytorch(workshop: Workshop, name: str):
    size, method = ROWS[name]
    torch.manual_seed(0)
    net = MODELS[name].make(10)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, size, size), dtype=np.float32)
    y = np.array([3, 1])
    plan = mo.plan(mo.capture(net, torch.from_numpy(x)), None, method, mo.SGD(lr=1e-3))
    by_torch = mo.adapt(net, plan, (x, y), epochs=1, record=True)
    folder = mo.emit(net, plan, workshop.root / name, data=(x[:1], y[:1]))
    job = {"train": (x, y), "order": by_torch.order, "record": True}
    host, m7 = (workshop.run(folder, on=on, **job) for on in ("host", "m7"))
    assert mo.compare(by_torch, host).same
    assert mo.compare(host, m7).bitwise
    assert m7.figures["arena_high_water"] == plan.cost.arena
    assert m7.figures["ram"] <= plan.cost.ram
