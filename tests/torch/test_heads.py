"""Output layers of few-shot tasks, and the two operators that came with them."""

from __future__ import annotations

import copy
from functools import cache

import graphs
import pytest
import torch
import torch.nn.functional as F
from graphs import Builder, explicit, selections
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import (
    GraphModel,
    autograd_gradients,
    difference,
    held_bytes,
    in_double,
    kept_bytes,
    randomise,
    run_values,
    samples,
    total_loss,
    tuned_gradients,
)
from torch import Tensor, nn

import modicum as mo
from modicum.apply import Tuned
from modicum.errors import UsageError
from modicum.graph import Graph, Node, Param, Value
from modicum.heads import (
    CosineHead,
    FewShot,
    class_means,
    cosine,
    cosine_logits,
    few_shot,
    linear_from_prototypes,
    with_ways,
)
from modicum.lower import fisher_of, lower
from modicum.methods import Inspect
from modicum.ops import OPS
from modicum.ops.base import Wanted
from modicum.selection import Selection


def small_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU6(),
        nn.Conv2d(6, 5, 1), nn.ReLU(), nn.Flatten(), nn.Linear(45, 7),
    )  # fmt: skip


IMAGE = torch.zeros(1, 3, 5, 5)


# ---- the operator and its gradient -----------------------------------------------------------


def similar(x: Tensor, c: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """From the definition, with PyTorch's own cosine."""
    return scale * (F.cosine_similarity(x[:, None], c[None], dim=-1) + bias)


def head_inputs(n: int, ways: int, d: int, seed: int = 0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    x, c = torch.randn(n, d, generator=g), torch.randn(ways, d, generator=g)
    return tuple(t.double() for t in (x, c, torch.tensor([7.5]), torch.tensor([-0.3])))


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6))
def test_cosine_logits_are_pytorchs_cosine_similarity(n, ways, d):
    inputs = head_inputs(n, ways, d)
    for function in (cosine, cosine_logits):
        assert torch.allclose(function(*inputs), similar(*inputs), atol=1e-12)


@pytest.mark.parametrize("function", [cosine, cosine_logits])
def test_gradcheck_finds_the_gradients_of_the_operator_by_differences(function):
    inputs = tuple(t.requires_grad_() for t in head_inputs(3, 4, 5))
    assert torch.autograd.gradcheck(function, inputs)


def test_the_registered_operator_keeps_the_promises_of_one():
    inputs = [t.float() for t in head_inputs(3, 4, 5)]
    torch.library.opcheck(cosine_logits, [t.requires_grad_() for t in inputs])


def test_an_embedding_or_prototype_of_length_zero_gives_no_nan():
    x, c, scale, bias = (t.float() for t in head_inputs(3, 4, 5))
    x[0], c[1] = 0, 0
    for function in (cosine, cosine_logits):
        inputs = [t.clone().requires_grad_() for t in (x, c, scale, bias)]
        y = function(*inputs)
        assert torch.equal(y[0].detach(), (scale * bias).expand(4))  # no direction, no similarity
        y.square().sum().backward()
        assert all(bool(t.grad.isfinite().all()) for t in inputs)
    node = Node(name="y", op="cosine", inputs=("x",), params={})
    params = {"prototypes": c, "scale": scale, "bias": bias}
    y = OPS["cosine"].forward(node, [x], params)
    dy = torch.randn(3, 4)
    (dx,), _ = OPS["cosine"].backward(node, dy, [x], params, Wanted((True,)), [x.shape])
    x.requires_grad_()
    (want,) = torch.autograd.grad(similar(x, c, scale, bias), x, dy)
    assert y.isfinite().all() and dx.isfinite().all()
    assert torch.allclose(dx[1:], want[1:], rtol=1e-4, atol=1e-5)


# ---- capture ---------------------------------------------------------------------------------


def test_capture_of_a_few_shot_model_gives_one_cosine_operator():
    net = few_shot(small_net(), 4)
    graph = mo.capture(net, IMAGE)
    last = graph.nodes[-1]
    assert (last.op, graph.output, graph.shape(graph.output)) == ("cosine", last.name, (1, 4))
    assert last.params == {r: f"head.{r}" for r in ("prototypes", "scale", "bias")}
    assert not any(name.startswith("head.") for name in graph.trainable())
    assert [n.op for n in graph.nodes].count("linear") == 0  # the classifier is gone


