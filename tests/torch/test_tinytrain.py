"""TinyTrain: Fisher scores against autograd, the pass that takes them, and bad input."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import Fn, inverted, seq
from oracle import held_bytes, randomise
from torch import Tensor, nn

import modicum as mo
from modicum.apply import Tuned
from modicum.errors import DoesNotFit, InvalidInput, UsageError
from modicum.graph import Graph, Node, Param
from modicum.heads import FewShot, few_shot, with_ways
from modicum.methods import Observed, SparseUpdate, TinyTrain
from modicum.methods.layers import head_of, layers
from modicum.models import MODELS
from modicum.observe import TOGETHER, inspection, observe


@dataclass(frozen=True)
class Net:
    """A net, its input, and by hand: each layer's module and the one whose output is its value.

    The last is the classifier.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    layers: dict[str, str]


def with_norms() -> nn.Module:
    return seq(
        *(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU6(inplace=True)),
        *(nn.Conv2d(6, 6, 3, 2, 1, groups=6, bias=False), nn.BatchNorm2d(6), nn.Hardswish()),
        *(nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )


def folded() -> nn.Module:
    return seq(
        *(nn.Conv2d(3, 8, 3, 2), nn.ReLU6(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU()),
        *(nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 3, padding=1, groups=2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(72, 6), nn.Hardtanh(), nn.Linear(6, 4)),
    )


def blocks() -> nn.Module:
    """Values that are read twice, by a layer and by a sum.  The stem belongs to no block."""
    stem = seq(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU6())
    body = seq(inverted(4, 4), inverted(4, 6, 2), inverted(6, 6))
    return seq(stem, body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))


def gated() -> nn.Module:
    squeeze = seq(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 3, 1), nn.ReLU(), nn.Conv2d(3, 6, 1),
                  nn.Sigmoid())  # fmt: skip

    def forward(m: Fn, x: Tensor) -> Tensor:
        x = m.act(m.conv(x))
        return m.head((x * m.squeeze(x)).mean((2, 3)))

    parts = {"conv": nn.Conv2d(3, 6, 3), "act": nn.SiLU(), "squeeze": squeeze}
    return Fn(forward, **parts, head=nn.Linear(6, 4))


NETS = {
    "norms": Net(with_norms, (3, 5, 5), {"0": "2", "3": "5", "6": "7", "10": "10"}),
    "folded": Net(folded, (3, 7, 7), {"0": "1", "2": "3", "4": "4", "5": "6", "8": "9",
                                      "10": "10"}),
    "blocks": Net(blocks, (3, 8, 8), {
        "1.0.body.0": "1.0.body.2", "1.0.body.3": "1.0.body.5",
        "1.0.body.6": "1.0.body.7", "1.1.0": "1.1.2", "1.1.3": "1.1.5", "1.1.6": "1.1.7",
        "1.2.body.0": "1.2.body.2", "1.2.body.3": "1.2.body.5", "1.2.body.6": "1.2.body.7",
        "4": "4",
    }),
    "gated": Net(gated, (3, 6, 6), {"conv": "act", "squeeze.1": "squeeze.2",
                                    "squeeze.3": "squeeze.4", "head": "head"}),
    "mlp": Net(lambda: seq(nn.Linear(7, 9), nn.Hardtanh(), nn.Linear(9, 6), nn.BatchNorm1d(6),
                           nn.ReLU(), nn.Linear(6, 4)), (7,), {"0": "1", "2": "4", "5": "5"}),
    "rows": Net(lambda: seq(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3, bias=False), nn.Flatten(),
                            nn.Linear(12, 4)), (4, 6), {"0": "1", "2": "2", "4": "4"}),
}  # fmt: skip
HEADS = ("linear", "cosine")
every_net = pytest.mark.parametrize("name", NETS)
both_heads = pytest.mark.parametrize("head", HEADS)


@cache
def net(name: str, head: str) -> tuple[nn.Module, Graph]:
    """Left as they are by the tests."""
    model = randomise(NETS[name].make(), seed=len(name))
    model = few_shot(model, 4).eval() if head == "cosine" else model
    return model, mo.capture(model, torch.zeros(1, *NETS[name].shape))


