"""Generated programs, run call by call with the real kernels, against autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable

import graphs
import numpy as np
import pytest
import torch
from c.kernels import PARITY, Kernels
from c.kernels import build as build_kernels
from emit.interpreter import Machine
from graphs import Builder
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import GraphModel, cut, gradient, run_graph, samples, total_loss

from modicum.lower import lower
from modicum.memory import place, verify
from modicum.optim import SGD
from modicum.selection import Selection, Slice, Update
from modicum.state import materialise


@pytest.fixture(scope="session")
def kernels(tmp_path_factory) -> Kernels:
    return Kernels(build_kernels(tmp_path_factory.mktemp("kernels"), [*PARITY, "-O1"]))


def sharing(grow: Callable[[Builder, str, str], str]) -> graphs.Graph:
    """A sum in which the gradient of one value is the buffer of another's."""
    b = Builder(4)
    y = grow(b, b.linear("input", 5, name="x"), b.linear("input", 5, name="z"))
    return b.graph(b.linear(y, 3, name="head"))


SHARING = [
    sharing(lambda b, x, z: b.add("add", b.add("add", x, z), x)),
    sharing(lambda b, x, z: b.add("add", x, b.add("add", z, x))),
    sharing(lambda b, x, z: b.add("add", b.add("add", x, x), x)),
    sharing(lambda b, x, z: b.add("add", b.linear(x, 5, name="square"), x)),
    sharing(lambda b, x, z: b.add("add", b.relu(x), z)),
    sharing(lambda b, x, z: b.add("add", b.add("mul", x, x), x)),
    sharing(lambda b, x, z: b.add("add", b.add("mul", z, b.relu(x)), b.add("mul", x, z))),
    sharing(lambda b, x, z: b.add("add", b.relu(x), x)),
    sharing(lambda b, x, z: b.add("add", b.norm(b.relu(x)), b.add("add", x, b.add("add", x, z)))),
]


def whole(graph: graphs.Graph, **more: object) -> dict[str, object]:
    selection = Selection(updates=tuple(Update(param=p) for p in graph.trainable()))
    settings_ = {"optimizer": SGD(), "loss": "cross_entropy", "accumulate": 1}
    return {"graph": graph, "selection": selection, **settings_, **more}


ORDERS = ["dx-first", "dw-first"]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("graph", SHARING, ids=lambda graph: "-".join(n.op for n in graph.nodes))
def test_gradients_that_share_a_buffer_do_not_spoil_each_other(kernels, graph, order, accumulate):
    takes_the_step_of_autograd(kernels, whole(graph, accumulate=accumulate), order)


def one_by_one(size: int, **attrs: object) -> graphs.Graph:
    """A 1x1 convolution whose output is as large as its input, but not pixel by pixel."""
    b = Builder(2, size, size)
    y = b.conv(b.conv("input", 5, kernel=1, name="below"), 6, kernel=1, name="op", **attrs)
    assert b.shape(y)[2:] == (size, size)
    return b.graph(b.linear(b.flatten(y), 3, name="head"))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "graph",
    [
        one_by_one(1, stride=(2, 2), padding=(1, 1, 0, 0)),
        one_by_one(1, stride=(2, 1), padding=(1, 0, 0, 0)),
        one_by_one(1, stride=(3, 3), padding=(0, 0, 2, 2)),
        one_by_one(3, stride=(2, 2), padding=(0, 0, 2, 2)),
        one_by_one(3, stride=(2, 2), padding=(1, 1, 1, 1)),
    ],
    ids=["in padding", "row in padding", "first pixel", "to the end", "to both sides"],
)
def test_a_one_by_one_convolution_over_padding_reads_zeros(kernels, graph, order):
    takes_the_step_of_autograd(kernels, whole(graph), order)


@settings(max_examples=250)
@given(job=graphs.jobs(10), order=st.sampled_from(ORDERS))
def test_a_generated_program_takes_the_step_that_autograd_says(kernels, job, order):
    takes_the_step_of_autograd(kernels, job, order)


@settings(max_examples=250)
@given(job=graphs.sliced(), order=st.sampled_from(ORDERS))
def test_a_slice_takes_the_step_of_the_same_channels_of_the_whole(kernels, job, order):
    takes_the_step_of_autograd(kernels, job, order)
    sliced, selection = steps(kernels, job, order), job["selection"]
    whole = tuple(u.model_copy(update={"slice": Slice()}) for u in selection.updates)
    job["selection"] = selection.model_copy(update={"updates": whole})
    dense = steps(kernels, job, order)
    # to the bit, but that a sliced scale adds up whole samples
    within = 0.0 if job["accumulate"] == 1 else 1e-5
    for u in selection.updates:
        got, want = sliced[u.param], cut(dense[u.param], u.slice)
        assert np.abs(got - want).max() <= within * np.abs(want).max(), u.param


def steps(kernels: Kernels, job: dict, order: str) -> dict[str, np.ndarray]:
    """The trained slices after one update of a model with random weights."""
    program = lower(**job, order=order)
    state = {k: v.numpy() for k, v in GraphModel(job["graph"]).state_dict().items()}
    machine = Machine(kernels, program, place(program), materialise(program.graph, state))
    n = job["accumulate"]
    x, y = samples(job["graph"], job["loss"], n)
    for i in range(n):
        machine.train(x[i].numpy(), y[i].numpy(), lr=1.0, last=i == n - 1)
    return machine.trained()


def takes_the_step_of_autograd(kernels: Kernels, job: dict, order: str) -> None:
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

    (single, roughly), (double, loss) = (
        autograd(copy.deepcopy(model).to(kind), job, x.to(kind), y)
        for kind in (torch.float32, torch.float64)
    )
    # where PyTorch's own float32 is far from its float64, nothing more can be asked
    assert sum(losses) == pytest.approx(loss, rel=1e-5, abs=1e-5 + 30 * abs(roughly - loss))
    for update in job["selection"].updates:
        want, rough = (
            cut(gradient(dict(net.named_parameters())[update.param]), update.slice).double() / n
            for net in (double, single)
        )
        got = before[update.param].astype(np.float64) - after[update.param]
        scale = max(1e-2, float(want.abs().max()), np.abs(before[update.param]).max() * 1e-2)
        rounding = float((rough - want).abs().max())
        assert np.abs(got - want.numpy()).max() <= 1e-4 * scale + 30 * rounding, update.param
    for t in program.statistics:
        want, rough = (dict(net.named_buffers())[t.param].double() for net in (double, single))
        rounding = float((rough - want).abs().max())
        assert after[t.param] == pytest.approx(want.numpy(), rel=1e-4, abs=1e-5 + 30 * rounding)


def autograd(net: GraphModel, job: dict, x: torch.Tensor, y: torch.Tensor) -> tuple:
    """The net with the gradients of all samples, and their loss."""
    loss = torch.zeros(())
    for i in range(len(x)):  # batch statistics are of one sample
        out = run_graph(job["graph"], net, x[i : i + 1], job["selection"])
        loss = loss + total_loss(job["loss"], out, y[i : i + 1])
    loss.backward()
    return net, loss.item()