def test_a_plan_of_a_few_shot_model_holds_the_prototypes_in_ram_and_does_not_train_them():
    plan = mo.plan(mo.capture(few_shot(small_net(), 4), IMAGE), method=mo.Full())
    assert [t.param for t in plan.program.statistics] == ["head.prototypes"]
    assert not any(t.param.startswith("head.") for t in plan.program.trained)
    assert plan.program.buffers["w:head.prototypes"].bytes == 4 * 4 * 45
    assert plan.program.refresh is not None


class Learned(nn.Module):
    """A cosine head as a user may write it, all of it parameters."""

    def __init__(self, features: int, ways: int) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(ways, features))
        self.scale = nn.Parameter(torch.tensor([4.0]))
        self.bias = nn.Parameter(torch.tensor([0.5]))

    def forward(self, x: Tensor) -> Tensor:
        return cosine_logits(x, self.prototypes, self.scale, self.bias)


def test_prototypes_that_are_parameters_are_refreshed_all_the_same_and_not_trained():
    net = FewShot(nn.Sequential(nn.Linear(6, 5), nn.ReLU()), Learned(5, 3))
    graph = mo.capture(net, torch.zeros(1, 6))
    assert graph.trainable() == ["backbone.0.weight", "backbone.0.bias"]
    plan = mo.plan(graph, method=mo.Full())
    assert plan.cost.trained_params == 35
    with pytest.raises(UsageError, match="no trainable parameter is called"):
        lower(graph, Selection(updates=({"param": "head.prototypes"},)), mo.SGD())
    x, y = torch.randn(6, 6), torch.arange(6) % 3
    tuned = mo.apply(net, plan)
    assert torch.allclose(tuned(x), net(x), atol=1e-5)
    tuned.refresh(x, y)
    assert torch.allclose(tuned.head()[0], class_means(net.backbone(x), y, 3), atol=1e-6)
    tuned.write_to(net)
    assert torch.equal(net.head.prototypes, tuned.head()[0])


@pytest.mark.parametrize("ways", [2, 40])
def test_with_ways_is_the_graph_of_a_model_with_so_many(ways):
    net = small_net()
    assert CAPTURED.hash  # which a copy with other ways must not take along
    made, want = with_ways(CAPTURED, ways), mo.capture(few_shot(net, ways), IMAGE)
    assert made == want and made.hash == want.hash != CAPTURED.hash


CAPTURED = mo.capture(few_shot(small_net(), 5), IMAGE)


def test_with_ways_refuses_what_is_no_number_of_classes_and_other_heads():
    for ways in (1, 0, -3):
        with pytest.raises(UsageError, match="2 or more"):
            with_ways(CAPTURED, ways)
    with pytest.raises(UsageError, match="does not end with a cosine head"):
        with_ways(mo.capture(small_net(), IMAGE), 5)


# ---- making few-shot models ------------------------------------------------------------------


def test_few_shot_replaces_the_last_linear_layer_of_a_copy():
    net = small_net()
    before = copy.deepcopy(net.state_dict())
    few = few_shot(net, 3, scale=2.0, bias=-0.5)
    assert isinstance(net[-1], nn.Linear) and isinstance(few.backbone[-1], nn.Identity)
    assert few.head.prototypes.shape == (3, 45)
    x, y = torch.randn(6, 3, 5, 5), torch.arange(6) % 3
    few.eval()
    net.eval()
    features = few.backbone(x)
    assert torch.equal(features, net[:-1](x))
    few.head.refresh(features, y)
    means = torch.stack([features[y == k].mean(0) for k in range(3)])
    assert torch.allclose(few.head.prototypes, means, atol=1e-6)
    want = 2.0 * (F.cosine_similarity(features[:, None], means[None], dim=-1) - 0.5)
    assert torch.allclose(few(x), want, atol=1e-5)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())


@pytest.mark.parametrize("net", [nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), nn.Linear(4, 3)])
def test_few_shot_of_a_model_without_a_linear_layer_to_replace_says_what_to_do(net):
    with pytest.raises(UsageError, match="no linear layer") as error:
        few_shot(net, 5)
    assert "FewShot(backbone, CosineHead(features, ways))" in str(error.value)


@pytest.mark.parametrize("ways", [1, 0, -2])
def test_few_shot_needs_two_classes(ways):
    with pytest.raises(UsageError, match="nothing to tell apart"):
        few_shot(small_net(), ways)


@pytest.mark.parametrize(
    ("labels", "counts"),
    [([0, 0, 2], "[2, 0, 1]"), ([0, 1, 3], "3"), ([0, 1, -1], "-1"), ([], "[0, 0, 0]")],
    ids=["a class without a sample", "one class too many", "a negative label", "no sample"],
)
def test_class_means_needs_samples_of_every_class_and_of_no_other(labels, counts):
    labels = torch.tensor(labels, dtype=torch.long)
    with pytest.raises(UsageError) as error:
        class_means(torch.ones(len(labels), 2), labels, 3)
    assert counts in str(error.value)