def data(name: str, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, *NETS[name].shape)).astype(np.float32), np.arange(n) % 4


def modules(name: str, head: str) -> dict[str, str]:
    """Layers and their values as the model with this head calls them, the classifier left out."""
    prefix = "backbone." if head == "cosine" else ""
    return {prefix + k: prefix + v for k, v in list(NETS[name].layers.items())[:-1]}


# ---- eq. 2 -----------------------------------------------------------------------------------


def reference(
    model: nn.Module,
    watched: dict[str, str],
    support: tuple[np.ndarray, np.ndarray],
    queries: tuple[np.ndarray, np.ndarray],
) -> dict[str, Tensor]:
    """Delta_o of eq. 2 of what these modules put out ("in": take in), one sample at a time."""
    model = copy.deepcopy(model).double().eval()
    seen: dict[str, Tensor] = {}

    def watch(name: str, side: str) -> None:
        def hook(module: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
            seen[name] = args[0] if side == "in" else y

        model.get_submodule(name).register_forward_hook(hook)

    for name, side in watched.items():
        watch(name, side)
    x, y = torch.tensor(support[0]).double(), torch.tensor(support[1])
    prototypes = None
    if isinstance(model, FewShot):
        with torch.no_grad():
            features = torch.cat([model.backbone(x[i : i + 1]) for i in range(len(x))])
        prototypes = torch.stack([features[y == k].mean(0) for k in range(4)])
    x, y = torch.tensor(queries[0]).double(), torch.tensor(queries[1])
    totals: dict[str, Tensor] = {}
    for i in range(len(x)):
        if prototypes is None:
            logits = model(x[i : i + 1])
        else:
            logits = 10 * F.cosine_similarity(model.backbone(x[i : i + 1]), prototypes)[None]
        loss = F.cross_entropy(logits, y[i : i + 1])
        for name, g in zip(seen, torch.autograd.grad(loss, list(seen.values())), strict=True):
            a = seen[name]
            axes = {4: (0, 2, 3), 3: (0, 1), 2: (0,)}[a.dim()]
            totals[name] = totals.get(name, 0) + (a * g).sum(axes).square()
    return {name: total.detach() / (2 * len(x)) for name, total in totals.items()}


def close(got: tuple[float, ...], want: Tensor) -> None:
    got_ = torch.tensor(got, dtype=torch.float64)
    assert got_.shape == want.shape
    assert float((got_ - want).abs().max()) <= 1e-5 * float(want.max())


@both_heads
@every_net
def test_fisher_scores_are_those_of_autograd_one_sample_at_a_time(name, head):
    model, graph = net(name, head)
    support, queries = data(name, 8), data(name, 5, seed=1)
    watched = modules(name, head)
    seen = observe(model, graph, TinyTrain(), support, queries=queries)
    assert list(seen.fisher) == list(watched.values()) and seen.samples == 5
    want = reference(model, dict.fromkeys(watched.values(), "out"), support, queries)
    for value, scores in want.items():
        close(seen.fisher[value], scores)


@both_heads
@every_net
def test_scores_of_input_channels_are_those_of_what_the_layers_take_in(name, head):
    model, graph = net(name, head)
    support = data(name, 6)
    readers = {x.node.name: x.node.inputs[0] for x in layers(graph)}
    inner = [k for k in modules(name, head) if readers[k] != graph.input]
    seen = observe(model, graph, TinyTrain(axis="in"), support)
    want = reference(model, dict.fromkeys(inner, "in"), support, support)
    assert set(seen.fisher) == {readers[k] for k in inner}
    for layer, scores in want.items():
        close(seen.fisher[readers[layer]], scores)


@both_heads
def test_more_samples_than_pass_together_are_all_counted(head):
    model, graph = net("norms", head)
    samples = data("norms", 2 * TOGETHER + 6)
    seen = observe(model, graph, TinyTrain(), samples)
    assert seen.samples == 2 * TOGETHER + 6
    watched = dict.fromkeys(modules("norms", head).values(), "out")
    for value, scores in reference(model, watched, samples, samples).items():
        close(seen.fisher[value], scores)


@both_heads
def test_the_model_is_left_alone_and_its_mode_does_not_matter(head):
    model, graph = net("norms", head)
    before = copy.deepcopy(model.state_dict())
    seen = observe(model, graph, TinyTrain(), data("norms", 6))
    model.train()
    again = observe(model, graph, TinyTrain(), data("norms", 6))
    model.eval()
    assert seen.fisher == again.fisher
    assert all(torch.equal(t, model.state_dict()[k]) for k, t in before.items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["norms", "rows", "folded"])
def test_norms_are_those_of_the_weights_channels(name):
    model, graph = net(name, "linear")
    seen = observe(model, graph, SparseUpdate(biases=1))
    weights = {n: p.detach() for n, p in model.named_parameters() if p.dim() > 1}
    assert set(seen.norms) == set(weights) and not seen.fisher and not seen.samples
    for weight, p in weights.items():
        for axis in (0, 1):
            want = [float(part.norm()) for part in p.unbind(axis)]
            assert seen.norms[weight][axis] == pytest.approx(want, rel=1e-6)


# ---- the pass that takes the scores ----------------------------------------------------------


@both_heads
@every_net
@pytest.mark.parametrize("axis", ["out", "in"])
def test_an_inspection_holds_the_bytes_that_its_plan_saves(name, head, axis):
    model, graph = net(name, head)
    plan = inspection(graph, TinyTrain(axis=axis).probes(graph))
    x = torch.randn(1, *NETS[name].shape)
    assert held_bytes(Tuned(model, plan), x) == plan.cost.saved > 0


def test_an_inspection_keeps_the_activations_that_it_scores_and_no_other():
    _, graph = net("norms", "linear")
    plan = inspection(graph, TinyTrain().probes(graph))
    # 6 channels of 5x5 and of 3x3, 8 of 3x3; and what hardswish needs: its input, 6 of 3x3
    assert plan.cost.saved == 4 * (6 * 25 + 6 * 9 + 8 * 9 + 6 * 9)
    _, graph = net("folded", "cosine")
    plan = inspection(graph, TinyTrain(inspect_blocks=1).probes(graph))
    # the last three: 6 and 8 channels of 3x3, 6 features, which are the embedding
    assert plan.cost.saved == 4 * (6 * 9 + 8 * 9 + 6)


@both_heads
@pytest.mark.parametrize("n", [1, 2, 3])
def test_back_propagation_stops_at_the_window(n, head):
    model, graph = net("blocks", head)
    names = list(modules("blocks", head))
    window = names[-3 * n :]
    plan = inspection(graph, TinyTrain(inspect_blocks=n).probes(graph))
    order = [node.name for node in plan.program.graph.nodes]
    passed = [node for node, wanted in plan.program.wanted.items() if wanted.any]
    assert order.index(passed[0]) > order.index(window[0])
    assert all(step.node in passed for step in plan.program.steps if step.phase == "backward")
    owing = {x.node.name: x.macs for x in layers(graph)}
    later = sum(owing[k] for k in window[1:])
    later += sum(owing[x.node.name] for x in [head_of(graph)] if x)
    later += 6 * (2 * 4 + 3) if head == "cosine" else 0
    assert plan.cost.macs_backward == later
    tuned = Tuned(model, plan)
    frozen = tuned.prefix(torch.randn(2, *NETS["blocks"].shape))
    assert not any(value.requires_grad for value in frozen.values())


def test_of_a_value_before_the_window_autograd_sees_nothing():
    model, graph = net("blocks", "linear")
    tuned = Tuned(model, inspection(graph, TinyTrain(inspect_blocks=1).probes(graph)))
    made: list[bool] = []
    run = tuned._run

    def watched(way: object, node: Node, inputs: list[Tensor]) -> Tensor:
        made.append((y := run(way, node, inputs)).requires_grad)
        return y

    tuned._run = watched
    tuned(torch.randn(1, *NETS["blocks"].shape))
    names = [node.name for node in tuned.nodes]
    first = names.index("probe:1.2.body.2")
    assert made == [False] * first + [True] * (len(names) - first)


# ---- what a plan makes of the scores ---------------------------------------------------------


@both_heads
def test_a_plan_by_samples_is_reproducible_and_trains_the_best_channels(head):
    model, graph = net("norms", head)
    method = TinyTrain(macs_fraction=1.0, channel_ratio=0.5)
    seen = observe(model, graph, method, data("norms", 8))
    plan = mo.plan(graph, method=method, samples=seen)
    assert plan.hash == mo.plan(graph, method=method, samples=seen).hash
    for layer, value in modules("norms", head).items():
        update = {u.param: u for u in plan.selection.updates}[f"{layer}.weight"]
        scores = torch.tensor(seen.fisher[value])
        best = sorted(scores.topk(len(scores) // 2).indices.tolist())
        assert update.slice.out == tuple(best)


def test_tinytrain_trains_the_linear_layers_of_a_model_without_convolutions():
    model, graph = net("mlp", "cosine")
    method = TinyTrain(ram="64KiB", macs_fraction=0.8)
    seen = observe(model, graph, method, data("mlp", 8))
    plan = mo.plan(graph, method=method, samples=seen)
    assert {u.param for u in plan.selection.updates} == {"backbone.0.weight", "backbone.2.weight"}


def test_a_norm_or_activation_may_follow_the_head():
    for tail in (nn.ReLU(), nn.BatchNorm1d(3)):
        model = randomise(seq(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3), tail))
        graph = mo.capture(model, torch.zeros(1, 5))
        for axis in ("out", "in"):
            method = TinyTrain(macs_fraction=1.0, axis=axis)
            samples = np.ones((3, 5), np.float32), np.arange(3)
            if axis == "in":  # the only other layer reads the model's input
                with pytest.raises(UsageError, match="the model's own input") as error:
                    observe(model, graph, method, samples)
                assert "axis=out" in str(error.value)
                continue
            plan = mo.plan(graph, method=method, samples=observe(model, graph, method, samples))
            whole = {u.param for u in plan.selection.updates if u.slice.whole}
            assert {"2.weight", "2.bias"} <= whole and "0.weight" not in whole


def test_a_weight_of_two_layers_is_left_out():
    def forward(m: Fn, x: Tensor) -> Tensor:
        return m.head(m.twice(m.twice(m.first(x)).relu()).relu())

    model = Fn(forward, first=nn.Linear(4, 4), twice=nn.Linear(4, 4), head=nn.Linear(4, 3))
    graph = mo.capture(randomise(model), torch.zeros(1, 4))
    method = TinyTrain(macs_fraction=1.0)
    samples = np.ones((3, 4), np.float32), np.arange(3)
    plan = mo.plan(graph, method=method, samples=observe(model, graph, method, samples))
    names = {u.param for u in plan.selection.updates}
    assert names == {"first.weight", "head.weight", "head.bias"}


# ---- bad input -------------------------------------------------------------------------------


def test_a_support_set_of_one_sample_per_class_and_queries_of_some_classes_will_do():
    model, graph = net("folded", "cosine")
    queries = data("folded", 2)
    seen = observe(model, graph, TinyTrain(), data("folded", 4), queries=queries)
    assert seen.samples == 2 and all(len(scores) for scores in seen.fisher.values())


def _wrong(x: np.ndarray, y: np.ndarray) -> dict[str, tuple[object, object, str]]:
    other = np.where(y == 3, 0, y)
    broken = x.copy()
    broken[2, 0, 0, 0] = np.nan
    return {
        "one class alone": (x, 0 * y, "does not have samples of each of 4 classes"),
        "a class missing": (x, other, "does not have samples of each of 4 classes"),
        "another size": (x[:, :, :5], y, "the inputs have shape"),
        "labels too large": (x, y + 1, "labels must be whole numbers from 0 to 3"),
        "negative labels": (x, y - 1, "labels must be whole numbers from 0 to 3"),
        "labels with a fraction": (x, y + 0.5, "labels must be whole numbers from 0 to 3"),
        "one-hot labels": (x, np.eye(4)[y], "labels must be whole numbers from 0 to 3"),
        "too few labels": (x, y[:-1], "8 inputs but labels of shape"),
        "not finite": (broken, y, "input 2 has values that are not finite"),
        "nothing": (x[:0], y[:0], "there are no samples"),
    }


WRONG = _wrong(*data("folded", 8))


@pytest.mark.parametrize("which", WRONG)
def test_a_support_set_that_cannot_be_used_is_refused(which):
    model, graph = net("folded", "cosine")
    x, y, message = WRONG[which]
    with pytest.raises((InvalidInput, UsageError), match=message):
        observe(model, graph, TinyTrain(), (x, y))
    if "samples of each" not in message:  # queries need not be of every class
        with pytest.raises(InvalidInput, match=message):
            observe(model, graph, TinyTrain(), data("folded", 8), queries=(x, y))


def test_samples_whose_scores_are_not_finite_are_refused():
    model = randomise(seq(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 4)))
    x, y = data("mlp", 4)
    with pytest.raises(InvalidInput, match="the Fisher scores are not finite"):
        observe(model, mo.capture(model, torch.zeros(1, 7)), TinyTrain(), (x * 1e25, y))


def test_a_graph_for_other_ways_has_an_inspection_of_its_own():
    model, graph = net("norms", "cosine")
    samples = data("norms", 8)
    observe(model, graph, TinyTrain(), samples)  # the inspection of this graph is remembered
    wide, x, y = model.of_ways(6), np.repeat(samples[0], 3, 0)[:12], np.arange(12) % 6
    seen = observe(wide, with_ways(graph, 6), TinyTrain(), (x, y))
    fresh = mo.capture(wide, torch.zeros(1, 3, 5, 5))
    assert seen.fisher == observe(wide, fresh, TinyTrain(), (x, y)).fisher


def test_a_graph_that_has_the_name_of_a_probe_is_refused():
    graph = net("norms", "linear")[1]
    value, *_ = TinyTrain().probes(graph)
    score = Param(name=f"{value}.fisher", shape=(6,), trainable=False)
    strange = graph.model_copy(update={"params": {**graph.params, score.name: score}})
    with pytest.raises(UsageError, match="the name of a probe"):
        inspection(strange, TinyTrain().probes(strange))


def test_a_method_that_scores_channels_says_that_it_needs_samples():
    model, graph = net("norms", "linear")
    with pytest.raises(UsageError, match="TinyTrain has to see samples"):
        observe(model, graph, TinyTrain())
    with pytest.raises(UsageError, match="TinyTrain has to see samples before it selects") as error:
        mo.plan(graph, method=TinyTrain())
    assert "observe(model, graph, method, support)" in str(error.value)
    with pytest.raises(UsageError, match="TinyTrain has to see the weights"):
        mo.plan(graph, method=TinyTrain(criterion="l2", channels="random"))


def test_what_was_observed_for_another_method_or_of_another_model_is_refused():
    model, graph = net("norms", "linear")
    samples = data("norms", 4)
    narrow = observe(model, graph, TinyTrain(inspect_blocks=1), samples)
    nothing = observe(model, graph, SparseUpdate(biases=1))
    wide = copy.deepcopy(net("norms", "linear")[0])
    wide[3], wide[4] = nn.Conv2d(6, 12, 3, 2, 1, groups=6), nn.BatchNorm2d(12)
    wide[6] = nn.Conv2d(12, 8, 1)
    other = observe(wide, mo.capture(wide, torch.zeros(1, 3, 5, 5)), TinyTrain(), samples)
    mo.plan(graph, method=TinyTrain(macs_fraction=0.9), samples=narrow)  # three layers are all
    for method, seen in ((TinyTrain(), nothing), (TinyTrain(), other), (TinyTrain(), Observed())):
        with pytest.raises(UsageError, match="no Fisher scores of"):
            mo.plan(graph, method=method, samples=seen)
    by_norms = TinyTrain(criterion="l2", channels="l2", macs_fraction=0.9)
    mo.plan(graph, method=by_norms, samples=nothing)  # has all that it asks for
    for seen in (other, Observed()):
        for method in (by_norms, SparseUpdate(weights={"*": 0.5})):
            with pytest.raises(UsageError, match="no norms of"):
                mo.plan(graph, method=method, samples=seen)


def test_a_model_that_does_not_belong_to_the_graph_is_refused():
    _, graph = net("norms", "linear")
    for model in (net("folded", "linear")[0], net("norms", "cosine")[0]):
        with pytest.raises(InvalidInput, match="does not belong to this graph"):
            observe(model, graph, TinyTrain(), data("norms", 4))


def test_a_model_with_nothing_before_its_output_says_what_it_has():
    model = seq(nn.Flatten(), nn.Linear(12, 4))
    graph = mo.capture(model, torch.zeros(1, 3, 2, 2))
    for few, its in ((model, graph), (few_shot(model, 3), None)):
        its = its or mo.capture(few, torch.zeros(1, 3, 2, 2))
        with pytest.raises(UsageError, match="no convolution or linear layer before its output"):
            observe(few, its, TinyTrain(), (np.zeros((3, 3, 2, 2)), np.arange(3)))


def test_a_standardised_weight_cannot_be_sliced_and_the_plan_says_so():
    from modicum.lite import StandardisedConv2d

    model = randomise(seq(StandardisedConv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4)))
    graph = mo.capture(model, torch.zeros(1, 3, 5, 5))
    method = TinyTrain(macs_fraction=1.0)
    seen = observe(model, graph, method, data("norms", 4))
    with pytest.raises(UsageError, match="can only be trained whole"):
        mo.plan(graph, method=method, samples=seen)


