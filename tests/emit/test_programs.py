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
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import GraphModel, cut, gradient, run_values, samples, total_loss

import modicum as mo
from modicum.graph import Param
from modicum.lower import fisher_of, lower
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


@st.composite
def few_shot_jobs(draw: st.DrawFn) -> dict:
    """A job of `graphs.jobs` with a cosine head, probes, or both; of both, it may train nothing."""
    job = draw(graphs.jobs(8))
    graph, updates = job["graph"], job["selection"].updates
    if cosine := draw(st.booleans()):
        graph = job["graph"] = with_cosine_head(graph)
        updates = tuple(u for u in updates if u.param in graph.trainable())
    norms = [n.inputs[0] for n in graph.nodes if n.op == "batch_norm"]
    able = [n.name for n in graph.nodes[:-1] if n.name not in norms]  # a norm may be folded
    least = 0 if updates else 1
    assume(able or updates)
    probes = st.lists(st.sampled_from(able or [""]), min_size=least, max_size=3, unique=True)
    chosen = tuple(draw(probes)) if able and (least or not cosine or draw(st.booleans())) else ()
    if chosen and draw(st.booleans()):
        updates = ()
    job["selection"] = job["selection"].model_copy(update={"updates": updates, "probes": chosen})
    return job


def with_cosine_head(graph: graphs.Graph) -> graphs.Graph:
    head = graph.by_name[graph.output]
    ways, features = graph.params[head.params["weight"]].shape
    shapes = {"prototypes": (ways, features), "scale": (1,), "bias": (1,)}
    new = {
        f"head.{role}": Param(name=f"head.{role}", shape=shape, trainable=False)
        for role, shape in shapes.items()
    }
    params = {k: v for k, v in graph.params.items() if k not in head.params.values()}
    roles = {role: f"head.{role}" for role in shapes}
    cosine = head.model_copy(update={"op": "cosine", "params": roles, "attrs": {}})
    nodes = (*graph.nodes[:-1], cosine)
    return graph.model_copy(update={"nodes": nodes, "params": {**params, **new}})


@settings(max_examples=200)
@given(job=few_shot_jobs(), order=st.sampled_from(ORDERS))
def test_a_program_with_a_cosine_head_and_probes_does_what_autograd_says(kernels, job, order):
    takes_the_step_of_autograd(kernels, job, order)


@settings(max_examples=60)
@given(job=few_shot_jobs().filter(lambda job: job["graph"].nodes[-1].op == "cosine"))
def test_refreshed_prototypes_are_the_sums_of_the_embeddings_of_each_class(kernels, job):
    machine, model = machine_of(kernels, job, "dx-first")
    ways = job["graph"].values[job["graph"].output].size
    x, _ = samples(job["graph"], "cross_entropy", ways + 2)
    before, labels = machine.trained(), [i % ways for i in range(ways + 2)]
    for _ in range(2):
        machine.clear_prototypes()
        for image, label in zip(x, labels, strict=True):
            machine.add_prototype(image.numpy(), label)
    after = machine.trained()
    double = copy.deepcopy(model).double()
    predicting = job["selection"].model_copy(update={"batch_norms": ()})
    with torch.no_grad():
        values = run_values(job["graph"], double, x.double(), predicting)
    for node in job["graph"].nodes:
        if node.op == "group_norm":  # of values that are all alike it makes noise: rounding / eps
            groups = values[node.inputs[0]].reshape(len(x) * int(node.attrs["groups"]), -1)
            assume(bool((groups.std(1) > 1e-3 * groups.abs().amax(1)).all()))
    want = torch.zeros_like(double.get_buffer("head.prototypes"))
    want.index_add_(0, torch.tensor(labels), values[job["graph"].nodes[-1].inputs[0]])
    within = 1e-4 * max(1.0, float(want.abs().max()))
    assert after.pop("head.prototypes") == pytest.approx(want.numpy(), abs=within)
    for name, value in after.items():
        assert np.array_equal(value, before[name]), name