@given(st.integers(2, 6), st.integers(1, 5), st.data())
def test_a_linear_layer_from_prototypes_ranks_classes_by_the_distance(ways, d, data):
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    prototypes, x = torch.randn(ways, d, generator=g), torch.randn(8, d, generator=g)
    layer = linear_from_prototypes(prototypes)
    distance = (x[:, None] - prototypes[None]).square().sum(-1)
    logits = layer(x)
    gap = logits + distance  # the same for all classes: |x|^2
    assert torch.allclose(gap, gap[:, :1].expand_as(gap), atol=1e-4)
    assert torch.allclose(logits.log_softmax(1), (-distance).log_softmax(1), atol=1e-4)


# ---- parts of a model that apply made --------------------------------------------------------


@cache
def residual(kind: str) -> tuple[nn.Module, Graph]:
    """What the frozen part hands over is read twice."""
    head = nn.Linear(4, 3) if kind == "linear" else CosineHead(4, 3)
    block = nn.Sequential(nn.Conv2d(4, 6, 1), nn.ReLU6(), nn.Conv2d(6, 4, 3, padding=1))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.head = nn.Conv2d(3, 4, 3), block, head

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            return self.head((x + self.block(x)).mean((2, 3)))

    model = randomise(Net())
    return model, mo.capture(model, IMAGE)


METHODS = {
    "all": mo.Full(),
    "the last": mo.Last(n=1),
    "biases": mo.Bias(head=0),
    "a slice": mo.Explicit(params={"block.2.weight": {"out": (0, 2)}}),
    "within": mo.Explicit(params={"block.0.weight": {"inp": (1,)}}),
}


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("method", METHODS)
def test_features_after_the_prefix_are_the_features_and_those_of_the_model(kind, method):
    model, graph = residual(kind)
    tuned = Tuned(model, mo.plan(graph, method=METHODS[method]))
    x = torch.randn(4, 3, 5, 5)
    seen = []
    with torch.no_grad():
        hook = model.head.register_forward_hook(lambda m, args, y: seen.append(args[0]))
        want = model(x)
        hook.remove()
    assert torch.allclose(tuned(x), want, atol=1e-5)
    assert torch.allclose(tuned.features(x), seen[0], atol=1e-5)
    assert torch.allclose(tuned.features_after(tuned.prefix(x)), seen[0], atol=1e-5)
    halves = [tuned.prefix(part) for part in x.split(2)]
    joined = {name: torch.cat([half[name] for half in halves]) for name in halves[0]}
    assert torch.allclose(tuned.features_after(joined), seen[0], atol=1e-5)
    assert (tuned.head() is None) == (kind == "linear")


def test_gradients_of_features_after_the_prefix_are_those_of_the_features():
    model, graph = residual("cosine")
    tuned = mo.apply(model, mo.plan(graph, method=METHODS["a slice"]))
    x = torch.randn(4, 3, 5, 5)
    (p,) = tuned.trained.values()
    (want,) = torch.autograd.grad(tuned.features(x).square().sum(), p)
    (got,) = torch.autograd.grad(tuned.features_after(tuned.prefix(x)).square().sum(), p)
    assert torch.allclose(got, want, rtol=1e-5)


def test_the_features_of_a_single_layer_are_its_input():
    model = nn.Linear(4, 3)
    tuned = mo.apply(model, mo.plan(mo.capture(model, torch.zeros(1, 4))))
    x = torch.randn(2, 4)
    assert torch.equal(tuned.features(x), x)
    assert torch.equal(tuned.features_after(tuned.prefix(x)), x)


def test_refreshing_a_model_without_a_cosine_head_says_so():
    model = nn.Linear(4, 3)
    tuned = mo.apply(model, mo.plan(mo.capture(model, torch.zeros(1, 4))))
    with pytest.raises(UsageError, match="no cosine head"):
        tuned.refresh(torch.randn(3, 4), torch.arange(3))


# ---- both operators in generated nets --------------------------------------------------------


@st.composite
def ending_in_a_cosine(draw: st.DrawFn) -> Graph:
    """A generated net whose linear output is the embedding."""
    graph = draw(graphs.graphs(6))
    ways, (n, d) = draw(st.integers(2, 5)), graph.shape(graph.output)
    roles = {"prototypes": (ways, d), "scale": (1,), "bias": (1,)}
    made = {r: Param(name=f"cosine.{r}", shape=s, trainable=False) for r, s in roles.items()}
    names = {r: p.name for r, p in made.items()}
    head = Node(name="cosine", op="cosine", inputs=(graph.output,), params=names)
    return Graph(
        input=graph.input,
        output="cosine",
        values={**graph.values, "cosine": Value(name="cosine", shape=(n, ways))},
        params={**graph.params, **{p.name: p for p in made.values()}},
        nodes=(*graph.nodes, head),
    )


