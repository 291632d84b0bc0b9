"""Generated programs, run call by call with the real kernels, against autograd."""

from __future__ import annotations

import graphs
import numpy as np
import pytest
from c.kernels import PARITY, Kernels
from c.kernels import build as build_kernels
from emit.interpreter import Machine
from graphs import Builder
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import GraphModel, cut, gradient, samples, total_loss

from modicum.lower import lower
from modicum.memory import place, verify
from modicum.optim import SGD
from modicum.selection import Update
from modicum.state import materialise


@pytest.fixture(scope="session")
def kernels(tmp_path_factory) -> Kernels:
    return Kernels(build_kernels(tmp_path_factory.mktemp("kernels"), [*PARITY, "-O1"]))


def sums() -> graphs.Graph:
    """x + z, then + x, then doubled, then + x: gradients that share a buffer in every way."""
    b = Builder(4)
    x, z = b.linear("input", 5, name="x"), b.linear("input", 5, name="z")
    s = b.add("add", x, z)
    s = b.add("add", s, x)
    s = b.add("add", b.add("add", s, s), x)
    s = b.add("add", x, b.add("add", z, s))
    s = b.add("add", b.linear(s, 5, name="square"), s)
    return b.graph(b.linear(b.add("add", b.relu(s), s), 3, name="head"))


def whole(graph: graphs.Graph, **more: object) -> dict[str, object]:
    selection = tuple(Update(param=p) for p in graph.trainable())
    settings_ = {"optimizer": SGD(), "loss": "cross_entropy", "accumulate": 1}
    return {"graph": graph, "selection": selection, **settings_, **more}


ORDERS = ["dx-first", "dw-first"]


@settings(max_examples=250)
@example(job=whole(sums()), order="dx-first")
@example(job=whole(sums()), order="dw-first")
@example(job=whole(sums(), accumulate=3), order="dx-first")
@given(job=graphs.jobs(10), order=st.sampled_from(ORDERS))
def test_a_program_takes_the_step_that_autograd_says(kernels, job, order):
    job["optimizer"] = SGD(lr=1.0)
    program = lower(**job, order=order)
    placement = place(program)
    verify(program, placement.offsets, placement.arena)
    model = GraphModel(job["graph"])
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    machine = Machine(kernels, program, placement, materialise(program.graph, state))
    n = job["accumulate"]
    x, y = samples(job["graph"], job["loss"], n)
    before = machine.trained()
    losses = [machine.train(x[i].numpy(), y[i].numpy(), lr=1.0, last=i == n - 1) for i in range(n)]
    after = machine.trained()

    net = model.double()
    loss = total_loss(job["loss"], net(x.double()), y)
    loss.backward()
    assert sum(losses) == pytest.approx(loss.item(), rel=1e-5, abs=1e-5)
    params = dict(net.named_parameters())
    for update in job["selection"]:
        want = cut(gradient(params[update.param]), update.slice).numpy() / n
        got = before[update.param].astype(np.float64) - after[update.param]
        scale = max(1e-2, np.abs(want).max(), np.abs(before[update.param]).max() * 1e-2)
        assert np.abs(got - want).max() <= 1e-4 * scale, update.param