@settings(max_examples=120)
@given(data=st.data())
def test_the_patterns_of_a_plan_take_turns_over_one_arena_as_autograd_says(kernels, data):
    job = data.draw(graphs.jobs(8))
    job["selection"] = data.draw(graphs.by_step(job["selection"], most=3))
    job["optimizer"] = SGD(lr=1.0)
    how = {key: job[key] for key in ("optimizer", "loss", "accumulate")}
    plan = mo.plan(job["graph"], None, graphs.explicit(job["selection"]), **how)
    net = GraphModel(job["graph"])
    state = {k: v.numpy() for k, v in net.state_dict().items()}
    placed = [
        (program, pattern.placement(program))
        for program, pattern in zip(plan.programs, plan.patterns, strict=True)
    ]
    values = materialise(plan.program.graph, state)
    machine = Machine(kernels, *placed[0], values, plan.cost.arena)
    n = plan.accumulate
    for step in range(plan.inner_steps + 1):
        machine.go_on(*placed[plan.pattern_of(step)])
        x, y = samples(job["graph"], job["loss"], n, seed=step)
        before = machine.trained()
        for i in range(n):
            last = i == n - 1
            machine.train(x[i].numpy(), y[i].numpy(), lr=1.0, last=last, update=step)
        after = machine.trained()
        assume(all(np.abs(v).max(initial=0.0) < 50.0 for v in after.values()))
        params = dict(net.named_parameters()) | dict(net.named_buffers())
        with torch.no_grad():  # where the machine was
            for t in machine.program.learned:
                params[t.param][within(params[t.param], t.slice)] = torch.from_numpy(
                    before[t.param].ravel()
                )
        single, double = (
            autograd(copy.deepcopy(net).to(kind), job, x.to(kind), y)[0]
            for kind in (torch.float32, torch.float64)
        )
        for update in plan.selection.updates:
            got = before[update.param].astype(np.float64) - after[update.param]
            if not update.rate(step):
                assert (got == 0.0).all(), (update.param, step)
                continue
            want, rough = (
                update.rate(step)
                * cut(gradient(dict(each.named_parameters())[update.param]), update.slice).double()
                / n
                for each in (double, single)
            )
            size = np.abs(before[update.param]).max()
            scale = max(1e-2, float(want.abs().max()), size * 1e-2)
            rounding = float((rough - want).abs().max()) + 1e-6 * size
            differs = np.abs(got - want.numpy()).max()
            assert differs <= 1e-4 * scale + 30 * rounding, (update.param, step)


def within(param: torch.Tensor, s: Slice) -> torch.Tensor:
    """Where a slice is, as a mask of the whole."""
    mask = torch.zeros(param.numel(), dtype=torch.bool)
    mask[cut(torch.arange(param.numel()).view(param.shape), s).flatten()] = True
    return mask.view(param.shape)


def machine_of(kernels: Kernels, job: dict, order: str) -> tuple[Machine, GraphModel]:
    program = lower(**job, order=order)
    placement = place(program)
    verify(program, placement.offsets, placement.arena)
    model = GraphModel(job["graph"])
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    return Machine(kernels, program, placement, materialise(program.graph, state)), model


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
    machine, model = machine_of(kernels, job, order)
    n = job["accumulate"]
    x, y = samples(job["graph"], job["loss"], n)
    before = machine.trained()
    losses = [machine.train(x[i].numpy(), y[i].numpy(), lr=1.0, last=i == n - 1) for i in range(n)]
    after = machine.trained()

    (single, roughly, rough_scores), (double, loss, scores) = (
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
    for name, want in scores.items():
        rounding = float((rough_scores[name] - want).abs().max())
        within = 1e-5 + 1e-4 * float(want.max()) + 30 * rounding
        # the loss of each sample is divided by n, and the score is quadratic
        assert np.abs(-after[fisher_of(name)] * n * n - want.numpy()).max() <= within * n, name
    for t in machine.program.statistics:
        want, rough = (dict(net.named_buffers())[t.param].double() for net in (double, single))
        rounding = float((rough - want).abs().max())
        assert after[t.param] == pytest.approx(want.numpy(), rel=1e-4, abs=1e-5 + 30 * rounding)


def autograd(net: GraphModel, job: dict, x: torch.Tensor, y: torch.Tensor) -> tuple:
    """The net with the gradients of all samples, their loss, and the scores of probed values."""
    loss, scores = torch.zeros(()), dict.fromkeys(job["selection"].probes, 0.0)
    for i in range(len(x)):  # batch statistics are of one sample
        sample = x[i : i + 1].requires_grad_()
        values = run_values(job["graph"], net, sample, job["selection"])
        one = total_loss(job["loss"], values[job["graph"].output], y[i : i + 1])
        probed = [values[name] for name in scores]
        grads = torch.autograd.grad(one, probed, retain_graph=True) if probed else ()
        for name, value, g in zip(scores, probed, grads, strict=True):
            product = (value * g).double().detach()
            product = product.flatten(2).sum(2) if product.dim() == 4 else product
            product = product.flatten(1, -2).sum(1) if product.dim() == 3 else product
            scores[name] = scores[name] + product[0].square() / 2
        loss = loss + one
    loss.backward()
    return net, loss.item(), scores