@settings(max_examples=25, suppress_health_check=[HealthCheck.large_base_example])
@given(st.data())
def test_a_generated_net_with_a_cosine_head_has_autograds_gradients_and_kept_bytes(data):
    graph = data.draw(ending_in_a_cosine())
    selection = data.draw(selections(graph))
    model, plan = GraphModel(graph), mo.plan(graph, method=explicit(selection))
    x, y = samples(graph, "cross_entropy", 2)
    tuned = Tuned(model, plan)
    got = tuned_gradients(in_double(tuned, model), x.double(), y)
    largest, where = difference(got, autograd_gradients(model, plan, x, y), floor=1e-3)
    assert largest < 1e-9, where
    assert held_bytes(tuned, x[:1].clone()) == kept_bytes(plan)


@settings(suppress_health_check=[HealthCheck.large_base_example])
@given(st.data())
def test_probes_in_a_generated_net_score_channels_as_autograd_does_sample_by_sample(data):
    graph = data.draw(ending_in_a_cosine())
    names = [n.name for n in graph.nodes if n.name != graph.output]
    probed = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=4, unique=True))
    model, plan = GraphModel(graph), mo.plan(graph, method=Inspect(values=tuple(probed)))
    x, y = samples(graph, "cross_entropy", 3)
    tuned = Tuned(model, plan)
    got = tuned_gradients(in_double(tuned, model), x.double(), y)
    want = scores(graph, model, x, y, probed)
    largest, where = difference(got, {fisher_of(v): s for v, s in want.items()}, floor=1e-9)
    assert largest < 1e-9, where
    assert held_bytes(tuned, x[:1].clone()) == kept_bytes(plan)


def scores(
    graph: Graph, model: nn.Module, x: Tensor, y: Tensor, probed: list[str]
) -> dict[str, Tensor]:
    """sum_n (sum_d a_nd g_nd)^2 / 2, one sample at a time, in double precision."""
    net = copy.deepcopy(model).double()
    total: dict[str, Tensor] = {}
    for i in range(len(x)):
        sample = x[i : i + 1].double().requires_grad_()
        values = run_values(graph, net, sample, Selection(updates=()))
        loss = total_loss("cross_entropy", values[graph.output], y[i : i + 1])
        grads = torch.autograd.grad(loss, [values[v] for v in probed])
        for name, g in zip(probed, grads, strict=True):
            product = (values[name] * g)[0]  # channels first in images, last in rows
            if product.dim() == 3:
                inner = product.sum((1, 2))
            else:
                inner = product.reshape(-1, product.shape[-1]).sum(0)
            total[name] = total.get(name, 0) + inner.detach().square() / 2
    return total


def test_a_value_may_be_probed_before_and_after_its_norm():
    model = randomise(small_net())
    graph = mo.capture(model, IMAGE)
    x, y = samples(graph, "cross_entropy", 3)
    values = ("0", "1", "2")
    tuned = in_double(Tuned(model, mo.plan(graph, method=Inspect(values=values))), model)
    got = tuned_gradients(tuned, x.double(), y)
    want = {fisher_of(v): s for v, s in scores(graph, model, x, y, list(values)).items()}
    largest, where = difference(got, want)
    assert largest < 1e-9, where


def test_a_probe_is_of_a_node_before_the_output_and_a_node_has_one():
    b = Builder(4)
    graph = b.graph(b.linear(b.relu(b.linear("input", 5, name="a"), name="act"), 3, name="head"))
    for values in (("head",), ("input",), ("nothing",), ("act", "act")):
        with pytest.raises(UsageError, match="cannot be probed"):
            mo.plan(graph, method=Inspect(values=values))


def test_adapt_under_an_inspection_takes_the_scores_from_zero():
    model = randomise(small_net())
    graph = mo.capture(model, IMAGE)
    plan = mo.plan(graph, None, Inspect(values=("4",)), mo.SGD(lr=1.0))
    x, y = samples(graph, "cross_entropy", 3)
    trace = mo.adapt(model, plan, (x.numpy(), y.numpy()), epochs=1)
    want = scores(graph, model, x, y, ["4"])["4"]
    assert torch.allclose(torch.tensor(trace.state["4.fisher"]).double(), -want, rtol=1e-4)