def test_the_command_lines_exit_code_for_budgets_that_are_too_small_is_3():
    model, graph = net("norms", "linear")
    seen = observe(model, graph, TinyTrain(), data("norms", 4))
    with pytest.raises(DoesNotFit) as error:
        mo.plan(graph, method=TinyTrain(ram=1), samples=seen)
    assert error.value.exit_code == 3 and "--set ram=" in str(error.value)


# ---- the paper's figure ----------------------------------------------------------------------


def test_mcunet_under_1_mib_and_15_percent_comes_to_the_papers_0_89_mib():
    entry = MODELS["mcunet-5fps"]
    torch.manual_seed(0)
    model = few_shot(entry.make(2), 5)
    graph = mo.capture(model, torch.zeros(entry.input))
    samples = np.random.default_rng(0).normal(size=(5, *entry.input[1:])), np.arange(5)
    seen = observe(model, graph, TinyTrain(), samples)
    plan = mo.plan(graph, method=TinyTrain(), optimizer=mo.Adam(), samples=seen)
    cost = mo.backward_cost(graph, plan.selection, plan.optimizer)
    assert cost.memory / 2**20 == pytest.approx(0.89, rel=0.01)
    full = mo.backward_cost(graph, mo.Full().select(graph), plan.optimizer)
    assert cost.macs <= 0.15 * full.macs
    stem = layers(graph)[0]  # Table 2 counts 44.9 M for everything, an input gradient here too
    assert full.macs + stem.macs == pytest.approx(44.9e6, rel=0.002)
    assert len(plan.selection.updates) == 6
    # the paper's Table 11: inspecting 6 blocks keeps 479.0 KB
    kept = [inspection(graph, TinyTrain(inspect_blocks=n).probes(graph)) for n in range(1, 7)]
    table = [80.3, 135.9, 191.6, 281.0, 392.3, 479.0]
    assert [p.cost.saved / 1024 for p in kept] == pytest.approx(table, rel=0.04)
